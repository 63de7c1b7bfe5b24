"""The objective of a whole population as one program: a contraction per leaf, then one or all candidates at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxckpt.averaging.average import average
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.lcsc.space import Space

PyTree = Any
Objective = Callable[[PyTree, jax.Array], Any]  # (params, key) -> a scalar, smaller is better
MEMORY_BYTES = 1 << 30


class Evaluator(Protocol):
    """What measures candidates."""

    def __call__(self, objective: Objective, coefficients: Any, keys: jax.Array) -> np.ndarray:
        """float64 [P] of coefficients [P, G, K]: the mean over keys, which all candidates share."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """Stacked checkpoints in device memory: leaves [K, ...], sharded like the parameters on the trailing axes.

    The stack is read once per generation (once per chunk of candidates, if a population does not fit), and as the sum
    is point-wise, nothing of it moves between devices.

    Attributes:
        stacked: the checkpoints.
        space: whose groups say which coefficients a leaf takes.
        chunk: candidates in memory at a time.
        mesh: whose axis ``axis`` the candidates are spread over; None: they are where the checkpoints are.
        axis: see mesh.
    """

    stacked: PyTree
    space: Space
    chunk: int
    mesh: Mesh | None = None
    axis: str = "data"

    def __call__(self, objective: Objective, coefficients: Any, keys: jax.Array) -> np.ndarray:
        """One jitted call."""
        return np.asarray(self._scores(objective, coefficients, keys), np.float64)

    def slopes(self, objective: Objective, y: jax.Array, centre: Any, keys: jax.Array, penalty: Any) -> Any:
        """Scores [P] and gradients [P, size] in the search vectors ``y`` [P, size], penalty included."""
        return _slopes(self._static(objective), self.space, penalty, self.stacked, y, jnp.asarray(centre), keys)

    def _scores(self, objective: Objective, coefficients: Any, keys: jax.Array) -> jax.Array:
        return _scores(self._static(objective), self.stacked, jnp.asarray(coefficients, jnp.float32), keys)

    def _static(self, objective: Objective) -> "_Program":
        groups = self.space.group_of(self.stacked)
        return _Program(objective, groups, self.chunk, self.mesh, self.axis)


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """Checkpoints on storage or in host memory, read once per chunk of candidates; objectives of any kind.

    Attributes:
        sources: as of ``average``.
        space: of the coefficients.
        chunk: candidates in memory at a time.
        how: the other arguments of ``average``.
        is_jitted: whether objectives are traced; else they are called with each candidate.
    """

    sources: Sequence[Any]
    space: Space
    chunk: int
    how: dict[str, Any]
    is_jitted: bool = True

    def __call__(self, objective: Objective, coefficients: Any, keys: jax.Array) -> np.ndarray:
        """Chunk by chunk."""
        wanted = np.asarray(coefficients, np.float64)
        found: list[float] = []
        call = jax.jit(objective) if self.is_jitted else objective
        for first in range(0, len(wanted), self.chunk):
            some = wanted[first : first + self.chunk]
            weights = {group: some[:, i] for i, group in enumerate(self.space.groups)}
            for params in average(self.sources, weights, **self.how):
                found += [float(np.mean([float(call(params, key)) for key in keys]))]
        return np.array(found, np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """Stacked checkpoints in memory and an objective in Python, called with one candidate after another."""

    stacked: PyTree
    space: Space

    def __call__(self, objective: Objective, coefficients: Any, keys: jax.Array) -> np.ndarray:
        """Each candidate's tree is one jitted contraction."""
        groups = self.space.group_of(self.stacked)
        found: list[float] = []
        for one in np.asarray(coefficients, np.float32):
            params = jax.tree.map(lambda leaf: leaf[0], _merged(self.stacked, one[None], groups))
            found.append(float(np.mean([float(objective(params, key)) for key in keys])))
        return np.array(found, np.float64)


