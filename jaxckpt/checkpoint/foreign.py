"""Checkpoints that Orbax wrote: find the tree in a folder, tell its leaves, read boxes of its arrays.

All layouts are read: v0 and v1, zarr2 and zarr3, with and without OCDBT, compressed or not, step folders and items.
Metadata of all arrays is fetched at once and the arrays are opened from it without another look at the storage.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorstore as ts

from jaxckpt.core.box import Box, contains, whole
from jaxckpt.core.dtypes import dtype_of
from jaxckpt.core.errors import (
    CorruptionError,
    InvalidArgumentError,
    NotCommittedError,
    NotFoundError,
    StorageError,
    UnsupportedFormatError,
)
from jaxckpt.core.text import counted
from jaxckpt.core.tree import NONE, Node, Path, flatten
from jaxckpt.format import orbax_metadata as om

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jaxckpt.storage.store import AbstractStore

MANIFEST = "manifest.ocdbt"
ZARR2_KEY, ZARR3_KEY = ".zarray", "zarr.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignLeaf:
    """One leaf of a checkpoint of another library."""

    name: str  # name of the parameter in its database
    path: Path
    kind: str  # "array", "numpy", "scalar", "string" or "prng_key"
    shape: tuple[int, ...] = ()  # of a "prng_key": of its data
    dtype: str = ""
    prng_impl: str | None = None
    sharding: dict[str, object] | None = None  # as Orbax records it
    value: object = None  # of strings, and of leaves of JSON items


@dataclass(frozen=True, slots=True, kw_only=True)
class _Array:
    driver: str
    metadata: dict[str, Any]
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]


class ForeignCheckpoint:
    """An opened checkpoint: leaves and structure, and reads of boxes from any number of threads."""

    def __init__(
        self,
        *,
        url: str,
        leaves: Sequence[ForeignLeaf],
        structure: Node,
        custom_metadata: object = None,
        step_metadata: Mapping[str, object] | None = None,
        arrays: _Arrays | None = None,
    ) -> None:
        self.url = url
        self.leaves = tuple(leaves)
        self.structure = structure
        self.custom_metadata = custom_metadata
        self.step_metadata = dict(step_metadata or {})  # `_CHECKPOINT_METADATA`: handlers, times, metrics
        self._arrays = arrays

    def read(self, leaf: ForeignLeaf, box: Box) -> np.ndarray:
        """The elements of a box, in memory of their own. Only the chunks that the box touches are read.

        Raises:
            InvalidArgumentError: the box is not within the leaf, or the leaf is a string.
            CorruptionError: a chunk is missing or cannot be decoded.
            StorageError: the storage failed.
        """
        if leaf.kind == "string":
            raise InvalidArgumentError(f'"{leaf.name}" of {self.url} is a string: take its `value`.')
        if len(box.shape) != len(leaf.shape) or not (box.size == 0 or contains(whole(leaf.shape), box)):
            raise InvalidArgumentError(f'"{leaf.name}" of {self.url} has shape {leaf.shape}: {box} is not within it.')
        if leaf.value is not None or self._arrays is None:
            return np.asarray(leaf.value, leaf.dtype)
        if box.size == 0:
            return np.empty(box.shape, dtype_of(leaf.dtype))
        try:
            return self._arrays.opened(leaf.name)[box.slices()].read(order="C").result()
        except (ValueError, OSError, KeyError) as error:
            failed = StorageError if any(code in str(error) for code in _STORAGE_CODES) else CorruptionError
            raise failed(f'"{leaf.name}" of {self.url}: {box} cannot be read: {error}') from error

    def chunk_shape(self, leaf: ForeignLeaf) -> tuple[int, ...]:
        """The shape of the smallest piece that can be read alone."""
        if self._arrays is None or leaf.kind == "string":
            return leaf.shape
        return self._arrays.records[leaf.name].chunk


class _Arrays:
    """The arrays of one database or folder, each opened at its first read and kept."""

    def __init__(self, kvstore: ts.KvStore, records: dict[str, _Array], context: ts.Context, missing_is_fill: bool):
        self.records = records
        self._kvstore = kvstore
        self._context = context
        self._missing_is_fill = missing_is_fill
        self._opened: dict[str, ts.TensorStore] = {}

    def opened(self, name: str) -> ts.TensorStore:
        found = self._opened.get(name)
        if found is None:
            # Two threads may both open it: cheap, and cheaper than a lock on every read.
            record = self.records[name]
            spec = {
                "driver": record.driver,
                "metadata": record.metadata,
                "fill_missing_data_reads": self._missing_is_fill,
                "recheck_cached_data": False,
                "recheck_cached_metadata": False,
            }
            found = ts.open(
                ts.Spec(spec),
                kvstore=self._kvstore / _key(name, ""),
                context=self._context,
                open=True,
                read=True,
                assume_metadata=True,
            ).result()
            self._opened[name] = found
        return found


def open_foreign(store: AbstractStore, *, context: ts.Context | None = None) -> ForeignCheckpoint:
    """Open a checkpoint of Orbax: a tree's own folder, or a step folder with one tree among its items.

    Raises:
        NotFoundError: nothing here is a checkpoint; tells what was looked for and what was found.
        NotCommittedError: the save that wrote the folder never finished.
        InvalidArgumentError: several items are trees; lists them.
        UnsupportedFormatError: the leaves are in an old msgpack file.
        CorruptionError: the metadata cannot be decoded, or names arrays that are not there.
    """
    if TMP in store.url:
        raise NotCommittedError(f'{store.url} is a temporary folder of Orbax ("{TMP}"): its save never finished.')
    step_data = _read(store, om.CHECKPOINT_METADATA)
    step = {} if step_data is None else om.decode_json(step_data, f"{store.url}{om.CHECKPOINT_METADATA}")
    found, item = _find_tree(store, step.get("item_handlers"))
    if found is None:
        return _open_json(store, step)
    tree_data = _read(found, om.TREE_METADATA)
    context = context or ts.Context(_CONTEXT, parent=store.context)
    if tree_data is None:
        tree, kvstore, records = _list_arrays(found, context)
    else:
        tree = om.decode_tree_metadata(tree_data, f"{found.url}{om.TREE_METADATA}")
        kvstore = _open_kvstore(found, tree.use_ocdbt, context)
        names = [".".join(e.keys) for e in tree.entries if not e.skip and e.value_type != "string"]
        records = _array_records(kvstore, names, tree.use_zarr3, found.url)
    leaves, structure = _leaves(found, tree.entries, records)
    return ForeignCheckpoint(
        url=found.url,
        leaves=leaves,
        structure=structure,
        custom_metadata=step.get("custom_metadata") if tree.custom_metadata is None else tree.custom_metadata,
        step_metadata={**step, "item": item} if item else step,
        arrays=_Arrays(kvstore, records, context, tree.missing_is_fill),
    )


TMP = ".orbax-checkpoint-tmp"
_CONTEXT = {"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}}  # B+tree nodes
_STORAGE_CODES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED")
_JSON_FILES = ("metadata", "data.json")
_KINDS = {"jax.Array": "array", "np.ndarray": "numpy", "scalar": "scalar", "string": "string", "str": "string"}
_EMPTY = {"None": NONE, "NamedTuple": NONE, **{k: Node(kind=k.lower()) for k in ("Dict", "List", "Tuple")}}


def _find_tree(store: AbstractStore, handlers: object) -> tuple[AbstractStore | None, str]:
    """The folder that holds the tree, and the item's name where it is a folder below; None where there is JSON only."""
    if store.exists(om.TREE_METADATA) or store.exists(MANIFEST):
        return store, ""
    folders = sorted(store.folders())
    named = [name for name in folders if name in handlers] if isinstance(handlers, dict) else folders
    candidates = [name for name in named if TMP not in name and not name.startswith(("ocdbt.process_", "array_"))]
    if candidates and any(store.exists(f"{candidates[0]}/{key}") for key in (ZARR2_KEY, ZARR3_KEY)):
        return store, ""  # one folder per array, and the tree's metadata lost
    for sign in (om.TREE_METADATA, MANIFEST):
        trees = [name for name in candidates if store.exists(f"{name}/{sign}")]
        if trees and trees[0].isdecimal() and not isinstance(handlers, dict):
            newest = max((name for name in trees if name.isdecimal()), key=int)
            raise InvalidArgumentError(
                f"{store.url} holds checkpoints by number, {', '.join(trees[:5])}: open one of them, as "
                f"{store.url}{newest}."
            )
        if len(trees) > 1:
            shown = ", ".join(f'"{name}"' for name in trees)
            raise InvalidArgumentError(
                f"{store.url} holds {len(trees)} trees, the items {shown}: open one of them, as {store.url}{trees[0]}."
            )
        if trees:
            return store.child(trees[0]), trees[0]
    if any(store.exists(name) for name in _JSON_FILES):
        return None, ""
    raise _nothing(store, folders)


