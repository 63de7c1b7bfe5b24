"""Sum stored leaves on the host, bucket by bucket, straight into the memory of the results.

A bucket is a flat row of elements per source, packed from pieces of one or many leaves. Two workers each take a bucket,
read its rows, have XLA sum them, and put the sums where they belong: one reads while the other sums. Memory beyond the
results: a slot of rows for each worker, and the accumulators of its bucket. A stored chunk is read once, so one that is
larger than a slot is a bucket of its own, and its sources are added one after the other.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from itertools import chain, repeat
from threading import Lock
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxckpt.averaging.cells import cells
from jaxckpt.averaging.kernel import split_weights
from jaxckpt.averaging.plain import are_plain, plain_sums
from jaxckpt.averaging.plan import Sum
from jaxckpt.averaging.reading import Destination
from jaxckpt.averaging.rows import ROW_GAP_BYTES, add_rows, add_words, staged_out, viewed
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
ALONE_BYTES = 64 * 1024 * 1024  # larger rows, as of a large chunk of another library, are those of one worker at a time


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
    """Pieces of leaves that have the same sources, dtypes and weights."""

    pieces: list[Piece]
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
    plain: bool,
) -> dict[int, int]:
    """Sum all of these; returns the bytes read by source.

    ``open_destinations`` gives P destinations and the boxes that they hold; ``close`` gets them filled. ``plain`` lets
    numpy sum what is over before a program is compiled; the results are the same.
    """
    stores = [getattr(source, "store", None) for source in sources]
    threads = min(max(getattr(store, "parallel_io", 2) for store in stores), 16)
    plain = plain and are_plain(sums)
    items = chain.from_iterable(
        zip(repeat(group[0]), _buckets(group, sources, open_destinations), strict=False) for group in _alike(sums)
    )
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="jaxckpt-average-read") as readers,
        ThreadPoolExecutor(WORKERS, thread_name_prefix="jaxckpt-average") as workers,
    ):
        stream = _Stream(sources, items, close, how, plain, readers, max(threads // WORKERS, 1))
        try:
            if plain:
                stream.work()
            else:
                for done in as_completed([workers.submit(stream.work) for _ in range(WORKERS)]):
                    done.result()
        finally:
            stream.stop()
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
                yield Bucket(pieces, capacity if used <= capacity else _padded(used))
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
        yield Bucket(pieces, min(capacity, _padded(used)) if used <= capacity else _padded(used))


def _padded(elements: int) -> int:
    """Few sizes, so few compilations."""
    step = max(1 << (elements.bit_length() - 4), 256) if elements > LARGE_ELEMENTS else 0
    return -(-elements // step) * step if step else max(1 << max(elements - 1, 0).bit_length(), 256)


class _Stream:
    """What the workers share."""

    def __init__(
        self,
        sources: Sequence[Source],
        items: Iterator[tuple[Sum, Bucket]],
        close: Callable[[Sum, list[Destination]], None],
        how: str,
        plain: bool,
        readers: ThreadPoolExecutor,
        at_once: int,
    ) -> None:
        self.sources, self.items, self.close, self.how, self.plain = sources, items, close, how, plain
        self.readers, self.at_once = readers, at_once
        self.read_bytes: dict[int, int] = {}
        self.parts: dict[Any, jax.Array] = {}  # weights, on the device
        self.cpu = jax.local_devices(backend="cpu")[0]
        self.lock = Lock()  # of the buckets, the jobs and the bytes read
        self.alone, self.large = Lock(), Slot()

    def work(self) -> None:
        """Take one bucket after the other until there is none left."""
        slot = Slot()
        with jax.enable_x64(True):  # a setting of each thread
            while True:
                with self.lock:
                    one, bucket = next(self.items, (None, None))
                if one is None or bucket is None:
                    return
                if bucket.elements * max(dtype.itemsize for dtype in one.dtypes) > ALONE_BYTES:
                    with self.alone:
                        self._put_sums(one, bucket, self.large)
                else:
                    self._put_sums(one, bucket, slot)

    def stop(self) -> None:
        """Begin no other bucket."""
        with self.lock:
            self.items = iter(())

    def _put_sums(self, one: Sum, bucket: Bucket, slot: Slot) -> None:
        sums: Any = None
        groups = _groups(one, bucket.elements)
        for group in groups:
            rows = self._read(slot, one, bucket, group)
            sums = self._summed(one, bucket, group, slot, rows, sums, is_last=group is groups[-1])
            jax.block_until_ready(sums)  # the rows are read by nothing any more
        self._write(bucket, sums, one.dtype)

    def _read(self, slot: Slot, one: Sum, bucket: Bucket, group: Sequence[int]) -> np.ndarray:
        """Rows of these sources, with what lies between them."""
        dtype = one.dtypes[group[0]]
        size = len(group) * (bucket.elements * dtype.itemsize + ROW_GAP_BYTES)
        if slot.memory.nbytes < size:
            slot.adopted, slot.memory = None, aligned(size)
        rows = slot.memory[:size].view(mover(dtype)).reshape(len(group), -1)
        wanted = []
        for row, k in zip(rows, group, strict=True):
            targets: dict[int, tuple[Target, ...]] = {}
            for piece in bucket.pieces:
                leaf = piece.job.sum.leaves[k]
                data = row[piece.offset : piece.offset + piece.box.size].reshape(piece.box.shape)
                if piece.box.size:
                    targets[leaf] = (*targets.get(leaf, ()), Target(piece.box, data))
            wanted.append((one.sources[k], targets))
        if self.at_once == 1:
            found = [self._fill(wanted)]
        else:
            parts = [wanted[i :: self.at_once] for i in range(self.at_once)]
            futures = [self.readers.submit(self._fill, part) for part in parts]
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
            try:
                found[source] = found.get(source, 0) + self.sources[source].fill(targets)
            except CheckpointError as error:
                error.add_note(f"While averaging {self.sources[source].url}, source {source} of {len(self.sources)}.")
                raise
        return found

    def _summed(
        self,
        one: Sum,
        bucket: Bucket,
        group: Sequence[int],
        slot: Slot,
        rows: np.ndarray,
        sums: Any,
        *,
        is_last: bool,
    ) -> Any:
        """``sums`` and these rows; of the last rows, the results."""
        dtype = one.dtypes[group[0]]
        if self.plain:
            row = rows[:, : bucket.elements].view(dtype)
            return plain_sums(row, one.weights[:, list(group)], sums, one.dtype if is_last else None)
        words = dtype.name == "bfloat16" and len(set(one.dtypes)) == 1 and self.how == "float64"
        data, doubled = viewed(rows, dtype, words)
        key = (one.weights.tobytes(), tuple(group))
        if key not in self.parts:
            self.parts[key] = jax.device_put(split_weights(one.weights[:, list(group)]), self.cpu)
        out = (one.dtype if not doubled or one.dtype.kind != "c" else np.finfo(one.dtype).dtype) if is_last else None
        staged = self._staged(slot, data)
        program = add_words if words else add_rows
        size = data.shape[1] * bucket.elements // rows.shape[1]
        return program(staged, self.parts[key], sums, size=size, how=self.how, out=staged_out(out))

    def _staged(self, slot: Slot, data: np.ndarray) -> jax.Array:
        """The rows for XLA, which adopts the memory of a slot: the array of one step serves the next, too."""
        key = (data.ctypes.data, data.shape, data.dtype)
        if slot.adopted is None or slot.adopted[0] != key:
            array = jax.device_put(data, self.cpu, may_alias=True)
            if array.unsafe_buffer_pointer() != data.ctypes.data:
                return array  # copied, so it holds this step's rows alone
            slot.adopted = (key, array)
        return slot.adopted[1]

    def _write(self, bucket: Bucket, found: Any, dtype: np.dtype) -> None:
        """Put the results where they belong, and hand on the leaves that are whole."""
        array = np.asarray(found)
        if is_packed(dtype):
            array = array.astype(dtype)
        elif array.dtype != dtype:
            array = array.view(dtype)
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
