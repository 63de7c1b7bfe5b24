"""Recovery of a stage on TPU slices: only neighbours' shards travel, and the state is written where it lies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxckpt.recovery.copies import NeighbourCopies, refresh_copies
from jaxckpt.recovery.layout import Stacked, StageLayout
from jaxckpt.recovery.norms import stage_norms
from jaxckpt.recovery.optimizer import stage_optimizer
from jaxckpt.recovery.plan import Available, RecoveryPolicy, plan_recovery
from jaxckpt.recovery.recover import lower_recovery
from tests.tpu.slices import SMALL, Compiled, compile_for_slice, devices, mesh

STAGES = 4
PLAIN = StageLayout(stages=STAGES, rules=(Stacked(pattern="stages"),))
SWAPPED = StageLayout(stages=STAGES, rules=(Stacked(pattern="stages"),), swap=True)
CIRCULAR = StageLayout(stages=STAGES, repeats=2, rules=(Stacked(pattern="stages", stage_axis=1, repeat_axis=0),))
LEAVES = {"query": (2, 1024, 512), "up": (2, 1024, 2048), "norm": (2, 1024)}


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", SMALL)
def test_average_moves_two_stages_and_nothing_else(name: str, power: int) -> None:
    """Three leaves of weights split over the axes within a stage, under Adam with a count per stage."""
    found, stage_bytes = _recovery(name, PLAIN, 1, policy=RecoveryPolicy(power=power))
    assert {c.kind for c in found.collectives} == {"collective-permute"}
    assert sum(c.size_bytes for c in found.collectives if c.size_bytes > 1024) <= _moved(found, 2 * stage_bytes)
    _assert_in_place(found)


@pytest.mark.parametrize("name", SMALL)
def test_an_edge_moves_one_stage(name: str) -> None:
    found, stage_bytes = _recovery(name, SWAPPED, 0)
    assert {c.kind for c in found.collectives} == {"collective-permute"}
    assert sum(c.size_bytes for c in found.collectives if c.size_bytes > 1024) <= _moved(found, stage_bytes)
    _assert_in_place(found)


@pytest.mark.parametrize("lost", [0, 2])
def test_a_circular_pipeline_moves_two_stages(lost: int) -> None:
    found, stage_bytes = _recovery(SMALL[0], CIRCULAR, lost)
    assert {c.kind for c in found.collectives} == {"collective-permute"}
    assert sum(c.size_bytes for c in found.collectives if c.size_bytes > 1024) <= _moved(found, 2 * stage_bytes)
    _assert_in_place(found)


@pytest.mark.parametrize("name", SMALL)
def test_a_copy_moves_one_stage(name: str) -> None:
    found, stage_bytes = _recovery(name, PLAIN, 2, copies=True)
    assert {c.kind for c in found.collectives} == {"collective-permute"}
    assert sum(c.size_bytes for c in found.collectives if c.size_bytes > 1024) <= _moved(found, stage_bytes)
    _assert_in_place(found)


@pytest.mark.parametrize("name", SMALL)
def test_copies_are_refreshed_by_one_move_of_each_leaf(name: str) -> None:
    on = _mesh(name)
    stages = _stages(on, PLAIN)
    copies = NeighbourCopies({"stages": stages}, _scalar(on, jnp.int32))
    program = jax.jit(
        lambda c, t, s: refresh_copies(c, {"stages": t}, s, PLAIN, on, every=10),
        donate_argnums=0,
        out_shardings=jax.tree.map(lambda x: x.sharding, copies),
    )
    found = compile_for_slice(program, copies, stages, _scalar(on, jnp.int32))
    assert {c.kind for c in found.collectives} == {"collective-permute"}
    assert sum(c.size_bytes for c in found.collectives if c.size_bytes > 1024) <= _moved(found, _shard_bytes(stages))
    assert found.alias_bytes >= _shard_bytes(stages)


@pytest.mark.parametrize("name", SMALL)
def test_norms_sum_scalars_within_a_stage(name: str) -> None:
    on = _mesh(name)
    found = compile_for_slice(jax.jit(lambda g: stage_norms({"stages": g}, PLAIN)), _stages(on, PLAIN))
    assert all(c.kind == "all-reduce" and c.size_bytes <= 1024 for c in found.collectives), found.collectives


def _recovery(
    name: str, layout: StageLayout, lost: int, *, policy: RecoveryPolicy | None = None, copies: bool = False
) -> tuple[Compiled, int]:
    """The program, and the bytes of one stage's weights on one device."""
    on = _mesh(name)
    tx = stage_optimizer(optax.adam(1e-3), layout)
    stages = _stages(on, layout)
    params = {"stages": stages, "head": jax.ShapeDtypeStruct((1024, 512), jnp.float32, sharding=_at(on))}
    shapes = jax.eval_shape(tx.init, params)
    homes = {f"stages.{leaf}": value.sharding for leaf, value in stages.items()} | {"head": params["head"].sharding}

    def placed(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        home = homes.get(str(getattr(path[-1], "key", "")))
        if home is None:
            home = _at(on, *(("stage",) if layout.repeats == 1 else (None, "stage"))[: leaf.ndim])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home)

    state = {"params": params, "opt_state": jax.tree_util.tree_map_with_path(placed, shapes)}
    shape = (STAGES,) if layout.repeats == 1 else (layout.repeats, STAGES)
    norms = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=_at(on, *(None,) * (len(shape) - 1), "stage"))
    available = Available(copies={lost: 10}) if copies else Available()
    plan = plan_recovery(lost, layout, available, policy=policy)
    given = {"stages": stages} if copies else None

    class Program:
        @staticmethod
        def lower(*args: Any) -> jax.stages.Lowered:
            return lower_recovery(state, plan, on, norms=norms, copies=given, tx=tx)

    return compile_for_slice(Program), _shard_bytes(stages)  # pyright: ignore[reportArgumentType]


def _assert_in_place(found: Compiled) -> None:
    """Every array of the state, bar small padding."""
    assert found.alias_bytes >= 0.999 * found.output_bytes - 4096


def _moved(found: Compiled, size_bytes: int) -> int:
    """What a `collective-permute-start` names: its operand too, and two words."""
    starts = "collective-permute-start(" in found.text
    return (2 if starts else 1) * size_bytes + 1024


def _mesh(name: str) -> jax.sharding.Mesh:
    return mesh(name, (STAGES, len(devices(name)) // STAGES // 2, 2), ("stage", "fsdp", "tensor"))


def _at(on: jax.sharding.Mesh, *spec: Any) -> NamedSharding:
    return NamedSharding(on, PartitionSpec(*spec))


def _scalar(on: jax.sharding.Mesh, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype, sharding=_at(on))


def _stages(on: jax.sharding.Mesh, layout: StageLayout) -> dict[str, jax.ShapeDtypeStruct]:
    lead = (STAGES,) if layout.repeats == 1 else (layout.repeats, STAGES)
    names = (None,) * (len(lead) - 1) + ("stage",)
    inner = {"query": (None, "fsdp", "tensor"), "up": (None, "fsdp", "tensor"), "norm": ()}
    return {
        leaf: jax.ShapeDtypeStruct((*lead, *shape), jnp.float32, sharding=_at(on, *names, *inner[leaf]))
        for leaf, shape in LEAVES.items()
    }


def _shard_bytes(stages: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Of one device: its part of one stage."""
    assert all(x.sharding is not None for x in stages.values())
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * 4 for x in stages.values())  # pyright: ignore
