"""Claims about searches that were killed, or go on for longer: their results are those of one that ran through."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt import lcsc
from jaxckpt.core.errors import MismatchError

if TYPE_CHECKING:
    from pathlib import Path

TREES = [{"w": jnp.array([float(i), i * i / 2.0])} for i in range(4)]


def loss(p: Any, key: jax.Array) -> jax.Array:
    return ((p["w"] - 1.7) ** 2).sum() * (1 + 0.1 * jax.random.normal(key, ()))


def sum_of_squares(state: Any, key: jax.Array) -> Any:
    return sum((leaf**2).sum() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("strategy", lcsc.names())
def test_a_search_with_a_larger_budget_goes_on_as_if_it_had_had_it(tmp_path: Path, strategy: str) -> None:
    state = str(tmp_path / "state")
    how: dict[str, Any] = {"strategy": strategy, "population": 4, "draws": 2}
    lcsc.search(TREES, loss, budget=12 + 3 * 4, state=state, **how)
    seen: list[int] = []
    longer = lcsc.search(
        TREES, loss, budget=12 + 5 * 4, state=state, progress=lambda one: seen.append(one.generation), **how
    )
    whole = lcsc.search(TREES, loss, budget=12 + 5 * 4, **how)
    assert seen == ([5, 6] if strategy == "gradient" else [4, 5])  # a gradient counts as three evaluations
    assert longer.report.fitness.tobytes() == whole.report.fitness.tobytes()
    assert longer.report.path.tobytes() == whole.report.path.tobytes()
    assert longer.coefficients.tobytes() == whole.coefficients.tobytes()
    assert np.asarray(longer.params["w"]).tobytes() == np.asarray(whole.params["w"]).tobytes()


def test_a_search_that_ended_is_not_run_again(tmp_path: Path) -> None:
    how: dict[str, Any] = {"strategy": "evolution", "budget": 12 + 2 * 16, "state": str(tmp_path / "state")}
    first = lcsc.search(TREES, loss, **how)
    again = lcsc.search(TREES, loss, progress=lambda _: pytest.fail("a generation was run"), **how)
    assert again.coefficients.tobytes() == first.coefficients.tobytes()


def test_other_checkpoints_are_another_search(tmp_path: Path) -> None:
    for i, tree in enumerate(TREES):
        jc.save(tmp_path / f"{i}", tree)
    paths = [tmp_path / f"{i}" for i in range(4)]
    how: dict[str, Any] = {"strategy": "evolution", "budget": 12 + 16, "state": str(tmp_path / "state")}
    lcsc.search(paths, loss, **how)
    jc.save(tmp_path / "moved", TREES[0])  # the same content elsewhere is the same checkpoint
    lcsc.search([tmp_path / "moved", *paths[1:]], loss, **how)
    with pytest.raises(MismatchError, match=r"sources\[0\] was 'crc32c"):
        lcsc.search([paths[1], *paths[1:]], loss, **how)
    with pytest.raises(MismatchError, match="record was {} and is {'nfe': 2}"):
        lcsc.search(paths, loss, record={"nfe": 2}, **how)


@pytest.mark.parametrize("ways", [({"only": "params"}, {"only": "ema"}), ({}, {"only": "ema"})])
def test_other_leaves_are_another_search(tmp_path: Path, ways: tuple[dict[str, Any], ...]) -> None:
    trees = [{"params": tree, "ema": {"w": -tree["w"]}} for tree in TREES]
    how: dict[str, Any] = {"strategy": "evolution", "budget": 12 + 16, "state": str(tmp_path / "state")}
    lcsc.search(trees, sum_of_squares, **how, **ways[0])
    with pytest.raises(MismatchError, match=r"parameters was '. lea.* and is '1 leaf \(ema.w\), crc32c"):
        lcsc.search(trees, sum_of_squares, **how, **ways[1])


def test_other_eval_params_are_another_search(tmp_path: Path) -> None:
    """Of all checkpoints, or of one that is not the last."""

    def doubled(state: Any) -> Any:
        return {"w": 2 * state["w"]}

    how: dict[str, Any] = {"strategy": "evolution", "budget": 12 + 16}
    for first, second in ((None, doubled), ([None, doubled, None, None], [None] * 4)):
        state = str(tmp_path / type(first).__name__)
        one = lcsc.search(TREES, sum_of_squares, eval_params=first, state=state, **how)
        again = lcsc.search(TREES, sum_of_squares, eval_params=first, state=state, **how)
        assert again.coefficients.tobytes() == one.coefficients.tobytes()
        with pytest.raises(MismatchError, match="parameters was .* and is "):
            lcsc.search(TREES, sum_of_squares, eval_params=second, state=state, **how)


@pytest.mark.parametrize("array", [jnp.asarray, np.asarray])
def test_other_trees_are_another_search(tmp_path: Path, array: Any) -> None:
    trees = [{"w": array(tree["w"]), "name": "a"} for tree in TREES]
    how: dict[str, Any] = {"strategy": "evolution", "budget": 12 + 16, "state": str(tmp_path / "state")}
    lcsc.search(trees, loss, **how)
    lcsc.search([dict(tree) for tree in trees], loss, **how)  # the same content
    others = ({"w": array([9.0, 8.0], trees[0]["w"].dtype), "name": "a"}, trees[0] | {"name": "b"})
    for other in others:
        with pytest.raises(MismatchError, match=r"sources\[1\] was 'crc32c"):
            lcsc.search([trees[0], other, *trees[2:]], loss, only="w", **how)


def test_a_seed_and_its_key_are_one_search_and_other_generators_are_not(tmp_path: Path) -> None:
    how: dict[str, Any] = {"strategy": "evolution", "budget": 12 + 16, "state": str(tmp_path / "state")}
    one = lcsc.search(TREES, loss, key=3, **how)
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        again = lcsc.search(TREES, loss, key=key, progress=lambda _: pytest.fail("a generation was run"), **how)
        assert again.coefficients.tobytes() == one.coefficients.tobytes()
    how["state"] = str(tmp_path / "rbg")
    lcsc.search(TREES, loss, key=jax.random.key(3, impl="rbg"), **how)
    with pytest.raises(MismatchError, match="generator was 'rbg' and is 'unsafe_rbg'"):
        lcsc.search(TREES, loss, key=jax.random.key(3, impl="unsafe_rbg"), **how)


def test_a_state_that_does_not_tell_its_parameters_is_refused(tmp_path: Path) -> None:
    jc.save(tmp_path / "state" / "0", {"generation": 0}, metadata={"search": {"strategy": "evolution"}})
    with pytest.raises(MismatchError, match="state/0 is the state of a search by an earlier version .* another path"):
        lcsc.search(TREES, loss, strategy="evolution", budget=12 + 16, state=str(tmp_path / "state"))


@pytest.mark.parametrize("strategy", ["evolution", "gradient"])
def test_the_generation_before_is_on_storage_when_progress_is_told(tmp_path: Path, strategy: str) -> None:
    """So a kill never costs two generations that had ended, however much faster they are than a save."""
    state, saved = tmp_path / "state", []

    def look(seen: lcsc.Advance) -> None:
        saved.append((seen.generation, jc.inspect(state / str((seen.generation - 1) % 2)).step))

    lcsc.search(TREES, loss, strategy=strategy, population=3, budget=12 + 20 * 3, state=str(state), progress=look)
    assert saved == [(number, number - 1) for number in range(1, len(saved) + 1)]
    assert len(saved) == 20


PROGRAM = """
import os, signal, sys
import jax, jax.numpy as jnp
from jaxckpt import lcsc
from jaxckpt.core.events import subscribe
trees = [{"w": jnp.array([float(i), i * i / 2.0])} for i in range(4)]
what, count = sys.argv[2], int(sys.argv[3])
seen = 0
def look(event):
    global seen
    seen += type(event).__name__ == what
    if seen == count:
        os.kill(os.getpid(), signal.SIGKILL)
subscribe(look)
def loss(p, key):
    return ((p["w"] - 1.7) ** 2).sum() * (1 + 0.1 * jax.random.normal(key, ()))
how = {"strategy": "evolution", "budget": 12 + 10 * 8, "population": 8}
found = lcsc.search(trees, loss, state=sys.argv[1], progress=look, **how)
print(found.report.fitness.tobytes().hex(), found.coefficients.tobytes().hex(), found.params["w"].tolist())
"""
KILLS = [("Advance", 1), ("Captured", 2), ("Flushed", 3), ("Committed", 1), ("StageEnded", 9)]


@pytest.mark.timeout(300)
def test_kills_at_every_stage_of_a_save_change_no_bit(tmp_path: Path) -> None:
    """One after the other, on one state: after a generation, within a save, right after one."""

    def run(state: str, what: str, count: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / state), what, str(count)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)

    for what, count in KILLS:
        killed = run("killed", what, count)
        assert killed.returncode == -9, (what, killed.stdout, killed.stderr)
    resumed, whole = run("killed", "none", 1), run("whole", "none", 1)
    assert whole.returncode == resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == whole.stdout
