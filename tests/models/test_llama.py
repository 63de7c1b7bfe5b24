"""The reference model: it learns, does not care how it is sharded, and has the sizes its names promise."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import text
from models.llama import PRESETS, LlamaConfig
from models.sharding import batch_sharding, make_mesh, partition_spec
from models.training import abstract_state, eval_loss, init_state, param_count, train_step

if TYPE_CHECKING:
    from jax.sharding import Mesh

SMALL = LlamaConfig(embed=64, mlp=128, layers=2, heads=4, kv_heads=2, dropout=0.1)


def run(config: LlamaConfig, mesh: Mesh, steps: int, *, fsdp: bool = False) -> list[float]:
    state = init_state(config, mesh, seed=1, fsdp=fsdp)
    losses = []
    for step in range(steps):
        tokens = text.train_batch(seed=0, step=step, batch=8, length=32)
        state, loss = train_step(config, mesh, fsdp=fsdp)(state, jax.device_put(tokens, batch_sharding(mesh)))
        losses.append(float(loss))
    return losses


def test_loss_falls_on_real_text(mesh_4x2: Mesh) -> None:
    losses = run(SMALL, mesh_4x2, 40)
    assert losses[0] == pytest.approx(np.log(256), abs=0.1)
    assert np.mean(losses[-5:]) < losses[0] - 1.5


@pytest.mark.parametrize("fsdp", [False, True])
def test_sharded_training_equals_training_on_one_device(mesh_4x2: Mesh, fsdp: bool) -> None:
    config = dataclasses.replace(SMALL, layers=1)  # compiling is what takes the time here
    np.testing.assert_allclose(run(config, mesh_4x2, 3, fsdp=fsdp), run(config, make_mesh(1, 1), 3), rtol=2e-5)


def test_params_and_their_moments_are_split_alike(mesh_4x2: Mesh) -> None:
    state = init_state(SMALL, mesh_4x2, fsdp=True)
    up = state.params["layers"][0]["mlp"]["up"][...]
    moment = state.opt_state[1][0].mu["layers"][0]["mlp"]["up"][...]
    assert up.sharding == moment.sharding
    assert up.addressable_shards[0].data.shape == (64 // 4, 128 // 2)
    assert state.step.is_fully_replicated


@pytest.mark.parametrize(("data", "model"), [(4, 2), (2, 4), (1, 1), (8, 1)])
def test_abstract_state_is_the_state_without_values(data: int, model: int) -> None:
    mesh = make_mesh(data, model)
    abstract, state = abstract_state(SMALL, mesh), init_state(SMALL, mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for want, have in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (want.shape, want.dtype) == (have.shape, have.dtype)
        assert want.sharding.is_equivalent_to(have.sharding, have.ndim)


def test_train_step_keeps_shardings_and_donates_its_state(mesh_4x2: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    state = init_state(SMALL, mesh_4x2, fsdp=True)
    want = [leaf.sharding for leaf in jax.tree.leaves(state)]
    tokens = jax.device_put(text.train_batch(seed=0, step=0, batch=8, length=32), batch_sharding(mesh_4x2))
    step = train_step(SMALL, mesh_4x2, fsdp=True)
    new, _ = step(state, tokens)
    assert int(new.step) == 1
    assert state.params["embedding"][...].is_deleted()
    for sharding, leaf in zip(want, jax.tree.leaves(new), strict=True):
        assert sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    with jax.log_compiles():
        step(new, tokens)
    assert "Compiling" not in caplog.text  # the second step uses what the first one compiled


def test_an_axis_that_does_not_divide_stays_whole() -> None:
    assert partition_spec(("embed", "kv_heads", "head_dim"), (64, 2, 16), make_mesh(2, 4))[1] is None
    assert partition_spec(("embed", "kv_heads", "head_dim"), (64, 2, 16), make_mesh(4, 2))[1] == "model"


@pytest.mark.parametrize(("preset", "low", "high"), [("tiny", 0.5e6, 1e6), ("demo", 4e6, 8e6), ("124m", 120e6, 128e6)])
def test_presets_have_the_sizes_their_names_say(preset: str, low: float, high: float) -> None:
    assert low <= param_count(PRESETS[preset]) <= high


def test_untied_head_adds_its_own_parameters() -> None:
    untied = dataclasses.replace(SMALL, tied=False)
    assert param_count(untied) - param_count(SMALL) == SMALL.vocab * SMALL.embed


def test_a_token_does_not_see_the_future() -> None:
    mesh = make_mesh(1, 1)
    params = init_state(SMALL, mesh).params
    tokens = text.eval_batch(batch=2, length=16)
    changed = tokens.copy()
    changed[:, -1] += 1  # a target only: the inputs are the same
    model = eval_loss(SMALL)
    losses = [float(model(params, jnp.asarray(t[:, :-1]))) for t in (tokens, changed)]
    assert losses[0] == losses[1]


def test_bfloat16_compute_keeps_float32_params() -> None:
    config = dataclasses.replace(SMALL, compute_dtype=jnp.dtype("bfloat16"))
    params = init_state(config, make_mesh(1, 1)).params
    tokens = text.eval_batch(batch=2, length=16)
    narrow, wide = (float(eval_loss(c)(params, tokens)) for c in (config, SMALL))
    assert params["embedding"][...].dtype == jnp.float32
    assert narrow == pytest.approx(wide, rel=0.01)
    assert narrow != wide


def test_invalid_head_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_heads=3"):
        LlamaConfig(embed=64, mlp=128, layers=1, heads=4, kv_heads=3)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 2), (2, 4)])
def test_demo_preset_learns_on_every_mesh(shape: tuple[int, int]) -> None:
    losses = run(PRESETS["demo"], make_mesh(*shape), 30)
    assert losses[-1] < losses[0] - 1.5
