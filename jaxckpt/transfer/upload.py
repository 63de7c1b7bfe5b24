"""Host -> device: destinations that are filled box by box and then become arrays of the target sharding.

Three kinds: host arrays; small shards, collected on the host and handed to JAX with a copy; and, on CPU, large shards,
which are allocated by XLA first and filled in place, so that a large leaf never exists twice.
Either way the finished array owns its memory and can be donated.
"""

import ctypes
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from jaxckpt.core.box import Box, from_index, whole
from jaxckpt.core.dtypes import is_packed, mover
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.plan.shards import device_boxes
from jaxckpt.transfer.allocate import can_allocate, uninitialised

IN_PLACE_BYTES = 128 * 1024
UNINITIALISED_BYTES = 64 * 1024 * 1024  # less is zeroed faster than the program that allocates it is compiled
_ALIGNMENT = 64


class Target(NamedTuple):
    """A box of an array and the host memory that its elements go to, as unsigned integers of the same size."""

    box: Box
    data: np.ndarray


class Destination:
    """Where one leaf's bytes go: fill all targets, then call ``finish`` once."""

    def __init__(
        self, *, staged_bytes: int, targets: Callable[[], tuple[Target, ...]], finish: Callable[[], Any]
    ) -> None:
        self.staged_bytes = staged_bytes  # host memory beyond the finished array
        self.finish = finish
        self._targets = targets

    def targets(self) -> tuple[Target, ...]:
        """The boxes to fill; waits until their memory is there."""
        return self._targets()


def host_destination(shape: tuple[int, ...], dtype: np.dtype, *, zero: bool = False) -> Destination:
    """A numpy array. ``zero``: elements that nobody fills are zero."""
    array = (np.zeros if zero else np.empty)(shape, dtype)
    targets = (
        Target(whole(shape), array.view(mover(dtype)) if shape else array.reshape(1).view(mover(dtype)).reshape(())),
    )
    return Destination(staged_bytes=0, targets=lambda: targets, finish=lambda: array)


class Allocation:
    """Arrays that large destinations ask for, allocated all at once."""

    def __init__(self) -> None:
        self._wanted: list[tuple[tuple[int, ...], np.dtype, Sharding]] = []
        self._arrays: list[jax.Array] = []

    def ask(self, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> Callable[[], jax.Array]:
        """Returns a function that gives the array, to be written to by its address, once ``make`` was called."""
        place = len(self._wanted)
        self._wanted.append((shape, dtype, sharding))
        return lambda: self._arrays[place]

    def make(self) -> None:
        """Allocate what was asked for. In the caller's thread: JAX's settings (x64) may be those of a thread."""
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in self._wanted)
        large = size >= UNINITIALISED_BYTES and all(can_allocate(*each) for each in self._wanted)
        self._arrays = uninitialised(self._wanted) if large else [_zeroed(*each) for each in self._wanted]


def device_destination(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    *,
    allocation: Allocation,
    cast: np.dtype | None = None,
    zero: bool = False,
) -> Destination:
    """A jax.Array of this sharding; only the parts of this process's devices are filled.

    Args:
        shape: global shape.
        dtype: of the bytes that will be filled in.
        sharding: of the result.
        allocation: shared with the other destinations that are filled at the same time.
        cast: dtype of the result, where it is another one; the cast is done on the host.
        zero: elements that nobody fills are zero.
    """
    boxes = device_boxes(sharding, shape)
    if cast is None and is_filled_in_place(shape, dtype, sharding):
        zeros = _zeroed(shape, dtype, sharding) if zero else None
        get = allocation.ask(shape, dtype, sharding) if zeros is None else lambda: zeros
        return _in_place(get, dtype, boxes)
    return _staged(shape, dtype, sharding, boxes, cast, zero)


