"""Averages are trees of the containers that the first source has, and computed leaves lie where their inputs do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt import averaging

if TYPE_CHECKING:
    from pathlib import Path

PARAMS = {"w": jnp.ones(2)}
OPTIMIZER = optax.chain(optax.clip(1.0), optax.adam(1e-3))


def training_state(value: float) -> dict[str, Any]:
    params = jax.tree.map(lambda x: x * value, PARAMS)
    return {"params": params, "opt": OPTIMIZER.init(params), "ema": None, "extra": {}, "more": []}


@pytest.mark.parametrize("how", [{}, {"missing": "keep"}, {"missing": "skip"}])
def test_none_and_empty_containers_are_kept(tmp_path: Path, how: dict[str, Any]) -> None:
    states = [training_state(1.0), training_state(3.0)]
    for step, state in enumerate(states):
        jc.save(tmp_path / f"{step}", state)
    paths = [tmp_path / "0", tmp_path / "1"]
    averaging.average_to(tmp_path / "averaged", paths, **how)
    trees = (averaging.average(states, **how), averaging.average(paths, **how), jc.restore(tmp_path / "averaged"))
    for found in trees:
        assert jax.tree.structure(found) == jax.tree.structure(states[0])
        assert found["params"]["w"].tolist() == [2.0, 2.0]
        with jax.numpy_dtype_promotion("standard"):
            OPTIMIZER.update(PARAMS, found["opt"], PARAMS)


def test_a_whole_subtree_keeps_them_too(tmp_path: Path) -> None:
    jc.save(tmp_path / "state", training_state(1.0))
    for found in (
        averaging.average([tmp_path / "state"], only="opt"),
        jc.restore(tmp_path / "state", only="opt"),
    ):
        assert list(found) == ["opt"]
        assert jax.tree.structure(found["opt"]) == jax.tree.structure(training_state(1.0)["opt"])
    assert list(jc.restore(tmp_path / "state", only="params")) == ["params"]
    # A container of which a part is chosen has that part alone.
    assert list(jc.restore(tmp_path / "state", only="opt.1.0.count")["opt"]) == [1]


def test_live_trees_come_back_as_what_they_are() -> None:
    models = [nnx.Linear(2, 3, rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    states = [nnx.state(model) for model in models]
    soup = averaging.uniform_soup(states)
    assert isinstance(soup, nnx.State)
    nnx.update(models[0], soup)
    assert models[0](jnp.ones((1, 2))).shape == (1, 3)
    assert isinstance(averaging.average([optax.EmaState(1, jnp.ones(2))] * 2), optax.EmaState)
    mapped = averaging.average(states, eval_params=lambda state: (state, None))
    assert isinstance(mapped, tuple)
    assert isinstance(mapped[0], nnx.State)


def test_computed_leaves_lie_on_the_mesh_of_their_inputs(tmp_path: Path) -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("a", "b"))
    for step in (0, 1):
        value = jax.device_put(jnp.full((16, 8), float(step)), sharding)
        jc.save(tmp_path / f"{step}", {"scale": jnp.float32(2), "y": value})

    def point(state: dict[str, Any]) -> dict[str, Any]:
        y = state["y"]
        return {"x": y - state["scale"], "mean": y.mean(), "rows": y.sum(0), "flat": y.reshape(-1), "half": y[:8]}

    found = averaging.average([tmp_path / "0", tmp_path / "1"], eval_params=point)
    assert found["x"].sharding == sharding
    for name in ("mean", "rows", "flat", "half"):
        assert found[name].sharding == NamedSharding(mesh, P())
    np.testing.assert_array_equal(found["rows"], np.full(8, 8.0))
    np.testing.assert_array_equal(found["x"], np.full((16, 8), -1.5))
