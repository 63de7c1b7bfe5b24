"""A lost stage is what the formula says, nothing of it is read, and only its neighbours' shards travel."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.events import Recovered, subscribe
from jaxckpt.recovery.copies import copy_ages, init_copies, refresh_copies
from jaxckpt.recovery.layout import Listed, Stacked, StageLayout
from jaxckpt.recovery.norms import finite_stages, init_norms, stage_norms
from jaxckpt.recovery.optimizer import scale_by_reset_age, scale_by_stage_lr, stage_optimizer
from jaxckpt.recovery.plan import Available, RecoveryPolicy, plan_recovery
from jaxckpt.recovery.recover import lower_recovery, recover_stage
from jaxckpt.recovery.rows import PART_BYTES

PLAIN = StageLayout(stages=4, rules=(Stacked(pattern="stages"),))
CIRCULAR = StageLayout(stages=4, repeats=2, rules=(Stacked(pattern="stages", stage_axis=1, repeat_axis=0),))


def mesh_of(stage: int = 4, fsdp: int = 2, kind: AxisType = AxisType.Auto) -> Any:
    return jax.make_mesh((stage, fsdp), ("stage", "fsdp"), axis_types=(kind,) * 2)


def oracle(left: Any, right: Any, a: float, b: float, power: int) -> Any:
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    a, b = np.float64(np.float32(a)) ** power, np.float64(np.float32(b)) ** power
    return (a * left + b * right) / (a + b)


def assert_one_ulp(have: Any, want: Any) -> None:
    rounded = want.astype(np.float32)
    assert np.all(np.abs(np.asarray(have, np.float64) - rounded) <= np.spacing(np.abs(rounded)))


def put(value: Any, mesh: Any, *spec: Any) -> jax.Array:
    return jax.device_put(value, NamedSharding(mesh, P(*spec)))


def poison(value: np.ndarray, index: Any) -> np.ndarray:
    value = value.copy()
    value[index] = np.nan
    return value


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("stage_devices", [4, 2, 1])
@pytest.mark.parametrize("lost", [1, 2])
def test_stacked_stage_is_the_weighted_average(power: int, stage_devices: int, lost: int) -> None:
    mesh = mesh_of(stage_devices)
    w = np.random.default_rng(0).normal(size=(4, 3, 64, 8)).astype(np.float32)
    norms = np.asarray([0.3, 1.7, 0.011, 2.5], np.float32)
    norms[lost] = np.nan
    state = {"stages": {"w": put(poison(w, lost), mesh, "stage", None, "fsdp")}, "head": put(w[0], mesh)}
    plan = plan_recovery(lost, PLAIN, policy=RecoveryPolicy(power=power))
    new = recover_stage(state, plan, mesh, norms=put(norms, mesh, "stage"))
    have = np.asarray(new["stages"]["w"])
    assert_one_ulp(have[lost], oracle(w[lost - 1], w[lost + 1], norms[lost - 1], norms[lost + 1], power))
    others = [s for s in range(4) if s != lost]
    np.testing.assert_array_equal(have[others], w[others])
    assert state["stages"]["w"].is_deleted()  # donated


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("lost", [1, 2])
def test_axes_within_a_stage_keep_their_shards(power: int, lost: int) -> None:
    """Stages on two devices, each leaf split over fsdp and tensor axes: only neighbours' shards travel."""
    mesh = jax.make_mesh((2, 2, 2), ("stage", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    specs = {
        "query": P("stage", None, "fsdp", "tensor"),
        "out": P("stage", None, ("tensor", "fsdp")),
        "norm": P("stage"),
    }
    shapes = {"query": (4, 2, 16, 8), "out": (4, 2, 16, 4), "norm": (4, 2, 16)}
    rng = np.random.default_rng(0)
    w = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    norms = np.asarray([0.3, 1.7, 0.011, 2.5], np.float32)
    state = {"stages": {n: put(poison(x, lost), mesh, *specs[n]) for n, x in w.items()}}
    homes = {n: x.sharding for n, x in state["stages"].items()}
    plan = plan_recovery(lost, PLAIN, policy=RecoveryPolicy(power=power))
    text = lower_recovery(state, plan, mesh, norms=jnp.asarray(norms)).compile().as_text()
    assert set(re.findall(r"= \S+ (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", text)) == {
        "collective-permute"
    }
    new = recover_stage(state, plan, mesh, norms=jnp.asarray(norms))["stages"]
    for name, x in w.items():
        assert new[name].sharding.is_equivalent_to(homes[name], x.ndim)
        have = np.asarray(new[name])
        assert_one_ulp(have[lost], oracle(x[lost - 1], x[lost + 1], norms[lost - 1], norms[lost + 1], power))
        others = [s for s in range(4) if s != lost]
        np.testing.assert_array_equal(have[others], x[others])


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("lost", range(4))
def test_circular_blocks_average_their_logical_neighbours(power: int, lost: int) -> None:
    mesh = mesh_of()
    w = np.random.default_rng(1).normal(size=(2, 4, 3, 8)).astype(np.float32)
    norms = np.random.default_rng(2).random((2, 4)).astype(np.float32)
    state = {"stages": put(poison(w, np.s_[:, lost]), mesh, None, "stage", None, "fsdp")}
    plan = plan_recovery(lost, CIRCULAR, policy=RecoveryPolicy(power=power))
    have = np.asarray(recover_stage(state, plan, mesh, norms=put(norms, mesh, None, "stage"))["stages"])
    flat, flat_norms = w.reshape(8, 3, 8), norms.reshape(8)
    for block in (lost, 4 + lost):
        if block == 0 or block == 7:
            want = flat[1 if block == 0 else 6].astype(np.float64)
        else:
            want = oracle(flat[block - 1], flat[block + 1], flat_norms[block - 1], flat_norms[block + 1], power)
        assert_one_ulp(have[block // 4, block % 4], want)


@pytest.mark.parametrize("pattern", ["stages.{stage}", "stage_{stage}"])
def test_listed_stages_give_what_stacked_ones_give(pattern: str) -> None:
    w = np.random.default_rng(3).normal(size=(4, 5, 6)).astype(np.float32)
    norms = jnp.asarray([0.3, 1.7, 0.9, 2.5])
    rows = [jnp.asarray(poison(w, 2)[s]) for s in range(4)]
    state = (
        {"stages": [{"w": x} for x in rows]} if "." in pattern else {f"stage_{s}": {"w": x} for s, x in enumerate(rows)}
    )
    plan = plan_recovery(2, StageLayout(stages=4, rules=(Listed(pattern=pattern),)))
    new = recover_stage(state, plan, mesh_of(), norms=norms)
    row = new["stages"][2]["w"] if "." in pattern else new["stage_2"]["w"]
    assert_one_ulp(row, oracle(w[1], w[3], 1.7, 2.5, 1))


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.0), (np.nan, 1.0), (np.inf, 1.0)])
def test_useless_norms_weigh_the_same(a: float, b: float) -> None:
    w = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    state = {"stages": jnp.asarray(poison(w, 1))}
    new = recover_stage(state, plan_recovery(1, PLAIN), mesh_of(), norms=jnp.asarray([a, 1.0, b, 1.0]))
    assert_one_ulp(new["stages"][1], oracle(w[0], w[2], 1, 1, 1))


def test_only_permutes_of_two_stages_travel_and_inputs_are_donated() -> None:
    mesh = mesh_of()
    shapes = {"a": (4, 3, 64, 8), "b": (4, 3, 16)}
    specs = {"a": P("stage", None, "fsdp"), "b": P("stage")}
    state = {
        "stages": {
            n: jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, specs[n])) for n, s in shapes.items()
        }
    }
    norms = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=NamedSharding(mesh, P("stage")))
    text = lower_recovery(state, plan_recovery(2, PLAIN), mesh, norms=norms).compile().as_text()
    collectives = re.findall(r"= \S+ (all-\w+|reduce-scatter|collective-\w+|all-to-all)(?:-start)?\(", text)
    assert set(collectives) == {"collective-permute"}
    moved = re.findall(r"= f32\[([\d,]*)\]\S* collective-permute\(", text)
    elements = sum(int(np.prod([int(x) for x in shape.split(",") if x])) for shape in moved)
    per_device = 3 * 32 * 8 + 3 * 16
    assert elements <= 2 * per_device + 2
    assert text.split("\n", 1)[0].count("may-alias") + text.split("\n", 1)[0].count("must-alias") == 2


