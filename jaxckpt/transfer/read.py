"""Storage -> host: read chunks in runs, check every checksum, put each element where it is wanted.

Chunks that lie side by side in a file are read together. A chunk that is contiguous in its one target is read straight
into it; any other goes through a warm buffer.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from jaxckpt.core.box import Box, cell_box, intersect
from jaxckpt.core.checksum import crc32c
from jaxckpt.core.errors import CorruptionError, NotFoundError
from jaxckpt.transfer.arena import ARENA
from jaxckpt.transfer.upload import Target

DIRECT_BYTES = 256 * 1024
BLOCK_BYTES = 1024 * 1024  # read and checked in turn where reads are cheap: what was just read is in the cache
# A gap is read along rather than starting another read if it is no larger than this ...
GAP_BYTES = 4096
PADDING_BYTES = 64  # ... and than this, or, where reads are cheap, than a 50th of what the read has so far


class Reader(Protocol):
    """Where bytes come from: see ``storage.store.AbstractStore``."""

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill ``out`` from an object."""
        ...


class ChunkRead(NamedTuple):
    """One stored chunk to read: ``length`` includes the 4 bytes of its checksum."""

    leaf: int
    index: int
    file: str
    offset: int
    length: int
    crc32c: int


class LeafRead(NamedTuple):
    """What reading needs to know of a leaf."""

    name: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype  # the mover dtype: unsigned, same size
    decode: Callable[[np.ndarray, int], bytes] | None  # decompressor (data, size in bytes), or None
    targets: tuple[Target, ...]


def read_chunks(
    reader: Reader,
    chunks: Sequence[ChunkRead],
    leaves: dict[int, LeafRead],
    *,
    threads: int,
    run_bytes: int,
    cheap_reads: bool = False,
    sink: Callable[[ChunkRead, np.ndarray], None] | None = None,
    tell: Callable[[int], None] | None = None,
) -> int:
    """Read these chunks (sorted by file and offset) into the targets of their leaves; returns the bytes read.

    With a ``sink``, it gets the checked bytes of each chunk as they are stored, and targets are not used. ``tell`` is
    called with the bytes of each run of chunks once it is read.

    Raises:
        CorruptionError: a chunk is not what was saved, or its file is missing or too short; names leaf, chunk, file.
    """
    runs = _runs(chunks, run_bytes, cheap_reads)
    total = [0] * threads
    lock = threading.Lock()

    def drain(worker: int) -> None:
        while True:
            with lock:
                run = next(runs, None)
            if run is None:
                return
            size = _read_run(reader, run, leaves, BLOCK_BYTES if cheap_reads else run_bytes, sink)
            total[worker] += size
            if tell is not None:
                tell(size)

    if threads == 1 or len(chunks) == 1:
        drain(0)
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="jaxckpt-read") as pool:
            for done in [pool.submit(drain, worker) for worker in range(threads)]:
                done.result()
    return sum(total)


def check(chunk: ChunkRead, name: str, data: np.ndarray, found: int | None = None) -> None:
    """Raise unless these bytes (without the stored checksum) are the ones that were saved; ``found``: their crc32c."""
    found = crc32c(data) if found is None else found
    if found != chunk.crc32c:
        raise CorruptionError(
            f'Leaf "{name}", chunk {chunk.index}: the bytes at '
            f"{chunk.file}[{chunk.offset}:{chunk.offset + chunk.length}] have crc32c {found:08x}, the checkpoint "
            f"recorded {chunk.crc32c:08x} when it was saved. The stored chunk is damaged or was replaced: restore "
            "another checkpoint, or the other leaves of this one (only=...)."
        )