def _nothing(store: AbstractStore, folders: list[str]) -> Exception:
    url = store.url
    if store.exists("checkpoint"):
        return UnsupportedFormatError(
            f'{url} holds a file "checkpoint" and no {om.TREE_METADATA}: a msgpack checkpoint of Flax or of an old '
            "Orbax, which is not read. Load it with the library that wrote it and save it anew."
        )
    unfinished = [name for name in folders if TMP in name or name.startswith("ocdbt.process_")]
    if unfinished:
        return NotCommittedError(
            f"{url} holds no {om.TREE_METADATA} and no {MANIFEST} but what an unfinished save leaves: "
            f"{', '.join(unfinished[:5])}."
        )
    below = [n for n in folders[:20] if any(store.exists(f"{n}/{x}") for x in (om.CHECKPOINT_METADATA, *_JSON_FILES))]
    # A listing goes all the way down, so it is asked for only where there is nothing below.
    shown = [f"{name}/" for name in folders[:10]] or sorted(store.names(""))[:10] or ["nothing"]
    return NotFoundError(
        f"No checkpoint at {url}: looked for jaxckpt.json, {om.TREE_METADATA} and {MANIFEST} there and in its folders; "
        f"found {', '.join(shown)}." + (f" Open one of {', '.join(below)}, as {url}{below[0]}." if below else "")
    )


