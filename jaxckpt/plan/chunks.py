"""Choose the chunk grid of an array: small enough to share and to check, large enough to be cheap.

A chunk lies in one process's box, so no two processes ever write one chunk. Where blocks of single devices are large,
chunks are pieces of them, cut along the first dimensions so that each is contiguous in its shard; where they are
small, one chunk spans all that the process holds.
"""

import math
from dataclasses import dataclass

from jaxckpt.plan.shards import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRule:
    """Sizes in bytes. ``largest`` bounds a chunk; below ``smallest`` blocks of devices are merged."""

    smallest: int = 512 * 1024
    largest: int = 1024 * 1024
    pieces: int = 256  # a process's part of a very large array is cut into about this many chunks ...
    ceiling: int = 8 * 1024 * 1024  # ... of at most this size


DEFAULT_RULE = ChunkRule()


def chunk_shape(
    layout: Layout, itemsize: int, *, rule: ChunkRule = DEFAULT_RULE, largest: int | None = None
) -> tuple[int, ...]:
    """The chunk extents for an array of this layout. ``largest`` tightens the rule for one leaf (for balance)."""
    if not all(layout.shape):
        return tuple([max(n, 1) for n in layout.shape])
    cell, block = layout.cell, layout.block
    start = block if itemsize * math.prod(block) >= rule.smallest and _divides(block, cell, layout.shape) else cell
    limit = min(max(rule.largest, itemsize * math.prod(start) // rule.pieces), rule.ceiling)
    if largest is not None:
        limit = min(limit, max(largest, itemsize))
    return start if itemsize * math.prod(start) <= limit else _cut(start, layout.shape, itemsize, limit)


def _cut(extent: tuple[int, ...], shape: tuple[int, ...], itemsize: int, limit: int) -> tuple[int, ...]:
    """Cut along the first dimensions until a chunk fits the limit."""
    chunk = list(extent)
    for d in range(len(chunk)):
        size = itemsize * math.prod(chunk)
        if size <= limit:
            break
        at_most = max(limit // (size // chunk[d]), 1)
        part = _largest_part(chunk[d], at_most, may_overhang=chunk[d] == shape[d])
        # A prime extent has no useful part: leave it whole and cut the next dimension instead.
        if part * 4 >= at_most or d == len(chunk) - 1:
            chunk[d] = part
    return tuple(chunk)


def _largest_part(extent: int, at_most: int, *, may_overhang: bool) -> int:
    """A part size <= at_most that divides ``extent``, or nearly so where the last part may overhang the array."""
    if may_overhang:
        parts = -(-extent // at_most)
        even = -(-extent // parts)
        if parts * even - extent <= extent // 64:
            return even
    return next(part for part in range(min(at_most, extent), 0, -1) if extent % part == 0)


def _divides(block: tuple[int, ...], cell: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return all(b and (c % b == 0 or (b == n and c == n)) for b, c, n in zip(block, cell, shape, strict=True))
