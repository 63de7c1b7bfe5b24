"""Commit: database, metadata and sidecar, and last the marker, by one process, after all have written their chunks.

States of a folder::

    nothing -> data files -> B+tree, metadata, manifest, sidecar -> commit_success.txt   a new checkpoint
    old     -> data files -> B+tree -> sidecar -> metadata, manifest -> sweep of the old   an overwrite

A new checkpoint exists once its marker does. An overwrite takes effect in one step, the replacement of the sidecar:
new data files have names of their own, so the old sidecar and the old manifest lead to the old bytes until then, and a
reader that finds the new sidecar beside the old manifest knows it from ``supersedes``. No step needs a rename of
folders or the order of a listing.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import google_crc32c
import numpy as np
from jax.sharding import Sharding

from jaxckpt.checkpoint.leaves import Described, plain_value
from jaxckpt.core.errors import AlreadyExistsError
from jaxckpt.core.text import counted
from jaxckpt.core.tree import path_name
from jaxckpt.format import orbax_metadata as om
from jaxckpt.format import sidecar as sc
from jaxckpt.format.ocdbt import Columns, encode_database_columns
from jaxckpt.format.zarr3 import array_metadata, chunk_keys, metadata_key
from jaxckpt.storage.store import AbstractStore

MANIFEST = "manifest.ocdbt"
_OURS = ("d/", "ocdbt.process_", "array_metadatas/")
_OUR_FILES = {MANIFEST, sc.FILE_NAME, om.TREE_METADATA, om.CHECKPOINT_METADATA, om.SHARDING, om.STRINGS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """What was at the destination before the save."""

    committed: bool  # a checkpoint: ours or Orbax's
    names: tuple[str, ...]  # its objects, or the leftovers of a save that never finished


def examine(store: AbstractStore, *, overwrite: bool) -> Before:
    """Refuse a destination that must not be written to.

    Raises:
        AlreadyExistsError: there is a checkpoint and ``overwrite`` is False, or there are files that are no checkpoint.
    """
    names = tuple(store.names())
    if not names:
        return Before(committed=False, names=())
    unfinished = is_unfinished(store, names)
    committed = not unfinished and bool({om.COMMIT_MARKER, om.TREE_METADATA} & set(names))
    if committed and not overwrite:
        raise AlreadyExistsError(
            f"{store.url} holds a checkpoint already. Pass overwrite=True to replace it (it stays whole until the "
            "new one commits), or save elsewhere."
        )
    foreign = [name for name in names if not is_ours(name)]
    if foreign and not committed:
        raise AlreadyExistsError(
            f"{store.url} holds {counted(len(foreign), 'file that is', 'files that are')} no part of a checkpoint, as "
            f"{', '.join(foreign[:5])}. "
            "Nothing was written: save to a folder of its own."
        )
    return Before(committed=committed, names=names)


def is_unfinished(store: AbstractStore, names: Collection[str]) -> bool:
    """Whether these objects are what a save of ours leaves when it does not reach its marker."""
    if not names or om.COMMIT_MARKER in names:
        return False
    if sc.FILE_NAME in names or all(is_ours(name) and name.startswith(_OURS) for name in names):
        return True
    # Older Orbax versions wrote no marker; their metadata do not name us.
    return om.CHECKPOINT_METADATA in names and b'"jaxckpt"' in store.read(om.CHECKPOINT_METADATA)


def is_ours(name: str) -> bool:
    """Whether an object's name is one that a save of this library writes."""
    return name in _OUR_FILES or name == om.COMMIT_MARKER or name.startswith(_OURS)


def commit(
    store: AbstractStore,
    described: Described,
    entries: list[sc.LeafEntry],
    files: tuple[str, ...],
    table: sc.ChunkTable,
    *,
    before: Before,
    shardings: tuple[dict[str, Any], ...],
    start_ns: int,
    now_ns: int,
    lineage: dict[str, Any],
) -> None:
    """Write everything but the chunks, in the order that the module describes, and sweep what was there before."""
    nodes_file = f"d/{uuid4().hex}"
    database = encode_database_columns(
        _database(described, entries, files, table), nodes_file=nodes_file, uuid=uuid4().bytes, commit_time_ns=now_ns
    )
    supersedes: tuple[int, ...] = ()
    if before.committed:
        supersedes = (sc.manifest_checksum(store.read(MANIFEST)) if MANIFEST in before.names else sc.NO_MANIFEST,)
    sidecar = sc.encode_sidecar(
        sc.Sidecar(
            structure=described.structure,
            leaves=tuple(entries),
            shardings=shardings,
            files=files,
            table=table,
            manifest_crc32c=sc.manifest_checksum(database.manifest),
            supersedes=supersedes,
            time_ns=now_ns,
            **lineage,
        )
    )
    metadata = _orbax_files(described, entries, lineage, start_ns, now_ns)
    nodes = {nodes_file: database.nodes}
    rest = {**metadata, MANIFEST: database.manifest}
    if before.committed:
        store.write_all(nodes)
        # An older Orbax may have written no marker, and a sidecar without one is no checkpoint: it must be there first.
        store.write_all({om.COMMIT_MARKER: om.commit_text(store.url)})
        store.write_all({sc.FILE_NAME: sidecar})  # the new checkpoint exists from here on
        store.write_all(rest)
    else:
        store.write_all({**nodes, **rest, sc.FILE_NAME: sidecar})
        store.write_all({om.COMMIT_MARKER: om.commit_text(store.url)})
    if before.names:
        sweep(store, before, keep={om.COMMIT_MARKER, sc.FILE_NAME, nodes_file, *rest, *files})


