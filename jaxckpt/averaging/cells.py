"""How stored leaves are cut for summing: in whole chunks of every source, so that none is read and decoded twice."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from jaxckpt.averaging.plan import Sum
from jaxckpt.averaging.sources import chunk_of, is_foreign
from jaxckpt.checkpoint.source import Source
from jaxckpt.core.box import Box, cell_box, intersect

Shape = tuple[int, ...]
LARGEST_CELL_BYTES = 8 * 1024 * 1024  # of one source, where no stored chunk is larger


def cells(one: Sum, boxes: Sequence[Box], sources: Sequence[Source]) -> Iterator[list[Box]]:
    """The parts of the boxes, grouped by the cell that they lie in.

    What TensorStore reads is one box around them: it decodes a chunk for each box that is asked for.
    """
    if not all(one.shape):
        return
    cell = cell_shape(one, sources)
    by_box = any(is_foreign(sources[k]) for k in one.sources)
    grid = tuple(-(-n // c) for n, c in zip(one.shape, cell, strict=True))
    for index in np.ndindex(*grid):
        held = cell_box(index, cell, one.shape)
        parts = list(dict.fromkeys(both for box in boxes if (both := intersect(box, held)) is not None))
        if parts:
            yield [_around(parts)] if by_box else parts


def cell_shape(one: Sum, sources: Sequence[Source]) -> Shape:
    """A multiple of the chunks of all sources, if that is not too large; else their largest chunk."""
    itemsize = max(dtype.itemsize for dtype in one.dtypes)
    known = (chunk_of(sources[k], leaf) for k, leaf in zip(one.sources, one.leaves, strict=True))
    chunks = {tuple(map(min, chunk, one.shape)) for chunk in known if chunk is not None}
    if not chunks:
        return _cut(one.shape, itemsize)
    largest = max(chunks, key=lambda chunk: (math.prod(chunk), chunk))
    most = max(LARGEST_CELL_BYTES, math.prod(largest) * itemsize)
    dimensions = list(zip(*chunks, strict=True))
    multiple = tuple(min(math.lcm(*sizes), n) for sizes, n in zip(dimensions, one.shape, strict=True))
    cover = tuple(max(sizes) for sizes in dimensions)
    return next((cell for cell in (multiple, cover) if math.prod(cell) * itemsize <= most), largest)


def _cut(shape: Shape, itemsize: int) -> Shape:
    """A part along the first dimensions: of trees in memory any part costs the same."""
    cell = list(shape)
    for d in range(len(cell)):
        size = math.prod(cell) * itemsize
        if size <= LARGEST_CELL_BYTES:
            break
        cell[d] = max(cell[d] * LARGEST_CELL_BYTES // size, 1)
    return tuple(cell)


def _around(boxes: Sequence[Box]) -> Box:
    start = tuple(map(min, zip(*(box.start for box in boxes), strict=True)))
    stop = tuple(map(max, zip(*(box.stop for box in boxes), strict=True)))
    return Box(start, tuple(b - a for a, b in zip(start, stop, strict=True)))
