"""The chunk tables that processes send to the one that commits, joined and checked: every chunk exactly once."""

import json
import zlib
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from jaxckpt.checkpoint.leaves import Described
from jaxckpt.core.checksum import crc32c
from jaxckpt.core.errors import CoordinationError
from jaxckpt.core.text import counted
from jaxckpt.format.sidecar import ChunkTable, LeafEntry
from jaxckpt.transfer.write import Written

_COLUMNS = ("leaf", "chunk", "file", "offset", "length", "crc32c")


class Marks(NamedTuple):
    """What tells whether processes save equal trees: checksums, by place in the tree.

    ``forms``: name, kind, dtype, shape and sharding of each leaf. ``own``: of those arrays that lie on devices of this
    process alone, without the sharding. ``values``: of those that live on the host.
    """

    forms: list[int]
    own: dict[int, int]
    values: dict[int, int]


def marks(described: Described) -> Marks:
    """Those of this process's tree."""
    shardings: dict[object, str] = {}
    found = Marks([], {}, {})
    for place, (leaf, index) in enumerate(zip(described.leaves, described.index, strict=True)):
        entry, sharding = described.entries[index], described.specs[index].sharding
        text = shardings.setdefault(sharding, str(sharding))
        form = zlib.crc32(f"{leaf.path!r} {index} {entry.kind} {entry.dtype} {entry.shape}".encode())
        found.forms.append(zlib.crc32(text.encode(), form))
        if sharding is not None and sharding.is_fully_addressable:
            found.own[place] = form
        elif not entry.stored:
            found.values[place] = zlib.crc32(repr(entry.value).encode())
        elif sharding is None:
            found.values[place] = crc32c(np.ascontiguousarray(described.arrays[index]).reshape(-1).view(np.uint8))
    return found


def check_alike(told: Sequence[bytes], described: Described) -> set[int]:
    """Raise unless all processes save the tree that process 0 does; ``told``: what they packed.

    Returns:
        The entries of which every process has an array on its own devices, as ``jnp.ones(3)`` makes it.

    Raises:
        CoordinationError: names the process and the first leaf that differs.
    """
    of_all = [_unpack_marks(data) for data in told]
    ours = of_all[0]
    repeated = {place for place, form in ours.own.items() if all(one.own.get(place) == form for one in of_all)}
    for rank, theirs in enumerate(of_all):
        if theirs == ours:
            continue
        pairs = enumerate(zip(ours.forms, theirs.forms, strict=False))
        least = min(len(ours.forms), len(theirs.forms))
        place = next((i for i, (a, b) in pairs if a != b and i not in repeated), least)
        if place < least or len(ours.forms) != len(theirs.forms):
            raise CoordinationError(_other_tree(rank, place, ours, theirs, described, len(of_all)))
        for place, value in ours.values.items():
            if theirs.values.get(place) != value:
                raise CoordinationError(_other_value(rank, described.leaves[place].name, len(of_all)))
    return {described.index[place] for place in repeated}


def _other_tree(rank: int, place: int, ours: Marks, theirs: Marks, described: Described, size: int) -> str:
    what = "it has more leaves"
    if place < len(ours.forms):
        index = described.index[place]
        entry, sharding = described.entries[index], described.specs[index].sharding
        what = f'"{described.leaves[place].name}" ({entry.kind} {entry.shape} {entry.dtype}, {sharding}) differs there'
    return (
        f"Process {rank} of {size} saves another tree than process 0 "
        f"({counted(len(theirs.forms), 'leaf', 'leaves')}, and there {len(ours.forms)}): {what}. Nothing was "
        "committed. All processes must save equal names, shapes, dtypes and shardings."
    )


def _other_value(rank: int, name: str, size: int) -> str:
    return (
        f'Leaf "{name}" has another value on process {rank} of {size} than on process 0. Nothing was committed. What '
        "does not lie on devices of several processes must be equal on all, as it is saved once: give what belongs to "
        "one process a name of its own in the trees of all, or make it one global array "
        "(jax.make_array_from_process_local_data)."
    )