def sweep(store: AbstractStore, before: Before, keep: set[str]) -> None:
    """Remove what an older or unfinished checkpoint left here; files of other people stay."""
    folders = {name.rsplit("/", 1)[0] + "/" for name in before.names if name.endswith(("/.zarray", "/zarr.json"))}
    # Array metadata last: it is what tells the files of an old array from other people's, after a crash in here too.
    for name in sorted(before.names, key=lambda name: name.endswith(("/.zarray", "/zarr.json"))):
        if name not in keep and (is_ours(name) or name.startswith(tuple(folders))):
            store.delete(name)


def _database(
    described: Described, entries: list[sc.LeafEntry], files: tuple[str, ...], table: sc.ChunkTable
) -> Columns:
    """Every key of the database: metadata and plain scalars inline, chunks by reference. Tied places share bytes."""
    keys: list[bytes] = []
    inline: list[bytes] = []
    ids: list[int] = []
    offsets: list[int] = []
    lengths: list[int] = []
    counts = [int(np.prod(e.grid, dtype=np.int64)) if e.stored else 0 for e in entries]
    first = np.concatenate([[0], np.cumsum(np.array(counts, np.int64))]).tolist()
    where, offset, length = table.file.tolist(), table.offset.tolist(), table.length.tolist()
    for leaf, index in zip(described.leaves, described.index, strict=True):
        entry = entries[index]
        if not entry.stored:
            plain = _plain_array(entry)
            if plain is not None:
                keys += [metadata_key(leaf.name).encode(), chunk_keys(leaf.name, ())[0].encode()]
                data = plain.tobytes()
                inline += [
                    array_metadata((), plain.dtype.name, (), None),
                    data + google_crc32c.value(data).to_bytes(4, "little"),
                ]
                ids += [-1, -1]
                offsets += [0, 0]
                lengths += [0, 0]
            continue
        a, b = first[index], first[index + 1]
        keys.append(metadata_key(leaf.name).encode())
        keys += [key.encode() for key in chunk_keys(leaf.name, entry.grid)]
        inline.append(array_metadata(entry.shape, entry.dtype, entry.chunk, entry.zstd_level))
        inline += [b""] * (b - a)
        ids.append(-1)
        ids += where[a:b]
        offsets.append(0)
        offsets += offset[a:b]
        lengths.append(0)
        lengths += length[a:b]
    return Columns(keys=keys, inline=inline, files=list(files), file_ids=ids, offsets=offsets, lengths=lengths)


def _plain_array(entry: sc.LeafEntry) -> np.ndarray | None:
    """A Python number as the 0-d array that Orbax wants; text, and what no array can hold, have none."""
    value = plain_value(entry)
    if isinstance(value, str) or (isinstance(value, int) and not -(2**63) <= value < 2**63):
        return None
    return np.asarray(value)


def _orbax_files(
    described: Described, entries: list[sc.LeafEntry], lineage: dict[str, Any], start_ns: int, now_ns: int
) -> dict[str, bytes]:
    names = {leaf.path: (leaf.name, index) for leaf, index in zip(described.leaves, described.index, strict=True)}
    leaves = []
    for place in om.places(described.structure):
        if place.leaf < 0:
            leaves.append(
                om.OrbaxLeaf(
                    name=path_name(place.path), path=place.path, sequence=place.sequence, value_type=place.value_type
                )
            )
            continue
        name, index = names[place.path]
        leaves.append(_orbax_leaf(place, name, entries[index], described.specs[index].sharding))
    custom = {"jaxckpt": {"step": lineage.get("step")}, **lineage.get("metadata", {})}
    found = {
        # First: it tells an unfinished save of ours from an old Orbax checkpoint, which has no marker either.
        om.CHECKPOINT_METADATA: om.encode_checkpoint_metadata(
            init_timestamp_ns=start_ns, commit_timestamp_ns=now_ns, custom_metadata=custom
        ),
        om.TREE_METADATA: om.encode_tree_metadata(leaves),
        om.SHARDING: om.encode_sharding(leaves),
        om.ARRAY_METADATAS: om.encode_array_metadatas(leaves),
    }
    if any([leaf.text is not None for leaf in leaves]):
        found[om.STRINGS] = om.encode_strings(leaves) or b""
    return found


def _orbax_leaf(place: om.Place, name: str, entry: sc.LeafEntry, sharding: Sharding | None) -> om.OrbaxLeaf:
    if not entry.stored:
        plain = _plain_array(entry)
        kind = om.VALUE_TYPES[entry.kind] if plain is not None else "string"
        text = str(plain_value(entry)) if plain is None else None
        return om.OrbaxLeaf(name=name, path=place.path, sequence=place.sequence, value_type=kind, text=text)
    of_jax = entry.kind in ("array", "prng_key")
    return om.OrbaxLeaf(
        name=name,
        path=place.path,
        sequence=place.sequence,
        value_type=om.VALUE_TYPES[entry.kind],
        write_shape=entry.chunk if of_jax else None,
        chunk_shape=entry.chunk if of_jax else None,
        prng_impl=entry.prng_impl or None,
        sharding=sharding if of_jax else None,
    )
