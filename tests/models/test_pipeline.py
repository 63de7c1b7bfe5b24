"""The pipeline computes what the sequential model computes, in every order; presets have the sizes they state."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from models import text
from models.llama import LlamaConfig
from models.pipeline import (
    PipelineConfig,
    abstract_params,
    init_params,
    make_pipeline_mesh,
    param_shardings,
    pipeline_loss,
    sequential_loss,
)
from models.presets import PIPELINE_PRESETS
from models.schedule import make_schedule, stage_order

MODEL = LlamaConfig(embed=16, mlp=32, layers=8, heads=2, kv_heads=2, tied=False)
PLAIN = PipelineConfig(model=MODEL, stages=4, microbatches=4)


def gradients(config: PipelineConfig, loss: Any, params: Any) -> tuple[Any, Any]:
    tokens = text.train_batch(seed=0, step=0, batch=8, length=8)
    return jax.jit(jax.value_and_grad(loss))(params, tokens)


def params_on(config: PipelineConfig, mesh: Any, *, fsdp: bool = False) -> Any:
    make = jax.jit(partial(init_params, config), out_shardings=param_shardings(config, mesh, fsdp=fsdp))
    params = make(jax.random.key(0))
    return jax.tree.map(lambda x: x * 5 if x.ndim > 3 else x, params)  # far from the identity


@pytest.mark.parametrize(
    ("swap", "repeats", "data", "model"), [(False, 1, 2, 1), (True, 1, 1, 2), (False, 2, 1, 1), (True, 2, 1, 1)]
)
def test_loss_and_gradients_equal_the_sequential_model(swap: bool, repeats: int, data: int, model: int) -> None:
    config = dataclasses.replace(PLAIN, swap=swap, repeats=repeats)
    mesh = make_pipeline_mesh(4, data, model)
    params = params_on(config, mesh, fsdp=data > 1)
    loss, grads = gradients(config, partial(pipeline_loss, config, mesh), params)
    want, want_grads = gradients(config, partial(sequential_loss, config), jax.device_get(params))
    assert float(loss) == pytest.approx(float(want), rel=1e-5)
    for have, expect in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert np.linalg.norm(have - expect) <= 1e-5 * np.linalg.norm(expect)


def test_swapped_half_runs_the_manual_order() -> None:
    assert stage_order(6, swapped=True) == (1, 0, 2, 3, 5, 4)
    with pytest.raises(ValueError, match="at least 4"):
        stage_order(3, swapped=True)


@pytest.mark.parametrize("stages", [4, 6])
@pytest.mark.parametrize("microbatches", [2, 4, 8, 16])
def test_swapping_costs_at_most_one_tick(stages: int, microbatches: int) -> None:
    plain = make_schedule(stages, microbatches)
    assert plain.ticks == microbatches + stages - 1
    assert not plain.swapped_edges
    assert make_schedule(stages, microbatches, swap=True).ticks <= plain.ticks + 1


@pytest.mark.parametrize("repeats", [2, 3])
def test_the_circular_schedule_has_one_bubble(repeats: int) -> None:
    assert make_schedule(4, 8, repeats).ticks == 8 * repeats + 3


@pytest.mark.parametrize("name", PIPELINE_PRESETS)
def test_presets_state_their_true_parameter_count(name: str) -> None:
    preset = PIPELINE_PRESETS[name]
    config = PipelineConfig(model=preset.model, stages=preset.stages, microbatches=2)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config))) == preset.parameters
