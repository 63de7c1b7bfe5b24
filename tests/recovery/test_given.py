"""What a recovery is given: copies of weights alone, counts that stages share, sources that do not mix, and names."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.recovery.copies import init_copies
from jaxckpt.recovery.layout import Listed, Stacked, StageLayout
from jaxckpt.recovery.norms import init_norms
from jaxckpt.recovery.optimizer import scale_by_reset_age, scale_by_stage_lr, stage_optimizer
from jaxckpt.recovery.plan import Available, RecoveryPolicy, plan_recovery
from jaxckpt.recovery.recover import lower_recovery, recover_stage

STACKED = StageLayout(stages=4, rules=(Stacked(pattern="stages"),))
LISTED = StageLayout(stages=4, rules=(Listed(pattern="stages.{stage}"),))
OWN = ("stale_copy", "checkpoint_stage")


def one_device() -> Any:
    return jax.make_mesh((1,), ("stage",), axis_types=(AxisType.Auto,))


def listed_state(tx: Any, lost: int = 1) -> Any:
    rows = [jnp.full((3, 2), np.nan if s == lost else s + 1.0) for s in range(4)]
    params = {"stages": [{"w": x} for x in rows]}
    state = {"params": params, "opt_state": tx.init(params)}
    spoil = {"params": state["params"], "opt_state": state["opt_state"]}

    def gone(path: Any, leaf: Any) -> Any:
        mine = f"'{lost}'" in jax.tree_util.keystr(path) or f"stages.{lost}." in jax.tree_util.keystr(path)
        return jnp.full_like(leaf, jnp.nan) if mine and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree_util.tree_map_with_path(gone, spoil)


@pytest.mark.parametrize("mode", ["fresh", "average", "keep", "nu_average"])
@pytest.mark.parametrize("source", OWN)
def test_weights_without_moments_leave_no_nan_in_a_list(mode: str, source: str) -> None:
    tx = stage_optimizer(optax.adam(1e-2), LISTED)
    state = listed_state(tx)
    assert any(not np.isfinite(x).all() for x in jax.tree.leaves(state["opt_state"]))
    copies = {"stages": [{"w": jnp.full((3, 2), 7.0)} for _ in range(4)]}
    available = Available(copies={1: 3}, checkpoint_age=3)
    plan = plan_recovery(1, LISTED, available, policy=RecoveryPolicy(optimizer=mode), source=source)
    new = recover_stage(state, plan, one_device(), copies=copies, tx=tx)
    for leaf in jax.tree.leaves(new):
        assert np.isfinite(leaf).all()
    np.testing.assert_array_equal(new["params"]["stages"][1]["w"], np.full((3, 2), 7.0))


@pytest.mark.parametrize("mode", ["fresh", "average", "keep", "nu_average"])
def test_moments_that_nobody_kept_are_as_init_makes_them(mode: str) -> None:
    """Schedule-free's z is the weights at first, and no zeros."""
    tx = stage_optimizer(optax.contrib.schedule_free_adamw(1e-2), STACKED)
    params = {"stages": jnp.arange(1.0, 5.0)[:, None] * jnp.ones((4, 3))}
    state = {"params": params, "opt_state": tx.init(params)}
    copies = {"stages": jnp.full((4, 3), 9.0)}
    plan = plan_recovery(
        1, STACKED, Available(copies={1: 3}), policy=RecoveryPolicy(optimizer=mode), source="stale_copy"
    )
    new = recover_stage(state, plan, one_device(), copies=copies, tx=tx)
    z = new["opt_state"].stacked_stages.z["stages"]
    np.testing.assert_array_equal(z[1], new["params"]["stages"][1])
    np.testing.assert_array_equal(new["params"]["stages"][1], [9.0, 9.0, 9.0])


