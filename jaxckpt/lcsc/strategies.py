"""Search strategies by name, with one interface: the paper's evolution, gradients, and those of evosax."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import jaxckpt.lcsc.evolution as evolution
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.text import nearest
from jaxckpt.lcsc.evosax_link import make_evosax

PyTree = Any

# Those of evosax that need no more than fitness values. Left out: ESMC, PersistentES and NoiseReuseES (their fitness
# has another shape), SV_* and GuidedES (several means; gradients), EvoTF_ES (weights of a network), RandomSearch
# (needs a sampler: "random" is built in).
_DISTRIBUTIONS = """
    ARS ASEBO CMAAnchoredLES CMA_ES CR_FM_NES DES GradientlessDescent HillClimbing LES LM_MA_ES MA_ES Open_ES PGPE
    Rm_ES Sep_CMA_ES SimpleES SimulatedAnnealing SNES xNES iAMaLGaM_Full iAMaLGaM_Univariate
"""
_POPULATIONS = "DifferentialEvolution DiffusionEvolution GESMR_GA LGA MR15_GA PSO SAMR_GA SimpleGA"
DISTRIBUTIONS = {name.lower(): name for name in _DISTRIBUTIONS.split()}
POPULATIONS = {name.lower(): name for name in _POPULATIONS.split()}
BUILT_IN = ("evolution", "random", "gradient")
# What else they are called, beside their names in any case and with or without "-", "_" and spaces.
ALIASES = {
    "lcsc": "evolution",
    "randomsearch": "random",
    "adam": "gradient",
    "de": "differentialevolution",
    "ga": "simplega",
    "geneticalgorithm": "simplega",
    "cma": "cma_es",
    "openaies": "open_es",
    "particleswarm": "pso",
    "particleswarmoptimization": "pso",
    "sa": "simulatedannealing",
}


class Strategy(Protocol):
    """State in, state out; all minimise. ``population`` is float32 [P, size]. Hashable, and its methods traceable.

    ``generation`` is 0 in the first generation and 1 in all others; 1 throughout for those to whom all are alike.
    """

    @property
    def is_first_apart(self) -> bool:
        """Whether the first generation goes differently."""
        ...

    @property
    def uses_gradient(self) -> bool:
        """Whether ``tell`` needs slopes."""
        ...

    def start(self, key: jax.Array, first: jax.Array) -> PyTree:
        """The state before the first generation; ``first`` [P, size] is the initial population around zero."""
        ...

    def ask(self, key: jax.Array, state: PyTree, generation: int) -> tuple[jax.Array, PyTree]:
        """Candidates [P, size], and the state from which ``tell`` goes on."""
        ...

    def tell(
        self,
        key: jax.Array,
        state: PyTree,
        population: jax.Array,
        fitness: jax.Array,
        slopes: jax.Array | None,
        generation: int,
    ) -> PyTree:
        """The state after their fitness [P] (and gradients [P, size], for those that use them)."""
        ...

    def mean(self, state: PyTree) -> jax.Array | None:
        """The point searched around [size], where there is one."""
        ...


def make_strategy(name: str, *, population: int, size: int, options: Mapping[str, Any]) -> Strategy:
    """A strategy by name.

    Args:
        name: one of ``names()``, or what ``canonical`` takes for it.
        population: candidates in a generation.
        size: numbers in a search vector.
        options: hyper-parameters: fields of ``Evolution`` or ``Gradient``, or of evosax' parameters (``std_init``...).

    Raises:
        InvalidArgumentError: no such strategy or option; lists those there are.
    """
    given = canonical(name)
    if given == "evolution":
        return EvolutionStrategy(population, size, _record(evolution.Evolution, options))
    if given == "random":
        if options:
            raise InvalidArgumentError(f'options are {dict(options)}, and strategy "random" has none; leave them out.')
        return RandomStrategy(population, size)
    if given == "gradient":
        return _record(Gradient, options)
    algorithm = {**DISTRIBUTIONS, **POPULATIONS}[given]
    return make_evosax(algorithm, given in DISTRIBUTIONS, population, size, tuple(sorted(options.items())))


def canonical(name: str) -> str:
    """The name in ``names()`` of a strategy: case, "-", "_" and spaces do not count, and ``ALIASES`` are known.

    Raises:
        InvalidArgumentError: there is no such strategy, or it needs evosax, which is not installed.

    Example:
        >>> canonical("CMA-ES"), canonical("DE"), canonical("Random Search")
        ('cma_es', 'differentialevolution', 'random')
    """
    known = {_bare(one): one for one in names()}
    bare = _bare(name) if isinstance(name, str) else ""
    found = known.get(bare) or ALIASES.get(bare)
    if found is None:
        near = nearest(bare, [*known, *ALIASES], cutoff=0.6)  # short names differ by much
        near = known.get(near or "") or ALIASES.get(near or "")
        raise InvalidArgumentError(
            f"strategy is {name!r}; " + (f"the nearest is {near!r}, and " if near else "") + f"there are: "
            f"{', '.join(names())}."
        )
    if found not in BUILT_IN and importlib.util.find_spec("evosax") is None:
        raise InvalidArgumentError(
            f'strategy {name!r} needs evosax: pip install "jaxckpt[search]"; "evolution" needs nothing.'
        )
    return found


def _bare(name: str) -> str:
    return "".join(one for one in name.lower() if one not in "-_ ")


def names() -> list[str]:
    """All strategies; all but "evolution", "random" and "gradient" need evosax.

    Example:
        >>> "cma_es" in names()
        True
    """
    return sorted([*BUILT_IN, *DISTRIBUTIONS, *POPULATIONS])


@dataclass(frozen=True, slots=True)
class EvolutionStrategy:
    """The paper's evolution (``evolution.py``)."""

    count: int
    size: int
    how: evolution.Evolution
    uses_gradient: bool = field(default=False, init=False)
    is_first_apart: bool = field(default=True, init=False)

    def start(self, key: jax.Array, first: jax.Array) -> PyTree:
        """The initial population waits to be asked for."""
        del key
        return {"first": first, "standing": evolution.start(self.how, self.size)}

    def ask(self, key: jax.Array, state: PyTree, generation: int) -> tuple[jax.Array, PyTree]:
        """The initial population, then children."""
        if generation == 0:
            return state["first"], state
        return evolution.ask(self.how, key, state["standing"], self.count), state

    def tell(
        self, key: jax.Array, state: PyTree, population: jax.Array, fitness: jax.Array, slopes: Any, generation: int
    ) -> PyTree:
        """The best stay."""
        del key, slopes, generation
        return {"first": state["first"], "standing": evolution.tell(self.how, state["standing"], population, fitness)}

    def mean(self, state: PyTree) -> None:
        """There is none."""


