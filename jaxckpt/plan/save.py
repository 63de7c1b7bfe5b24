"""Plan a save: which chunks of which leaves does each process write?

Every process runs this on the same shardings and gets the same answer, so nothing is communicated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Sharding

from jaxckpt.core.box import Box
from jaxckpt.plan.balance import share
from jaxckpt.plan.chunks import DEFAULT_RULE, ChunkRule, chunk_shape
from jaxckpt.plan.shards import Layout, layout_of

SMALLEST_SPLIT = 1024  # bytes; a replicated leaf is not split below this for the sake of balance


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """What planning needs to know of an array: ``dtype`` size in bytes, shape, sharding (None: host memory)."""

    shape: tuple[int, ...]
    itemsize: int
    sharding: Sharding | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SavePlan:
    """Chunk shape and grid of every array, this process's chunks, and the bytes every process writes.

    ``mine[i]`` holds the linear (C-order) grid indices of the chunks of array ``i`` that this process writes.
    """

    chunks: tuple[tuple[int, ...], ...]
    grids: tuple[tuple[int, ...], ...]
    chunk_bytes: tuple[int, ...]
    mine: tuple[np.ndarray, ...]
    load_bytes: np.ndarray


def plan_save(
    specs: Sequence[ArraySpec],
    *,
    rank: int = 0,
    processes: int = 1,
    devices_per_process: int = 1,
    rule: ChunkRule = DEFAULT_RULE,
) -> SavePlan:
    """Plan the save of these arrays for process ``rank``.

    Example:
        >>> plan = plan_save([ArraySpec(shape=(4, 4), itemsize=4, sharding=None)])
        >>> plan.chunks, plan.mine[0].tolist()
        (((4, 4),), [0])
    """
    layouts = [layout_of(s.sharding, s.shape, devices_per_process=devices_per_process) for s in specs]
    # A replicated leaf may be cut finer than others so that no process writes much more than its share.
    share_bytes = sum([math.prod(s.shape) * s.itemsize for s in specs]) // (50 * processes)
    chunks, grids, sizes = [], [], []
    for spec, layout in zip(specs, layouts, strict=True):
        replicated = layout.holders.shape[1] > 1
        largest = max(share_bytes, SMALLEST_SPLIT) if replicated else None
        chunk = chunk_shape(layout, spec.itemsize, rule=rule, largest=largest)
        chunks.append(chunk)
        grids.append(tuple([-(-n // c) for n, c in zip(spec.shape, chunk, strict=True)]))
        sizes.append(math.prod(chunk) * spec.itemsize)

    loads = np.zeros(processes, np.int64)
    mine: list[np.ndarray] = [_NONE] * len(specs)
    for i in sorted(range(len(specs)), key=lambda i: (layouts[i].holders.shape[1] > 1, -sizes[i])):
        if 0 in specs[i].shape:
            continue
        if processes == 1:
            mine[i] = np.arange(int(np.prod(grids[i], dtype=np.int64)))
            loads[0] += len(mine[i]) * sizes[i]
            continue
        mine[i] = _mine(layouts[i], chunks[i], grids[i], sizes[i], loads, rank)
    return SavePlan(
        chunks=tuple(chunks), grids=tuple(grids), chunk_bytes=tuple(sizes), mine=tuple(mine), load_bytes=loads
    )


def chunks_of_box(box: Box, chunk: Sequence[int], grid: Sequence[int]) -> np.ndarray:
    """Linear indices of the chunks that a box touches, ascending."""
    if not grid:
        return np.zeros(1, np.int64)
    linear = np.zeros(1, np.int64)
    for a, n, c, g in zip(box.start, box.shape, chunk, grid, strict=True):
        if n == 0:
            return _NONE
        linear = (linear[:, None] * g + np.arange(a // c, -(-(a + n) // c))[None, :]).reshape(-1)
    return linear


_NONE = np.zeros(0, np.int64)


def _mine(
    layout: Layout, chunk: tuple[int, ...], grid: tuple[int, ...], chunk_bytes: int, loads: np.ndarray, rank: int
) -> np.ndarray:
    extent = np.array(chunk, np.int64)
    counts = np.prod(-(-layout.hi // extent) - layout.lo // extent, axis=1, dtype=np.int64)
    given = share(loads, layout.holders, counts, chunk_bytes)
    parts = []
    for row, column in zip(*np.nonzero((layout.holders == rank) & (given > 0)), strict=True):
        lo, hi = layout.lo[row], layout.hi[row]
        held = chunks_of_box(Box(tuple(lo.tolist()), tuple((hi - lo).tolist())), chunk, grid)
        first = int(given[row, :column].sum())
        parts.append(held[first : first + int(given[row, column])])
    return np.concatenate(parts) if parts else _NONE