def pack(written: Written, marks: Marks) -> bytes:
    """A process's table as bytes: a line of JSON, then the columns as little-endian int64."""
    columns = [np.ascontiguousarray(getattr(written, name), "<i8") for name in _COLUMNS]
    record = {"files": list(written.files), "rows": len(written.leaf), "marks": marks.forms}
    record |= {"own": list(marks.own.items()), "values": list(marks.values.items())}
    head = json.dumps(record).encode() + b"\n"
    return head + b"".join(column.tobytes() for column in columns)


def unpack(data: bytes) -> Written:
    """The inverse of ``pack``."""
    head, _, body = data.partition(b"\n")
    record = json.loads(head)
    columns = np.frombuffer(body, "<i8").reshape(len(_COLUMNS), record["rows"])
    return Written(files=tuple(record["files"]), **dict(zip(_COLUMNS, columns, strict=True)))


def _unpack_marks(data: bytes) -> Marks:
    record = json.loads(data.partition(b"\n")[0])
    return Marks(record["marks"], dict(record["own"]), dict(record["values"]))


def join(
    tables: Sequence[Written], entries: Sequence[LeafEntry], repeated: Collection[int] = ()
) -> tuple[tuple[str, ...], ChunkTable]:
    """All files and one table in order of (leaf, chunk). Those of ``repeated`` that process 0 wrote stand for all.

    Raises:
        CoordinationError: some chunk was written by no process, or by two: the processes saved different trees.
    """
    files: list[str] = []
    parts = []
    first_of = _chunks_of(tables[0], repeated)
    for rank, table in enumerate(tables):
        columns = np.stack([getattr(table, name) for name in _COLUMNS])
        if rank and repeated:
            theirs = _chunks_of(table, repeated)
            if theirs != first_of:
                different = min(leaf for leaf, *_ in theirs ^ first_of)
                raise CoordinationError(_other_value(rank, entries[different].name, len(tables)))
            columns = columns[:, ~np.isin(columns[0], list(repeated))]
        columns[2] += len(files)
        parts.append(columns)
        files += table.files
    leaf, chunk, file, offset, length, crc = np.concatenate(parts, axis=1)
    counts = np.array([int(np.prod(e.grid, dtype=np.int64)) if e.stored else 0 for e in entries], np.int64)
    first = np.concatenate([[0], np.cumsum(counts)])
    place = first[leaf] + chunk if len(leaf) else leaf
    found = np.bincount(place, minlength=int(first[-1])) if len(place) else np.zeros(int(first[-1]), np.int64)
    if len(found) != first[-1] or (found != 1).any():
        bad = int(np.nonzero(found != 1)[0][0]) if len(found) else 0
        which = int(np.searchsorted(first, bad, side="right")) - 1
        name = entries[which].name if which < len(entries) else "?"
        raise CoordinationError(
            f'Leaf "{name}", chunk {bad - int(first[min(which, len(entries))])}: written {int(found[bad])} times over '
            "all processes, should be once. All processes must save the same tree with the same shardings."
        )
    order = np.argsort(place, kind="stable")
    return tuple(files), ChunkTable(
        file=file[order].astype(np.uint32),
        offset=offset[order].astype(np.uint64),
        length=length[order].astype(np.uint64),
        crc32c=crc[order].astype(np.uint32),
    )


def _chunks_of(table: Written, leaves: Collection[int]) -> set[tuple[int, int, int, int]]:
    """(leaf, chunk, length, checksum) of every chunk of these leaves."""
    if not leaves:
        return set()
    chosen = np.isin(table.leaf, list(leaves))
    columns = (table.leaf, table.chunk, table.length, table.crc32c)
    return set(zip(*(column[chosen].tolist() for column in columns), strict=True))
