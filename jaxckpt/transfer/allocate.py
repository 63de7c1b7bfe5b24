"""Uninitialised arrays on CPU, in memory that XLA owns: filled in place by a restore, donatable afterwards.

JAX has no allocation without a value: even ``jax.lax.empty`` writes zeros on CPU, a pass over memory (and its first
touch) that costs a restore about as much as reading the file. The results of an XLA FFI call are allocated by XLA and
left to the callee, so a callee that does nothing leaves them as they are. All arrays of a restore are the results of
one call, so that one small program is compiled for all of them.

The handler is the C interface of jaxlib's ``xla/ffi/api/c_api.h`` (``jax.ffi.include_dir()``), as ctypes structures.
"""

import ctypes
import math
import mmap
from collections.abc import Sequence
from functools import lru_cache

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxckpt.core.dtypes import is_packed

_TARGET = "jaxckpt_uninitialised"
_METADATA_EXTENSION = 1  # XLA_FFI_Extension_Metadata


def uninitialised(wanted: Sequence[tuple[tuple[int, ...], np.dtype, Sharding]]) -> list[jax.Array]:
    """Arrays of these shapes, dtypes and shardings. Their elements are whatever the memory held.

    Every device must belong to this process and hold a part of the same shape (``can_allocate``).
    """
    groups: dict[Mesh, list[int]] = {}
    for place, (_, _, sharding) in enumerate(wanted):
        groups.setdefault(_mesh(sharding), []).append(place)
    found: dict[int, jax.Array] = {}
    for mesh, places in groups.items():
        program = _program(mesh, tuple((shape, dtype, _spec(s)) for shape, dtype, s in (wanted[p] for p in places)))
        found.update(zip(places, jax.block_until_ready(program()), strict=True))
    for place, (shape, _, sharding) in enumerate(wanted):
        if found[place].sharding != sharding:  # one device, or a spec that JAX spells out in full
            shards = [shard.data for shard in found[place].addressable_shards]
            found[place] = jax.make_array_from_single_device_arrays(shape, sharding, shards)
    for array in found.values():
        for shard in array.addressable_shards:
            _use_huge_pages(shard.data.unsafe_buffer_pointer(), shard.data.nbytes)
    return [found[place] for place in range(len(wanted))]


def can_allocate(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> bool:
    """Whether ``uninitialised`` makes such an array: not of packed dtypes, and with even shards only."""
    if is_packed(dtype) or not sharding.is_fully_addressable:
        return False
    if isinstance(sharding, NamedSharding):
        return all(n % k == 0 for n, k in zip(shape, _divisors(sharding, len(shape)), strict=True))
    return len(sharding.device_set) == 1


def _divisors(sharding: NamedSharding, ndim: int) -> tuple[int, ...]:
    split = [axes if isinstance(axes, tuple) else (axes,) if axes else () for axes in sharding.spec]
    sizes = [math.prod(sharding.mesh.shape[axis] for axis in axes) for axes in split]
    return tuple(sizes) + (1,) * (ndim - len(sizes))


def _mesh(sharding: Sharding) -> Mesh:
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return Mesh(np.array(list(sharding.device_set)), ("device",))


def _spec(sharding: Sharding) -> PartitionSpec:
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


@lru_cache(maxsize=16)
def _program(mesh: Mesh, specs: tuple[tuple[tuple[int, ...], np.dtype, PartitionSpec], ...]):
    _register()
    local = [NamedSharding(mesh, spec).shard_shape(shape) for shape, _, spec in specs]
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape, (_, dtype, _) in zip(local, specs, strict=True)]
    call = jax.ffi.ffi_call(_TARGET, results)
    out_specs = [spec for _, _, spec in specs]
    return jax.jit(jax.shard_map(lambda: call(), mesh=mesh, in_specs=(), out_specs=out_specs, check_vma=False))


class _Extension(ctypes.Structure):
    pass


_Extension._fields_ = [
    ("struct_size", ctypes.c_size_t),
    ("type", ctypes.c_int),
    ("next", ctypes.POINTER(_Extension)),
]


class _Version(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_Extension)),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    )


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("version", _Version))


class _MetadataExtension(ctypes.Structure):
    _fields_ = (("base", _Extension), ("metadata", ctypes.POINTER(_Metadata)))


class _CallFrame(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("extension", ctypes.POINTER(_Extension)))


@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_CallFrame))
def _leave_as_it_is(frame):  # no error, and nothing written
    extension = frame.contents.extension
    if extension and extension.contents.type == _METADATA_EXTENSION:  # asked once, at registration
        version = ctypes.cast(extension, ctypes.POINTER(_MetadataExtension)).contents.metadata.contents.version
        version.major, version.minor = 0, 1


@lru_cache(maxsize=1)
def _register() -> None:
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(_leave_as_it_is), platform="cpu")


def _use_huge_pages(address: int, size_bytes: int) -> None:
    """Ask for large pages before the first touch, as numpy does for its arrays: 512 times fewer page faults."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        _madvise(start, stop - start, mmap.MADV_HUGEPAGE)  # advice: the answer does not matter


_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
