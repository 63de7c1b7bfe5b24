"""A lost stage's rows come from a checkpoint without reading the rest of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.core.errors import MismatchError
from jaxckpt.core.events import Restored, subscribe
from jaxckpt.recovery.layout import Listed, Stacked, StageLayout
from jaxckpt.recovery.optimizer import stage_optimizer
from jaxckpt.recovery.plan import Available, RecoveryPolicy, plan_recovery
from jaxckpt.recovery.read import read_stage
from jaxckpt.recovery.recover import recover_stage

if TYPE_CHECKING:
    from pathlib import Path

LAYOUT = StageLayout(stages=4, rules=(Stacked(pattern="stages"),))
ROW_BYTES = 2 * 256 * 512 * 4
SMALL_BYTES = 3 * 4 * 512 * 4 + 1000  # leaves of a few KiB are one chunk, whatever their sharding
LISTED = StageLayout(stages=4, rules=(Listed(pattern="stages.{stage}"),))


def mesh() -> Any:
    return jax.make_mesh((4, 2), ("stage", "model"), axis_types=(AxisType.Auto,) * 2)


def counted(*args: Any, **options: Any) -> tuple[Any, int]:
    heard: list[Any] = []
    stop = subscribe(heard.append)
    found = read_stage(*args, **options)
    stop()
    return found, sum(event.read_bytes for event in heard if isinstance(event, Restored))


def trained(on: Any) -> tuple[dict[str, Any], Any]:
    """Weights split over both axes and replicated ones, and moments with counts."""
    rng = np.random.default_rng(0)
    params = {
        "stages": {
            "w": jax.device_put(
                rng.normal(size=(4, 2, 256, 512)).astype(np.float32), NamedSharding(on, P("stage", None, None, "model"))
            ),
            "scale": jax.device_put(rng.normal(size=(4, 512)).astype(np.float32), NamedSharding(on, P("stage"))),
        },
        "head": jax.device_put(np.ones((512, 64), np.float32), NamedSharding(on, P())),
    }
    tx = stage_optimizer(optax.adam(1e-2), LAYOUT)
    opt_state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        _, opt_state = jax.jit(tx.update)(params, opt_state, params)
    return {"params": params, "opt_state": opt_state}, tx


@pytest.mark.parametrize("lost", [0, 2])
def test_only_the_lost_stage_is_read_and_it_returns_as_it_was(lost: int, tmp_path: Path) -> None:
    on = mesh()
    state, tx = trained(on)
    jc.save(tmp_path / "a", state)
    saved = jax.tree.map(np.asarray, state)
    rows, read_bytes = counted(tmp_path / "a", LAYOUT, lost, state)
    assert 3 * ROW_BYTES <= read_bytes <= 3 * ROW_BYTES + SMALL_BYTES  # weights and two moments
    spoiled = jax.tree.map(
        lambda x: x.at[lost].set(jnp.nan if x.dtype == np.float32 else 99) if x.shape[:1] == (4,) else x + 1, state
    )
    plan = plan_recovery(
        lost, LAYOUT, Available(checkpoint_age=3), policy=RecoveryPolicy(optimizer="keep"), source="checkpoint_stage"
    )
    new = recover_stage(spoiled, plan, on, copies=rows, tx=tx)
    for have, want in zip(jax.tree.leaves(new), jax.tree.leaves(saved), strict=True):
        if want.shape[:1] == (4,):
            np.testing.assert_array_equal(have, want)
    assert int(new["opt_state"].outside[0].count) == int(saved["opt_state"].outside[0].count) + 1  # goes on


def test_weights_alone_and_two_stages_at_once(tmp_path: Path) -> None:
    on = mesh()
    state, _ = trained(on)
    jc.save(tmp_path / "a", state)
    rows, read_bytes = counted(tmp_path / "a", LAYOUT, (1, 3), {"params": state["params"]})
    assert 2 * ROW_BYTES <= read_bytes <= 2 * ROW_BYTES + SMALL_BYTES
    w = np.asarray(rows["params"]["stages"]["w"])
    np.testing.assert_array_equal(w[[1, 3]], np.asarray(state["params"]["stages"]["w"])[[1, 3]])
    assert not w[[0, 2]].any()
    assert rows["params"]["stages"]["w"].sharding == state["params"]["stages"]["w"].sharding


def test_of_listed_stages_one_is_read(tmp_path: Path) -> None:
    state = {"stages": [{"w": jnp.full(1000, s, jnp.float32)} for s in range(4)], "head": jnp.ones(5000)}
    jc.save(tmp_path / "a", state)
    rows, read_bytes = counted(tmp_path / "a", LISTED, 2, state)
    assert 4000 <= read_bytes <= 4100
    state["stages"][2]["w"] = jnp.full(1000, jnp.nan)
    plan = plan_recovery(2, LISTED, Available(checkpoint_age=3), source="checkpoint_stage")
    new = recover_stage(state, plan, mesh(), copies=rows)
    np.testing.assert_array_equal(new["stages"][2]["w"], np.full(1000, 2))


def test_a_mesh_of_other_devices_reads_what_it_needs(tmp_path: Path) -> None:
    state, _ = trained(mesh())
    jc.save(tmp_path / "a", {"params": state["params"]})
    other = jax.make_mesh((2, 4), ("stage", "model"), axis_types=(AxisType.Auto,) * 2)
    like = {
        "params": {
            "stages": {
                "w": jax.ShapeDtypeStruct(
                    (4, 2, 256, 512), np.float32, sharding=NamedSharding(other, P("stage", None, "model"))
                )
            }
        }
    }
    rows, read_bytes = counted(tmp_path / "a", LAYOUT, 3, like)
    assert ROW_BYTES <= read_bytes <= ROW_BYTES + 100
    np.testing.assert_array_equal(rows["params"]["stages"]["w"][3], state["params"]["stages"]["w"][3])


def test_what_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    jc.save(tmp_path / "a", {"stages": {"w": jnp.ones((4, 3))}})
    with pytest.raises(MismatchError, match=r"stages\.v"):
        read_stage(tmp_path / "a", LAYOUT, 1, {"stages": {"w": jnp.ones((4, 3)), "v": jnp.ones((4, 2))}})
    with pytest.raises(MismatchError, match=r"\(4, 3\)"):
        read_stage(tmp_path / "a", LAYOUT, 1, {"stages": {"w": jnp.ones((4, 5))}})