def merge(stacked: PyTree, coefficients: jax.Array, groups: Sequence[int]) -> PyTree:
    """Leaves [P, ...] of stacked leaves [K, ...] and coefficients [P, G, K]: sums in float32, rounded once.

    Leaves that are not floating are those of the last checkpoint.
    """

    def one(leaf: jax.Array, group: int) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.broadcast_to(leaf[-1], (len(coefficients), *leaf.shape[1:]))
        wide = leaf if leaf.dtype in (jnp.float64, jnp.complex64, jnp.complex128) else leaf.astype(jnp.float32)
        weights = coefficients[:, group].astype(wide.dtype)
        return jnp.tensordot(weights, wide, 1, precision="highest").astype(leaf.dtype)

    leaves, structure = jax.tree.flatten(stacked)
    return structure.unflatten([one(leaf, group) for leaf, group in zip(leaves, groups, strict=True)])


def chunk_of(population: int, model_bytes: int, memory_bytes: int, multiple: int = 1) -> int:
    """Candidates at a time: a divisor of the population, and a multiple of the devices they are spread over.

    Example:
        >>> chunk_of(16, model_bytes=100, memory_bytes=600)
        4
    """
    if population % multiple:
        raise InvalidArgumentError(
            f"population is {population}, and the candidates are spread over {multiple} devices: not a multiple."
        )
    fits = [n for n in range(multiple, population + 1, multiple) if population % n == 0]
    return max([n for n in fits if n // multiple * model_bytes <= memory_bytes], default=fits[0])


@dataclass(frozen=True, slots=True)
class _Program:
    """What the program is compiled for."""

    objective: Objective
    groups: tuple[int, ...]
    chunk: int
    mesh: Mesh | None
    axis: str

    def __call__(self, stacked: PyTree, coefficients: jax.Array, keys: jax.Array) -> jax.Array:
        def some(chunk: jax.Array) -> jax.Array:
            return jax.vmap(partial(self.score, keys=keys))(self.spread(merge(stacked, chunk, self.groups)))

        count = len(coefficients)
        if count <= self.chunk:
            return some(coefficients)
        whole = count - count % self.chunk
        parts = coefficients[:whole].reshape(-1, self.chunk, *coefficients.shape[1:])
        found = jax.lax.map(some, parts).reshape(-1)
        return found if whole == count else jnp.concatenate([found, some(coefficients[whole:])])

    def score(self, params: PyTree, keys: jax.Array) -> jax.Array:
        found = jax.lax.map(lambda key: jnp.asarray(self.objective(params, key), jnp.float32), keys)
        return found.mean()

    def spread(self, models: PyTree) -> PyTree:
        if self.mesh is None or len(jax.tree.leaves(models)[0]) % self.mesh.shape[self.axis]:
            return models
        free = PartitionSpec.UNCONSTRAINED  # the weights stay sharded as the checkpoints are

        def one(leaf: jax.Array) -> jax.Array:
            spec = PartitionSpec(self.axis, *[free] * (leaf.ndim - 1))
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))  # pyright: ignore

        return jax.tree.map(one, models)


@partial(jax.jit, static_argnums=0)
def _scores(program: _Program, stacked: PyTree, coefficients: jax.Array, keys: jax.Array) -> jax.Array:
    return program(stacked, coefficients, keys)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _slopes(
    program: _Program, space: Space, penalty: Any, stacked: PyTree, y: jax.Array, centre: jax.Array, keys: jax.Array
) -> Any:
    def total(vector: jax.Array) -> jax.Array:
        coefficients = space.coefficients(vector, centre)[None]
        return (program(stacked, coefficients, keys) + penalty(coefficients))[0]

    return jax.lax.map(jax.value_and_grad(total), y)


@partial(jax.jit, static_argnums=2)
def _merged(stacked: PyTree, coefficients: jax.Array, groups: tuple[int, ...]) -> PyTree:
    return merge(stacked, coefficients, groups)
