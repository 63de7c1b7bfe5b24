"""Batch-norm statistics of Flax models, against numpy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxckpt as jc
from jaxckpt.averaging import batch_norm

X = (np.random.default_rng(0).standard_normal((64, 3)) * 3 + np.arange(3) * 5).astype(np.float32)
BATCHES = np.sort(X, axis=0).reshape(4, 16, 3)  # of very different means
MEAN, VARIANCE = (getattr(X.astype(np.float64), name)(axis=0) for name in ("mean", "var"))


class Model(nnx.Module):
    """Two layers of which the first sees the batch itself."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.BatchNorm(3, momentum=0.0, rngs=rngs)
        self.second = nnx.BatchNorm(3, momentum=0.0, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.first(x))


def statistics_of(model: Model, batch: jax.Array) -> Any:
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, state)
    copy.train()
    copy(batch)
    return nnx.state(copy, nnx.BatchStat)


def test_states_of_nnx_get_the_statistics_of_all_examples() -> None:
    model = Model(nnx.Rngs(0))
    found = batch_norm.reestimate(lambda batch: statistics_of(model, jnp.asarray(batch)), BATCHES)
    assert isinstance(found, nnx.State)
    plain = nnx.to_pure_dict(found)
    np.testing.assert_allclose(plain["first"]["mean"], MEAN, rtol=1e-5)
    np.testing.assert_allclose(plain["first"]["var"], VARIANCE, rtol=1e-5)
    nnx.update(model, found)
    model.eval()
    expected = (X - MEAN) / np.sqrt(VARIANCE + 1e-5)
    np.testing.assert_allclose(model.first(jnp.asarray(X)), expected, rtol=1e-4, atol=1e-5)


def test_states_of_one_layer_and_pure_dicts_are_the_same() -> None:
    def statistics(batch: Any) -> Any:
        return statistics_of(Model(nnx.Rngs(0)), jnp.asarray(batch))

    one = batch_norm.reestimate(lambda batch: statistics(batch)["first"], BATCHES)
    pure = batch_norm.reestimate(lambda batch: nnx.to_pure_dict(statistics(batch)), BATCHES)
    np.testing.assert_allclose(jax.tree.leaves(one)[1], VARIANCE, rtol=1e-5)
    np.testing.assert_allclose(pure["first"]["var"], VARIANCE, rtol=1e-5)


def test_batch_stats_of_linen_are_the_same() -> None:
    norm = linen.BatchNorm(use_running_average=False, momentum=0.0)
    state = norm.init(jax.random.key(0), jnp.asarray(X))
    found = batch_norm.reestimate(
        lambda batch: norm.apply(state, batch, mutable=["batch_stats"])[1]["batch_stats"], BATCHES
    )
    np.testing.assert_allclose(found["mean"], MEAN, rtol=1e-5)
    np.testing.assert_allclose(found["var"], VARIANCE, rtol=1e-5)


def test_means_far_from_zero_do_not_drown_the_variance() -> None:
    far = BATCHES + np.float32(3000)
    found = batch_norm.reestimate(lambda x: {"mean": x.mean(0), "var": x.var(0)}, far)
    np.testing.assert_allclose(found["var"], far.astype(np.float64).var(axis=(0, 1)), rtol=1e-3)


def test_statistics_without_a_pair_are_an_error_that_names_what_is_there() -> None:
    def statistics(batch: Any) -> Any:
        return {"norm": {"mu": batch.mean(0), "var": batch.var(0)}}

    with pytest.raises(jc.CheckpointError, match=r"no 'mean' with a 'var' beside it; they have norm.mu, norm.var"):
        batch_norm.reestimate(statistics, BATCHES)
    found = batch_norm.reestimate(statistics, BATCHES, mean="mu")
    np.testing.assert_allclose(found["norm"]["var"], VARIANCE, rtol=1e-5)
    with pytest.raises(jc.CheckpointError, match="they have no leaves"):
        batch_norm.reestimate(lambda batch: {}, BATCHES)
