"""Plan a restore over several processes: every stored chunk is read once, by one of the processes that need it.

Source: ByteCheckpoint (NSDI 2025), section 4.1, redundant-read elimination: data-parallel peers read disjoint parts
and pass them on. Here the parts are chunks, the plan is computed alone by every process, and it holds for any pair of
shardings, replicated or not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jax.sharding import Sharding

from jaxckpt.core.box import Box
from jaxckpt.plan.save import chunks_of_box
from jaxckpt.plan.shards import layout_of

Groups = tuple[tuple[int, ...], ...]  # processes that exchange among themselves


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sharing:
    """Who needs which chunks of one array.

    ``needs`` is bool [chunks, processes]. ``groups`` partitions the processes so that no chunk is needed in two
    groups, in equal sizes; where no finer partition has this, it is one group of all.
    """

    needs: np.ndarray
    groups: Groups


@lru_cache(maxsize=4096)
def sharing(
    wanted: tuple[tuple[Sharding, tuple[int, ...]], ...], shape: tuple[int, ...], chunk: tuple[int, ...], processes: int
) -> Sharing:
    """Who needs the chunks of an array of this shape, wanted in these (sharding, shape) forms."""
    grid = tuple(-(-n // c) for n, c in zip(shape, chunk, strict=True))
    needs = np.zeros((int(np.prod(grid, dtype=np.int64)), processes), bool)
    for target, target_shape in wanted:
        layout = layout_of(target, target_shape)
        for row in range(len(layout.lo)):
            lo = np.minimum(layout.lo[row], shape)
            hi = np.minimum(layout.hi[row], shape)
            touched = chunks_of_box(Box(tuple(lo.tolist()), tuple((hi - lo).tolist())), chunk, grid)
            holders = layout.holders[row]
            needs[np.ix_(touched, holders[holders >= 0])] = True
    return Sharing(needs=needs, groups=_groups(needs))


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


def _groups(needs: np.ndarray) -> Groups:
    processes = needs.shape[1]
    everyone = (tuple(range(processes)),)
    shared = np.unique(needs[needs.sum(axis=1) > 1], axis=0)
    if not len(shared):
        return everyone
    # Processes that share a chunk belong together, and so do those that share one with either of them.
    label = np.arange(processes)
    for row in shared:
        members = np.isin(label, label[row])
        label[members] = label[row].min()
    found: dict[int, list[int]] = {}
    for process, name in enumerate(label.tolist()):
        found.setdefault(name, []).append(process)
    groups = tuple(tuple(members) for members in found.values())
    return groups if len({len(group) for group in groups}) == 1 else everyone