@pytest.mark.parametrize("source", ["average", "stale_copy", "checkpoint_stage", "edge_copy"])
def test_what_travels_in_parts_arrives_whole(source: str) -> None:
    mesh = mesh_of()
    w = np.random.default_rng(0).normal(size=(4, 3, 4124, 256)).astype(np.float32)
    layout = replace(PLAIN, swap=source == "edge_copy")
    lost = 0 if source == "edge_copy" else 2
    copies = None if source in ("average", "edge_copy") else {"stages": put(w + 1, mesh, "stage", None, "fsdp")}
    plan = plan_recovery(lost, layout, Available(copies={lost: 3}, checkpoint_age=3), source=source)
    norms = put(np.asarray([0.3, 1.7, 0.011, 2.5], np.float32), mesh, "stage")
    state = {"stages": put(poison(w, lost), mesh, "stage", None, "fsdp")}
    text = lower_recovery(state, plan, mesh, norms=norms, copies=copies).compile().as_text() or ""
    assert " while(" in text
    assert -(-3 * 2062 * 256 * 4 // PART_BYTES) == 4  # of a device: three times 516 rows, and the other 514
    have = np.asarray(recover_stage(state, plan, mesh, norms=norms, copies=copies)["stages"])
    if source == "average":
        assert_one_ulp(have[2], oracle(w[1], w[3], 1.7, 2.5, 1))
    else:
        want = {"stale_copy": w[3] + 1, "checkpoint_stage": w[2] + 1, "edge_copy": w[1]}[source]
        np.testing.assert_array_equal(have[lost], want)
    others = [s for s in range(4) if s != lost]
    np.testing.assert_array_equal(have[others], w[others])


def test_a_large_stage_takes_the_memory_of_a_part_to_travel() -> None:
    mesh = mesh_of(fsdp=1)
    rows = jax.ShapeDtypeStruct((4, 12, 1024, 1024), jnp.float32, sharding=NamedSharding(mesh, P("stage")))
    norms = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=NamedSharding(mesh, P("stage")))
    found = lower_recovery({"stages": rows}, plan_recovery(1, PLAIN), mesh, norms=norms).compile().memory_analysis()
    assert found.temp_size_in_bytes <= 4 * PART_BYTES  # of a stage of 48 MiB, from two neighbours
    assert found.alias_size_in_bytes >= 48 * 2**20


