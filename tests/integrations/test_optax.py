"""Optax: the state of every kind of optimizer is saved whole, and placed like its parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxckpt as jc
from jaxckpt.integrations.optax import abstract_opt_state, place_opt_state

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from jax.sharding import Mesh

P = PartitionSpec


def params_on(mesh: Mesh) -> dict[str, Any]:
    kernel = NamedSharding(mesh, P("data", "model"))
    bias = NamedSharding(mesh, P("model"))
    return {
        "layers": [
            {"kernel": jax.device_put(jnp.full((8, 4), i + 1.0), kernel), "bias": jax.device_put(jnp.ones(4), bias)}
            for i in range(2)
        ],
        "scale": jax.device_put(jnp.ones(()), NamedSharding(mesh, P())),
    }


def is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: optax.adam(1e-3),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-3), every_k_schedule=2).gradient_transformation(),
    "masked": lambda: optax.masked(optax.adam(1e-3), is_matrix),
    "partition": lambda: optax.partition(
        {"matrix": optax.adam(1e-3), "rest": optax.sgd(1e-2, momentum=0.9)},
        lambda params: jax.tree.map(lambda leaf: "matrix" if leaf.ndim == 2 else "rest", params),
    ),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-3),
    "hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=4),
    "lbfgs": lambda: optax.lbfgs(memory_size=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_comes_back_to_the_bit_where_its_parameters_are(name: str, tmp_path: Path, mesh_4x2: Mesh) -> None:
    optimizer, params = OPTIMIZERS[name](), params_on(mesh_4x2)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = optimizer.init(params)
        if name != "lbfgs":  # needs values and a line search
            grads = jax.tree.map(jnp.ones_like, params)
            for _ in range(2):
                _, state = optimizer.update(grads, state, params)
        like = abstract_opt_state(optimizer, params)
    jc.save(tmp_path / "x", {"opt_state": state})
    again = jc.restore(tmp_path / "x", {"opt_state": like})["opt_state"]
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()
        assert new.sharding.mesh == mesh_4x2
        if new.shape == (8, 4):
            assert new.sharding.spec == P("data", "model")


def test_factored_moments_keep_the_split_of_what_is_left(mesh_4x2: Mesh) -> None:
    params = params_on(mesh_4x2)
    with jax.numpy_dtype_promotion("standard"):
        like = abstract_opt_state(optax.adafactor(1e-3, min_dim_size_to_factor=4), params)
    by_shape = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(like) if leaf.shape}
    assert by_shape[(8,)] == P("data")
    assert by_shape[(1,)] == P()


def test_a_projected_moment_keeps_the_split_of_equal_dimensions(mesh_4x2: Mesh) -> None:
    """As GaLore keeps them: (rank, m) for a parameter (n, m)."""
    placed = place_opt_state({"mu": {"w": jax.ShapeDtypeStruct((2, 4), jnp.float32)}}, {"w": leaf_on(mesh_4x2)})
    assert placed["mu"]["w"].sharding.spec == P(None, "model")


def test_names_that_occur_at_several_depths_go_to_the_longest_path(mesh_4x2: Mesh) -> None:
    inner, outer = leaf_on(mesh_4x2, P("data")), leaf_on(mesh_4x2, P(None, "model"))
    params = {"w": outer, "block": {"w": inner}}
    placed = place_opt_state({"mu": params}, params)
    assert placed["mu"]["block"]["w"].sharding.spec == P("data")
    assert placed["mu"]["w"].sharding.spec == P(None, "model")


def test_nothing_is_allocated(mesh_4x2: Mesh) -> None:
    params = {"w": leaf_on(mesh_4x2)}
    before = len(jax.live_arrays())
    abstract_opt_state(optax.adam(1e-3), params)
    assert len(jax.live_arrays()) <= before


def leaf_on(mesh: Mesh, spec: PartitionSpec | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, spec or P("data", "model")))
