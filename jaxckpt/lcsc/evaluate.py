"""The objective of a whole population as one program, for checkpoints on devices, in host memory, or on storage."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.lcsc.merge import Form, is_stacked, merge
from jaxckpt.lcsc.space import Space

PyTree = Any
Objective = Callable[[PyTree, jax.Array], Any]  # (params, key) -> a scalar, smaller is better
MEMORY_BYTES = 1 << 30
# What jax raises where a function that is traced needs the numbers themselves.
_IN_PYTHON = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
BUCKET_BYTES = 64 << 20  # of stacked leaves that are on their way from host memory to devices


class Keys(NamedTuple):
    """PRNG keys: their data, uint32 [n, words], and their implementation."""

    data: np.ndarray
    impl: Any

    def typed(self) -> list[jax.Array]:
        """As objectives take them."""
        return [jax.random.wrap_key_data(one, impl=self.impl) for one in self.data]


class Evaluator(Protocol):
    """What measures candidates."""

    @property
    def placement(self) -> str:
        """Where the checkpoints are."""
        ...

    def __call__(self, objective: Objective, coefficients: Any, keys: Keys) -> np.ndarray:
        """float64 [P] of coefficients [P, G, K]: the mean over keys [n], which all candidates share."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """Stacked checkpoints in device memory: leaves [K, ...], sharded like the parameters on the trailing axes.

    The stack is read once per generation (once per chunk of candidates, if a population does not fit), and as the sum
    is point-wise, nothing of it moves between devices. One program serves any number of candidates.

    Attributes:
        stacked: the checkpoints.
        form: of a candidate.
        width: candidates that the program is compiled for; fewer are filled up.
        chunk: candidates in memory at a time; ``width`` is a multiple.
    """

    stacked: Sequence[jax.Array]
    form: Form
    width: int
    chunk: int
    placement: str = "device"

    def __call__(self, objective: Objective, coefficients: Any, keys: Keys) -> np.ndarray:
        """A jitted call for every ``width`` candidates and every key."""
        program = Program(objective, self.form, self.chunk, keys.impl)
        blocks = list(_blocks(coefficients, self.width))
        found = [
            [self._dispatched(_scores(program, self.stacked, block, one)) for block, _ in blocks] for one in keys.data
        ]
        return np.mean([_joined(row, blocks) for row in found], axis=0)

    def check(self, objective: Objective, coefficients: Any, keys: Keys) -> None:
        """Raise what the objective raises when it is traced: the program of a later call, not compiled yet."""
        block, _ = next(_blocks(coefficients, self.width))
        _scores.eval_shape(Program(objective, self.form, self.chunk, keys.impl), self.stacked, block, keys.data[0])

    def _dispatched(self, scores: jax.Array) -> jax.Array:
        """All are dispatched before the first is waited for, but by several CPU devices one after the other.

        Their programs wait for one another in threads that programs dispatched later may hold.
        """
        devices = {device for leaf in self.stacked for device in leaf.sharding.device_set}
        several = len(devices) > 1 and next(iter(devices)).platform == "cpu"
        return jax.block_until_ready(scores) if several else scores

    def slopes(self, objective: Objective, space: Space, y: jax.Array, centre: Any, keys: Keys, penalty: Any) -> Any:
        """Scores [P] and gradients [P, size] in the search vectors ``y`` [P, size], penalty included."""
        program = Program(objective, self.form, 1, keys.impl)
        return _slopes(program, space, penalty, self.stacked, y, np.asarray(centre, np.float32), keys.data[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """Candidates made chunk by chunk, then measured: for objectives in Python, and stacks in host memory.

    Attributes:
        make: coefficients [chunk, G, K] -> leaves [chunk, ...] on the devices.
        form: of a candidate.
        chunk: candidates in memory at a time.
        is_jitted: whether objectives are traced; else they are called with one candidate after another.
        placement: of the stack.
    """

    make: Callable[[np.ndarray], Sequence[jax.Array]]
    form: Form
    chunk: int
    is_jitted: bool
    placement: str

    def __call__(self, objective: Objective, coefficients: Any, keys: Keys) -> np.ndarray:
        """Each chunk is made once and measured with all keys."""
        program = Program(objective, self.form, self.chunk, keys.impl)
        found: list[np.ndarray] = []
        for block, count in _blocks(coefficients, self.chunk):
            leaves = self.make(block)
            if self.is_jitted:
                rows = [np.asarray(_measured(program, leaves, one), np.float64)[:count] for one in keys.data]
                found.append(np.mean(rows, axis=0))
            else:
                for p in range(count):
                    params = self.form.tree([leaf[p] for leaf in leaves])
                    found.append(np.array([np.mean([called(objective, params, key) for key in keys.typed()])]))
        return np.concatenate(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """Checkpoints on storage, read once per chunk of candidates; objectives of any kind.

    Attributes:
        make: coefficients [P, G, K] -> P trees.
        form: of a candidate.
        chunk: candidates in memory at a time.
        is_jitted: whether objectives are traced; else they are called with each candidate.
    """

    make: Callable[[np.ndarray], Sequence[PyTree]]
    form: Form
    chunk: int
    is_jitted: bool
    placement: str = "stream"

    def __call__(self, objective: Objective, coefficients: Any, keys: Keys) -> np.ndarray:
        """Chunk by chunk."""
        wanted = np.asarray(coefficients, np.float64)
        found: list[float] = []
        typed = keys.typed()
        for first in range(0, len(wanted), self.chunk):
            for params in self.make(wanted[first : first + self.chunk]):
                if self.is_jitted:
                    leaves = [leaf for leaf in jax.tree.leaves(params) if is_stacked(leaf)]
                    scores = [float(_one(objective, self.form, leaves, key)) for key in typed]
                else:
                    scores = [called(objective, params, key) for key in typed]
                found.append(float(np.mean(scores)))
        return np.array(found, np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosted:
    """Checkpoints in host memory, brought to the devices bucket by bucket: the sums of one run while the next arrives.

    Attributes:
        models: K lists of leaves: numpy arrays, or arrays in pinned host memory, sharded as on the devices.
        shardings: of each leaf on the devices; None: the default device.
        form: of a candidate.
    """

    models: Sequence[Sequence[Any]]
    shardings: Sequence[Any]
    form: Form

    def __call__(self, coefficients: np.ndarray) -> list[jax.Array]:
        """Leaves [P, ...] of coefficients [P, G, K]."""
        found: list[Any] = [None] * len(self.shardings)
        before: list[jax.Array] = []
        for bucket in self._buckets():
            stacks = [[jax.device_put(model[i], self.shardings[i]) for model in self._of(i)] for i in bucket]
            made = _contracted(stacks, coefficients, self._part(bucket))
            jax.block_until_ready(before)  # one bucket is summed and one on its way: no more are in device memory
            before = made
            for i, leaf in zip(bucket, made, strict=True):
                found[i] = leaf
        return found

    def _of(self, leaf: int) -> Sequence[Sequence[Any]]:
        is_summed = jnp.issubdtype(self.models[-1][leaf].dtype, jnp.inexact)
        return self.models if is_summed else self.models[-1:]

    def _buckets(self) -> Iterator[list[int]]:
        """Leaves that go together; the factors of a product always do."""
        together = {pair.right: pair.left for pair in self.form.pairs}
        partner = {left: right for right, left in together.items()}
        bucket: list[int] = []
        size = 0
        for i in range(len(self.shardings)):
            if i in together:
                continue
            chosen = [i, partner[i]] if i in partner else [i]
            bucket += chosen
            size += sum(model[j].size * model[j].dtype.itemsize for j in chosen for model in self._of(j))
            if size >= BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket

    def _part(self, bucket: list[int]) -> Form:
        """The form of some of the leaves."""
        place = {leaf: i for i, leaf in enumerate(bucket)}
        return Form(
            structure=None,
            names=tuple(self.form.names[i] for i in bucket),
            groups=tuple(self.form.groups[i] for i in bucket),
            pairs=tuple(
                type(pair)(place[pair.left], place[pair.right], pair.rank)
                for pair in self.form.pairs
                if pair.left in place
            ),
        )


def on_device(stacked: Sequence[jax.Array], form: Form) -> Callable[[np.ndarray], list[jax.Array]]:
    """Makes chunks of candidates from a stack on the devices."""
    return lambda coefficients: _merged(stacked, coefficients, form)


def chunk_of(population: int, model_bytes: int, memory_bytes: int, multiple: int = 1) -> int:
    """Candidates at a time: a divisor of the population, and a multiple of the devices they are spread over.

    Example:
        >>> chunk_of(16, model_bytes=100, memory_bytes=600)
        4
    """
    if population < 1 or population % multiple:
        raise InvalidArgumentError(
            f"population is {population}, and the candidates are spread over {multiple} devices: not a multiple."
        )
    fits = [n for n in range(multiple, population + 1, multiple) if population % n == 0]
    return max([n for n in fits if n // multiple * model_bytes <= memory_bytes], default=fits[0])


def called(objective: Objective, params: PyTree, key: jax.Array) -> float:
    """The value of an objective in Python."""
    value = objective(params, key)
    _check(value)
    return float(value)


@dataclass(frozen=True, slots=True)
class Program:
    """What a program is compiled for."""

    objective: Objective
    form: Form
    chunk: int
    impl: Any  # of the keys

    def __call__(self, stacked: Sequence[jax.Array], coefficients: jax.Array, data: jax.Array) -> jax.Array:
        """Scores [P] of coefficients [P, G, K], P a multiple of ``chunk``, and the data of one key."""

        def some(part: jax.Array) -> jax.Array:
            return self.measure(merge(stacked, part, self.form), data)

        count = len(coefficients)
        if count == self.chunk:
            return self.everywhere(some(coefficients))
        parts = coefficients.reshape(-1, self.chunk, *coefficients.shape[1:])
        return self.everywhere(jax.lax.map(some, parts).reshape(-1))

    def measure(self, leaves: Sequence[jax.Array], data: jax.Array) -> jax.Array:
        """Scores [P] of leaves [P, ...]."""
        key = jax.random.wrap_key_data(data, impl=self.impl)
        return jax.vmap(lambda each: _traced(self.objective, self.form.tree(each), key))(self.spread(leaves))

    def spread(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """Candidates over their axis of the mesh, weights over the others."""
        form = self.form
        if form.mesh is None:
            return list(leaves)
        found: list[jax.Array] = []
        for leaf, spec in zip(leaves, form.specs, strict=True):
            # Summed where the checkpoints lie: what may move after that is the sum, and never the stack.
            summed = jax.lax.with_sharding_constraint(leaf, NamedSharding(form.mesh, PartitionSpec(None, *spec)))
            if form.axis is not None and len(leaf) % form.mesh.shape[form.axis] == 0:
                rest = [_without(names, form.axis) for names in spec]
                home = NamedSharding(form.mesh, PartitionSpec(form.axis, *rest))
                summed = jax.lax.with_sharding_constraint(summed, home)
            found.append(summed)
        return found

    def everywhere(self, scores: jax.Array) -> jax.Array:
        """On all devices, so that every process can read them."""
        if self.form.mesh is None:
            return scores
        return jax.lax.with_sharding_constraint(scores, NamedSharding(self.form.mesh, PartitionSpec()))


def _without(names: Any, axis: str) -> Any:
    if isinstance(names, tuple):
        rest = tuple(name for name in names if name != axis)
        return rest or None
    return None if names == axis else names


def _traced(objective: Objective, params: PyTree, key: jax.Array) -> jax.Array:
    """The value of an objective inside a program."""
    try:
        value = objective(params, key)
    except _IN_PYTHON as error:
        raise InvalidArgumentError(
            "The objective cannot be compiled: it makes Python numbers or numpy arrays of its parameters, as float(x) "
            'and np.asarray(x) do. Give jit=False, or write it in jax.numpy (strategy="gradient" needs that).'
        ) from error
    _check(value)
    return jnp.asarray(value, jnp.float32)


def _check(value: Any) -> None:
    if isinstance(value, tuple | list | dict | None.__class__):
        raise InvalidArgumentError(
            f"The objective gave a {type(value).__name__}; it gives one number and nothing else."
        )
    if np.shape(value) != ():
        raise InvalidArgumentError(
            f"The objective gave an array of shape {list(np.shape(value))}; it gives one number, as the mean of it."
        )
    if np.iscomplexobj(value):
        raise InvalidArgumentError("The objective gave a complex number; it gives a real one, as its magnitude: abs.")


def _blocks(coefficients: Any, width: int) -> Iterator[tuple[np.ndarray, int]]:
    """float32 [width, G, K] and how many of them count: the rest repeats the last."""
    wanted = np.asarray(coefficients, np.float32)
    for first in range(0, len(wanted), width):
        block = wanted[first : first + width]
        yield np.concatenate([block, np.repeat(block[-1:], width - len(block), axis=0)]), len(block)


def _joined(rows: Sequence[jax.Array], blocks: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
    return np.concatenate([np.asarray(row, np.float64)[:n] for row, (_, n) in zip(rows, blocks, strict=True)])


@partial(jax.jit, static_argnums=0)
def _scores(program: Program, stacked: Sequence[jax.Array], coefficients: Any, data: Any) -> jax.Array:
    return program(stacked, coefficients, data)


@partial(jax.jit, static_argnums=0)
def _measured(program: Program, leaves: Sequence[jax.Array], data: Any) -> jax.Array:
    return program.everywhere(program.measure(leaves, data))


@partial(jax.jit, static_argnums=(0, 1))
def _one(objective: Objective, form: Form, leaves: Sequence[Any], key: jax.Array) -> jax.Array:
    return _traced(objective, form.tree(leaves), key)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _slopes(
    program: Program, space: Space, penalty: Any, stacked: Sequence[jax.Array], y: jax.Array, centre: Any, data: Any
) -> Any:
    def total(vector: jax.Array) -> jax.Array:
        coefficients = space.coefficients(vector, centre)[None]
        return (program(stacked, coefficients, data) + penalty(coefficients))[0]

    return jax.lax.map(jax.value_and_grad(total), y)


@partial(jax.jit, static_argnums=2)
def _merged(stacked: Sequence[jax.Array], coefficients: Any, form: Form) -> list[jax.Array]:
    return merge(stacked, coefficients, form)


@partial(jax.jit, static_argnums=2)
def _contracted(models: Sequence[Sequence[jax.Array]], coefficients: Any, form: Form) -> list[jax.Array]:
    return merge([jnp.stack(parts) for parts in models], coefficients, form)
