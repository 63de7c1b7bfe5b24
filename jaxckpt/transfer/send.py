"""Device -> host: shards are packed on their device by one cached program, and moved by one call.

Small shards become one flat array per dtype and device, so that two thousand of them cost a few transfers and not two
thousand; parts of shards are cut out there too, so that no byte is moved which another process writes.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxckpt.core.box import Box
from jaxckpt.transfer.feed import Piece

PACKED_BYTES = 1024 * 1024  # shards below this size are packed
MOST_PACKED = 256  # operands of one concatenation: the time to compile it grows with them


class Part(NamedTuple):
    """What of one local shard goes to storage."""

    leaf: int
    box: Box  # of the shard, in the global array
    source: Any  # the shard: a jax array on one device, or a numpy array
    wanted: Box  # what of the box must be moved, at least

    @property
    def size_bytes(self) -> int:
        """Size on the host, where every element has a byte at least."""
        return math.prod(self.wanted.shape) * np.dtype(self.source.dtype).itemsize


class Sent(NamedTuple):
    """An array with the elements of these parts, one after the other; if ``whole``, the shard of the only one."""

    data: Any  # a jax array on one device, or a numpy array
    parts: tuple[Part, ...]
    whole: bool


def gather(parts: Sequence[Part], *, copies: bool) -> list[Sent]:
    """Arrays where the parts are that hold them.

    One program per device, compiled once for the same shapes. What is on the host already, and large whole shards, are
    passed on as they are; but with ``copies``, nothing that comes back from a device shares memory with the sources.
    """
    found: list[Sent] = []
    by_device: dict[jax.Device, list[Part]] = {}
    for part in parts:
        large = part.wanted == part.box and not copies and part.source.nbytes >= PACKED_BYTES
        if large or is_on_host(part.source):
            found.append(Sent(part.source, (part,), True))
        else:
            by_device.setdefault(next(iter(part.source.devices())), []).append(part)
    for members in by_device.values():
        forms = tuple([(part.source.shape, part.source.dtype, _cut(part)) for part in members])
        program, groups = _packer(forms)
        arrays = program([part.source for part in members])
        for data, group in zip(arrays, groups, strict=True):
            found.append(
                Sent(data, tuple([members[k]._replace(box=members[k].wanted) for k in group]), len(group) == 1)
            )
    return found


def pinned(sent: Sequence[Sent]) -> list[Sent]:
    """The same in ``pinned_host`` memory: the transfers are under way when this returns."""
    there = [one for one in sent if is_on_host(one.data)]
    moving = [one for one in sent if not is_on_host(one.data)]
    homes = [_pinned_home(next(iter(one.data.devices()))) for one in moving]
    moved = jax.device_put([one.data for one in moving], homes)
    return there + [one._replace(data=data) for one, data in zip(moving, moved, strict=True)]


def pieces_of(sent: Sent, flat: np.ndarray) -> list[tuple[int, Piece]]:
    """The (leaf, piece) of every part, as views of the host bytes of ``sent``."""
    if sent.whole:
        part = sent.parts[0]
        return [(part.leaf, Piece(part.box, flat))]
    found, start = [], 0
    for part in sent.parts:
        stop = start + math.prod(part.box.shape)
        found.append((part.leaf, Piece(part.box, flat[start:stop].reshape(part.box.shape))))
        start = stop
    return found


def is_on_host(data: Any) -> bool:
    """Whether an array needs no transfer: numpy, or in a host memory that is not its device's own."""
    if not isinstance(data, jax.Array):
        return True
    device = next(iter(data.devices()))
    return data.sharding.memory_kind not in (None, "device", device.default_memory().kind)


def _cut(part: Part) -> Box | None:
    """What is wanted of a shard, from its own first element; None: all."""
    if part.wanted == part.box:
        return None
    return Box(tuple([a - o for a, o in zip(part.wanted.start, part.box.start, strict=True)]), part.wanted.shape)


@lru_cache(maxsize=1024)
def _packer(
    forms: tuple[tuple[tuple[int, ...], Any, Box | None], ...],
) -> tuple[Callable[[list[jax.Array]], list[jax.Array]], tuple[tuple[int, ...], ...]]:
    groups: list[list[int]] = []
    open_groups: dict[Any, list[int]] = {}
    for k, (shape, dtype, taken) in enumerate(forms):
        size = math.prod(shape if taken is None else taken.shape) * np.dtype(dtype).itemsize
        group = open_groups.get(dtype)
        if size >= PACKED_BYTES or group is None or len(group) == MOST_PACKED:
            group = []
            groups.append(group)
            if size < PACKED_BYTES:
                open_groups[dtype] = group
        group.append(k)

    def pack(arrays: list[jax.Array]) -> list[jax.Array]:
        cut = [x if form[2] is None else x[form[2].slices()] for x, form in zip(arrays, forms, strict=True)]
        return [
            jnp.copy(cut[group[0]]) if len(group) == 1 else jnp.concatenate([cut[k].reshape(-1) for k in group])
            for group in groups
        ]

    return jax.jit(pack), tuple([tuple(group) for group in groups])


@lru_cache(maxsize=1024)
def _pinned_home(device: jax.Device) -> SingleDeviceSharding:
    return SingleDeviceSharding(device, memory_kind="pinned_host")
