"""Device -> host: the parts of each array that this process writes, as host views that training cannot change.

On CPU no byte is copied: ``np.asarray`` of a shard is a view that holds a reference on the XLA buffer, and XLA refuses
to reuse a donated buffer while such a reference lives (it copies instead), so the view keeps its bytes whatever the
caller does with the array. On accelerators the copies of all shards are started before the first is awaited.
Host (numpy) arrays may be written by their owner at any time, so they are copied when ``frozen`` is asked for.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from jaxckpt.core.box import Box, intersect
from jaxckpt.plan.save import SavePlan
from jaxckpt.plan.shards import device_boxes


class Piece(NamedTuple):
    """A box of an array and its bytes on the host."""

    box: Box
    data: np.ndarray


def capture(arrays: Sequence[Any], plan: SavePlan, *, frozen: bool) -> list[list[Piece]]:
    """Host pieces that cover this process's chunks of each array.

    Args:
        arrays: jax or numpy arrays, in the order of the plan.
        plan: what this process writes.
        frozen: copy numpy arrays, so that the caller may change them afterwards.
    """
    shards = [_shards(array, plan, i) if len(plan.mine[i]) else [] for i, array in enumerate(arrays)]
    if jax.default_backend() != "cpu":
        for pieces in shards:
            for _, data in pieces:
                if isinstance(data, jax.Array):
                    data.copy_to_host_async()
    return [
        [Piece(box, np.asarray(data) if isinstance(data, jax.Array) else _host(data, frozen)) for box, data in pieces]
        for pieces in shards
    ]


def _shards(array: Any, plan: SavePlan, index: int) -> list[tuple[Box, Any]]:
    """The distinct local shards that this process's chunks touch."""
    if not isinstance(array, jax.Array):
        return [(Box((0,) * array.ndim, array.shape), array)]
    if len(array.sharding.device_set) == 1:
        return [(Box((0,) * array.ndim, array.shape), array)]
    chosen = _touched(array.sharding, array.shape, plan.chunks[index], plan.grids[index], plan.mine[index].tobytes())
    return [(box, array.addressable_data(k)) for k, box in chosen]


@lru_cache(maxsize=4096)
def _touched(
    sharding: Sharding, shape: tuple[int, ...], chunk: tuple[int, ...], grid: tuple[int, ...], mine: bytes
) -> list[tuple[int, Box]]:
    """Which distinct local shards lie in the smallest box around these chunks; leaves of one shape share the answer."""
    places = np.unravel_index(np.frombuffer(mine, np.int64), grid) if grid else ()
    start = tuple([int(p.min()) * c for p, c in zip(places, chunk, strict=True)])
    stop = [min((int(p.max()) + 1) * c, n) for p, c, n in zip(places, chunk, shape, strict=True)]
    wanted = Box(start, tuple([b - a for a, b in zip(start, stop, strict=True)]))
    found: dict[Box, int] = {}
    for k, box in enumerate(device_boxes(sharding, shape).values()):
        if box not in found and intersect(box, wanted) is not None:
            found[box] = k
    return [(k, box) for box, k in found.items()]


def _host(data: np.ndarray, frozen: bool) -> np.ndarray:
    return np.array(data, order="C") if frozen else np.ascontiguousarray(data).reshape(data.shape)