@pytest.mark.parametrize(
    ("mode", "chained", "refused"),
    [("average", False, True), ("nu_average", False, True), ("rescale", False, True), ("rescale", True, False)],
)
def test_fresh_moments_under_a_shared_count_are_refused(mode: str, chained: bool, refused: bool) -> None:
    tx = optax.chain(optax.adam(1e-2), scale_by_reset_age(STACKED)) if chained else optax.adam(1e-2)
    params = {"stages": jnp.ones((4, 3))}
    state = {"params": params, "opt_state": tx.init(params)}
    policy = RecoveryPolicy(optimizer=mode)
    plan = plan_recovery(1, STACKED, Available(copies={1: 3}), policy=policy, source="stale_copy")
    given: dict[str, Any] = {"copies": {"stages": jnp.ones((4, 3))}, "tx": tx}
    if refused:
        with pytest.raises(InvalidArgumentError, match="one count for all stages"):
            recover_stage(state, plan, one_device(), **given)
    else:
        recover_stage(state, plan, one_device(), **given)


def test_an_exact_source_changes_neither_the_learning_rate_nor_ages() -> None:
    tx = optax.chain(optax.adam(1e-2), scale_by_stage_lr(STACKED), scale_by_reset_age(STACKED))
    params = {"stages": jnp.ones((4, 3))}
    state = {"params": params, "opt_state": tx.init(params)}
    policy = RecoveryPolicy(optimizer="keep")
    plan = plan_recovery(1, STACKED, Available(copies={1: 0}), policy=policy, source="same_step_copy")
    copies = {"params": params, "opt_state": state["opt_state"]}
    copies = jax.tree.map(lambda x: x.copy(), {"params": copies["params"], "opt_state": {0: moments(copies)}})
    new = recover_stage(state, plan, one_device(), copies=copies, tx=tx)
    np.testing.assert_array_equal(new["opt_state"][1].stage_lr_scale, np.ones(4))
    assert (np.asarray(new["opt_state"][2].stage_age) > 0).all()


def moments(state: Any) -> Any:
    adam = state["opt_state"][0][0]
    return {0: {"mu": adam.mu, "nu": adam.nu}}


def test_an_average_of_moments_keeps_their_age() -> None:
    tx = optax.chain(optax.adam(1e-2), scale_by_reset_age(STACKED))
    params = {"stages": jnp.ones((4, 3))}
    state = {"params": params, "opt_state": tx.init(params)}
    plan = plan_recovery(1, STACKED, policy=RecoveryPolicy(optimizer="average"))
    new = recover_stage(state, plan, one_device(), norms=jnp.ones(4), tx=tx)
    assert (np.asarray(new["opt_state"][1].stage_age) > 0).all()


def test_copies_of_neighbours_and_of_a_checkpoint_do_not_mix() -> None:
    plan = plan_recovery((1, 2), STACKED, Available(copies={2: 3}, checkpoint_age=3))
    assert {step.source for step in plan.steps} == {"checkpoint_stage", "stale_copy"}
    state = {"stages": jnp.ones((4, 3))}
    with pytest.raises(InvalidArgumentError, match=r"stages \[1, 2\] from .*one stage\s+after the other"):
        recover_stage(state, plan, one_device(), copies={"stages": jnp.ones((4, 3))})


def test_stages_of_other_shapes_come_back_from_a_checkpoint() -> None:
    state = {"stages": [{"w": jnp.ones(3)}, {"w": jnp.full(5, np.nan)}, {"w": jnp.ones(3)}, {"w": jnp.ones(3)}]}
    plan = plan_recovery(1, LISTED, Available(congruent=False, checkpoint_age=4))
    assert plan.steps[0].source == "checkpoint_stage"
    copies = {"stages": [{"w": jnp.full(n, 2.0)} for n in (3, 5, 3, 3)]}
    new = recover_stage(state, plan, one_device(), copies=copies)
    np.testing.assert_array_equal(new["stages"][1]["w"], np.full(5, 2.0))


def test_stages_on_devices_of_their_own_are_told_what_to_do() -> None:
    state = {"stages": [{"w": jax.device_put(jnp.ones(3), d)} for d in jax.devices()[:4]]}
    with pytest.raises(InvalidArgumentError, match=r"different devices.*device_put the neighbours"):
        recover_stage(state, plan_recovery(1, LISTED), one_device(), norms=jnp.ones(4))


