"""Sum stored leaves on the host, bucket by bucket, straight into the memory of the results.

A bucket is a flat row of elements per source, packed from pieces of one or many leaves. Two workers each take a bucket,
read its rows, have XLA sum them, and put the sums where they belong: one reads while the other sums. Memory beyond the
results: a slot of rows for each worker, and the accumulators of its bucket. A stored chunk is read once, so one that is
larger than a slot is a bucket of its own, and its sources are added one after the other.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from itertools import chain
from threading import Lock
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxckpt.averaging.cells import cells
from jaxckpt.averaging.kernel import split_weights
from jaxckpt.averaging.plan import Sum
from jaxckpt.averaging.reading import Destination
from jaxckpt.averaging.rows import ROW_GAP_BYTES, added_sums, packed, rounded_sums, staged_out, viewed
from jaxckpt.checkpoint.source import Source
from jaxckpt.core.box import Box, intersect
from jaxckpt.core.dtypes import is_packed, mover
from jaxckpt.core.errors import CheckpointError
from jaxckpt.transfer.arena import aligned
from jaxckpt.transfer.upload import Target

BUCKET_BYTES = 1024 * 1024  # of one source; a larger stored chunk makes a larger bucket
WORKERS = 2
SLOT_BYTES = 24 * 1024 * 1024  # rows of all sources that are read together, of a worker; twice that for P > 1
LARGE_ELEMENTS = 1024 * 1024  # rows above are padded by an eighth at most, others to a power of two
ALONE_BYTES = 128 * 1024 * 1024  # a bucket whose row and sums are larger, as of a large chunk, is summed alone


class Piece(NamedTuple):
    """A box of one leaf, and its place in the row of a bucket."""

    job: "Job"
    box: Box
    offset: int


@dataclass(slots=True, eq=False)
class Job:
    """One leaf on its way: P destinations, open from its first piece to its last."""

    sum: Sum
    destinations: list[Destination]
    boxes: tuple[Box, ...]
    targets: list[dict[Box, list[np.ndarray]]] = field(default_factory=list)
    left: int = 0  # pieces not written yet
    listed: bool = False  # all pieces are known


class Bucket(NamedTuple):
    """Pieces of leaves that have the same sources, dtypes and weights: those of ``sum``."""

    sum: Sum
    pieces: list[Piece]
    used: int  # elements of a row
    elements: int  # of a row, padding included


@dataclass(slots=True, eq=False)
class Slot:
    """Memory for the rows of one bucket, and the array for XLA that has adopted it."""

    memory: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    adopted: tuple[Any, jax.Array] | None = None


def stream_sums(
    sources: Sequence[Source],
    sums: Sequence[Sum],
    open_destinations: Callable[[Sum], tuple[list[Destination], tuple[Box, ...]]],
    close: Callable[[Sum, list[Destination]], None],
    *,
    how: str,
) -> dict[int, int]:
    """Sum all of these; returns the bytes read by source.

    ``open_destinations`` gives P destinations and the boxes that they hold; ``close`` gets them filled.
    """
    stores = [getattr(source, "store", None) for source in sources]
    threads = min(max(getattr(store, "parallel_io", 2) for store in stores), 16)
    buckets = chain.from_iterable(_buckets(group, sources, open_destinations) for group in _alike(sums))
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="jaxckpt-average-read") as readers,
        ThreadPoolExecutor(WORKERS, thread_name_prefix="jaxckpt-average") as workers,
    ):
        stream = _Stream(sources, buckets, close, how, readers, threads)
        try:
            for done in as_completed([workers.submit(stream.work) for _ in range(WORKERS)]):
                done.result()
        finally:
            stream.is_stopped = True
    return stream.read_bytes


def _alike(sums: Sequence[Sum]) -> list[list[Sum]]:
    groups: dict[Any, list[Sum]] = {}
    for one in sums:
        groups.setdefault((one.sources, one.dtypes, one.dtype, one.weights.tobytes()), []).append(one)
    return list(groups.values())


def _buckets(
    sums: Sequence[Sum],
    sources: Sequence[Source],
    open_destinations: Callable[[Sum], tuple[list[Destination], tuple[Box, ...]]],
) -> Iterator[Bucket]:
    itemsize = max(dtype.itemsize for dtype in sums[0].dtypes)
    capacity = BUCKET_BYTES // itemsize
    pieces: list[Piece] = []
    used = 0
    for one in sums:
        destinations, boxes = open_destinations(one)
        job = Job(one, destinations, boxes)
        for together in cells(one, boxes, sources):
            size = sum(box.size for box in together)
            if pieces and used + size > capacity:
                yield Bucket(sums[0], pieces, used, max(capacity, _padded(used)))
                pieces, used = [], 0
            for box in together:
                pieces.append(Piece(job, box, used))
                used += box.size
                job.left += 1
        job.listed = True
        if not job.left:  # an empty array, or one that lies on other processes
            pieces.append(Piece(job, Box((0,) * len(one.shape), (0,) * len(one.shape)), used))
            job.left = 1
    if pieces:
        yield Bucket(sums[0], pieces, used, _padded(used))


def _padded(elements: int) -> int:
    """Few sizes, so few compilations."""
    step = max(1 << (elements.bit_length() - 4), 256) if elements > LARGE_ELEMENTS else 0
    return -(-elements // step) * step if step else max(1 << max(elements - 1, 0).bit_length(), 256)


class _Stream:
    """What the workers share."""

    def __init__(
        self,
        sources: Sequence[Source],
        buckets: Iterator[Bucket],
        close: Callable[[Sum, list[Destination]], None],
        how: str,
        readers: ThreadPoolExecutor,
        threads: int,
    ) -> None:
        self.sources, self.buckets, self.close, self.how = sources, buckets, close, how
        self.readers, self.threads = readers, threads
        self.read_bytes: dict[int, int] = {}
        self.parts: dict[Any, jax.Array] = {}  # weights, on the device
        self.cpu = jax.local_devices(backend="cpu")[0]
        self.lock = Lock()  # of the buckets, the jobs and the bytes read
        self.alone, self.large = Lock(), Slot()
        self.is_stopped = False  # a worker has failed, or the caller was interrupted

    def work(self) -> None:
        """Take one bucket after the other until there is none left."""
        slot = Slot()
        with jax.enable_x64(True):  # a setting of each thread
            while not self.is_stopped:
                with self.lock:
                    bucket = next(self.buckets, None)
                if bucket is None:
                    return
                row = max(dtype.itemsize for dtype in bucket.sum.dtypes) + 8 * len(bucket.sum.weights)
                if bucket.elements * row > ALONE_BYTES:
                    with self.alone:
                        self._put_sums(bucket, self.large)
                else:
                    self._put_sums(bucket, slot)

    def _put_sums(self, bucket: Bucket, slot: Slot) -> None:
        sums: Any = None
        groups = _groups(bucket.sum, bucket.elements)
        for group in groups:
            rows = self._read(slot, bucket, group)
            if self.is_stopped:
                return
            sums = self._summed(bucket, group, slot, rows, sums, is_last=group is groups[-1])
            jax.block_until_ready(sums)  # the rows are read by nothing any more
        self._write(bucket, sums)

    def _read(self, slot: Slot, bucket: Bucket, group: Sequence[int]) -> np.ndarray:
        """Rows of these sources, with what lies between them."""
        one = bucket.sum
        dtype = one.dtypes[group[0]]
        size = len(group) * (bucket.elements * dtype.itemsize + ROW_GAP_BYTES)
        if slot.memory.nbytes < size:
            slot.adopted, slot.memory = None, np.zeros(0, np.uint8)  # never both
            slot.memory = aligned(size)
        rows = slot.memory[:size].view(mover(dtype)).reshape(len(group), -1)
        rows[:, bucket.used :] = 0  # what lay there may be NaN, which jax_debug_nans would tell of
        wanted = []
        for row, k in zip(rows, group, strict=True):
            targets: dict[int, tuple[Target, ...]] = {}
            for piece in bucket.pieces:
                leaf = piece.job.sum.leaves[k]
                data = row[piece.offset : piece.offset + piece.box.size].reshape(piece.box.shape)
                if piece.box.size:
                    targets[leaf] = (*targets.get(leaf, ()), Target(piece.box, data))
            wanted.append((one.sources[k], targets))
        if self.threads <= WORKERS:
            found = [self._fill(wanted)]
        else:
            count = min(self.threads, len(wanted))
            futures = [self.readers.submit(self._fill, wanted[i::count]) for i in range(count)]
            wait(futures)  # also where one has failed: none writes to the slot any more
            found = [future.result() for future in futures]
        with self.lock:
            for source, size in chain.from_iterable(each.items() for each in found):
                self.read_bytes[source] = self.read_bytes.get(source, 0) + size
        return rows

    def _fill(self, wanted: Sequence[tuple[int, dict[int, tuple[Target, ...]]]]) -> dict[int, int]:
        """Read rows of several sources, one after the other; the bytes read by source."""
        found: dict[int, int] = {}
        for source, targets in wanted:
            if self.is_stopped:
                break
            try:
                found[source] = found.get(source, 0) + self.sources[source].fill(targets)
            except CheckpointError as error:
                error.add_note(f"While averaging {self.sources[source].url}, source {source} of {len(self.sources)}.")
                raise
        return found

    def _summed(
        self, bucket: Bucket, group: Sequence[int], slot: Slot, rows: np.ndarray, sums: Any, *, is_last: bool
    ) -> Any:
        """``sums`` and these rows; of the last rows, the results."""
        one = bucket.sum
        dtype = one.dtypes[group[0]]
        words = dtype.name == "bfloat16" and len(set(one.dtypes)) == 1 and self.how == "float64"
        data, doubled = viewed(rows, dtype, words)
        key = (one.weights.tobytes(), tuple(group))
        if key not in self.parts:
            self.parts[key] = jax.device_put(split_weights(one.weights[:, list(group)]), self.cpu)
        staged = self._staged(slot, data)
        size = data.shape[1] * bucket.elements // rows.shape[1]
        program = rounded_sums if is_last else added_sums
        out = staged_out(one.dtype, doubled=doubled) if is_last else None
        used = not one.weights.all()  # each of P results has sources of its own
        return program(staged, self.parts[key], sums, size=size, how=self.how, words=words, used=used, out=out)

    def _staged(self, slot: Slot, data: np.ndarray) -> jax.Array:
        """The rows for XLA, which adopts the memory of a slot: the array of one step serves the next, too."""
        key = (data.ctypes.data, data.shape, data.dtype)
        if slot.adopted is None or slot.adopted[0] != key:
            array = jax.device_put(data, self.cpu, may_alias=True)
            if array.unsafe_buffer_pointer() != data.ctypes.data:
                return array  # copied, so it holds this step's rows alone
            slot.adopted = (key, array)
        return slot.adopted[1]

    def _write(self, bucket: Bucket, found: Any) -> None:
        """Put the results where they belong, and hand on the leaves that are whole."""
        dtype = bucket.sum.dtype
        array = packed(np.asarray(found), dtype) if is_packed(dtype) else np.asarray(found).view(dtype)
        array = array.view(mover(dtype))
        with self.lock:
            for job in {id(piece.job): piece.job for piece in bucket.pieces}.values():
                if not job.targets:
                    job.targets = [_by_box(destination.targets()) for destination in job.destinations]
        for p in range(array.shape[1]):
            _put(bucket.pieces, array, p)
        whole = []
        with self.lock:
            for piece in bucket.pieces:
                piece.job.left -= 1
                if piece.job.listed and not piece.job.left:
                    whole.append(piece.job)
        for job in whole:
            self.close(job.sum, job.destinations)
            job.targets, job.destinations = [], []


def _put(pieces: list[Piece], blocks: np.ndarray, p: int) -> None:
    """The elements of one result, from the blocks of a bucket [B, P, elements] to where they belong."""
    data = blocks[:, p].reshape(-1)
    for piece in pieces:
        if not piece.box.size:
            continue
        part = data[piece.offset : piece.offset + piece.box.size].reshape(piece.box.shape)
        for box, places in piece.job.targets[p].items():
            both = intersect(box, piece.box)
            if both is not None:
                for place in places:
                    place[both.slices(box.start)] = part[both.slices(piece.box.start)]


def _groups(one: Sum, elements: int) -> list[list[int]]:
    """The sources in runs of one dtype that fit a slot, of about equal length."""
    runs: list[list[int]] = []
    for k, dtype in enumerate(one.dtypes):
        if runs and one.dtypes[runs[-1][-1]] == dtype:
            runs[-1].append(k)
        else:
            runs.append([k])
    groups = []
    for run in runs:
        # The accumulators of P results cost more than their rows: rather no second group.
        slot_bytes = SLOT_BYTES * (2 if len(one.weights) > 1 else 1)
        most = max(min(slot_bytes // (elements * one.dtypes[run[0]].itemsize), 32), 1)
        parts = -(-len(run) // most)
        size = -(-len(run) // parts)
        groups += [run[i : i + size] for i in range(0, len(run), size)]
    return groups


def _by_box(targets: Sequence[Target]) -> dict[Box, list[np.ndarray]]:
    found: dict[Box, list[np.ndarray]] = {}
    for target in targets:
        found.setdefault(target.box, []).append(target.data)
    return found
