"""Host -> device: destinations that are filled box by box and then become arrays of the target sharding.

Three kinds: host arrays; small shards, collected on the host and handed to JAX with a copy; and, on CPU, large shards,
which are allocated by XLA first and filled in place, so that a large leaf never exists twice.
Either way the finished array owns its memory and can be donated.
"""

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from jaxckpt.core.box import Box, from_index, whole
from jaxckpt.core.dtypes import mover
from jaxckpt.plan.shards import device_boxes

IN_PLACE_BYTES = 1024 * 1024
_ALIGNMENT = 64


class Target(NamedTuple):
    """A box of an array and the host memory that its elements go to, as unsigned integers of the same size."""

    box: Box
    data: np.ndarray


class Destination(NamedTuple):
    """Where one leaf's bytes go: fill all targets, then call ``finish`` once."""

    targets: tuple[Target, ...]
    staged_bytes: int  # host memory beyond the finished array
    finish: Callable[[], Any]


def host_destination(shape: tuple[int, ...], dtype: np.dtype) -> Destination:
    """A numpy array."""
    array = np.empty(shape, dtype)
    return Destination((Target(whole(shape), array.view(mover(dtype))),), 0, lambda: array)


def device_destination(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> Destination:
    """A jax.Array of this sharding; only the parts of this process's devices are filled."""
    boxes = device_boxes(sharding, shape)
    shard_bytes = max((box.size for box in boxes.values()), default=0) * dtype.itemsize
    if shard_bytes >= IN_PLACE_BYTES and _is_plain_cpu(sharding):
        return _in_place(shape, dtype, sharding, boxes)
    return _staged(shape, dtype, sharding, boxes)


def _staged(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding, boxes: dict[jax.Device, Box]) -> Destination:
    buffers = {box: _unaliasable(box.shape, dtype) for box in boxes.values()}
    targets = tuple(Target(box, buffer.view(mover(dtype))) for box, buffer in buffers.items())

    def finish() -> jax.Array:
        if len(boxes) == 1 and sharding.is_fully_addressable:
            return jax.device_put(buffers[next(iter(boxes.values()))], sharding, may_alias=False)
        return jax.make_array_from_callback(shape, sharding, lambda i: buffers[from_index(i, shape)], dtype=dtype)

    return Destination(targets, sum(b.nbytes for b in buffers.values()), finish)


def _unaliasable(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A host array that XLA must copy: on CPU it would adopt a 64-byte aligned one, which then cannot be donated."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 2 * _ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % _ALIGNMENT + _ALIGNMENT // 4
    return raw[skip : skip + size].view(dtype).reshape(shape)


def _in_place(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding, boxes: dict[jax.Device, Box]) -> Destination:
    arrays = [jax.device_put(_zeros(box.shape, dtype), device, may_alias=False) for device, box in boxes.items()]
    jax.block_until_ready(arrays)
    targets = []
    for box, array in zip(boxes.values(), arrays, strict=True):
        memory = (ctypes.c_uint8 * (box.size * dtype.itemsize)).from_address(array.unsafe_buffer_pointer())
        targets.append(Target(box, np.frombuffer(memory, mover(dtype)).reshape(box.shape)))

    def finish() -> jax.Array:
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    return Destination(tuple(targets), 0, finish)


_ZERO_BYTES = np.zeros(0, np.uint8)


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that cost no memory: untouched pages of one allocation, shared by all."""
    global _ZERO_BYTES
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size > _ZERO_BYTES.nbytes:
        _ZERO_BYTES = np.zeros(size, np.uint8)
        _ZERO_BYTES.flags.writeable = False
    return _ZERO_BYTES[:size].view(dtype).reshape(shape)


def _is_plain_cpu(sharding: Sharding) -> bool:
    device = next(iter(sharding.addressable_devices), None)
    return device is not None and device.platform == "cpu" and sharding.memory_kind in (None, device.default_memory().kind)
