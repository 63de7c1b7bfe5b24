"""Algorithms of evosax (0.3.1 or newer; Lange, arXiv 2212.04180) as strategies, of both its families."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt.core.errors import InvalidArgumentError

PyTree = Any


@contextmanager
def _lenient() -> Iterator[None]:
    """evosax relies on implicit promotion, which the caller may have forbidden."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@dataclass(frozen=True, slots=True, eq=False)
class Evosax:
    """An algorithm of evosax. Its state is arrays alone, so it is saved as any tree."""

    algorithm: Any
    params: Any
    has_mean: bool
    uses_gradient: bool = field(default=False, init=False)

    @property
    def is_first_apart(self) -> bool:
        """Those of populations begin with one that is evaluated already."""
        return not self.has_mean

    @_lenient()
    def start(self, key: jax.Array, first: jax.Array) -> PyTree:
        """Around zero; those of populations take the fitness of the first one in the first ``tell``."""
        if self.has_mean:
            return self.algorithm.init(key, jnp.zeros_like(first[0]), self.params)
        return {"first": first, "inner": self.algorithm.init(key, first, jnp.zeros(len(first)), self.params)}

    @_lenient()
    def ask(self, key: jax.Array, state: PyTree, generation: int) -> tuple[jax.Array, PyTree]:
        """Candidates [P, size]."""
        if self.has_mean:
            return self.algorithm.ask(key, state, self.params)
        if generation == 0:
            return state["first"], state
        population, inner = self.algorithm.ask(key, state["inner"], self.params)
        return population, {"first": state["first"], "inner": inner}

    @_lenient()
    def tell(
        self, key: jax.Array, state: PyTree, population: jax.Array, fitness: jax.Array, slopes: Any, generation: int
    ) -> PyTree:
        """The state after their fitness [P]; what is not finite counts as the worst that is."""
        del slopes
        is_finite = jnp.isfinite(fitness)
        worst = jnp.max(jnp.where(is_finite, fitness, -jnp.inf))
        fitness = jnp.where(is_finite, fitness, jnp.where(jnp.isfinite(worst), worst, 0.0))
        if self.has_mean:
            return self.algorithm.tell(key, population, fitness, state, self.params)[0]
        if generation == 0:
            inner = self.algorithm.init(key, population, fitness, self.params)
        else:
            inner = self.algorithm.tell(key, population, fitness, state["inner"], self.params)[0]
        return {"first": state["first"], "inner": inner}

    @_lenient()
    def mean(self, state: PyTree) -> jax.Array | None:
        """The mean of the distribution."""
        return self.algorithm.get_mean(state) if self.has_mean else None


@lru_cache(maxsize=32)  # an instance is a static argument compared by identity: a new one compiles anew
def make_evosax(name: str, has_mean: bool, population: int, size: int, options: tuple[tuple[str, Any], ...]) -> Evosax:
    """The algorithm of this name, with these of its parameters replaced.

    A step of one is what ``Space`` scales, so ``std_init`` is 1 unless given: comparing algorithms at their own
    defaults would compare step sizes.
    """
    from evosax.algorithms import algorithms

    solution = jax.device_put(np.zeros(size, np.float32))
    with _lenient():
        try:
            algorithm = algorithms[name](population_size=population, solution=solution)
            params: Any = _default_params(algorithm)
        except (AssertionError, ArithmeticError, ValueError) as error:
            raise InvalidArgumentError(
                f"evosax' {name} does not take a population of {population} for {size} coefficients: {error} Give "
                "another population; 16 suits all."
            ) from error
    known = sorted(params.__dataclass_fields__)
    if wrong := [key for key, _ in options if key not in known]:
        raise InvalidArgumentError(f"evosax' {name} has no parameters {wrong}; it has {known}.")
    given = dict(options)
    if "std_init" in known:
        given.setdefault("std_init", 1.0)
    return Evosax(algorithm, params.replace(**given), has_mean)


def quick_options() -> dict[str, Any] | None:
    """For programs that run in less time than it takes to optimise them; None but on CPU, which has such options."""
    return _quick_options() if jax.default_backend() == "cpu" else None


@lru_cache(maxsize=1)
def _quick_options() -> dict[str, Any]:
    """No optimisation, and fusions as one loop by the older emitter: half the time, where this jaxlib has it yet."""
    plain = {"xla_backend_optimization_level": 0}
    older = {**plain, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: np.float32(0), compiler_options=older).lower().compile()
    except jax.errors.JaxRuntimeError:  # "No such compile option"
        return plain
    return older


def _default_params(algorithm: Any) -> Any:
    """As one program, where an algorithm allows it: op by op it would be a hundred."""
    try:
        return jax.jit(lambda: algorithm.default_params, compiler_options=quick_options())()
    except jax.errors.ConcretizationTypeError:
        return algorithm.default_params