@dataclass(frozen=True, slots=True)
class RandomStrategy:
    """Gaussian points around the centre that learn nothing: what others are to beat."""

    count: int
    size: int
    uses_gradient: bool = field(default=False, init=False)
    is_first_apart: bool = field(default=True, init=False)

    def start(self, key: jax.Array, first: jax.Array) -> PyTree:
        """The initial population waits to be asked for."""
        del key
        return {"first": first}

    def ask(self, key: jax.Array, state: PyTree, generation: int) -> tuple[jax.Array, PyTree]:
        """The initial population, then noise."""
        return state["first"] if generation == 0 else jax.random.normal(key, (self.count, self.size)), state

    def tell(
        self, key: jax.Array, state: PyTree, population: Any, fitness: Any, slopes: Any, generation: int
    ) -> PyTree:
        """Nothing is learned."""
        del key, population, fitness, slopes, generation
        return state

    def mean(self, state: PyTree) -> None:
        """There is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) on the search vector, inside a ball around the centre.

    Attributes:
        learning_rate: in units of the space's step.
        radius: of the ball, over the root of the size; None: no ball.
        decay: of the slopes' first and second moments.
    """

    learning_rate: float = 0.1
    radius: float | None = 5.0
    decay: tuple[float, float] = (0.9, 0.999)
    uses_gradient: bool = field(default=True, init=False)
    is_first_apart: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay", tuple(self.decay) if isinstance(self.decay, Sequence) else self.decay)
        is_pair = isinstance(self.decay, tuple) and len(self.decay) == 2
        positive = [self.learning_rate, *([] if self.radius is None else [self.radius])]
        if not is_pair or not all(_is_in(one, 0, math.inf) and one > 0 for one in positive):
            raise InvalidArgumentError(f"{self}: learning_rate and radius are finite and above 0, decay is a pair.")
        if not all(_is_in(one, 0, 1) for one in self.decay):
            raise InvalidArgumentError(f"{self}: decay is two numbers from 0 to below 1.")

    def start(self, key: jax.Array, first: jax.Array) -> PyTree:
        """At the centre."""
        del key
        zero = jnp.zeros_like(first[0])
        return {"y": zero, "first": zero, "second": zero, "count": jnp.zeros((), jnp.int32)}

    def ask(self, key: jax.Array, state: PyTree, generation: int) -> tuple[jax.Array, PyTree]:
        """One point."""
        del key, generation
        return state["y"][None], state

    def tell(
        self, key: jax.Array, state: PyTree, population: jax.Array, fitness: Any, slopes: Any, generation: int
    ) -> PyTree:
        """One step down; a slope that is not finite changes nothing."""
        del key, fitness, generation
        slope = jnp.where(jnp.isfinite(slopes[0]).all(), slopes[0], 0.0)
        count = state["count"] + 1
        power = count.astype(jnp.float32)
        first = self.decay[0] * state["first"] + (1 - self.decay[0]) * slope
        second = self.decay[1] * state["second"] + (1 - self.decay[1]) * slope**2
        change = first / (1 - self.decay[0] ** power) / (jnp.sqrt(second / (1 - self.decay[1] ** power)) + 1e-8)
        y = population[0] - self.learning_rate * change
        if self.radius is not None:
            limit = self.radius * np.sqrt(y.size)
            y = y * jnp.minimum(1.0, limit / jnp.maximum(jnp.linalg.norm(y), 1e-12))
        return {"y": y, "first": first, "second": second, "count": count}

    def mean(self, state: PyTree) -> jax.Array:
        """The iterate."""
        return state["y"]


def _is_in(value: Any, least: float, above: float) -> bool:
    """Whether it is a number, ``least`` or more and below ``above``."""
    return isinstance(value, Real) and least <= float(value) < above


def _record(kind: Any, options: Mapping[str, Any]) -> Any:
    known = [one.name for one in fields(kind) if one.init]
    if wrong := [name for name in options if name not in known]:
        raise InvalidArgumentError(f"{kind.__name__} has no {wrong}; it has {known}.")
    return kind(**options)
