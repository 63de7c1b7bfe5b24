"""Plan a restore over several processes: every stored chunk is read once, by one of the processes that need it.

Source: ByteCheckpoint (NSDI 2025), section 4.1, redundant-read elimination: data-parallel peers read disjoint parts
and pass them on. Here the parts are chunks, the plan is computed alone by every process, and it holds for any pair of
shardings, replicated or not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jax.sharding import Sharding

from jaxckpt.plan.shards import layout_of

Groups = tuple[tuple[int, ...], ...]  # processes that exchange among themselves


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sharing:
    """Who needs which chunks of one array.

    ``sets`` holds the distinct sets of processes, ascending, that need some chunk; ``set_of`` is int64 [chunks], the
    position of each chunk's set, -1 where no process needs it. ``groups`` partitions the processes so that no chunk is
    needed in two groups, in equal sizes; where no finer partition has this, it is one group of all.
    """

    sets: tuple[np.ndarray, ...]
    set_of: np.ndarray
    processes: int
    groups: Groups

    @property
    def needs(self) -> np.ndarray:
        """The same as bool [chunks, processes]: large where both are many."""
        found = np.zeros((len(self.sets) + 1, self.processes), bool)
        for row, members in zip(found, self.sets, strict=False):
            row[members] = True
        return found[self.set_of]  # -1: the last row, of none

    def alone(self, rank: int) -> list[int]:
        """The chunks that this process alone needs, ascending."""
        places = [i for i, members in enumerate(self.sets) if len(members) == 1 and members[0] == rank]
        return np.nonzero(np.isin(self.set_of, places))[0].tolist()

    def shared(self) -> list[tuple[int, tuple[int, ...]]]:
        """Each chunk that several processes need, ascending, and these processes."""
        members = [tuple(found.tolist()) for found in self.sets]
        return [(i, members[k]) for i, k in enumerate(self.set_of.tolist()) if k >= 0 and len(members[k]) > 1]


@lru_cache(maxsize=4096)
def sharing(
    wanted: tuple[tuple[Sharding, tuple[int, ...]], ...], shape: tuple[int, ...], chunk: tuple[int, ...], processes: int
) -> Sharing:
    """Who needs the chunks of an array of this shape, wanted in these (sharding, shape) forms.

    Chunks that touch the same boxes are needed by the same processes, and there are few such sets of boxes.
    """
    grid = tuple([-(-n // c) for n, c in zip(shape, chunk, strict=True)])
    holders: list[np.ndarray] = []  # of each box of each form
    parts = []
    for target, target_shape in wanted:
        layout = layout_of(target, target_shape)
        lo, hi = np.minimum(layout.lo, shape), np.minimum(layout.hi, shape)
        row, touched = _touched(lo, hi, chunk, grid)
        parts.append((touched, row + len(holders)))
        holders += list(layout.holders)
    chunks, boxes = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.lexsort((boxes, chunks))
    chunks, boxes = chunks[order], boxes[order]
    starts = np.nonzero(np.diff(chunks, prepend=-1))[0]
    set_of = np.full(math.prod(grid), -1, np.int64)
    by_boxes: dict[bytes, int] = {}
    by_members: dict[bytes, int] = {}
    sets: list[np.ndarray] = []
    stops = np.append(starts, len(chunks))[1:]
    for index, start, stop in zip(chunks[starts].tolist(), starts, stops, strict=True):
        key = boxes[start:stop].tobytes()
        if key not in by_boxes:
            members = np.unique(np.concatenate([holders[box] for box in boxes[start:stop]]))
            members = members[members >= 0]
            place = by_members.setdefault(members.tobytes(), len(sets))
            if place == len(sets):
                sets.append(members)
            by_boxes[key] = place
        set_of[index] = by_boxes[key]
    return Sharing(sets=tuple(sets), set_of=set_of, processes=processes, groups=_groups(sets, processes))


def split_evenly(sizes: Sequence[int], parts: int) -> list[int]:
    """The part (0 ... parts - 1) of each of these in turn, so that parts are runs of about equal size.

    Example:
        >>> split_evenly([4, 4, 4, 4, 16], 2)
        [0, 0, 0, 0, 1]
    """
    ends = np.cumsum(np.array(sizes, np.int64))
    if not len(ends):
        return []
    middles = ends - np.array(sizes) / 2
    return np.minimum(middles * parts // max(int(ends[-1]), 1), parts - 1).astype(int).tolist()


def rounds(sizes: Sequence[Sequence[int]], limit: int) -> list[list[tuple[int, int]]]:
    """Cut each process's list of chunk sizes into rounds of at most ``limit`` bytes.

    Returns, per round and process, the (first, stop) positions of its list; all processes have equally many rounds.
    """
    cuts = []
    for own in sizes:
        parts, first, total = [], 0, 0
        for place, size in enumerate(own):
            if place > first and total + size > limit:
                parts.append((first, place))
                first, total = place, 0
            total += size
        cuts.append([*parts, (first, len(own))] if len(own) > first else parts)
    count = max((len(parts) for parts in cuts), default=0)
    ends = [parts + [(len(own), len(own))] * (count - len(parts)) for parts, own in zip(cuts, sizes, strict=True)]
    return [[parts[i] for parts in ends] for i in range(count)]


def _touched(
    lo: np.ndarray, hi: np.ndarray, chunk: tuple[int, ...], grid: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """(box, chunk) of every pair that meets: the number of the box, and the linear index of the chunk."""
    box = np.nonzero((hi > lo).all(axis=1))[0]
    linear = np.zeros(len(box), np.int64)
    for axis, (extent, size) in enumerate(zip(chunk, grid, strict=True)):
        first, stop = lo[box, axis] // extent, -(-hi[box, axis] // extent)
        count = stop - first
        step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        linear = np.repeat(linear * size + first, count) + step
        box = np.repeat(box, count)
    return box, linear


def _groups(sets: Sequence[np.ndarray], processes: int) -> Groups:
    everyone = (tuple(range(processes)),)
    shared = [members for members in sets if len(members) > 1]
    if not shared:
        return everyone
    # Processes that share a chunk belong together, and so do those that share one with either of them: each takes the
    # smallest number that any of them has, until none changes.
    member = np.concatenate(shared)
    counts = np.array([len(members) for members in shared])
    starts = np.cumsum(counts) - counts
    label = np.arange(processes)
    while True:
        smallest = np.repeat(np.minimum.reduceat(label[member], starts), counts)
        found = label.copy()
        np.minimum.at(found, label[member], smallest)
        np.minimum.at(found, member, smallest)
        found = found[found]
        if np.array_equal(found, label):
            break
        label = found
    joined: dict[int, list[int]] = {}
    for process, name in enumerate(label.tolist()):
        joined.setdefault(name, []).append(process)
    groups = tuple([tuple(members) for members in joined.values()])
    return groups if len({len(group) for group in groups}) == 1 else everyone