def _open_json(store: AbstractStore, step: Mapping[str, Any]) -> ForeignCheckpoint:
    data = next(data for name in _JSON_FILES if (data := _read(store, name)) is not None)
    try:
        value = json.loads(data)
    except ValueError as error:
        raise CorruptionError(f"{store.url}: its JSON item cannot be decoded: {error}") from error
    named, structure = flatten(value)
    dtypes = {bool: "bool", int: "int64", float: "float64", str: ""}
    leaves = [
        ForeignLeaf(name=name, path=path, kind=_KINDS.get(type(x).__name__, "scalar"), dtype=dtypes[type(x)], value=x)
        for name, path, x in named
    ]
    return ForeignCheckpoint(url=store.url, leaves=leaves, structure=structure, step_metadata=step)


def _leaves(
    store: AbstractStore, entries: Iterable[om.TreeEntry], records: dict[str, _Array]
) -> tuple[list[ForeignLeaf], Node]:
    lost = [".".join(e.keys) for e in entries if e.skip and e.value_type not in _EMPTY]
    if lost:
        raise UnsupportedFormatError(
            f"{store.url}: {counted(len(lost), 'leaf is', 'leaves are')} in the msgpack file of an old Orbax, which is "
            f"not read: {', '.join(lost[:5])}. Load the checkpoint with Orbax and save it anew."
        )
    shardings = _optional(store, om.SHARDING, om.decode_sharding)
    impls = _optional(store, om.ARRAY_METADATAS, om.decode_prng_impls)
    strings: object = (
        _optional(store, om.STRINGS, om.decode_json) if any(e.value_type == "string" for e in entries) else {}
    )
    leaves: list[ForeignLeaf] = []
    places: list[tuple[om.TreeEntry, Node]] = []
    for entry in entries:
        if entry.value_type in _EMPTY:
            places.append((entry, _EMPTY[entry.value_type]))
            continue
        name = ".".join(entry.keys)
        path = tuple(int(key) if sequence else key for key, sequence in zip(entry.keys, entry.sequence, strict=True))
        places.append((entry, Node(kind="leaf", leaf=len(leaves))))
        if entry.value_type == "string":
            text = om.string_at(strings, name)
            if text is None:
                raise CorruptionError(f'{store.url}: "{name}" is a string, and {om.STRINGS} has none of that name.')
            leaves.append(ForeignLeaf(name=name, path=path, kind="string", value=text))
            continue
        record, impl = records[name], impls.get(name)
        leaves.append(
            ForeignLeaf(
                name=name,
                path=path,
                kind="prng_key" if impl else _KINDS.get(entry.value_type, "array"),
                shape=record.shape,
                dtype=record.dtype.name,
                prng_impl=impl,
                sharding=shardings.get(name),
            )
        )
    return leaves, om.nested(places)


