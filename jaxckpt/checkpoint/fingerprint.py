"""A few words that say what bits a live tree holds, computed where they lie; the same on any mesh."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxckpt.core.dtypes import dtype_of, is_packed
from jaxckpt.core.tree import flatten

_SUMS = 2  # of 32 bits each
_GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio: its multiples, the seeds, are far apart


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafFingerprint:
    """What one leaf holds: its shape, the name of its dtype, and 64 bits over its elements and their places."""

    shape: tuple[int, ...]
    dtype: str
    sums: tuple[int, ...]


def fingerprint(tree: Any) -> dict[str, LeafFingerprint]:
    """The fingerprint of every array of a tree, by leaf name. All processes of sharded arrays call it together.

    The sharding does not matter: a tree that was restored on another mesh, or a replica, has the fingerprints of the
    original exactly if (but for chance) all bits are the same; NaNs and negative zeros count by their bits. Nothing is
    gathered: each device reads its own shards, and sums of 8 bytes per leaf cross the interconnect. Memory: XLA fuses
    the whole, so that no copy of a leaf is made.

    Every element becomes words of 32 bits, that are mixed with its place (its row-major index in the global array) by
    multiplication and the finalizer of MurmurHash3 (Austin Appleby, public domain), under two seeds; the two sums
    modulo 2**32 of the results are the fingerprint. A sum does not depend on the order or on the sharding, and integer
    arithmetic is exact, so every device gives the same: the multiset hash "MSet-Add" of Clarke et al., ASIACRYPT 2003,
    section 5, with a mixing function in place of a keyed hash. It finds faults, not forgery: one changed word is always
    found, as the mixing is one to one in it; changes of several escape with a chance of about 2**-64.

    Args:
        tree: of jax or numpy arrays of any dtype, typed PRNG keys and Python numbers; each numpy array and number is
            moved to a device, and must fit a dtype of JAX (float64 does with x64 enabled only).

    Raises:
        TypeError: a leaf is no array or number.
        ValueError: a numpy array has a dtype that JAX would narrow.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxckpt.checkpoint.fingerprint import fingerprint
        >>> state = {"w": jnp.arange(6.0).reshape(2, 3)}
        >>> fingerprint(state) == fingerprint({"w": jnp.arange(6.0).reshape(2, 3)})
        True
        >>> fingerprint(state) == fingerprint({"w": state["w"].at[1, 1].set(-4.0)})
        False
    """
    named = flatten(tree)[0]
    leaves = {leaf.name: _array(leaf.name, leaf.value) for leaf in named}
    dtypes = {leaf.name: leaf.value.dtype if isinstance(leaf.value, jax.Array) else None for leaf in named}
    if not leaves:
        return {}
    by_devices: dict[tuple[jax.Device, ...], list[str]] = {}
    for name, leaf in leaves.items():
        by_devices.setdefault(_devices(leaf.sharding), []).append(name)
    # One program for all leaves on the same devices: all are started before the first is waited for.
    running = [(names, sums_program(on)([leaves[n] for n in names])) for on, names in by_devices.items()]
    found = {
        name: LeafFingerprint(
            shape=leaves[name].shape,
            dtype=str(dtypes[name] or leaves[name].dtype),
            sums=tuple(np.asarray(row).tolist()),
        )
        for names, sums in running
        for name, row in zip(names, sums.addressable_data(0), strict=True)
    }
    return {name: found[name] for name in leaves}


@lru_cache(maxsize=64)
def sums_program(devices: tuple[jax.Device, ...]) -> Callable[[list[jax.Array]], jax.Array]:
    """The jitted sums of arrays on these devices: a list of arrays to uint32 [arrays, 2], the same on all of them."""
    everywhere = NamedSharding(Mesh(np.array(devices), "device"), PartitionSpec())
    return jax.jit(lambda leaves: jnp.stack([_sums(leaf) for leaf in leaves]), out_shardings=everywhere)


def _devices(sharding: Sharding) -> tuple[jax.Device, ...]:
    """In the order of the mesh: arrays on the same devices in another order cannot meet in one program."""
    if isinstance(sharding, NamedSharding):
        return tuple(np.asarray(sharding.mesh.devices).flat)
    return tuple(sorted(sharding.device_set, key=lambda device: device.id))


def _array(name: str, value: Any) -> jax.Array:
    if isinstance(value, jax.Array):
        is_key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(value) if is_key else value
    if not isinstance(value, np.ndarray | np.generic | bool | int | float | complex):
        raise TypeError(f'Leaf "{name}" is a {type(value).__name__}: only arrays and numbers have a fingerprint.')
    given = np.asarray(value)
    array = jnp.asarray(given)
    if isinstance(value, np.ndarray) and array.dtype != given.dtype:
        raise ValueError(
            f'Leaf "{name}": a numpy array of {given.dtype}, of which JAX makes {array.dtype}: bits would be lost. '
            f"Next step: enable x64 (jax_enable_x64), or cast it yourself."
        )
    return array


def _sums(leaf: jax.Array) -> jax.Array:
    """uint32 [2] of one array."""
    words = _words(leaf)
    low, high = _places(leaf.shape)
    rows = []
    for seed in range(_SUMS):
        total = jnp.zeros((), jnp.uint32)
        for number, word in enumerate(words):
            mixed = _mix(low ^ np.uint32(_GOLDEN * (seed * 8 + number + 1) & 0xFFFFFFFF))
            if high is not None:
                mixed = _mix(mixed ^ high)
            total = total + jnp.sum(_mix(mixed ^ word), dtype=jnp.uint32)
        rows.append(total)
    return jnp.stack(rows)


def _words(leaf: jax.Array) -> list[jax.Array]:
    """The bits of each element as arrays of uint32 in the shape of the leaf: one, or several for wide dtypes."""
    dtype = np.dtype(leaf.dtype)
    if dtype == np.bool_:
        return [leaf.astype(jnp.uint32)]
    if dtype.kind == "c":
        return [*_words(leaf.real), *_words(leaf.imag)]
    if is_packed(dtype):
        bits = int(dtype.name.removeprefix("u").removeprefix("int").removeprefix("float")[0])
        return [jax.lax.bitcast_convert_type(leaf, dtype_of(f"uint{bits}")).astype(jnp.uint32)]
    if dtype.itemsize == 8:
        pairs = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        return [pairs[..., 0], pairs[..., 1]]
    return [jax.lax.bitcast_convert_type(leaf, np.dtype(f"uint{8 * dtype.itemsize}")).astype(jnp.uint32)]


def _places(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array | None]:
    """The row-major index of each element, low 32 bits, and the high ones where there are so many elements."""
    low = jnp.zeros((1,) * len(shape), jnp.uint32)
    high = low if math.prod(shape) > 1 << 32 else None
    for axis, size in enumerate(shape):
        stride = math.prod(shape[axis + 1 :])
        index = jax.lax.broadcasted_iota(jnp.uint32, tuple(size if i == axis else 1 for i in range(len(shape))), axis)
        if high is None:
            low = low + index * np.uint32(stride & 0xFFFFFFFF)
            continue
        more_low, more_high = _product(index, stride)
        total = low + more_low
        high = high + more_high + (total < more_low).astype(jnp.uint32)
        low = total
    return jnp.broadcast_to(low, shape), None if high is None else jnp.broadcast_to(high, shape)


def _product(index: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
    """A product of 64 bits from words of 32, as JAX has no wider ones by default: (low, high)."""
    low, high = np.uint32(factor & 0xFFFFFFFF), np.uint32(factor >> 32 & 0xFFFFFFFF)
    a0, a1 = index & np.uint32(0xFFFF), index >> np.uint32(16)
    b0, b1 = np.uint32(int(low) & 0xFFFF), np.uint32(int(low) >> 16)
    middle = a0 * b1 + (a0 * b0 >> np.uint32(16))
    other = a1 * b0 + (middle & np.uint32(0xFFFF))
    return index * low, a1 * b1 + (middle >> np.uint32(16)) + (other >> np.uint32(16)) + index * high


def _mix(word: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer of 32 bits: one bit of the input changes half of the output."""
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return word ^ (word >> np.uint32(16))
