"""Boxes: rectangular regions of an array, the one geometry kernel."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """The elements ``start[d] <= index[d] < start[d] + shape[d]`` in every dimension ``d``."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def stop(self) -> tuple[int, ...]:
        """One past the last index in every dimension."""
        return tuple(a + n for a, n in zip(self.start, self.shape, strict=True))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def slices(self, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
        """The box as slices of an array whose first element is at ``origin`` (default: zeros)."""
        if origin is None:
            return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))
        return tuple(slice(a - o, a - o + n) for a, n, o in zip(self.start, self.shape, origin, strict=True))


def whole(shape: Sequence[int]) -> Box:
    """The box of all elements of an array of this shape."""
    return Box((0,) * len(shape), tuple(shape))


def from_index(index: Sequence[slice] | None, shape: Sequence[int]) -> Box:
    """The box of a tuple of slices, as JAX shardings give them (``slice(None)`` is the whole dimension)."""
    start, extent = [], []
    for piece, size in zip(index or (), shape, strict=True):
        lo, hi, _ = piece.indices(size)
        start.append(lo)
        extent.append(max(hi - lo, 0))
    return Box(tuple(start), tuple(extent))


def intersect(a: Box, b: Box) -> Box | None:
    """The elements in both boxes, or None where there are none. Two 0-d boxes share their one element."""
    start, shape = [], []
    for a0, an, b0, bn in zip(a.start, a.shape, b.start, b.shape, strict=True):
        lo, hi = max(a0, b0), min(a0 + an, b0 + bn)
        if hi <= lo:
            return None
        start.append(lo)
        shape.append(hi - lo)
    return Box(tuple(start), tuple(shape))


def contains(outer: Box, inner: Box) -> bool:
    """Whether every element of ``inner`` is in ``outer``."""
    return all(
        o0 <= i0 and i0 + n <= o0 + on
        for o0, on, i0, n in zip(outer.start, outer.shape, inner.start, inner.shape, strict=True)
    )


def grid_cells(box: Box, cell: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Indices of the cells of a regular grid (cell extents ``cell``, origin zero) that ``box`` touches."""
    ranges = [
        range(a // c, -(-(a + n) // c)) if n else range(0) for a, n, c in zip(box.start, box.shape, cell, strict=True)
    ]
    return _product(ranges)


def cell_box(index: Sequence[int], cell: Sequence[int], shape: Sequence[int]) -> Box:
    """The box of one grid cell, cut at the array's edge."""
    start = tuple(i * c for i, c in zip(index, cell, strict=True))
    return Box(start, tuple(min(c, n - a) for a, c, n in zip(start, cell, shape, strict=True)))


def _product(ranges: list[range]) -> Iterator[tuple[int, ...]]:
    if not ranges:
        yield ()
        return
    for first in ranges[0]:
        for rest in _product(ranges[1:]):
            yield (first, *rest)
