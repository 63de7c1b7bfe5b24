"""The chunk tables that processes send to the one that commits, joined and checked: every chunk exactly once."""

import json
import zlib
from collections.abc import Sequence

import numpy as np

from jaxckpt.checkpoint.leaves import Described
from jaxckpt.core.errors import CoordinationError
from jaxckpt.format.sidecar import ChunkTable, LeafEntry
from jaxckpt.transfer.write import Written

_COLUMNS = ("leaf", "chunk", "file", "offset", "length", "crc32c")


def marks(described: Described) -> list[int]:
    """One number per leaf: equal on all processes if they save equal trees."""
    shardings: dict[object, str] = {}
    found = []
    for leaf, index in zip(described.leaves, described.index, strict=True):
        entry, sharding = described.entries[index], described.specs[index].sharding
        text = shardings.setdefault(sharding, str(sharding))
        found.append(zlib.crc32(f"{leaf.path!r} {index} {entry.kind} {entry.dtype} {entry.shape} {text}".encode()))
    return found


def check_alike(marks_of_all: Sequence[list[int]], described: Described) -> None:
    """Raise unless all processes save the tree that process 0 does.

    Raises:
        CoordinationError: names the process and the first leaf that differs.
    """
    ours = marks_of_all[0]
    for rank, theirs in enumerate(marks_of_all):
        if theirs == ours:
            continue
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
        what = "it has more leaves"
        if place < len(ours):
            index = described.index[place]
            entry, sharding = described.entries[index], described.specs[index].sharding
            what = (
                f'"{described.leaves[place].name}" ({entry.kind} {entry.shape} {entry.dtype}, {sharding}) differs there'
            )
        raise CoordinationError(
            f"Process {rank} of {len(marks_of_all)} saves another tree than process 0 ({len(theirs)} and {len(ours)} "
            f"leaves): {what}. Nothing was committed. All processes must save equal names, shapes, dtypes and "
            "shardings. An array of this process alone, as jnp.ones(3) makes it, lies on another device in each: make "
            "it global (jax.make_array_from_process_local_data) or a numpy array, which process 0 saves for all."
        )


def pack(written: Written, marks: Sequence[int] = ()) -> bytes:
    """A process's table as bytes: a line of JSON, then the columns as little-endian int64."""
    columns = [np.ascontiguousarray(getattr(written, name), "<i8") for name in _COLUMNS]
    record = {"files": list(written.files), "rows": len(written.leaf), "marks": list(marks)}
    head = json.dumps(record).encode() + b"\n"
    return head + b"".join(column.tobytes() for column in columns)


def unpack(data: bytes) -> Written:
    """The inverse of ``pack``."""
    head, _, body = data.partition(b"\n")
    record = json.loads(head)
    columns = np.frombuffer(body, "<i8").reshape(len(_COLUMNS), record["rows"])
    return Written(files=tuple(record["files"]), **dict(zip(_COLUMNS, columns, strict=True)))


def unpack_marks(data: bytes) -> list[int]:
    """The marks that were given to ``pack``."""
    return json.loads(data.partition(b"\n")[0])["marks"]


def join(tables: Sequence[Written], entries: Sequence[LeafEntry]) -> tuple[tuple[str, ...], ChunkTable]:
    """All files and one table in order of (leaf, chunk).

    Raises:
        CoordinationError: some chunk was written by no process, or by two: the processes saved different trees.
    """
    files: list[str] = []
    parts = []
    for table in tables:
        columns = np.stack([getattr(table, name) for name in _COLUMNS])
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
