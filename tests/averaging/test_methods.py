"""Soups, EMA, SWA, LAWA, post-hoc EMA, run averages, WiSE-FT and batch norm: each against its definition."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import jaxckpt as jc
from jaxckpt.averaging import batch_norm, ema, posthoc, swa
from jaxckpt.averaging.lawa import lawa, newest
from jaxckpt.averaging.learned import learned_soup
from jaxckpt.averaging.runs import run_average
from jaxckpt.averaging.soups import greedy_soup, score_weights, uniform_soup, weighted_soup
from jaxckpt.averaging.wiseft import wise_ft

if TYPE_CHECKING:
    from pathlib import Path

TARGET = np.array([0.3, -0.2, 0.5, 0.1], np.float32)


def trees(count: int = 6) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {"w": TARGET + rng.standard_normal(4).astype(np.float32), "b": np.zeros(2, np.float32)} for _ in range(count)
    ]


def score(params: Any) -> float:
    return -float(((np.asarray(params["w"]) - TARGET) ** 2).sum())


# Soups.


def test_a_greedy_soup_keeps_what_does_not_hurt_and_beats_the_best_alone() -> None:
    soup = greedy_soup(trees(), score)
    assert soup.score >= max(soup.scores)
    assert soup.score == score(soup.params)
    kept = {trial["source"] for trial in soup.trials if trial["kept"]} | {int(np.argmax(soup.scores))}
    assert set(np.nonzero(soup.weights)[0].tolist()) == kept
    order = sorted(range(6), key=lambda k: -soup.scores[k])
    assert [trial["source"] for trial in soup.trials] == order[1:]
    flipped = greedy_soup(trees(), lambda p: -score(p), mode="min")
    assert (flipped.weights == soup.weights).all()


@pytest.mark.parametrize("stop_after", [0, 3, 6, 8])
def test_a_greedy_soup_goes_on_where_it_was_interrupted(tmp_path: Path, stop_after: int) -> None:
    whole = greedy_soup(trees(), score)
    calls = 0

    def fails(params: Any) -> float:
        nonlocal calls
        if calls == stop_after:
            raise KeyboardInterrupt
        calls += 1
        return score(params)

    with pytest.raises(KeyboardInterrupt):
        greedy_soup(trees(), fails, progress=tmp_path / "soup.json")
    seen = calls
    calls = -100
    resumed = greedy_soup(trees(), fails, progress=tmp_path / "soup.json")
    assert calls + 100 == len(whole.scores) + len(whole.trials) - seen
    assert resumed.params["w"].tobytes() == whole.params["w"].tobytes()
    assert resumed.trials == whole.trials
    with pytest.raises(jc.CheckpointError, match="progress of another search"):
        greedy_soup(trees(5), score, progress=tmp_path / "soup.json")
    assert len(json.loads((tmp_path / "soup.json").read_text())["sources"]) == 6


def test_weighted_soups_lean_to_better_scores() -> None:
    weights = score_weights([1.0, 2.0, 3.0], temperature=0.5)
    assert weights.sum() == pytest.approx(1)
    assert (np.diff(weights) > 0).all()
    assert (np.diff(score_weights([1.0, 2.0, 3.0], temperature=0.5, mode="min")) < 0).all()
    sharp = weighted_soup(trees(3), [0, 1, 0], temperature=1e-3)
    np.testing.assert_allclose(sharp["w"], trees(3)[1]["w"], rtol=1e-6)
    np.testing.assert_allclose(uniform_soup(trees(3))["w"], np.mean([t["w"] for t in trees(3)], axis=0), rtol=1e-6)


@pytest.mark.parametrize("normalize", ["softmax", "sum", "none"])
def test_a_learned_soup_descends(tmp_path: Path, normalize: str) -> None:
    paths = []
    for k, tree in enumerate(trees()):
        jc.save(tmp_path / f"{k}", {name: jnp.asarray(value) for name, value in tree.items()})
        paths.append(tmp_path / f"{k}")
    like = {"w": jnp.zeros(4), "b": jnp.zeros(2)}
    loss = lambda p: ((p["w"] - TARGET) ** 2).sum()  # noqa: E731
    soup = learned_soup(paths, loss, like=like, steps=60, learning_rate=0.1, normalize=normalize)
    assert min(soup.losses) < 0.5 * soup.losses[0]
    assert float(loss(soup.params)) == pytest.approx(min(soup.losses), rel=1e-5)
    if normalize != "none":
        assert soup.weights.sum() == pytest.approx(1)
    grouped = learned_soup(paths, loss, like=like, steps=3, groups=("w", "*"))
    assert grouped.weights.shape == (2, 6)
    assert (grouped.weights[1] == 1 / 6).all()  # nothing depends on b
    assert list(grouped.by_path()) == ["w", "*"]


# EMA and SWA.


def test_an_ema_of_bfloat16_moves_where_bfloat16_would_not() -> None:
    state = ema.init({"w": jnp.ones(3, jnp.bfloat16)})
    step = jax.jit(lambda s: ema.update(s, {"w": jnp.full(3, 2, jnp.bfloat16)}, decay=0.9999))
    for _ in range(100):
        state = step(state)
    assert state.average["w"].dtype == jnp.float32
    assert float(state.average["w"][0]) == pytest.approx(2 - 0.9999**100, rel=1e-5)
    assert ema.value(state, {"w": jnp.ones(3, jnp.bfloat16)})["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("warm_up", [False, True])
def test_an_ema_is_what_its_formula_says(debias: bool, warm_up: bool) -> None:
    values = np.random.default_rng(0).standard_normal(20)
    average, weight = (0.0, 0.0) if debias else (values[0], 1.0)
    state = ema.init({"w": jnp.asarray(values[0], jnp.float32), "step": jnp.int32(0)}, debias=debias)
    for n, x in enumerate(values[1:]):
        decay = min(0.9, (1 + n) / (10 + n)) if warm_up else 0.9
        average, weight = decay * average + (1 - decay) * x, decay * weight + (1 - decay)
        state = ema.update(state, {"w": jnp.asarray(x, jnp.float32), "step": jnp.int32(n)}, decay=0.9, warm_up=warm_up)
    found = ema.value(state)
    assert float(found["w"]) == pytest.approx(average / weight, rel=1e-5)
    assert found["step"] == 18


def test_it_is_a_link_of_an_optax_chain() -> None:
    chain: Any = optax.chain(optax.sgd(0.1), ema.transformation(0.5))
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    state = chain.init(params)
    updates, state = jax.jit(chain.update)({"w": jnp.ones(2, jnp.bfloat16)}, state, params)
    assert float(ema.value(state[1])["w"][0]) == pytest.approx(0.5 * 1 + 0.5 * 0.9, rel=1e-2)
    assert updates["w"].dtype == jnp.bfloat16
    with pytest.raises(jc.CheckpointError, match="needs them"):
        chain.update({"w": jnp.ones(2)}, state)


def test_ema_states_are_saved_like_any_tree(tmp_path: Path) -> None:
    state = ema.update(ema.init({"w": jnp.ones(3)}), {"w": jnp.zeros(3)}, decay=0.9)
    jc.save(tmp_path / "ema", state)
    found = jc.restore(tmp_path / "ema", state)
    assert (found.average["w"] == state.average["w"]).all()


def test_ema_weights_are_those_of_the_recursion() -> None:
    x = np.random.default_rng(0).standard_normal(7)
    average = x[0]
    for value in x[1:]:
        average = 0.8 * average + 0.2 * value
    assert ema.ema_weights(7, 0.8) @ x == pytest.approx(average)
    assert ema.ema_weights(7, 0.8).sum() == pytest.approx(1)


def test_swa_is_the_mean_of_what_it_saw() -> None:
    values = np.random.default_rng(0).standard_normal((5, 3)).astype(ml_dtypes.bfloat16)
    state = swa.init({"w": jnp.asarray(values[0])})
    for x in values:
        state = jax.jit(swa.update)(state, {"w": jnp.asarray(x)})
    np.testing.assert_allclose(state.mean["w"], values.astype(np.float64).mean(axis=0), rtol=1e-5)
    assert swa.value(state, {"w": jnp.asarray(values[0])})["w"].dtype == jnp.bfloat16


# Post-hoc EMA.


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_gamma_and_sigma_are_each_others_inverse(sigma: float) -> None:
    assert posthoc.sigma_of(posthoc.gamma_of(sigma)) == pytest.approx(sigma, rel=1e-9)


def test_a_profile_that_was_tracked_is_found_again() -> None:
    snapshots = [(s, t) for t in (250, 500, 750, 1000) for s in (0.05, 0.10)]
    for i, (sigma, step) in enumerate(snapshots):
        weights = posthoc.solve(snapshots, sigma, step)
        np.testing.assert_allclose(weights, np.eye(len(snapshots))[i], atol=1e-4)


@pytest.mark.parametrize("sigma", [0.06, 0.08, 0.12, 0.18])
def test_a_post_hoc_ema_is_near_the_one_that_was_tracked(sigma: float) -> None:
    rng, steps = np.random.default_rng(0), 1024
    path = np.cumsum(rng.standard_normal((steps, 8)), axis=0).astype(np.float32)
    sigmas = (0.05, 0.10, sigma)
    state = posthoc.init({"w": jnp.asarray(path[0])}, sigmas)
    update = jax.jit(lambda s, x: posthoc.update(s, {"w": x}))
    snapshots = []
    for t, x in enumerate(path, 1):
        state = update(state, x)
        if t % 64 == 0:
            snapshots += [posthoc.Snapshot(state.averages[i], sigmas[i], t) for i in range(2)]
    found = np.asarray(posthoc.post_hoc_ema(snapshots, sigma)["w"])
    tracked = np.asarray(state.averages[2]["w"])
    away = np.linalg.norm(np.asarray(state.averages[0]["w"]) - tracked)
    assert np.linalg.norm(found - tracked) < 0.05 * max(away, 1)


def test_post_hoc_needs_a_snapshot_of_its_step() -> None:
    with pytest.raises(jc.CheckpointError, match="needs a snapshot of that step"):
        posthoc.solve([(0.05, 10), (0.1, 20)], 0.07, 25)
    assert posthoc.solve([(0.05, 10), (0.1, 10), (0.1, 20)], 0.07, 10)[2] == 0
    with pytest.raises(jc.CheckpointError, match="sigma_rel is 0.5"):
        posthoc.gamma_of(0.5)


def test_power_weights_follow_the_profile() -> None:
    weights = posthoc.power_weights(range(1, 101), 0.1)
    assert weights.sum() == pytest.approx(1)
    times = np.arange(0.5, 100)
    mean = weights @ times
    assert (weights @ (times - mean) ** 2) ** 0.5 / 100 == pytest.approx(0.1, rel=0.02)


# Runs.


def save_steps(root: Path, count: int) -> None:
    for step in range(1, count + 1):
        jc.save(root / f"{step * 100}", {"w": np.full(2, step, np.float32), "step": step}, step=step * 100)


def test_lawa_takes_the_steps_of_a_manager(tmp_path: Path) -> None:
    with jc.CheckpointManager(tmp_path / "run") as manager:
        for step in range(1, 5):
            manager.save(step, {"w": np.full(2, float(step))})
    assert lawa(tmp_path / "run", 2)["w"].tolist() == [3.5, 3.5]
    (tmp_path / "run" / "4" / "_CHECKPOINT_METADATA").unlink()  # as where its deletion was interrupted
    assert [step for step, _ in newest(tmp_path / "run", None)] == [1, 2, 3]


def test_lawa_averages_the_newest_committed_steps(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    (tmp_path / "600").mkdir()
    (tmp_path / "600" / "_METADATA").write_text("{}")
    (tmp_path / "plots").mkdir()
    assert lawa(tmp_path, 3) == {"w": pytest.approx([4, 4]), "step": 5}
    assert lawa(tmp_path, 2, step=300)["w"].tolist() == [2.5, 2.5]
    assert [step for step, _ in newest(tmp_path, 99)] == [100, 200, 300, 400, 500]
    with pytest.raises(jc.NotFoundError, match="no committed step up to 50"):
        lawa(tmp_path, 3, step=50)


def test_runs_are_averaged_with_a_policy_for_the_head() -> None:
    def snapshot(x: float) -> dict[str, Any]:
        return {"body": np.full(2, x, np.float32), "head": {"w": np.full(2, -x, np.float32)}}

    runs = [[snapshot(1), snapshot(3)], [snapshot(10)]]
    assert run_average(runs)["body"].tolist() == [6, 6]
    kept = run_average(runs, head="head", head_policy="first")
    assert kept["body"].tolist() == [6, 6]
    assert kept["head"]["w"].tolist() == [-2, -2]


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_sweep_goes_from_one_end_to_the_other(at_once: int) -> None:
    a, b = trees(2)
    points = wise_ft(a, b, lambda p: p["w"].copy(), at_once=at_once)
    assert [point.alpha for point in points] == pytest.approx(np.linspace(0, 1, 11))
    assert points[0].score.tobytes() == a["w"].tobytes()
    assert points[-1].score.tobytes() == b["w"].tobytes()
    np.testing.assert_allclose(points[5].score, (a["w"] + b["w"]) / 2, rtol=1e-6)


def test_batch_statistics_are_those_of_all_examples() -> None:
    x = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32) * 3 + 1

    def statistics(batch: jax.Array) -> dict:
        return {"norm": {"mean": batch.mean(0), "var": batch.var(0)}, "other": {"scale": batch.max(0)}}

    found = batch_norm.reestimate(statistics, jnp.asarray(x).reshape(4, 16, 5))
    np.testing.assert_allclose(found["norm"]["mean"], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["norm"]["var"], x.var(0), rtol=1e-5)
    with pytest.raises(jc.CheckpointError, match="no batches"):
        batch_norm.reestimate(statistics, [])
