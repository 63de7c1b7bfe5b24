"""Weighted sums in memory: against a float64 oracle, and under JAX's transformations."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.averaging.combine import barrier, combine, interpolate
from tests.averaging.oracle import random_stack, ulps, weighted

WEIGHTS = {
    "uniform": lambda k: np.full(k, 1 / k),
    "signed": lambda k: np.random.default_rng(k).standard_normal(k),
    "large and cancelling": lambda k: np.resize([6.3, -5.9], k) + np.arange(k) / 100,
}


@pytest.mark.parametrize("accumulate", ["float64", "float32"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("k", [1, 2, 20, 40])
def test_sums_are_within_one_ulp_of_the_rounded_oracle(k: int, dtype: type, weights: str, accumulate: str) -> None:
    stack, w = random_stack(k, (33, 64), dtype), WEIGHTS[weights](k)
    found = combine({"x": jnp.asarray(stack)}, w, accumulate=accumulate)["x"]
    assert found.dtype == dtype
    assert ulps(found, weighted(stack, w)) <= 1


def test_complex_leaves_are_combined() -> None:
    stack = random_stack(5, (7, 3), np.float32) + 1j * random_stack(5, (7, 3), np.float32, seed=1)
    w = WEIGHTS["signed"](5)
    found = np.asarray(combine(jnp.asarray(stack.astype(np.complex64)), w))
    assert found.dtype == np.complex64
    assert ulps(found.real, weighted(stack.real, w)) <= 1
    assert ulps(found.imag, weighted(stack.imag, w)) <= 1


@pytest.mark.parametrize("accumulate", ["float64", "float32"])
@pytest.mark.parametrize(
    ("dtype", "k"),
    [(np.float32, 6), (np.float32, 100), (ml_dtypes.bfloat16, 6), (np.complex64, 6), (ml_dtypes.float8_e5m2, 6)],
)
def test_p_trees_are_those_of_p_calls(dtype: type, accumulate: Any, k: int) -> None:
    stack = {"x": jnp.asarray(random_stack(k, (5, 8), dtype)), "s": jnp.arange(k) / 7, "n": jnp.arange(k)}
    w = np.random.default_rng(0).standard_normal((4, k))
    together = combine(stack, w, accumulate=accumulate)
    for p in range(4):
        alone = combine(stack, w[p], accumulate=accumulate)
        assert together["x"][p].tobytes() == alone["x"].tobytes()
        assert together["s"][p].tobytes() == alone["s"].tobytes()
    assert together["n"].tolist() == [k - 1] * 4


def test_a_program_for_many_trees_is_as_long_as_that_for_one() -> None:
    stack = {"x": jnp.ones((20, 5, 8)), "b": jnp.ones((20, 6), jnp.bfloat16)}
    programs = [jax.jit(partial(combine, weights=np.ones((p, 20)))) for p in (1, 16)]
    one, many = (program.lower(stack).as_text() for program in programs)
    assert len(many.splitlines()) < 1.3 * len(one.splitlines())


def test_the_stack_may_be_sharded_for_p_trees(mesh_4x2: jax.sharding.Mesh) -> None:
    stack, w = random_stack(6, (8, 16), np.float32), np.random.default_rng(0).standard_normal((3, 6))
    sharded = jax.device_put(stack, NamedSharding(mesh_4x2, P(None, "data", "model")))
    found = jax.jit(lambda s: combine(s, w))(sharded)
    assert found.sharding.is_equivalent_to(NamedSharding(mesh_4x2, P(None, "data", "model")), 3)
    assert found.tobytes() == combine(jnp.asarray(stack), w).tobytes()


def test_one_tree_with_weight_one_comes_back_to_the_bit() -> None:
    x = np.array([[0.0, -0.0, np.inf, -np.inf, np.nan, 1e-30, 3e38]], np.float32)
    for accumulate in ("float64", "float32"):
        found = np.asarray(combine(jnp.asarray(x), [1.0], accumulate=accumulate))
        assert ((found == x[0]) | (np.isnan(found) & np.isnan(x[0]))).all()
    assert np.asarray(combine(jnp.asarray(x), [1.0])).tobytes() == x[0].tobytes()


def test_integers_booleans_and_keys_are_the_last() -> None:
    stacked = {
        "step": jnp.array([1, 2, 3]),
        "on": jnp.array([True, True, False]),
        "key": jax.random.split(jax.random.key(0), 3),
    }
    found = combine(stacked, [1, 1, 1])
    assert found["step"] == 3
    assert not found["on"]
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(stacked["key"][-1])).all()


def test_it_runs_under_jit_vmap_grad_and_shard_map(mesh_4x2: jax.sharding.Mesh) -> None:
    stack, w = jnp.asarray(random_stack(5, (8, 16), np.float32)), np.linspace(-1, 2, 5)
    plain = combine(stack, w)
    traced = jnp.asarray(w, jnp.float32)
    expected = combine(stack, traced)
    assert (jax.jit(combine)(stack, traced) == expected).all()
    assert (jax.jit(lambda s: combine(s, w))(stack) == plain).all()
    assert (jax.vmap(combine, (None, 0))(stack, jnp.stack([traced, traced]))[1] == expected).all()
    by_weight = jax.grad(lambda t: combine(stack, t).sum())(traced)
    np.testing.assert_allclose(by_weight, stack.sum((1, 2)), rtol=1e-5)
    by_stack = jax.grad(lambda s: combine(s, w).sum())(stack)
    np.testing.assert_allclose(by_stack, np.broadcast_to(w[:, None, None], stack.shape), rtol=1e-6)
    spread = jax.device_put(stack, NamedSharding(mesh_4x2, P(None, "data", "model")))
    mapped = jax.shard_map(
        lambda s: combine(s, w), mesh=mesh_4x2, in_specs=P(None, "data", "model"), out_specs=P("data", "model")
    )
    assert (mapped(spread) == plain).all()
    text = jax.jit(lambda s: combine(s, w)).lower(spread).compile().as_text()
    assert "all-" not in text
    assert (combine(spread, w) == plain).all()


def test_a_wrong_number_of_weights_names_the_leaf() -> None:
    with pytest.raises(jc.MismatchError, match=r'"a\.b" is float32\[3, 2\]; there are 2 weights'):
        combine({"a": {"b": jnp.ones((3, 2))}}, [0.5, 0.5])


def test_interpolation_is_exact_at_its_ends_and_keeps_variance_where_asked() -> None:
    a, b = ({"x": jnp.asarray(random_stack(1, (4096,), np.float32, seed=s)[0]), "n": s} for s in (1, 2))
    assert (interpolate(a, b, 0.0)["x"] == a["x"]).all()
    assert (interpolate(a, b, 1.0)["x"] == b["x"]).all()
    assert interpolate(a, b, 1.0)["n"] == 2
    assert abs(float(interpolate(a, b, 0.5, preserve_variance=True)["x"].std()) - 1) < 0.03
    assert abs(float(interpolate(a, b, 0.5)["x"].std()) - 0.5**0.5) < 0.03


def test_a_barrier_is_nothing_to_oneself_and_high_between_two_basins() -> None:
    def loss(p: dict) -> jax.Array:
        return ((p["x"] ** 2 - 1) ** 2).sum()

    one, other = {"x": jnp.ones(3)}, {"x": -jnp.ones(3)}
    assert barrier(one, one, loss).height == 0
    found = jax.jit(lambda a, b: barrier(a, b, loss))(one, other)
    assert found.height == 3
    assert found.t[int(found.losses.argmax())] == 0.5
    with pytest.raises(jc.MismatchError, match='"x"'):
        barrier(one, {"x": jnp.ones(4)}, loss)


def test_a_real_dtype_leaves_complex_leaves_as_they_are() -> None:
    stacked = {"c": jnp.array([[1 + 2j], [3 + 4j]]), "w": jnp.ones((2, 3))}
    found = combine(stacked, [0.5, 0.5], dtype=jnp.bfloat16)
    assert (found["c"].dtype, found["w"].dtype) == (jnp.complex64, jnp.bfloat16)
    assert found["c"].tolist() == [2 + 3j]
    assert combine(stacked, [0.5, 0.5], dtype=jnp.complex64)["w"].dtype == jnp.float32
    with pytest.raises(jc.CheckpointError, match="dtype is int32"):
        combine(stacked, [0.5, 0.5], dtype=jnp.int32)
