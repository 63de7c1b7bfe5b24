"""What is wrong in a call is told before any work: by the name of the argument, with what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt import averaging

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TREE = {"w": np.ones(2, np.float32), "layers": [{"kernel": np.ones(3, np.float32)}], "step": 3}


def fails(params: Any) -> float:
    raise AssertionError("nothing is evaluated")


CALLS: dict[str, Callable[[Any], Any]] = {
    "average": averaging.average,
    "uniform_soup": averaging.uniform_soup,
    "weighted_soup": lambda sources: averaging.weighted_soup(sources, [], temperature=1),
    "greedy_soup": lambda sources: averaging.greedy_soup(sources, fails),
    "learned_soup": lambda sources: averaging.learned_soup(sources, fails, like={"w": jnp.ones(2)}),
    "average_to": lambda sources: averaging.average_to("memory://arguments/none", sources),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (list, "sources is empty; it is a list of checkpoints"),
        (lambda: None, "sources is a NoneType; it is a list"),
        (lambda: TREE, r"sources is a dict; .* Put it into a list: \[source\]"),
        (lambda: "run/1", r"sources is a str \(run/1\); .* Put it into a list"),
        (lambda: averaging.Snapshot(TREE, 0.1, 3), "sources is a Snapshot; .* Put it into a list"),
        (lambda: (tree for tree in [TREE]), r"sources is a generator; .* Make a list of it: list\(sources\)"),
    ],
)
def test_sources_are_a_list(call: str, make: Callable[[], Any], words: str) -> None:
    with pytest.raises(jc.CheckpointError, match=words):
        CALLS[call](make())


def test_snapshots_are_a_list() -> None:
    with pytest.raises(jc.CheckpointError, match="snapshots is empty; it is a list of Snapshot"):
        averaging.post_hoc_ema([], 0.1)
    with pytest.raises(jc.CheckpointError, match="snapshots is a Snapshot; .* Put it into a list"):
        averaging.post_hoc_ema(averaging.Snapshot(TREE, 0.1, 3), 0.1)  # type: ignore[arg-type]


def test_an_empty_dict_of_weights_is_told() -> None:
    with pytest.raises(jc.CheckpointError, match="weights is an empty dict"):
        averaging.average([TREE, TREE], {})


def numbers(*values: float) -> list[dict[str, np.ndarray]]:
    return [{"w": np.array([x])} for x in values]


def near_half(params: Any) -> float:
    return -abs(params["w"].item() - 0.5)


@pytest.mark.parametrize("where", ["numpy", "jax", "stored"])
def test_the_progress_of_a_search_over_other_sources_is_refused(tmp_path: Path, where: str) -> None:
    def sources(*values: float) -> list[Any]:
        if where == "jax":
            return [{"w": jnp.array([x])} for x in values]
        if where == "stored":
            for x in values:
                jc.save(tmp_path / f"{x}", {"w": np.array([x])}, overwrite=True)
            return [tmp_path / f"{x}" for x in values]
        return numbers(*values)

    progress = tmp_path / "soup.json"
    first = averaging.greedy_soup(sources(0.0, 1.0, 9.0), near_half, progress=progress)
    again = averaging.greedy_soup(sources(0.0, 1.0, 9.0), fails, progress=progress)
    assert again.score == first.score
    with pytest.raises(jc.CheckpointError, match=r"progress of another search: its source 2 is crc32c .*, and now crc"):
        averaging.greedy_soup(sources(0.0, 1.0, 8.0), fails, progress=progress)
    with pytest.raises(jc.CheckpointError, match="its mode is 'max', and now \"min\""):
        averaging.greedy_soup(sources(0.0, 1.0, 9.0), fails, progress=progress, mode="min")


def test_trials_of_other_scores_are_refused(tmp_path: Path) -> None:
    progress = tmp_path / "soup.json"
    found = averaging.greedy_soup(numbers(0.0, 1.0, 9.0), near_half, progress=progress)
    same = averaging.greedy_soup(numbers(0.0, 1.0, 9.0), fails, progress=progress, scores=found.scores)
    assert same.weights.tolist() == found.weights.tolist()
    with pytest.raises(
        jc.CheckpointError, match="its trial 0 is of source 1, kept, and by the scores of now of source"
    ):
        averaging.greedy_soup(numbers(0.0, 1.0, 9.0), fails, progress=progress, scores=[-8.5, -8.5, 0.0])
    with pytest.raises(jc.CheckpointError, match="scores has 1 of them for 3 sources"):
        averaging.greedy_soup(numbers(0.0, 1.0, 9.0), fails, scores=[1])


def test_a_file_that_is_no_progress_is_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(jc.CheckpointError, match=r"broken\.json is no progress file"):
        averaging.greedy_soup(numbers(0.0), fails, progress=tmp_path / "broken.json")
    (tmp_path / "old.json").write_text('{"sources": 1, "mode": "max", "scores": [0.5], "trials": []}')
    with pytest.raises(jc.CheckpointError, match="does not tell its sources"):
        averaging.greedy_soup(numbers(0.0), fails, progress=tmp_path / "old.json")
    with pytest.raises(jc.CheckpointError, match="is no folder"):
        averaging.greedy_soup(numbers(0.0), fails, progress=tmp_path / "no" / "soup.json")
