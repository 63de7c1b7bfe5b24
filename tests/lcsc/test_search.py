"""Claims about the search, on models whose best coefficients are known in closed form."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxckpt.averaging.average import average
from jaxckpt.checkpoint.inspect import inspect
from jaxckpt.checkpoint.restore import restore
from jaxckpt.checkpoint.save import save
from jaxckpt.core.errors import InvalidArgumentError, MismatchError
from jaxckpt.lcsc.search import DECAYS, search
from jaxckpt.lcsc.space import Space, profiles
from jaxckpt.lcsc.strategies import names

K = 6


def _trees() -> list[Any]:
    rng = np.random.default_rng(0)
    return [
        {
            "a": {"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)},
            "b": jnp.asarray(rng.normal(size=4), jnp.float32),
        }
        for _ in range(K)
    ]


TREES = _trees()
WANTED = np.array([-0.3, 0.1, 0.2, 0.3, 0.3, 0.4])
TARGET = average(TREES, WANTED)


def distance(a: Any, b: Any) -> Any:
    return sum(((x - y) ** 2).sum() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def loss(params: Any, key: jax.Array) -> jax.Array:
    """Least squares; the noise is common to all candidates of a generation."""
    noise = 0.01 * jax.random.normal(key, ())
    return (
        sum(((x - y) ** 2).sum() for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(TARGET), strict=True)) + noise
    )


def test_cma_es_finds_the_optimum_with_signs() -> None:
    found = search(TREES, loss, budget=1200, scale=0.2, l1_penalty=0)
    np.testing.assert_allclose(found.coefficients, WANTED, atol=0.02)
    assert abs(found.coefficients.sum() - 1) < 1e-12
    assert found.coefficients.dtype == np.float64
    assert found.report.row("mean").negative_mass == pytest.approx(0.3, abs=0.03)
    exact = average(TREES, found.coefficients)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), found.params, exact)))


@pytest.mark.parametrize("strategy", ["evolution", "random", "gradient", "SNES", "DifferentialEvolution"])
def test_other_strategies_are_no_worse_than_the_best_profile(strategy: str) -> None:
    options = {"sigma": 0.5} if strategy == "evolution" else {}
    report = search(TREES, loss, strategy=strategy, options=options, budget=407).report
    assert report.row(report.chosen).score <= report.row("profile").score
    if strategy != "random":
        assert report.row(report.chosen).score < 0.8 * report.row("profile").score


@pytest.mark.parametrize("strategy", sorted(set(names()) - {"cma_es", "evolution", "random", "gradient"}))
def test_every_named_strategy_runs(strategy: str) -> None:
    report = search(TREES, loss, strategy=strategy, budget=15 + 3 * 8, population=8).report
    assert np.isfinite(report.fitness).all()


def test_the_search_begins_at_the_best_checkpoints_where_training_went_astray() -> None:
    """The last third of the run is useless, and so is every EMA; the mean of the best two is better than each alone."""
    good = [jax.tree.map(lambda x, s=s: x + s, TARGET) for s in (0.1, -0.1, 0.2, -0.3)]
    astray = [jax.tree.map(lambda x, s=s: x + s, TARGET) for s in (30.0, 40.0)]
    report = search([*good, *astray], lambda p, key: distance(p, TARGET), budget=147).report
    assert report.row("start").score < 0.01 * report.row("profile").score
    np.testing.assert_allclose(report.row("start").coefficients, [[0.5, 0.5, 0, 0, 0, 0]], atol=1e-9)


def test_simplex_has_no_negative_coefficient() -> None:
    found = search(TREES, loss, space="simplex", budget=407)
    assert found.coefficients.min() >= 0
    assert abs(found.coefficients.sum() - 1) < 1e-12


def test_bounds_hold() -> None:
    found = search(TREES, loss, bounds=(-0.1, 0.35), decays=(0.5, 0.9), budget=402)
    assert found.coefficients.min() >= -0.1
    assert found.coefficients.max() <= 0.35
    assert abs(found.coefficients.sum() - 1) < 1e-9


def test_free_space_need_not_sum_to_one() -> None:
    half = jax.tree.map(lambda x: x / 2, TARGET)

    def to_half(params: Any, key: jax.Array) -> Any:
        return distance(params, half)

    found = search(TREES, to_half, space="free", scale=0.2, budget=807)
    assert found.coefficients.sum() == pytest.approx(0.5, abs=0.05)


def test_groups_have_their_own_coefficients() -> None:
    other = average(TREES, WANTED[::-1].copy())

    def apart(params: Any, key: jax.Array) -> Any:
        return ((params["a"]["w"] - TARGET["a"]["w"]) ** 2).sum() + ((params["b"] - other["b"]) ** 2).sum()

    one = search(TREES, apart, budget=807, scale=0.2, l1_penalty=0)
    two = search(TREES, apart, budget=807, scale=0.2, l1_penalty=0, groups=("a", "*"))
    assert two.coefficients.shape == (2, K)
    assert two.report.row(two.report.chosen).score < 0.2 * one.report.row(one.report.chosen).score


def test_the_penalty_is_a_tenth_of_the_best_score_before_the_search_unless_said() -> None:
    report, bare = (search(TREES, loss, budget=407, scale=0.2, l1_penalty=p).report for p in (None, 0))
    assert report.settings["l1_penalty"] == pytest.approx(report.row("start").score / 10, rel=0.05)
    assert report.row(report.chosen).l1 < bare.row(bare.chosen).l1


def test_the_penalty_of_an_objective_below_zero_is_of_its_spread() -> None:
    def below(offset: float) -> float:
        how: dict[str, Any] = {"strategy": "random", "budget": 31}
        return search(TREES, lambda p, key: distance(p, TARGET) - offset, **how).report.settings["l1_penalty"]

    first = np.concatenate([profiles(K, DECAYS), np.eye(K)])  # and soups of the best 2 and 4 alone
    alone = np.array([distance(one, TARGET) for one in TREES])
    soups = np.zeros((2, K))
    for row, size in zip(soups, (2, 4), strict=True):
        row[np.argsort(alone)[:size]] = 1 / size
    scores = [float(distance(one, TARGET)) for one in average(TREES, np.concatenate([first, soups]))]
    assert below(0) == pytest.approx(min(scores) / 10, rel=1e-5)
    for offset in (100, 1000):
        assert below(offset) == pytest.approx((np.median(scores) - min(scores)) / 10, rel=1e-3)


def test_l1_penalty_shrinks_negative_mass() -> None:
    plain, held = (search(TREES, loss, budget=407, scale=0.2, l1_penalty=p).report for p in (0.0, 100.0))
    assert held.row(held.chosen).negative_mass < 0.05 < plain.row(plain.chosen).negative_mass


def test_python_objectives_and_streamed_checkpoints_agree_with_the_jitted_program(tmp_path: Path) -> None:
    for i, tree in enumerate(TREES):
        save(tmp_path / str(i), tree)
    how: dict[str, Any] = {"budget": 15 + 3 * 4, "population": 4}
    jitted = search(TREES, loss, **how)
    python = search(TREES, lambda p, key: float(loss(p, key)), jit=False, **how)
    stored = [str(tmp_path / str(i)) for i in range(K)]
    streamed = search(stored, loss, like=TREES[0], placement="stream", **how)
    for other in (python, streamed):
        np.testing.assert_allclose(other.report.fitness, jitted.report.fitness, rtol=1e-4)


def test_a_small_memory_budget_changes_no_result() -> None:
    whole, parts = (search(TREES, loss, budget=15 + 32, memory_bytes=m) for m in (1 << 30, 100))
    np.testing.assert_allclose(parts.report.fitness, whole.report.fitness, rtol=1e-5)


def test_candidates_are_spread_over_the_mesh() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    rest = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    placed = [{"a": {"w": jax.device_put(t["a"]["w"], spec)}, "b": jax.device_put(t["b"], rest)} for t in TREES]
    target = jax.tree.map(np.asarray, TARGET)

    def same(params: Any, key: jax.Array) -> Any:
        return ((params["a"]["w"] - target["a"]["w"]) ** 2).sum() + ((params["b"] - target["b"]) ** 2).sum()

    spread = search(placed, same, mesh=mesh, budget=15 + 32)
    alone = search(TREES, same, budget=15 + 32)
    np.testing.assert_allclose(spread.report.fitness, alone.report.fitness, rtol=1e-4)
    assert spread.params["b"].sharding.is_equivalent_to(rest, 1)


def test_noise_is_common_within_a_generation_and_fresh_across() -> None:
    def only_noise(params: Any, key: jax.Array) -> Any:
        return jax.random.normal(key, ()) + 0 * params["b"].sum()

    fresh = search(TREES, only_noise, budget=15 + 64, strategy="random", l1_penalty=0).report.fitness
    fixed = search(TREES, only_noise, budget=15 + 64, strategy="random", l1_penalty=0, noise="fixed").report.fitness
    assert (fresh == fresh[:, :1]).all()
    assert len(set(fresh[:, 0])) == len(fresh)
    assert len(set(fixed.ravel())) == 1


def test_a_worse_guard_is_warned_of_and_reported() -> None:
    def guard(params: Any, key: jax.Array) -> Any:
        return -loss(params, key)

    with pytest.warns(RuntimeWarning, match="guard metric disagrees"):
        report = search(TREES, loss, budget=407, guard=guard, held_out=loss).report
    assert report.concerns
    assert report.row("last").held_out is not None
    table = str(report)
    assert "chosen" in table
    assert table.splitlines()[0].split() == ["score", "guard", "held", "out", "sum", "|a|", "negative", "largest"]
    plain = str(replace(report, rows=tuple(replace(row, guard=None, held_out=None) for row in report.rows)))
    assert plain.splitlines()[0].split() == ["score", "sum", "|a|", "negative", "largest"]


def test_numbers_of_the_table_have_four_digits() -> None:
    report = search(TREES, loss, budget=15 + 64, strategy="random").report
    report = replace(report, rows=(replace(report.rows[0], name="last", score=123.456789, guard=1e-7 / 3),), chosen="")
    table = str(replace(report, settings={"rate": 0.1 + 0.2, "sources": ["x"]}))
    assert "123.5 " in table
    assert "3.333e-08" in table
    assert "rate: 0.3" in table.splitlines()


def test_an_objective_that_is_never_finite_is_an_error() -> None:
    with pytest.raises(InvalidArgumentError, match="not finite for any of the 13 averages"):
        search(TREES, lambda p, key: jnp.float32(jnp.nan) * p["b"].sum(), budget=39)


def test_a_checkpoint_that_is_not_finite_is_named() -> None:
    broken = [*TREES[:2], {"a": TREES[2]["a"], "b": TREES[2]["b"].at[1].set(jnp.nan)}, *TREES[3:]]
    with pytest.raises(InvalidArgumentError, match=r'NaN or infinity: tree 2 of sources \(checkpoint 2, leaf "b"\)'):
        search(broken, loss, budget=39)


def test_only_leaves_that_are_combined_are_in_groups() -> None:
    counted = [tree | {"count": jnp.int32(i), "name": "x"} for i, tree in enumerate(TREES)]
    how: dict[str, Any] = {"strategy": "evolution", "budget": 71}

    def plain(params: Any, key: jax.Array) -> Any:
        return loss({"a": params["a"], "b": params["b"]}, key)

    found = search(counted, plain, groups=("a", "b"), **how)
    bare = search(TREES, loss, groups=("a", "b"), **how)
    assert found.coefficients.tobytes() == bare.coefficients.tobytes()
    assert int(found.params["count"]) == K - 1
    with pytest.raises(MismatchError, match=r"Groups \['\*'\] match no floating leaf.*Leave them out"):
        search(counted, plain, groups=("a", "b", "*"), **how)


def test_final_scores_come_on_top_of_the_budget() -> None:
    calls: dict[str, int] = {"objective": 0, "held_out": 0}

    def counting(name: str) -> Any:
        def measure(params: Any, key: jax.Array) -> float:
            calls[name] += 1
            return float(loss(params, key))

        return measure

    metrics: dict[str, Any] = {name: counting(name) for name in calls}
    report = search(TREES, **metrics, jit=False, strategy="evolution", budget=15 + 16, draws=2).report
    assert report.final_evaluations == 2 * 2 * len(report.rows)
    assert calls["objective"] == report.evaluations + report.final_evaluations // 2
    assert calls["held_out"] == report.final_evaluations // 2 + 1  # tried on one before the search
    assert report.to_json()["final_evaluations"] == report.final_evaluations
    assert f"31 evaluations and {report.final_evaluations} for the final scores" in str(report)


def test_steps_are_those_saved_or_the_numbers_of_folders(tmp_path: Path) -> None:
    for i, tree in enumerate(TREES):
        save(tmp_path / "run" / str(100 * i), tree, step=7 if i == 0 else None)
    how: dict[str, Any] = {"strategy": "random", "budget": 31}
    found = search(tmp_path / "run", loss, **how)
    assert found.report.steps == (7, 100, 200, 300, 400, 500)
    assert [step for _, step in found.sources] == [7, 100, 200, 300, 400, 500]
    save(tmp_path / "last", TREES[-1])
    mixed = [tmp_path / "run" / "100", TREES[1], tmp_path / "last"]
    assert search(mixed, loss, like=TREES[0], **how).report.steps == (100, None, None)


def test_plot_is_a_png(tmp_path: Path) -> None:
    search(TREES, loss, budget=39).report.plot(tmp_path / "search.png", steps=range(K))
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["sum_to_one", "free", "simplex"])
def test_vectors_and_coefficients_are_inverses(kind: Any) -> None:
    space = Space(kind=kind, count=3, groups=("a", "*"))
    centre = np.array([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    wanted = np.array([[0.6, 0.3, 0.1], [0.3, 0.3, 0.4]])
    np.testing.assert_allclose(space.coefficients(space.vector(wanted, centre), centre), wanted, atol=1e-6)


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from jaxckpt.lcsc.search import search
trees = [{"w": jnp.array([float(i), i * i / 2.0])} for i in range(4)]
stop = int(sys.argv[2])
def look(seen):
    if seen.generation == stop:
        os.kill(os.getpid(), signal.SIGKILL)
import jax
def loss(p, key):
    return ((p["w"] - 1.7) ** 2).sum() * (1 + 0.1 * jax.random.normal(key, ()))
found = search(trees, loss, strategy=sys.argv[3], budget=15 + 8 * 8, population=8, state=sys.argv[1], progress=look)
print(found.report.fitness.tobytes().hex(), found.coefficients.tobytes().hex(), found.params["w"].tolist())
"""