def is_filled_in_place(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> bool:
    """Whether a ``device_destination`` without a cast takes no memory beyond the array."""
    largest = max((box.size for box in device_boxes(sharding, shape).values()), default=0)
    return largest * dtype.itemsize >= IN_PLACE_BYTES and not is_packed(dtype) and _is_plain_cpu(sharding)


def _staged(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    boxes: dict[jax.Device, Box],
    cast: np.dtype | None,
    zero: bool,
) -> Destination:
    around = _around(tuple(boxes.values()))
    whole_boxes = (around,) if around is not None else tuple(dict.fromkeys(boxes.values()))
    buffers = {box: _unaliasable(box.shape, dtype) for box in whole_boxes}
    if zero:
        for buffer in buffers.values():
            buffer.view(mover(dtype))[...] = 0
    targets = tuple(Target(box, buffer.view(mover(dtype))) for box, buffer in buffers.items())

    def finish() -> jax.Array:
        if not boxes:  # all of it lies on other processes
            return jax.make_array_from_single_device_arrays(shape, sharding, [], dtype=cast or dtype)
        ready = buffers if cast is None else {box: _cast(buffer, cast) for box, buffer in buffers.items()}
        if len(boxes) == 1 and sharding.is_fully_addressable:
            return jax.device_put(next(iter(ready.values())), sharding, may_alias=False)
        if around is not None and around.shape == shape:
            return jax.make_array_from_callback(shape, sharding, ready[around].__getitem__, dtype=cast or dtype)
        pieces = {
            box: ready[box] if around is None else ready[around][box.slices(around.start)] for box in boxes.values()
        }
        return jax.make_array_from_callback(
            shape, sharding, lambda i: pieces[from_index(i, shape)], dtype=cast or dtype
        )

    return Destination(staged_bytes=sum(b.nbytes for b in buffers.values()), targets=lambda: targets, finish=finish)


@lru_cache(maxsize=1024)
def _around(boxes: tuple[Box, ...]) -> Box | None:
    """The one box that these fill together, if there is one: then one buffer does for all."""
    distinct = set(boxes)
    if not distinct:
        return None
    start = tuple(min(box.start[d] for box in distinct) for d in range(len(boxes[0].start)))
    stop = tuple(max(box.start[d] + box.shape[d] for box in distinct) for d in range(len(boxes[0].start)))
    around = Box(start, tuple(b - a for a, b in zip(start, stop, strict=True)))
    return around if around.size == sum(box.size for box in distinct) else None


def _unaliasable(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A host array that XLA must copy: on CPU it would adopt an aligned one, which could then not be donated."""
    size = math.prod(shape) * dtype.itemsize
    return _misaligned(np.empty(size + 2 * _ALIGNMENT, np.uint8), size).view(dtype).reshape(shape)


def _cast(buffer: np.ndarray, dtype: np.dtype) -> np.ndarray:
    out = _unaliasable(buffer.shape, dtype)
    out[...] = buffer.astype(dtype)
    return out


def _in_place(get: Callable[[], jax.Array], dtype: np.dtype, boxes: dict[jax.Device, Box]) -> Destination:
    def targets() -> tuple[Target, ...]:
        # Nobody else has seen the array when its memory is written to.
        shards = {shard.device: shard.data for shard in jax.block_until_ready(get()).addressable_shards}
        return tuple(Target(box, _memory(shards[device], dtype, box.shape)) for device, box in boxes.items())

    return Destination(staged_bytes=0, targets=targets, finish=get)


def _memory(array: jax.Array, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    # JAX narrows 64-bit types where x64 is off: never write past what it allocated.
    if array.dtype != dtype or array.on_device_size_in_bytes() < size:
        raise InvalidArgumentError(f"JAX allocated {array.dtype} where {dtype.name} was asked for: set jax_enable_x64.")
    memory = (ctypes.c_uint8 * size).from_address(array.unsafe_buffer_pointer())
    return np.frombuffer(memory, mover(dtype)).reshape(shape)


_ZERO_BYTES = np.zeros(0, np.uint8)


def _zeroed(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> jax.Array:
    boxes = device_boxes(sharding, shape)
    parts = [jax.device_put(_zeros(box.shape, dtype), device, may_alias=False) for device, box in boxes.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that cost no memory (untouched pages of one allocation, shared by all) and that XLA must copy."""
    global _ZERO_BYTES
    size = math.prod(shape) * dtype.itemsize
    if size > _ZERO_BYTES.nbytes:
        raw = np.zeros(size + 2 * _ALIGNMENT, np.uint8)
        raw.flags.writeable = False
        _ZERO_BYTES = _misaligned(raw, size)
    return _ZERO_BYTES[:size].view(dtype).reshape(shape)


def _misaligned(raw: np.ndarray, size: int) -> np.ndarray:
    # XLA adopts 64-byte aligned host memory on CPU, also when told may_alias=False (seen with jax 0.10 and 0.12).
    skip = -raw.ctypes.data % _ALIGNMENT + _ALIGNMENT // 4
    return raw[skip : skip + size]


def _is_plain_cpu(sharding: Sharding) -> bool:
    device = next(iter(sharding.addressable_devices), None)
    return (
        device is not None and device.platform == "cpu" and sharding.memory_kind in (None, device.default_memory().kind)
    )