def adam_state(tx: Any, mesh: Any) -> Any:
    params = {"stages": put(np.ones((4, 8), np.float32), mesh, "stage"), "head": put(np.ones(3, np.float32), mesh)}
    return {"params": params, "opt_state": tx.init(params)}


def train(state: Any, tx: Any, steps: int) -> tuple[Any, Any]:
    grads = jax.tree.map(lambda x: jnp.ones_like(x) * 0.1, state["params"])
    update = jax.jit(tx.update)
    updates, opt_state = None, state["opt_state"]
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            updates, opt_state = update(grads, opt_state, state["params"])
    return {"params": state["params"], "opt_state": opt_state}, updates


@pytest.mark.parametrize("mode", ["fresh", "nu_average", "average", "rescale"])
def test_the_first_update_after_recovery_is_no_larger_than_the_learning_rate(mode: str) -> None:
    mesh = mesh_of()
    if mode == "rescale":
        tx = optax.chain(optax.adam(1e-2), scale_by_reset_age(PLAIN))
    else:
        tx = stage_optimizer(optax.adam(1e-2), PLAIN)
    state, _ = train(adam_state(tx, mesh), tx, 60)
    rows = {"stage": 1}

    def lose(path: Any, x: Any) -> Any:
        staged = x.ndim and x.shape[0] == 4 and jnp.issubdtype(x.dtype, jnp.floating)
        return x.at[rows["stage"]].set(jnp.nan) if staged else x

    state = jax.tree_util.tree_map_with_path(lose, state)
    plan = plan_recovery(1, PLAIN, policy=RecoveryPolicy(optimizer=mode))
    state = recover_stage(state, plan, mesh, norms=jnp.ones(4), tx=tx)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    for _ in range(12):
        state, updates = train(state, tx, 1)
        assert np.abs(updates["stages"]).max() <= 1.05 * 1e-2


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_moments_lie_where_their_weights_lie(kind: AxisType) -> None:
    mesh = mesh_of(kind=kind)
    w = put(np.ones((4, 8, 6), np.float32), mesh, "stage", "fsdp")
    state = stage_optimizer(optax.adam(1e-2), PLAIN).init({"stages": w})
    moments = state.stacked_stages[0]
    assert moments.mu["stages"].sharding == moments.nu["stages"].sharding == w.sharding
    assert moments.count.sharding.spec == P("stage")


