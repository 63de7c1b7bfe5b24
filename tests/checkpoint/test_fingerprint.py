"""Fingerprints of live trees: the same on every mesh, those of an oracle in numpy, and another for any changed bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import jaxckpt as jc
from jaxckpt.checkpoint.fingerprint import LeafFingerprint, _places, fingerprint

NAMES = [
    "bool", "int2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32", "bfloat16", "float16",
    "float32", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn",
]  # fmt: skip
SPECS = [PartitionSpec(), PartitionSpec("data"), PartitionSpec("model", "data"), PartitionSpec(None, ("data", "model"))]


def _mix(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.uint64)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return x ^ (x >> np.uint64(16))


def oracle(value: np.ndarray) -> tuple[int, ...]:
    """The two sums, from the bytes, in 64-bit arithmetic."""
    data = np.ascontiguousarray(value).reshape(-1)
    bits = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}.get(data.dtype.name)
    if data.dtype.itemsize > 4:
        words = data.view(np.uint32).reshape(data.size, -1).astype(np.uint64)
    else:
        words = data.view(f"u{data.dtype.itemsize}").astype(np.uint64).reshape(data.size, 1)
    if bits:
        words &= np.uint64((1 << bits) - 1)
    place = np.arange(data.size, dtype=np.uint64)
    return tuple(
        sum(
            int(_mix(_mix(place ^ np.uint64(0x9E3779B9 * (8 * seed + k + 1) & 0xFFFFFFFF)) ^ words[:, k]).sum())
            for k in range(words.shape[1])
        )
        % 2**32
        for seed in range(2)
    )


def some(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bits (for complex: of both parts, without NaN, which XLA may quieten)."""
    rng = np.random.default_rng(seed)
    if name == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if name == "complex64":
        return (rng.normal(size=shape) - 1j * rng.normal(size=shape)).astype(np.complex64)
    if name.startswith(("int2", "int4", "uint4", "float4")):
        return rng.integers(-2 if name[0] == "i" else 0, 2, shape).astype(np.int8).astype(getattr(ml_dtypes, name))
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(rng.bytes(size), dtype).reshape(shape)


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_agrees_with_the_oracle_on_every_sharding(name: str, mesh_4x2: jax.sharding.Mesh) -> None:
    value = some(name, (8, 16))
    expected = LeafFingerprint(shape=(8, 16), dtype=name, sums=oracle(value))
    tree = {str(i): jax.device_put(value, NamedSharding(mesh_4x2, spec)) for i, spec in enumerate(SPECS)}
    tree["one device"] = jax.device_put(value, jax.devices()[3])
    assert set(fingerprint(tree).values()) == {expected}


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 0, 2), (3, 5, 2)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    value = some("float32", shape)
    assert fingerprint([value])["0"].sums == oracle(value)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 119), st.integers(0, 31))
def test_one_flipped_bit_changes_both_sums(place: int, bit: int) -> None:
    value = some("uint32", (120,))
    other = value.copy()
    other[place] ^= np.uint32(1 << bit)
    a, b = fingerprint([value, other]).values()
    assert all(x != y for x, y in zip(a.sums, b.sums, strict=True))


def test_swapped_elements_and_moved_rows_are_seen() -> None:
    value = np.arange(64, dtype=np.float32).reshape(8, 8)
    trees: dict[str, Any] = {
        "plain": value,
        "turned": value.T,
        "rolled": np.roll(value, 1, axis=0),
        "swapped": value[[1, 0, *range(2, 8)]],
        "reshaped": value.reshape(4, 16),
    }
    found = fingerprint(trees)
    assert len({(f.shape, f.sums) for f in found.values()}) == len(trees)
    assert found["plain"].sums == found["reshaped"].sums  # the shape is compared beside the sums
    assert found["plain"] != found["reshaped"]


def test_minus_zero_and_the_bits_of_nans_count() -> None:
    a = np.array([0.0, np.nan], np.float32)
    b = np.array([-0.0, np.nan], np.float32)
    c = a.copy()
    c.view(np.uint32)[1] ^= 1
    assert len(set(fingerprint([a, b, c]).values())) == 3


def test_typed_keys_are_compared_by_their_data() -> None:
    found = fingerprint({"a": jax.random.key(1), "b": jax.random.key(1), "c": jax.random.key(2)})
    assert found["a"] == found["b"] != found["c"]
    assert found["a"].dtype == "key<fry>"
    assert found["a"].sums == oracle(np.asarray(jax.random.key_data(jax.random.key(1))))


def test_a_restored_tree_has_the_fingerprint_of_the_saved_one(tmp_path: Any, mesh_4x2: jax.sharding.Mesh) -> None:
    def placed(spec: PartitionSpec) -> dict[str, Any]:
        sharding = NamedSharding(mesh_4x2, spec)
        return {"w": jax.device_put(some("bfloat16", (16, 8)), sharding), "n": jnp.int32(3), "k": jax.random.key(0)}

    tree = placed(PartitionSpec("data", "model"))
    jc.save(tmp_path / "c", tree)
    assert fingerprint(jc.restore(tmp_path / "c", placed(PartitionSpec("model")))) == fingerprint(tree)


def test_a_place_beyond_32_bits_has_its_high_word() -> None:
    """Shapes of more than 2**32 elements are too large to make: their places are computed for a corner."""
    shape = (3, 1 << 20, (1 << 13) + 5)
    jaxpr = jax.make_jaxpr(lambda: _places(shape))()
    assert [v.aval.shape for v in jaxpr.jaxpr.outvars] == [shape, shape]
    place = jax.jit(lambda: tuple(part[2, -1, -1] for part in _places(shape) if part is not None))
    low, high = (int(part) for part in place())
    assert (high << 32) + low == 3 * (1 << 20) * ((1 << 13) + 5) - 1


def test_a_leaf_without_bits_is_named() -> None:
    with pytest.raises(TypeError, match='"note" is a str'):
        fingerprint({"note": "text"})


def test_a_float64_array_is_not_narrowed_silently() -> None:
    with pytest.raises(ValueError, match="float64, of which JAX makes float32"):
        fingerprint([np.zeros(3)])


def test_meshes_of_other_device_orders_meet_in_one_tree() -> None:
    value = some("float32", (8,))
    devices = jax.devices()
    orders = [devices, devices[::-1], devices[:4]]
    meshes = [jax.sharding.Mesh(np.array(order), ("data",)) for order in orders]
    tree = [jax.device_put(value, NamedSharding(mesh, PartitionSpec("data"))) for mesh in meshes]
    assert {found.sums for found in fingerprint(tree).values()} == {oracle(value)}


def test_an_empty_tree_has_none() -> None:
    assert fingerprint({}) == {}
