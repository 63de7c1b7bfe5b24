"""The chunk tables that processes send to the one that commits, joined and checked: every chunk exactly once."""

import json
from collections.abc import Sequence

import numpy as np

from jaxckpt.core.errors import CoordinationError
from jaxckpt.format.sidecar import ChunkTable, LeafEntry
from jaxckpt.transfer.write import Written

_COLUMNS = ("leaf", "chunk", "file", "offset", "length", "crc32c")


def pack(written: Written) -> bytes:
    """A process's table as bytes: a line of JSON, then the columns as little-endian int64."""
    columns = [np.ascontiguousarray(getattr(written, name), "<i8") for name in _COLUMNS]
    head = json.dumps({"files": list(written.files), "rows": len(written.leaf)}).encode() + b"\n"
    return head + b"".join(column.tobytes() for column in columns)


def unpack(data: bytes) -> Written:
    """The inverse of ``pack``."""
    head, _, body = data.partition(b"\n")
    record = json.loads(head)
    columns = np.frombuffer(body, "<i8").reshape(len(_COLUMNS), record["rows"])
    return Written(files=tuple(record["files"]), **dict(zip(_COLUMNS, columns, strict=True)))


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