@pytest.mark.parametrize("strategy", ["cma_es", "PSO"])
def test_a_killed_search_goes_on_bit_for_bit(tmp_path: Path, strategy: str) -> None:
    def run(state: str, stop: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, str(tmp_path / state), str(stop), strategy]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)

    killed = run("killed", 5)
    assert killed.returncode == -9, killed.stderr
    resumed, whole = run("killed", -1), run("whole", -1)
    assert whole.returncode == resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == whole.stdout


def test_state_of_another_search_is_refused(tmp_path: Path) -> None:
    search(TREES, loss, budget=59, state=str(tmp_path / "s"))
    for wrong, said in (
        ({"strategy": "random"}, "strategy was 'cma_es' and is 'random'"),
        ({"population": 8}, "population was 16 and is 8"),
        ({"key": 1}, r"key\[1\] was 0 and is 1"),
        ({"budget": 43}, "has 2 generations, and the budget of 43 has room for 1"),
    ):
        with pytest.raises(MismatchError, match=said):
            search(TREES, loss, **{"budget": 59, "state": str(tmp_path / "s"), **wrong})
    with pytest.raises(MismatchError, match="checkpoints was 6 and is 5"):
        search(TREES[:5], loss, budget=59, state=str(tmp_path / "s"))


def test_a_result_is_saved_with_its_lineage_and_report(tmp_path: Path) -> None:
    for i, tree in enumerate(TREES):
        save(tmp_path / str(i), tree, step=10 * i)
    found = search(
        [tmp_path / str(i) for i in range(K)], loss, strategy="evolution", budget=71, record={"metric": "l2", "nfe": 1}
    )
    found.save(tmp_path / "merged")
    info = inspect(tmp_path / "merged")
    assert info.step == 50
    assert [parent["weight"] for parent in info.parents] == found.coefficients.tolist()
    assert [parent["step"] for parent in info.parents] == [0, 10, 20, 30, 40, 50]
    metric = info.metadata["averaging"]["metric"]
    assert metric["nfe"] == 1
    assert metric["penalty"] >= 0
    np.testing.assert_allclose(metric["value"] + metric["penalty"], found.report.row(found.report.chosen).score)
    np.testing.assert_allclose(metric["value"], float(loss(found.params, jax.random.key(0))), atol=0.05)  # of noise
    told = info.metadata["lcsc"]
    assert told["settings"]["strategy"] == "evolution"
    assert told["settings"]["seed"] == 0
    assert len(told["rows"]) == len(found.report.rows)
    restored = restore(tmp_path / "merged", found.params)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), restored, found.params)))


def test_a_report_is_written_as_text_plot_and_json(tmp_path: Path) -> None:
    found = search(TREES, loss, strategy="evolution", budget=71, groups=("a", "*"))
    found.save(tmp_path / "merged")
    found.report.save(tmp_path / "report")
    told = json.loads((tmp_path / "report" / "report.json").read_text())
    assert told["chosen"] in (tmp_path / "report" / "report.md").read_text()
    assert np.array(told["search"]["path"]).shape[1:] == (2, K)
    assert (tmp_path / "report" / "search.png").read_bytes().startswith(b"\x89PNG")


def test_progress_is_a_line_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    search(TREES, loss, strategy="evolution", budget=71)
    assert capsys.readouterr().err == ""
    search(TREES, loss, strategy="evolution", budget=71, progress=True)
    assert "/71 evaluations, best" in capsys.readouterr().err
    with pytest.raises(InvalidArgumentError, match="progress is 'yes'"):
        search(TREES, loss, strategy="evolution", budget=71, progress="yes")  # pyright: ignore[reportArgumentType]
