"""Plan a save: which chunks of which leaves does each process write?

Every process runs this on the same shardings and gets the same answer, so nothing is communicated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    # A replicated leaf may be cut finer than others so that no process writes much more than its share.
    share_bytes = sum([math.prod(s.shape) * s.itemsize for s in specs]) // (50 * processes)
    forms: dict[ArraySpec, _Form] = {}  # most leaves of a model are alike
    for spec in specs:
        if spec not in forms:
            layout = layout_of(spec.sharding, spec.shape, devices_per_process=devices_per_process)
            largest = max(share_bytes, SMALLEST_SPLIT) if layout.holders.shape[1] > 1 else None
            chunk = chunk_shape(layout, spec.itemsize, rule=rule, largest=largest)
            grid = tuple([-(-n // c) for n, c in zip(spec.shape, chunk, strict=True)])
            chunks_alone = np.arange(math.prod(grid)) if processes == 1 else _NONE
            is_own = spec.sharding is not None and len(np.unique(layout.holders)) == 1
            forms[spec] = _Form(layout, chunk, grid, math.prod(chunk) * spec.itemsize, chunks_alone, is_own)
    found = [forms[spec] for spec in specs]

    loads = np.zeros(processes, np.int64)
    # An array on devices of one process may be that process's own, with another in its place on each of the others:
    # it must not move what all agree upon.
    own_loads = np.zeros(processes, np.int64)
    mine: list[np.ndarray] = [_NONE] * len(specs)
    for i in sorted(range(len(specs)), key=lambda i: (found[i].layout.holders.shape[1] > 1, -found[i].chunk_bytes)):
        if 0 in specs[i].shape:
            continue
        form = found[i]
        if processes == 1:
            mine[i] = form.chunks_alone
            loads[0] += len(mine[i]) * form.chunk_bytes
            continue
        load = own_loads if form.is_own else loads
        mine[i] = _mine(form.layout, form.chunk, form.grid, form.chunk_bytes, load, rank)
    return SavePlan(
        chunks=tuple([form.chunk for form in found]),
        grids=tuple([form.grid for form in found]),
        chunk_bytes=tuple([form.chunk_bytes for form in found]),
        mine=tuple(mine),
        load_bytes=loads + own_loads,
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


class _Form(NamedTuple):
    """What arrays of one spec have in common."""

    layout: Layout
    chunk: tuple[int, ...]
    grid: tuple[int, ...]
    chunk_bytes: int
    chunks_alone: np.ndarray  # of the only process
    is_own: bool  # on devices of one process


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
