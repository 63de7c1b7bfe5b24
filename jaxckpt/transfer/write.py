"""Host -> storage: assemble chunks, checksum them, append them to data files. One file per worker thread.

A chunk that is contiguous in its shard is written from there, with no copy; any other is put together in a warm
buffer first. Nothing else is staged, so the memory used is one arena buffer per worker.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Protocol

import numpy as np

from jaxckpt.core.box import Box, cell_box, intersect
from jaxckpt.core.checksum import crc32c
from jaxckpt.core.dtypes import mover
from jaxckpt.plan.save import SavePlan
from jaxckpt.transfer.arena import ALIGNMENT, ARENA
from jaxckpt.transfer.feed import Feed, Piece

DIRECT_BYTES = 256 * 1024  # contiguous chunks from this size on are written from the shard itself
# Work that a thread takes at a time, and writes in one call: Linux caches what one call writes in pages as large as the
# call allows, and small ones cost three times as much (docs/decisions/0007-large-writes.md).
BATCH_BYTES = 32 * 1024 * 1024


class DataWriter(Protocol):
    """Where a worker puts its bytes: see ``storage.store.AbstractDataWriter``."""

    name: str

    def append_all(self, parts: Sequence[np.ndarray]) -> int:
        """Append these, one after the other."""
        ...

    def close(self) -> int:
        """Make the file durable."""
        ...

    def abort(self) -> None:
        """Give the file up."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Written:
    """Chunks written by this process: columns of leaf, grid index, file, offset, length and crc32c."""

    files: tuple[str, ...]
    leaf: np.ndarray
    chunk: np.ndarray
    file: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    crc32c: np.ndarray


def write_chunks(
    open_file: Callable[[], DataWriter],
    plan: SavePlan,
    pieces: Feed | list[list[Piece]],
    *,
    encoders: Sequence[Callable[[np.ndarray], bytes] | None],
    threads: int,
    file_bytes: int | None,
    tell: Callable[[int], None] | None = None,
) -> Written:
    """Write this process's chunks and make them durable.

    Args:
        open_file: opens a new data file.
        plan: chunk shapes, and the chunks of this process.
        pieces: host bytes of each array; from a feed, as they land there, and given back once they are written.
        encoders: per array, a compressor of a chunk's bytes, or None to store them as they are.
        threads: workers; each writes files of its own.
        file_bytes: start another file at this size; None: never.
        tell: called with the bytes of each batch (before compression) once it is written.
    """
    most = min(BATCH_BYTES, max(pieces.batch_bytes, DIRECT_BYTES)) if isinstance(pieces, Feed) else BATCH_BYTES
    batches = iter(list(_batches(plan, most)))
    lock = threading.Lock()
    workers = [_Worker(open_file, plan, pieces, encoders, file_bytes) for _ in range(threads)]

    def drain(worker: "_Worker") -> None:
        while True:
            with lock:
                batch = next(batches, None)
            if batch is None:
                break
            worker.write(batch)
            if tell is not None:
                tell(sum([len(chunks) * plan.chunk_bytes[leaf] for leaf, chunks in batch]))
        worker.finish()

    try:
        if threads == 1:
            drain(workers[0])
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="jaxckpt-write") as pool:
                for done in [pool.submit(drain, worker) for worker in workers]:
                    done.result()
    except Exception:
        for worker in workers:
            worker.abort()
        raise
    files: list[str] = []
    rows: list[np.ndarray] = []
    for worker in workers:
        if worker.rows:
            part = np.array(worker.rows, np.int64)
            part[:, 2] += len(files)
            rows.append(part)
            files += worker.files
    table = np.concatenate(rows) if rows else np.zeros((0, 6), np.int64)
    leaf, chunk, file, offset, length, crc = table.T
    return Written(files=tuple(files), leaf=leaf, chunk=chunk, file=file, offset=offset, length=length, crc32c=crc)