@pytest.mark.parametrize("layout", [PLAIN, CIRCULAR])
def test_explicit_axes_recover_to_the_same_bits(layout: StageLayout) -> None:
    """The optimizer's state made, a step taken, a stage lost and filled in, without a mesh in force."""
    tx = optax.chain(stage_optimizer(optax.adam(1e-2), layout), scale_by_stage_lr(layout))
    lead = (4,) if layout is PLAIN else (2, 4)
    w = np.random.default_rng(0).normal(size=(*lead, 16, 8)).astype(np.float32)

    def run(kind: AxisType) -> Any:
        mesh = mesh_of(kind=kind)
        params = {"stages": put(w, mesh, *([None] * (len(lead) - 1)), "stage", "fsdp"), "head": put(w[0], mesh)}
        opt_state = tx.init(params)
        grads = jax.tree.map(lambda x: 0.1 * x, params)
        updates, opt_state = tx.update(grads, opt_state, params)
        state = {"params": optax.apply_updates(params, updates), "opt_state": opt_state}
        plan = plan_recovery(1, layout)
        return recover_stage(state, plan, mesh, norms=jnp.asarray([0.3, 1.7, 0.011, 2.5], jnp.float32), tx=tx)

    auto, explicit = run(AxisType.Auto), run(AxisType.Explicit)
    jax.tree.map(np.testing.assert_array_equal, explicit, auto)


def test_a_shared_count_under_fresh_moments_is_refused() -> None:
    mesh, tx = mesh_of(), optax.adam(1e-2)
    state = adam_state(tx, mesh)
    with pytest.raises(InvalidArgumentError, match="6 times too large"):
        recover_stage(state, plan_recovery(1, PLAIN), mesh, norms=jnp.ones(4), tx=tx)


def test_the_learning_rate_of_the_lost_stage_is_raised() -> None:
    mesh = mesh_of()
    tx = optax.chain(stage_optimizer(optax.adam(1e-2), PLAIN), scale_by_stage_lr(PLAIN, decay_steps=2))
    state = adam_state(tx, mesh)
    state = recover_stage(state, plan_recovery(1, PLAIN), mesh, norms=jnp.ones(4), tx=tx)
    np.testing.assert_allclose(state["opt_state"][1].stage_lr_scale, [1, 1.1, 1, 1])
    for factor in (1.1, 1.05, 1.0):
        state, updates = train(state, tx, 1)
        np.testing.assert_allclose(updates["stages"][1] / updates["stages"][0], factor, rtol=1e-5)


