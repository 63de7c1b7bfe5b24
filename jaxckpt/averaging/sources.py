"""What is averaged: saved checkpoints, live trees, and the point that ``eval_params`` maps either to."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, final

import google_crc32c
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxckpt.averaging.reading import Want, fetch, open_path
from jaxckpt.checkpoint.fingerprint import fingerprint
from jaxckpt.checkpoint.leaves import describe, plain_value, sharding_record
from jaxckpt.checkpoint.source import ForeignSource, OwnSource, Source
from jaxckpt.core.box import Box, from_index, intersect, whole
from jaxckpt.core.dtypes import dtype_of, mover
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.text import counted
from jaxckpt.core.tree import build, flatten, rebuild, walk
from jaxckpt.format.sidecar import LeafEntry
from jaxckpt.storage.store import AbstractStore
from jaxckpt.storage.url import StorageOptions
from jaxckpt.transfer.upload import Target

PyTree = Any
EvalParams = Callable[[PyTree], PyTree] | Sequence[Callable[[PyTree], PyTree] | None] | None


def check_sources(sources: Any, name: str = "sources", of: str = "checkpoints (paths, URLs) and trees") -> int:
    """How many there are; an error where it is no list of them."""
    is_list = isinstance(sources, Sequence) and not isinstance(sources, str | bytes)
    if is_list and not hasattr(sources, "_fields") and len(sources):  # a namedtuple is a tree
        return len(sources)
    is_one = isinstance(sources, str | os.PathLike | Mapping | AbstractStore) or hasattr(sources, "_fields")
    what = "empty" if is_list and not sources else f"a {type(sources).__name__}"
    shown = f" ({sources})" if isinstance(sources, str | os.PathLike) else ""
    advice = f" Put it into a list: [{name[:-1]}]." if is_one else ""
    advice = f" Make a list of it: list({name})." if isinstance(sources, Iterator) else advice
    raise InvalidArgumentError(f"{name} is {what}{shown}; it is a list of {of}, one at least.{advice}")


def open_sources(sources: Sequence[Any], eval_params: EvalParams, options: StorageOptions | None) -> list[Source]:
    """Each of them opened: strings, paths and stores are checkpoints, anything else is a tree."""
    check_sources(sources)
    functions = [eval_params] * len(sources) if eval_params is None or callable(eval_params) else list(eval_params)
    if len(functions) != len(sources):
        raise InvalidArgumentError(
            f"eval_params has {counted(len(functions), 'function')} for {counted(len(sources), 'source')}."
        )
    found: list[Source] = []
    programs: dict[Any, Any] = {}
    for place, (source, function) in enumerate(zip(sources, functions, strict=True)):
        is_path = isinstance(source, str | os.PathLike | AbstractStore)
        opened = open_path(source, options) if is_path else LiveSource(source, f"tree {place} of sources")
        found.append(opened if function is None else MappedSource(opened, function, programs))
    return found


def arrays_of(source: Source, wants: Sequence[Want]) -> tuple[list[Any], int]:
    """These leaves as arrays of the shardings wanted, and the bytes read."""
    if isinstance(source, LiveSource):
        return [source.spread(want.leaf, want.sharding) for want in wants], 0
    if isinstance(source, MappedSource):
        return source.spread(wants)
    return fetch(source, list(wants))


def identity(source: Source) -> str:
    """What tells a source from another: a digest of its content; of another library's checkpoint, its place.

    All processes of sharded trees call it together.
    """
    inner = source.source if isinstance(source, MappedSource) else source
    if isinstance(inner, OwnSource):
        plain = [repr(entry.value) for entry in inner.leaves if not entry.stored]
        parts = [inner.sidecar.table.crc32c.tobytes(), repr(plain).encode()]
    elif isinstance(inner, LiveSource):
        leaves = zip(inner.leaves, inner.arrays, strict=True)
        return digest([(leaf.name, leaf.value if array is None else array) for leaf, array in leaves])
    else:
        return inner.url
    return f"crc32c {google_crc32c.value(b''.join(parts)):08x}"


def digest(leaves: Sequence[tuple[str, Any]]) -> str:
    """Of leaves by name: of the bits of arrays, and of all others as they are written.

    On the host, where no program must be compiled; of arrays over several processes where they lie.
    """
    shared = {str(i): x for i, (_, x) in enumerate(leaves) if isinstance(x, jax.Array) and not x.is_fully_addressable}
    sums = fingerprint(shared)
    parts = [(name, sums.get(str(i)) or _content(leaf)) for i, (name, leaf) in enumerate(leaves)]
    return f"crc32c {google_crc32c.value(repr(parts).encode()):08x}"


def _content(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return leaf
    array = np.asarray(leaf)
    return array.dtype.name, array.shape, google_crc32c.value(array.tobytes())


def chunk_of(source: Source, leaf: int) -> tuple[int, ...] | None:
    """What is read of a leaf at least; None where it lies in memory, so that a part costs no more than its size."""
    if isinstance(source, MappedSource):
        return source.chunk_of(leaf)
    return None if isinstance(source, LiveSource) else source.leaves[leaf].chunk


def is_foreign(source: Source) -> bool:
    """Whether another library wrote it: every box that is asked for decodes its chunks anew."""
    return isinstance(source.source if isinstance(source, MappedSource) else source, ForeignSource)


@final
class LiveSource:
    """A tree in memory, with the interface of a checkpoint."""

    def __init__(self, tree: PyTree, name: str) -> None:
        described = describe(tree)
        self.example = tree  # of the containers of a result
        self.url, self.structure, self.arrays = name, described.structure, described.arrays
        self.leaves: Sequence[LeafEntry] = tuple(
            replace(entry, chunk=tuple(max(n, 1) for n in entry.shape), sharding=place) if entry.stored else entry
            for place, entry in enumerate(described.entries)
        )
        self.shardings: Sequence[dict[str, Any]] = tuple(
            sharding_record(a.sharding) if isinstance(a, jax.Array) else {"type": "host", "devices": []}
            for a in self.arrays
        )
        self._lock = threading.Lock()
        self._host: tuple[int, list[tuple[Box, np.ndarray]]] = (-1, [])

    def fill(self, targets: Mapping[int, tuple[Target, ...]]) -> int:
        """Copy the wanted boxes. Reads nothing from storage."""
        for leaf, boxes in targets.items():
            pieces = self._pieces(leaf)
            for target in boxes:
                covered = 0
                for box, data in pieces:
                    both = intersect(target.box, box)
                    if both is not None:
                        target.data[both.slices(target.box.start)] = data[both.slices(box.start)]
                        covered += both.size
                if covered < target.box.size:
                    raise InvalidArgumentError(
                        f'Leaf "{self.leaves[leaf].name}" of {self.url} lies partly on other processes, and its '
                        "average is wanted on this one. Give `like` with shardings over all processes."
                    )
        return 0

    def spread(self, leaf: int, sharding: Any) -> Any:
        """A leaf with this sharding; it may be the very array of the tree."""
        array = self.arrays[leaf]
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return _identity(sharding)(array)
        return jax.make_array_from_callback(array.shape, sharding, np.asarray(array).__getitem__, dtype=array.dtype)

    def _pieces(self, leaf: int) -> list[tuple[Box, np.ndarray]]:
        """The distinct boxes of an array that are here, with their elements; those of the last leaf are kept."""
        with self._lock:
            if self._host[0] == leaf:
                return self._host[1]
        array = self.arrays[leaf]
        if isinstance(array, jax.Array):
            held = {from_index(shard.index, array.shape): shard.data for shard in array.addressable_shards}
        else:
            held = {whole(array.shape): array}
        found = []
        for box, data in held.items():
            piece = np.asarray(data)
            found.append(
                (box, piece.view(mover(piece.dtype)) if piece.shape else piece[None].view(mover(piece.dtype))[0, ...])
            )
        with self._lock:
            self._host = (leaf, found)
        return found


@final
class MappedSource:
    """What a function makes of a checkpoint's tree, leaf by leaf: a leaf of its result needs only what it depends on.

    The function is traced once. Results that are leaves of the state as they are (``lambda state: state["ema"]``) are
    read as such; others (schedule-free: ``x = (y - (1 - b1) z) / b1``) are computed one leaf at a time.
    """

    def __init__(self, source: Source, function: Callable[[PyTree], PyTree], programs: dict[Any, Any]) -> None:
        self.source, self.url, self._programs = source, source.url, programs
        self._inputs = [i for i, entry in enumerate(source.leaves) if entry.stored and entry.kind != "bytes"]
        self._function = function
        # The caller's setting: sums are made with x64 on, and in other threads.
        self._x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
        structs = [_struct(source.leaves[i]) for i in self._inputs]
        closed, out = jax.make_jaxpr(self._apply, return_shape=True)(structs)
        self.example = out
        leaves, self.structure = flatten(out)
        jaxpr = closed.jaxpr
        place_of = {var: place for place, var in enumerate(jaxpr.invars)}
        self._same: dict[int, int] = {}  # leaf -> leaf of the source
        self._needs = _dependencies(jaxpr)
        entries = []
        self.shardings: Sequence[dict[str, Any]] = list(source.shardings)
        for place, (leaf, var) in enumerate(zip(leaves, jaxpr.outvars, strict=True)):
            if not hasattr(var, "val") and var in place_of:
                self._same[place] = self._inputs[place_of[var]]
                entries.append(replace(source.leaves[self._same[place]], name=leaf.name))
            else:
                shape = tuple(leaf.value.shape)
                chunk = tuple(max(n, 1) for n in shape)
                like = self._place_of(shape, [source.leaves[self._inputs[i]] for i in self._needs[place]])
                entries.append(
                    LeafEntry(
                        name=leaf.name,
                        kind="array",
                        dtype=np.dtype(leaf.value.dtype).name,
                        shape=shape,
                        chunk=chunk,
                        sharding=like,
                    )
                )
        self.leaves: Sequence[LeafEntry] = tuple(entries)
        self._lock = threading.Lock()
        self._last: tuple[int, LiveSource | None] = (-1, None)

    def _place_of(self, shape: tuple[int, ...], inputs: Sequence[LeafEntry]) -> int:
        """The sharding of a computed leaf: that of an input of its shape, or else on all devices of an input's mesh."""
        alike = next((entry.sharding for entry in inputs if entry.shape == shape), None)
        if alike is not None:
            return alike
        found = max(
            (entry.sharding for entry in inputs if entry.sharding >= 0),
            key=lambda place: len(self.shardings[place].get("devices", ())),
            default=-1,
        )
        if found < 0 or "spec" not in self.shardings[found]:
            return found
        replicated = self.shardings[found] | {"spec": []}
        if replicated not in self.shardings:
            self.shardings = [*self.shardings, replicated]
        return self.shardings.index(replicated)

    def fill(self, targets: Mapping[int, tuple[Target, ...]]) -> int:
        """Read what is read as it is, and compute the rest on the host."""
        read_bytes = 0
        plain: dict[int, tuple[Target, ...]] = {self._same[leaf]: () for leaf in targets if leaf in self._same}
        for leaf, boxes in targets.items():
            if leaf in self._same:
                plain[self._same[leaf]] += boxes
            else:
                computed, more = self._computed(leaf)
                computed.fill({0: boxes})
                read_bytes += more
        return read_bytes + (self.source.fill(plain) if plain else 0)

    def chunk_of(self, leaf: int) -> tuple[int, ...] | None:
        """As the function of this name; what is computed is kept until the next leaf."""
        return chunk_of(self.source, self._same[leaf]) if leaf in self._same else None

    def spread(self, wants: Sequence[Want]) -> tuple[list[Any], int]:
        """These leaves as arrays of the shardings wanted; all processes call it together."""
        results: list[Any] = []
        read_bytes = 0
        for want in wants:
            if want.leaf in self._same:
                (value,), more = arrays_of(self.source, [replace(want, leaf=self._same[want.leaf])])
            else:
                needs = self._needs[want.leaf]
                shape = self.leaves[want.leaf].shape
                inputs = [self._inputs[i] for i in needs]
                forms = [_alike(want.sharding, self.source.leaves[i].shape == shape) for i in inputs]
                parts, more = arrays_of(
                    self.source, [Want(leaf=i, sharding=form) for i, form in zip(inputs, forms, strict=True)]
                )
                with jax.enable_x64(self._x64):
                    value = self._program(want.leaf)([_canonical(part) for part in parts])
                    value = _identity(want.sharding)(value)
            results.append(value)
            read_bytes += more
        return results, read_bytes

    def _computed(self, leaf: int) -> tuple[LiveSource, int]:
        with self._lock:  # one leaf of a source is computed at a time
            if self._last[0] == leaf and self._last[1] is not None:
                return self._last[1], 0
            values, read_bytes = fetch(self.source, [Want(leaf=self._inputs[i]) for i in self._needs[leaf]])
            values = [np.asarray(value) for value in values]
            with jax.enable_x64(self._x64), jax.default_device(jax.local_devices(backend="cpu")[0]):
                value = np.asarray(self._program(leaf)(values))
            entry = self.leaves[leaf]
            if value.dtype != dtype_of(entry.dtype):
                raise InvalidArgumentError(
                    f'eval_params gave "{entry.name}" of {self.url} as {value.dtype}, and as {entry.dtype} when it was '
                    "first traced. Give a function of the state alone."
                )
            found = LiveSource(value, self.url)
            self._last = (leaf, found)
            return found, read_bytes

    def _program(self, leaf: int) -> Callable[[list[Any]], jax.Array]:
        # Sources of one run are alike: they share programs.
        key = (self._function, self.source.structure, leaf)
        key += tuple((e.kind, e.dtype, e.shape, repr(e.value)) for e in self.source.leaves)
        return self._programs.setdefault(key, jax.jit(partial(self._one, leaf)))

    def _one(self, leaf: int, needed: list[Any]) -> Any:
        given = dict(zip(self._needs[leaf], needed, strict=True))
        values = []
        for place, i in enumerate(self._inputs):
            entry = self.source.leaves[i]
            value = given.get(place)
            if value is None:  # this leaf does not depend on it: XLA drops it
                value = _nothing(entry)
            elif entry.kind == "prng_key" and value.dtype == np.uint32:
                value = jax.random.wrap_key_data(value, impl=entry.prng_impl)
            values.append(value)
        return jax.tree.leaves(self._apply(values))[leaf]

    def _apply(self, values: list[Any]) -> PyTree:
        given = dict(zip(self._inputs, values, strict=True))

        def leaf(i: int) -> Any:
            return given[i] if i in given else plain_value(self.source.leaves[i])

        if not isinstance(self.source, LiveSource):
            return self._function(build(self.source.structure, leaf))
        at = {path: node.leaf for path, node in walk(self.source.structure) if node.kind == "leaf"}
        return self._function(rebuild(self.source.example, lambda path, _: leaf(at[path])))


