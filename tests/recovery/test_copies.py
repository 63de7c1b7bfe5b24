"""Copies of whole states and of stages in lists: what is kept, what is left out, and what comes back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.recovery.copies import copy_ages, init_copies, refresh_copies
from jaxckpt.recovery.layout import Listed, Stacked, StageLayout
from jaxckpt.recovery.optimizer import scale_by_stage_lr, stage_optimizer
from jaxckpt.recovery.plan import Available, RecoveryPolicy, plan_recovery
from jaxckpt.recovery.recover import recover_stage

STACKED = StageLayout(stages=4, rules=(Stacked(pattern="stages"),))
LISTED = StageLayout(stages=4, rules=(Listed(pattern="stages.{stage}"),))
KEEP = RecoveryPolicy(optimizer="keep")


def mesh() -> Any:
    return jax.make_mesh((4, 2), ("stage", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def trained(layout: StageLayout, on: Any, *, updates: int = 3) -> tuple[dict[str, Any], Any]:
    """Weights and moments of four stages and a head, all on one mesh."""
    w = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    stacked = jax.device_put(w, NamedSharding(on, P("stage", "fsdp")))
    listed = [{"w": jax.device_put(row, NamedSharding(on, P("fsdp")))} for row in w]
    head = jax.device_put(w[0], NamedSharding(on, P()))
    params = {"stages": stacked if layout is STACKED else listed, "head": head}
    tx = optax.chain(stage_optimizer(optax.adam(1e-2), layout), scale_by_stage_lr(layout))
    state = {"params": params, "opt_state": tx.init(params)}
    for _ in range(updates):
        state = updated(state, tx)
    return state, tx


def updated(state: dict[str, Any], tx: Any) -> dict[str, Any]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, opt_state = tx.update(state["params"], state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}


def of_stage(state: Any, layout: StageLayout, stage: int) -> list[np.ndarray]:
    """What belongs to a stage: weights, moments and counts."""
    if layout is STACKED:
        held = (state["params"]["stages"], state["opt_state"][0].stacked_stages)
        return [np.asarray(x)[stage] for x in jax.tree.leaves(held)]
    held = (state["params"]["stages"][stage], state["opt_state"][0].listed_stages[str(stage)])
    return [np.asarray(x) for x in jax.tree.leaves(held)]


def without(state: Any, layout: StageLayout, stage: int) -> Any:
    def lose(x: jax.Array) -> jax.Array:
        return jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 99)

    opt_state = state["opt_state"][0]
    if layout is STACKED:
        rows = lambda x: x.at[stage].set(jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 99)  # noqa: E731
        params = state["params"] | {"stages": rows(state["params"]["stages"])}
        opt_state = opt_state._replace(stacked_stages=jax.tree.map(rows, opt_state.stacked_stages))
    else:
        stages = [jax.tree.map(lose, x) if i == stage else x for i, x in enumerate(state["params"]["stages"])]
        params = state["params"] | {"stages": stages}
        listed = opt_state.listed_stages
        opt_state = opt_state._replace(listed_stages=listed | {str(stage): jax.tree.map(lose, listed[str(stage)])})
    return {"params": params, "opt_state": (opt_state, *state["opt_state"][1:])}


@pytest.mark.parametrize("layout", [STACKED, LISTED], ids=["stacked", "listed"])
@pytest.mark.parametrize("lost", [0, 2, 3])
def test_a_stage_comes_back_with_its_moments_as_they_were(layout: StageLayout, lost: int) -> None:
    on = mesh()
    state, tx = trained(layout, on)
    copies = init_copies(state, layout, on, step=3)
    assert copies.values["params"]["head"] is None
    want = of_stage(state, layout, lost)
    others = {s: of_stage(updated(state, tx), layout, s) for s in range(4) if s != lost}
    state = without(updated(state, tx), layout, lost)  # the copy is one step old
    plan = plan_recovery(lost, layout, Available(copies=copy_ages(copies, 4, layout)), policy=KEEP)
    assert plan.steps[0].source == "stale_copy"
    state = recover_stage(state, plan, on, copies=copies.values, tx=tx)
    for have, was in zip(of_stage(state, layout, lost), want, strict=True):
        np.testing.assert_array_equal(have, was)
    for stage, before in others.items():
        for have, was in zip(of_stage(state, layout, stage), before, strict=True):
            np.testing.assert_array_equal(have, was)


@pytest.mark.parametrize("layout", [STACKED, LISTED], ids=["stacked", "listed"])
def test_a_copy_is_taken_anew_when_its_step_comes_and_outlives_the_donated_state(layout: StageLayout) -> None:
    on = mesh()
    state, _ = trained(layout, on, updates=0)
    copies = init_copies(state["params"], layout, on)

    def step(params: Any, copies: Any, done: Any) -> Any:
        new = jax.tree.map(lambda x: x + 1, params)
        return new, refresh_copies(copies, new, done, layout, on, every=2)

    first = np.asarray(jax.tree.leaves(state["params"]["stages"])[0])
    program, params = jax.jit(step, donate_argnums=(0, 1)), state["params"]
    seen, ages = [], []
    for done in range(1, 5):
        params, copies = program(params, copies, done)
        ages.append(copy_ages(copies, done, layout)[1])
        value = np.asarray(jax.tree.leaves(copies.values["stages"])[0])
        seen.append(np.roll(value, -1, 0) - first if layout is STACKED else value - first)
    assert ages == [1, 0, 1, 0]
    np.testing.assert_allclose([x.mean() for x in seen], [0, 2, 2, 4], atol=1e-5)


def test_only_stages_of_which_a_copy_was_given_have_an_age() -> None:
    params = {"stages": {1: {"w": jnp.ones(3)}, 2: {"w": jnp.ones(3)}}}
    copies = init_copies(params, LISTED, mesh(), step=5)
    assert copy_ages(copies, 9, LISTED) == {1: 4, 2: 4}


def test_a_tree_without_stages_is_refused() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"No leaf belongs to a stage; leaves are \['head'\].*Give the stages"
    ):
        init_copies({"head": jnp.ones(3)}, STACKED, mesh())


def test_refreshing_with_other_leaves_is_refused() -> None:
    on = mesh()
    copies = init_copies({"stages": {"w": jnp.ones((4, 3)), "b": jnp.ones(4)}}, STACKED, on)
    with pytest.raises(InvalidArgumentError, match=r'"stages\.b" is in the copies alone'):
        refresh_copies(copies, {"stages": {"w": jnp.ones((4, 3))}}, 1, STACKED, on)
    with pytest.raises(InvalidArgumentError, match=r'"params\.stages\.w" is in the tree alone'):
        refresh_copies(
            init_copies({"stages": jnp.ones(4)}, STACKED, on),
            {"params": {"stages": {"w": jnp.ones(4)}}},
            1,
            STACKED,
            on,
        )