def test_a_list_is_not_filled_from_a_replica_in_silence() -> None:
    state = {"stages": [{"w": jnp.ones(3)} for _ in range(4)]}
    plan = plan_recovery(1, LISTED, Available(replicas={1: ("data", 0, 1)}))
    with pytest.raises(InvalidArgumentError, match="no row of a replica"):
        recover_stage(state, plan, one_device())


def test_arguments_are_understood_or_named() -> None:
    mesh, state = one_device(), {"stages": jnp.ones((4, 3))}
    assert plan_recovery(np.int64(1), STACKED).lost == (1,)
    with pytest.raises(InvalidArgumentError, match=r"copies\[2\] is -3"):
        Available(copies={2: -3})
    with pytest.raises(InvalidArgumentError, match="splice.*needs units"):
        RecoveryPolicy(method="splice")
    with pytest.raises(InvalidArgumentError, match="got StageNorms"):
        recover_stage(state, plan_recovery(1, STACKED), mesh, norms=init_norms(STACKED))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidArgumentError, match="fill_replicated"):
        recover_stage(state, plan_recovery(1, LISTED), mesh, norms=jnp.ones(4), fill_replicated=True)
    copies = init_copies({"stages": jnp.full((4, 3), 5.0)}, STACKED, mesh)
    plan = plan_recovery(1, STACKED, Available(copies={1: 0}))
    new = recover_stage(state, plan, mesh, copies=copies)
    np.testing.assert_array_equal(new["stages"][1], [5.0, 5.0, 5.0])


def test_what_travels_in_parts_is_two_stages_and_no_more() -> None:
    mesh = jax.make_mesh((4,), ("stage",), axis_types=(AxisType.Auto,))
    home = NamedSharding(mesh, P("stage"))
    rows = jax.ShapeDtypeStruct((4, 12, 1024, 1024), jnp.float32, sharding=home)
    norms = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=home)
    text = lower_recovery({"stages": rows}, plan_recovery(1, STACKED), mesh, norms=norms).compile().as_text() or ""
    (times,) = {int(n) for n in re.findall(r'known_trip_count":\{"n":"(\d+)"', text)}
    sizes = [int(n) for n in re.findall(r"= f32\[12,(\d+),1024\]\S* collective-permute\(", text)]
    assert sorted(sizes) == sorted(2 * [43] + 2 * [1024 - 43 * times])  # from two neighbours, the rest after the loop
    assert times == 23


class Lists(nnx.Module):
    def __init__(self) -> None:
        self.stages = nnx.List([nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(4)])
        self.head = nnx.Linear(3, 2, rngs=nnx.Rngs(9))


class Stacks(nnx.Module):
    def __init__(self) -> None:
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key: jax.Array) -> nnx.Linear:
            return nnx.Linear(3, 3, rngs=nnx.Rngs(key))

        self.stages = make(jax.random.split(jax.random.key(0), 4))
        self.head = nnx.Linear(3, 2, rngs=nnx.Rngs(9))


@pytest.mark.parametrize(("model", "layout"), [(Lists, LISTED), (Stacks, STACKED)])
def test_an_nnx_optimizer_takes_a_stage_optimizer(model: Any, layout: StageLayout) -> None:
    made = model()
    tx = optax.chain(stage_optimizer(optax.adam(1e-2), layout), scale_by_stage_lr(layout))
    optimizer = nnx.Optimizer(made, tx, wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(made, nnx.Param))

    def loss(m: Any) -> jax.Array:
        return jnp.stack([jnp.sum(x**2) for x in jax.tree.leaves(nnx.state(m, nnx.Param))]).sum()

    for _ in range(2):
        optimizer.update(made, nnx.grad(loss)(made))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, nnx.state(made, nnx.Param))
    assert sum(jax.tree.leaves(moved)) >= 2  # biases begin at zero, where the loss has no slope
    state = {"params": nnx.state(made, nnx.Param), "opt_state": nnx.state(optimizer)["opt_state"]}
    state = jax.tree.map(jnp.copy, state)
    policy = RecoveryPolicy(optimizer="average")
    new = recover_stage(state, plan_recovery(1, layout, policy=policy), one_device(), norms=jnp.ones(4), tx=tx)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new))