def test_a_stale_copy_brings_back_the_lost_stage_alone() -> None:
    mesh = mesh_of()
    w = np.arange(32, dtype=np.float32).reshape(4, 8)
    old, new = (put(w + d, mesh, "stage", "fsdp") for d in (0, 100))
    copies = init_copies({"stages": old}, PLAIN, mesh)
    copies = jax.jit(lambda c, t: refresh_copies(c, t, 7, PLAIN, mesh, every=10))(copies, {"stages": new})
    assert copy_ages(copies, 7, PLAIN)[2] == 7
    plan = plan_recovery(2, PLAIN, Available(copies=copy_ages(copies, 7, PLAIN)))
    assert plan.steps[0].source == "stale_copy"
    lost = put(poison(w + 100, 2), mesh, "stage", "fsdp")
    heard: list[Any] = []
    stop = subscribe(heard.append)
    have = np.asarray(
        recover_stage({"params": {"stages": lost}}, plan, mesh, copies=copies.values, step=7)["params"]["stages"]
    )
    stop()
    np.testing.assert_array_equal(have[2], w[2])
    np.testing.assert_array_equal(have[[0, 1, 3]], w[[0, 1, 3]] + 100)
    assert isinstance(heard[0], Recovered)
    assert heard[0].stages == (2,)


def test_taking_copies_of_the_new_weights_copies_nothing_in_other_steps() -> None:
    mesh = mesh_of()
    w = put(np.ones((4, 64, 64), np.float32), mesh, "stage", "fsdp")
    copies = init_copies({"stages": w}, PLAIN, mesh)

    def step(w: Any, copies: Any, step: Any) -> Any:
        new = w - 0.1 * jnp.sin(w)
        return new, refresh_copies(copies, {"stages": new}, step + 1, PLAIN, mesh, every=10)

    homes = jax.tree.map(lambda x: x.sharding, (w, copies))
    program = jax.jit(step, donate_argnums=(0, 1), out_shardings=homes).lower(w, copies, jnp.int32(3)).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 64 * 64 * 4 // 2  # of one device: half of a stage


@pytest.mark.parametrize(("lost", "partner"), [(0, 1), (3, 2)])
def test_edge_stages_copy_their_swap_partner(lost: int, partner: int) -> None:
    w = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    plan = plan_recovery(lost, StageLayout(stages=4, swap=True))
    mesh = mesh_of()
    have = np.asarray(recover_stage({"stages": put(poison(w, lost), mesh, "stage")}, plan, mesh)["stages"])
    np.testing.assert_array_equal(have[lost], w[partner])


def test_stages_that_are_not_congruent_are_refused() -> None:
    state = {"stages": [{"w": jnp.ones(3)}, {"w": jnp.ones(3)}, {"w": jnp.ones(4)}, {"w": jnp.ones(3)}]}
    plan = plan_recovery(1, StageLayout(stages=4, rules=(Listed(pattern="stages.{stage}"),)))
    with pytest.raises(InvalidArgumentError, match="not congruent"):
        recover_stage(state, plan, mesh_of(), norms=jnp.ones(4))


def test_norms_are_per_stage_without_a_collective() -> None:
    mesh = jax.make_mesh((4,), ("stage",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    grads = {"stages": put(np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32), mesh, "stage")}
    compute = jax.jit(lambda g: stage_norms(g, PLAIN))
    np.testing.assert_allclose(compute(grads), np.linalg.norm(grads["stages"], axis=1), rtol=1e-6)
    assert not re.search(
        r"(all-\w+|collective-\w+|reduce-scatter)(-start)?\(", compute.lower(grads).compile().as_text()
    )
    bad = {"stages": jnp.asarray(poison(np.ones((4, 2), np.float32), 3))}
    assert finite_stages(bad, PLAIN).tolist() == [True, True, True, False]


def test_fresh_norms_can_be_donated() -> None:
    pointers = [norm.unsafe_buffer_pointer() for norm in init_norms(PLAIN)]
    assert len(set(pointers)) == 3
