"""Equality of restored leaves to the bit: type, dtype, shape, sharding, memory kind and raw bytes."""

from typing import Any

import jax
import numpy as np


def raw(value: Any) -> bytes:
    """The bytes of an array in C order; NaN payloads and padding included."""
    return np.asarray(value).tobytes()


def assert_same(found: Any, wanted: Any, *, placed: bool = True) -> None:
    """``placed``: shardings and memory kinds must be the same, too."""
    if isinstance(wanted, jax.Array):
        assert isinstance(found, jax.Array), type(found)
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        if placed:
            assert found.sharding == wanted.sharding, (found.sharding, wanted.sharding)
            assert found.sharding.memory_kind == wanted.sharding.memory_kind
        if jax.dtypes.issubdtype(wanted.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(found) == jax.random.key_impl(wanted)
            found, wanted = jax.random.key_data(found), jax.random.key_data(wanted)
        assert raw(found) == raw(wanted)
        for shard in found.addressable_shards:
            assert raw(shard.data) == raw(np.asarray(wanted)[shard.index])
        return
    assert type(found) is type(wanted), (type(found), type(wanted))
    if isinstance(wanted, np.ndarray | np.generic):
        native = wanted.dtype.newbyteorder("=")
        assert found.dtype == native
        assert found.shape == wanted.shape
        assert raw(found) == raw(np.asarray(wanted).astype(native))
    elif isinstance(wanted, float):
        assert wanted.hex() == found.hex()
    elif isinstance(wanted, complex):
        assert (found.real.hex(), found.imag.hex()) == (wanted.real.hex(), wanted.imag.hex())
    else:
        assert found == wanted


def assert_same_tree(found: Any, wanted: Any, *, placed: bool = True) -> None:
    """Same containers, same leaves."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        try:
            assert_same(new, old, placed=placed)
        except AssertionError as error:
            raise AssertionError(f"{jax.tree_util.keystr(path)}: {error}") from error


def random_bits(dtype: Any, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """An array of random bits: for floats also NaNs of any payload; narrow types get values that they can have."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64))
    data = np.random.default_rng(seed).integers(0, 256, size * dtype.itemsize, np.uint8)
    if dtype.kind == "b":
        data &= 1
    elif dtype.name.startswith(("int", "uint")) and dtype.kind == "V":
        bits = int(dtype.name.removeprefix("u").removeprefix("int"))
        low = 0 if dtype.name.startswith("u") else -(1 << (bits - 1))
        return (data.astype(np.int32) % (1 << bits) + low).astype(np.int8).astype(dtype).reshape(shape)
    elif dtype.name.startswith("float4"):
        data &= 0xF
    return data.view(dtype).reshape(shape)