def _struct(entry: LeafEntry) -> jax.ShapeDtypeStruct:
    if entry.kind == "prng_key":
        data = jax.ShapeDtypeStruct(entry.shape, np.uint32)
        return jax.eval_shape(partial(jax.random.wrap_key_data, impl=entry.prng_impl), data)
    return jax.ShapeDtypeStruct(entry.shape, jax.dtypes.canonicalize_dtype(dtype_of(entry.dtype)))


def _canonical(part: jax.Array) -> jax.Array:
    """As the function was traced with it: without x64, 64 bits are 32."""
    known = jax.dtypes.issubdtype(part.dtype, jax.dtypes.prng_key)
    wanted = part.dtype if known else jax.dtypes.canonicalize_dtype(part.dtype)
    return part if part.dtype == wanted else part.astype(wanted)


def _nothing(entry: LeafEntry) -> Any:
    if entry.kind == "prng_key":
        return jax.random.wrap_key_data(jax.numpy.zeros(entry.shape, np.uint32), impl=entry.prng_impl)
    return jax.numpy.zeros(entry.shape, jax.dtypes.canonicalize_dtype(dtype_of(entry.dtype)))


def _dependencies(jaxpr: Any) -> list[tuple[int, ...]]:
    """For each output of a jaxpr, the inputs that it may depend on."""
    needs: dict[Any, frozenset[int]] = {var: frozenset([i]) for i, var in enumerate(jaxpr.invars)}
    for equation in jaxpr.eqns:
        found = frozenset().union(*(needs.get(v, frozenset()) for v in equation.invars if not hasattr(v, "val")))
        needs.update(dict.fromkeys(equation.outvars, found))
    return [() if hasattr(v, "val") else tuple(sorted(needs.get(v, frozenset()))) for v in jaxpr.outvars]


def _alike(sharding: Sharding | None, same_shape: bool) -> Sharding | None:
    if same_shape or not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec())


def _identity(sharding: Sharding | None) -> Callable[[Any], Any]:
    return jax.jit(lambda x: x, out_shardings=sharding)