@dataclass(slots=True, eq=False)
class _Worker:
    """One thread's data file, its write buffer and the rows it has produced."""

    _open: Callable[[], DataWriter]
    _plan: SavePlan
    _pieces: Feed | list[list[Piece]]
    _encoders: Sequence[Callable[[np.ndarray], bytes] | None]
    _file_bytes: int | None
    _file: DataWriter | None = None
    _end: int = 0  # bytes in the file and of what waits to be written
    _buffer: np.ndarray = field(default_factory=partial(np.empty, 0, np.uint8))
    _fill: int = 0
    _run: int = 0  # from here on, the buffer is in no part yet
    _parts: list[np.ndarray] = field(default_factory=list)  # what waits to be written, in order
    files: list[str] = field(default_factory=list)
    rows: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)

    def write(self, batch: list[tuple[int, np.ndarray]]) -> None:
        largest = max([self._plan.chunk_bytes[leaf] for leaf, _ in batch])
        try:
            with ARENA.borrow(largest + 2 * ALIGNMENT) as buffer:
                self._buffer, self._fill, self._run = buffer, 0, 0
                for leaf, chunks in batch:
                    self._leaf(leaf, chunks)
                self._flush()
        finally:
            if isinstance(self._pieces, Feed):
                self._pieces.written([(leaf, len(chunks)) for leaf, chunks in batch])

    def finish(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def abort(self) -> None:
        if self._file is not None:
            self._file.abort()
            self._file = None

    def _leaf(self, leaf: int, chunks: np.ndarray) -> None:
        chunk, pieces, encode = self._plan.chunks[leaf], self._pieces[leaf], self._encoders[leaf]
        dtype = mover(pieces[0].data.dtype)
        sources = [piece.data.view(dtype) for piece in pieces]
        size = self._plan.chunk_bytes[leaf]
        recipe = None
        if len(pieces) > 1 or pieces[0].data.shape != chunk:
            recipe = _recipe(tuple([piece.box for piece in pieces]), chunk, self._plan.grids[leaf])
        for index in chunks.tolist():
            parts, padded = recipe(index) if recipe is not None else _WHOLE
            if encode is None and size >= DIRECT_BYTES and len(parts) == 1 and not padded:
                source = sources[parts[0][0]][parts[0][1]]
                if source.flags.c_contiguous:
                    self._direct(leaf, index, source.reshape(-1).view(np.uint8))
                    continue
            if self._fill + size + 2 * ALIGNMENT > len(self._buffer):
                self._flush()
            start = self._fill
            raw = self._buffer[start : start + size]
            target = raw.view(dtype).reshape(chunk)
            if padded:
                raw[:] = 0
            for which, taken, placed in parts:
                target[placed] = sources[which][taken]
            if encode is None:
                crc, stop = crc32c(raw), start + size
                end = -(-(stop + 4) // ALIGNMENT) * ALIGNMENT
                self._buffer[stop:end] = 0
                self._buffer[stop : stop + 4] = np.frombuffer(crc.to_bytes(4, "little"), np.uint8)
                self._current()
                self.rows.append((leaf, index, len(self.files) - 1, self._end, size + 4, crc))
                self._fill = end
                self._end += end - start
            else:
                self._direct(leaf, index, np.frombuffer(encode(raw), np.uint8))

    def _direct(self, leaf: int, index: int, data: np.ndarray) -> None:
        if self._file_bytes is not None:  # it may be time for another file
            self._flush()
        crc = crc32c(data)
        self._current()
        self.rows.append((leaf, index, len(self.files) - 1, self._end, len(data) + 4, crc))
        tail = crc.to_bytes(4, "little") + bytes(-(len(data) + 4) % ALIGNMENT)
        self._parts += [self._buffer[self._run : self._fill], data, np.frombuffer(tail, np.uint8)]
        self._run = self._fill
        self._end += len(data) + len(tail)

    def _flush(self) -> None:
        if self._fill > self._run:
            self._parts.append(self._buffer[self._run : self._fill])
        if self._parts:
            self._current().append_all(self._parts)
            self._parts = []
        self._fill = self._run = 0

    def _current(self) -> DataWriter:
        file, waits = self._file, self._parts or self._fill
        if file is not None and self._file_bytes is not None and not waits and self._end >= self._file_bytes:
            self.finish()
            file = None
        if file is None:
            file = self._file = self._open()
            self._end = 0
            self.files.append(file.name)
        return file


def _batches(plan: SavePlan, batch_bytes: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Pieces of work of about this size, in leaf order."""
    batch, size = [], 0
    for leaf, chunks in enumerate(plan.mine):
        if not len(chunks):
            continue
        each = plan.chunk_bytes[leaf]
        step = max(batch_bytes // max(each, 1), 1)
        for first in range(0, len(chunks), step):
            part = chunks[first : first + step]
            batch.append((leaf, part))
            size += len(part) * each
            if size >= batch_bytes:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


_WHOLE = ([(0, ..., ...)], False)  # the one chunk of an array is its one piece


@lru_cache(maxsize=1024)
def _recipe(boxes: tuple[Box, ...], chunk: tuple[int, ...], grid: tuple[int, ...]):
    """Chunk index -> ([(piece, slices of the piece, slices of the chunk)], padded); leaves of one shape share it."""
    edge = tuple(max(box.start[d] + box.shape[d] for box in boxes) for d in range(len(chunk)))

    @cache
    def parts(index: int) -> tuple[list[tuple[int, tuple[slice, ...], tuple[slice, ...]]], bool]:
        place = tuple(int(i) for i in np.unravel_index(index, grid)) if grid else ()
        want = cell_box(place, chunk, edge)
        found = []
        for k, box in enumerate(boxes):
            both = intersect(box, want)
            if both is not None:
                part = (k, both.slices(box.start), both.slices(want.start))
                if both == want:
                    return [part], want.shape != chunk
                found.append(part)
        return found, want.shape != chunk

    return parts