def _runs(chunks: Sequence[ChunkRead], run_bytes: int, cheap_reads: bool) -> Iterator[list[ChunkRead]]:
    run: list[ChunkRead] = []
    for chunk in chunks:
        if run:
            last = run[-1]
            gap = chunk.offset - (last.offset + last.length)
            fits = chunk.offset + chunk.length - run[0].offset <= run_bytes
            most = GAP_BYTES
            if cheap_reads:
                most = min(max((last.offset - run[0].offset) // 50, PADDING_BYTES), GAP_BYTES)
            if chunk.file != last.file or not 0 <= gap <= most or not fits:
                yield run
                run = []
        run.append(chunk)
    if run:
        yield run


def _read_run(
    reader: Reader,
    run: list[ChunkRead],
    leaves: dict[int, LeafRead],
    block_bytes: int,
    sink: Callable[[ChunkRead, np.ndarray], None] | None,
) -> int:
    first, last = run[0], run[-1]
    if sink is None and len(run) == 1 and (direct := _direct_target(first, leaves[first.leaf])) is not None:
        found = _fetch_blocks(reader, first, leaves[first.leaf].name, direct, block_bytes)
        check(first, leaves[first.leaf].name, direct, found)
        _scatter(leaves[first.leaf], first.index, direct.view(leaves[first.leaf].dtype), skip_first=True)
        return len(direct)
    size = last.offset + last.length - first.offset
    with ARENA.borrow(size) as buffer:
        _fetch(reader, first, leaves[first.leaf].name, buffer[:size])
        for chunk in run:
            leaf = leaves[chunk.leaf]
            start = chunk.offset - first.offset
            data = buffer[start : start + chunk.length - 4]
            check(chunk, leaf.name, data)
            if sink is None:
                deliver(leaf, chunk.index, data)
            else:
                sink(chunk, data)
    return size


def deliver(leaf: LeafRead, index: int, data: np.ndarray) -> None:
    """Put the checked bytes of one chunk into all targets of its leaf."""
    if leaf.decode is not None:
        size = int(np.prod(leaf.chunk, dtype=np.int64)) * leaf.dtype.itemsize
        data = np.frombuffer(leaf.decode(data, size), np.uint8)
    _scatter(leaf, index, data.view(leaf.dtype))


def _fetch(reader: Reader, chunk: ChunkRead, name: str, out: np.ndarray, skip: int = 0) -> None:
    try:
        reader.read_into(chunk.file, chunk.offset + skip, out)
    except (NotFoundError, CorruptionError) as error:
        raise CorruptionError(f'Leaf "{name}", chunk {chunk.index}: {error}') from error


def _fetch_blocks(reader: Reader, chunk: ChunkRead, name: str, out: np.ndarray, block_bytes: int) -> int:
    """Read a chunk; returns its crc32c, taken of each block while it is in the cache."""
    crc = 0
    for start in range(0, len(out), block_bytes):
        block = out[start : start + block_bytes]
        _fetch(reader, chunk, name, block, start)
        crc = crc32c(block, crc)
    return crc


def _direct_target(chunk: ChunkRead, leaf: LeafRead) -> np.ndarray | None:
    """The contiguous bytes of the first target if the whole chunk goes there as it is."""
    if chunk.length < DIRECT_BYTES or leaf.decode is not None:
        return None
    placed = _placement(leaf)(chunk.index)
    if not placed or placed[0][2] is not None:
        return None
    which, inside, _ = placed[0]
    target = leaf.targets[which].data[inside]
    return target.reshape(-1).view(np.uint8) if target.flags.c_contiguous else None


def _scatter(leaf: LeafRead, index: int, data: np.ndarray, *, skip_first: bool = False) -> None:
    chunk = data.reshape(leaf.chunk)
    for which, inside, taken in _placement(leaf)(index)[skip_first:]:
        leaf.targets[which].data[inside] = chunk if taken is None else chunk[taken]


def _placement(leaf: LeafRead):
    return _placements(tuple(target.box for target in leaf.targets), leaf.shape, leaf.chunk)


@lru_cache(maxsize=1024)
def _placements(boxes: tuple[Box, ...], shape: tuple[int, ...], chunk: tuple[int, ...]):
    """chunk index -> [(target, slices of the target, slices of the chunk or None for all)]; whole chunks first."""
    grid = tuple(-(-n // c) for n, c in zip(shape, chunk, strict=True))

    @cache
    def placed(index: int) -> list[tuple[int, tuple[slice, ...], tuple[slice, ...] | None]]:
        place = tuple(int(i) for i in np.unravel_index(index, grid)) if grid else ()
        held = cell_box(place, chunk, shape)
        found = []
        for which, box in enumerate(boxes):
            both = intersect(box, held)
            if both is not None:
                complete = both == held and held.shape == chunk
                found.append((which, both.slices(box.start), None if complete else both.slices(held.start)))
        return sorted(found, key=lambda f: f[2] is not None)

    return placed
