"""Trees as Flax makes them, several processes' replicated leaves, the variants, and compiling once."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.recovery.layout import Listed, Stacked, StageLayout
from jaxckpt.recovery.optimizer import stage_optimizer
from jaxckpt.recovery.plan import Available, RecoveryPolicy, plan_recovery
from jaxckpt.recovery.recover import recover_stage

LAYOUT = StageLayout(stages=4, rules=(Stacked(pattern="stages", layers_axis=1),))
LISTED = StageLayout(stages=4, rules=(Listed(pattern="stages.{stage}"),))
MESH = partial(jax.make_mesh, (4, 2), ("stage", "data"), axis_types=(AxisType.Auto,) * 2)


def test_boxed_linen_leaves_stay_boxed() -> None:
    w = jnp.asarray([[1.0, 2.0], [jnp.nan] * 2, [3.0, 4.0], [0.0, 0.0]])
    state = {"params": {"stages": {"w": nn.Partitioned(w, names=("stage", None))}}}
    box = recover_stage(state, plan_recovery(1, LAYOUT), MESH(), norms=jnp.ones(4))["params"]["stages"]["w"]
    assert isinstance(box, nn.Partitioned)
    assert box.names == ("stage", None)
    np.testing.assert_array_equal(box.value[1], [2.0, 3.0])


def test_an_nnx_list_of_stages_and_its_optimizer() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.stages = nnx.List([nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(4)])
            self.head = nnx.Linear(3, 2, rngs=nnx.Rngs(9))

    params = nnx.state(Model(), nnx.Param)
    tx = stage_optimizer(optax.adam(1e-2), LISTED)
    want = 0.5 * (np.asarray(params["stages"][0]["kernel"][...]) + np.asarray(params["stages"][2]["kernel"][...]))
    opt_state = tx.init(params)
    _, opt_state = tx.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
    lost = params["stages"][1]
    lost["kernel"] = lost["kernel"].replace(jnp.full((3, 3), jnp.nan))
    plan = plan_recovery(1, LISTED)
    new = recover_stage({"params": params, "opt_state": opt_state}, plan, MESH(), norms=jnp.ones(4), tx=tx)
    np.testing.assert_allclose(new["params"]["stages"][1]["kernel"][...], want, rtol=1e-6)
    counts = [int(new["opt_state"].listed_stages[str(s)][0].count) for s in range(4)]
    assert counts == [1, 0, 1, 1]


def test_what_every_stage_holds_is_copied_to_an_empty_process() -> None:
    mesh = MESH()
    sharding = NamedSharding(mesh, P())
    pieces = [
        jax.device_put(np.full(3, np.nan if row == 1 else 7.0, np.float32), device)
        for row, devices in enumerate(mesh.devices)
        for device in devices
    ]
    head = jax.make_array_from_single_device_arrays((3,), sharding, pieces)
    stages = jax.device_put(np.ones((4, 2), np.float32), NamedSharding(mesh, P("stage")))
    state = {"stages": stages, "head": head}
    new = recover_stage(state, plan_recovery(1, LAYOUT), mesh, norms=jnp.ones(4), fill_replicated=True)
    assert all((np.asarray(shard.data) == 7.0).all() for shard in new["head"].addressable_shards)


def test_a_live_replica_is_copied_exactly() -> None:
    mesh = MESH()
    w = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    sharding = NamedSharding(mesh, P("stage"))
    pieces = [
        jax.device_put(np.full((1, 6), np.nan, np.float32) if (row, column) == (2, 1) else w[row : row + 1], device)
        for row, devices in enumerate(mesh.devices)
        for column, device in enumerate(devices)
    ]
    state = {"stages": jax.make_array_from_single_device_arrays((4, 6), sharding, pieces)}
    plan = plan_recovery(2, LAYOUT, Available(replicas={2: ("data", 1, 0)}))
    new = recover_stage(state, plan, mesh)["stages"]
    for shard in new.addressable_shards:
        np.testing.assert_array_equal(shard.data, w[shard.index])


def variant(method: str, **policy: Any) -> np.ndarray:
    w = np.stack([np.full((2, 4), s, np.float32) for s in (1, np.nan, 3, 5)])
    w[0, 1], w[2, 0] = 2, 8
    plan = plan_recovery(1, LAYOUT, policy=RecoveryPolicy(method=method, **policy))
    state = {"params": {"stages": jax.device_put(w, NamedSharding(MESH(), P("stage")))}}
    init = lambda: {"stages": jnp.full((4, 2, 4), 9.0)}  # noqa: E731
    return np.asarray(recover_stage(state, plan, MESH(), init=init)["params"]["stages"])[1]


def test_variants() -> None:
    np.testing.assert_array_equal(variant("uniform")[:, 0], [4.5, 2.5])
    np.testing.assert_array_equal(variant("copy")[:, 0], [1, 2])
    np.testing.assert_array_equal(variant("random"), np.full((2, 4), 9))
    np.testing.assert_array_equal(variant("identity", zero=("stages",)), np.zeros((2, 4)))
    np.testing.assert_array_equal(variant("splice", units=(("stages", -1),))[0], [1, 1, 8, 8])
    np.testing.assert_allclose(variant("layerwise")[:, 0], [4, 6], rtol=1e-6)  # between 2 and 8


def test_losing_the_same_stage_again_compiles_nothing(caplog: pytest.LogCaptureFixture) -> None:
    mesh = MESH()

    def lose() -> None:
        state = {"stages": jax.device_put(np.ones((4, 2), np.float32), NamedSharding(mesh, P("stage")))}
        recover_stage(state, plan_recovery(1, LAYOUT), mesh, norms=norms)

    norms = jnp.ones(4)
    lose()
    with jax.log_compiles():
        lose()
    assert "Compiling" not in caplog.text


def test_what_the_plan_needs_must_be_given() -> None:
    state = {"stages": jnp.ones((4, 2))}
    for plan, match in (
        (plan_recovery(1, LAYOUT), "needs norms"),
        (plan_recovery(1, LAYOUT, Available(copies={1: 3})), "pass copies="),
        (plan_recovery(1, LAYOUT, policy=RecoveryPolicy(method="random")), "init="),
        (plan_recovery(1, LAYOUT, Available(snapshot_age=0)), "rollback"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            recover_stage(state, plan, MESH())
