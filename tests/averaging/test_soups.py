"""Soups and run averages on what training leaves: whole states, diverged models, averages beside the steps."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxckpt as jc
from jaxckpt import averaging
from jaxckpt.averaging.lawa import newest

if TYPE_CHECKING:
    from pathlib import Path


def test_a_diverged_model_is_in_no_greedy_soup() -> None:
    trees = [{"w": np.array([x])} for x in (0.0, 1.0, np.nan, 9.0)]
    found = set()
    for order in permutations(range(4)):
        soup = averaging.greedy_soup([trees[k] for k in order], lambda p: -abs(p["w"].item() - 0.5))
        assert soup.score == 0
        found.add(tuple(soup.weights[np.argsort(order)].tolist()))
    assert found == {(0.5, 0.5, 0.0, 0.0)}
    with pytest.raises(jc.CheckpointError, match="NaN for each of the 2 sources"):
        averaging.greedy_soup(trees[:2], lambda p: float("nan"))


def test_a_learned_soup_of_whole_training_states(tmp_path: Path) -> None:
    paths = []
    for k in range(3):
        params = {"w": jnp.full(2, float(k))}
        jc.save(tmp_path / f"{k}", {"params": params, "opt": optax.adam(0.1).init(params), "step": k})
        paths.append(tmp_path / f"{k}")

    def loss(params: Any) -> jax.Array:
        return ((params["w"] - 1.3) ** 2).sum()

    def loss_of_state(state: Any) -> jax.Array:
        return loss(state["params"])

    state = jc.restore(paths[0])
    chosen = averaging.learned_soup(paths, loss_of_state, like=state, only="params", steps=40)
    assert min(chosen.losses) < 0.01
    assert chosen.params["step"] == 0
    every = averaging.learned_soup(paths, loss_of_state, like=state, steps=40)
    assert every.params["opt"][0].count.dtype == jnp.int32
    mapped = averaging.learned_soup(
        paths, loss, like=state["params"], eval_params=lambda state: state["params"], steps=40
    )
    for found in (every, mapped):
        np.testing.assert_allclose(found.weights, chosen.weights, atol=1e-6)


def test_averages_beside_the_steps_of_a_run_are_no_steps(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        jc.save(tmp_path / "run" / f"{step}", {"w": np.full(1, float(step))})
        jc.save(tmp_path / "named" / f"step-{step}", {"w": np.full(1, float(step))})
    for run in ("run", "named"):
        steps = [path for _, path in newest(tmp_path / run, None)]
        averaging.average_to(tmp_path / run / "lawa-6", steps, method="lawa")
        assert [step for step, _ in newest(tmp_path / run, None)] == [1, 2, 3]
        assert averaging.lawa(tmp_path / run, 2)["w"].item() == 2.5
    found = averaging.run_average([tmp_path / "run", [tmp_path / "named" / "step-3"]])
    assert found["w"].item() == 2.5
    assert averaging.run_average([str(tmp_path / "run"), str(tmp_path / "named")])["w"].item() == 2