def _open_kvstore(store: AbstractStore, use_ocdbt: bool | None, context: ts.Context) -> ts.KvStore:
    base = store.kvstore_spec()
    if use_ocdbt is False:
        return ts.KvStore.open(base, context=context).result()
    if store.exists(MANIFEST):
        spec = {"driver": "ocdbt", "base": base, "cache_pool": "cache_pool#ocdbt"}
        try:
            return ts.KvStore.open(spec, context=context).result()
        except ValueError as error:
            raise CorruptionError(f"{store.url}{MANIFEST} cannot be read: {error}") from error
    if use_ocdbt and any(name.startswith("ocdbt.process_") for name in store.folders()):
        raise NotCommittedError(
            f"{store.url}: no {MANIFEST} joins the databases of its processes: a save never finished."
        )
    # A tree without any array has no database; Orbax also left the flag out of old files.
    return ts.KvStore.open(base, context=context).result()


def _array_records(kvstore: ts.KvStore, names: Sequence[str], zarr3_first: bool, url: str) -> dict[str, _Array]:
    keys = [ZARR3_KEY, ZARR2_KEY] if zarr3_first else [ZARR2_KEY, ZARR3_KEY]
    found: dict[str, _Array] = {}
    waiting = list(names)
    for key in keys:
        futures = [kvstore.read(_key(name, key)) for name in waiting]
        for name, future in zip(waiting, futures, strict=True):
            try:
                read = future.result()
            except (ValueError, OSError) as error:
                raise CorruptionError(f'"{name}" of {url}: {_key(name, key)} cannot be read: {error}') from error
            if read.state == "value":
                found[name] = _record(read.value, key == ZARR3_KEY, f'"{name}" of {url}')
        waiting = [name for name in waiting if name not in found]
    if waiting:
        raise CorruptionError(
            f"{url}: {om.TREE_METADATA} names {counted(len(names), 'array')}, and {len(waiting)} of these "
            f"cannot be found: {', '.join(waiting[:10])} (looked for {_key(waiting[0], keys[0])} and "
            f"{_key(waiting[0], keys[1])})."
        )
    return found


def _key(name: str, key: str) -> str:
    # A tree that is a single array has no name, and its keys no folder.
    return f"{name}/{key}" if name else key


def _record(data: bytes, zarr3: bool, source: str) -> _Array:
    metadata = om.decode_json(data, source)
    try:
        name = metadata["data_type"] if zarr3 else metadata["dtype"]
        dtype = dtype_of(name)
        if zarr3:
            chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
            for codec in metadata.get("codecs", ()):
                if codec["name"] == "sharding_indexed":
                    chunk = codec["configuration"]["chunk_shape"]
        else:
            chunk = metadata["chunks"]
        shape = tuple(metadata["shape"])
    except KeyError as error:
        raise CorruptionError(f"{source}: its metadata lacks {error}.") from error
    except (TypeError, AttributeError) as error:
        raise UnsupportedFormatError(f"{source}: its dtype {name!r} is not known here.") from error
    driver = "zarr3" if zarr3 else "zarr"
    return _Array(driver=driver, metadata=metadata, shape=shape, dtype=dtype.newbyteorder("="), chunk=tuple(chunk))


def _list_arrays(store: AbstractStore, context: ts.Context) -> tuple[om.TreeMetadata, ts.KvStore, dict[str, _Array]]:
    """The tree of a checkpoint that lost its metadata: names are taken apart at their dots, as Orbax joined them."""
    use_ocdbt = store.exists(MANIFEST)
    kvstore = _open_kvstore(store, use_ocdbt, context)
    if use_ocdbt:
        keys = [key.decode() for key in kvstore.list().result()]
        names = [key.rpartition("/")[0] for key in keys if key.endswith((f"/{ZARR2_KEY}", f"/{ZARR3_KEY}"))]
    else:
        names = [name for name in sorted(store.folders()) if not name.startswith("array_")]
    nested = [tuple(name.split(".")) for name in names]
    inner = {keys[:depth] for keys in nested for depth in range(len(keys))}
    if any(keys in inner for keys in nested):
        nested = [(name,) for name in names]
    tree = om.TreeMetadata(
        entries=tuple(om.TreeEntry(keys, (False,) * len(keys), "jax.Array", False) for keys in nested),
        use_ocdbt=use_ocdbt,
        use_zarr3=True,
        missing_is_fill=True,
        custom_metadata=None,
    )
    return tree, kvstore, _array_records(kvstore, names, True, store.url)


def _optional(store: AbstractStore, name: str, decode: Any) -> dict[str, Any]:
    data = _read(store, name)
    return {} if data is None else decode(data, f"{store.url}{name}")


def _read(store: AbstractStore, name: str) -> bytes | None:
    try:
        return store.read(name)
    except FileNotFoundError:
        return None
