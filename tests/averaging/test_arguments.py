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


def test_globs_that_match_no_leaf_are_told_with_the_nearest_name() -> None:
    pair = [TREE, TREE]
    with pytest.raises(jc.CheckpointError, match=r'weights: "layrs" matches no leaf; the nearest name is "layers"'):
        averaging.average(pair, {"layrs": [1, 0], "*": [0.5, 0.5]})
    with pytest.raises(jc.CheckpointError, match=r'policy: "stp" matches no leaf; the nearest name is "step"'):
        averaging.average(pair, policy={"stp": "first"})
    with pytest.raises(
        jc.CheckpointError, match=r'policy: "qq" matches no leaf; the leaves are "w", "layers.0.kernel", "step"'
    ):
        averaging.average(pair, policy={"qq": "first"})
    for head_policy in ("first", "average"):
        with pytest.raises(jc.CheckpointError, match=r'head: "\*\.kernl" matches no leaf; .* "layers.0.kernel"'):
            averaging.run_average([[TREE], [TREE]], head="*.kernl", head_policy=head_policy)
    like = {"w": jnp.ones(2), "layers": [{"kernel": jnp.ones(3)}]}
    with pytest.raises(jc.CheckpointError, match=r'groups: "wx" matches no leaf'):
        averaging.learned_soup([like, like], fails, like=like, groups=("wx", "*"))


def test_globs_may_match_what_is_not_averaged() -> None:
    pair = [TREE, TREE]
    assert list(averaging.average(pair, {"layers": [1, 0], "*": [1, 0]}, only="w")) == ["w"]
    assert averaging.average(pair, policy={"step": "first", "w": "last", "layers.*.kernel": "average"})["step"] == 3
    more = {**TREE, "head": np.ones(1)}
    for missing in ("keep", "skip"):
        averaging.average([TREE, more], {"head": [0, 1], "*": [0.5, 0.5]}, missing=missing)


def test_a_list_is_cut_to_what_all_sources_have() -> None:
    def layers(*values: float, kind: Any = list) -> dict[str, Any]:
        return {"layers": kind({"w": np.full(1, x)} for x in values), "x": np.ones(1)}

    found = averaging.average([layers(1.0, 2.0, 3.0), layers(3.0, 4.0)], missing="skip")
    assert isinstance(found["layers"], list)
    assert [layer["w"].item() for layer in found["layers"]] == [2.0, 3.0]
    assert isinstance(averaging.average([layers(1.0), layers(3.0, 4.0)], missing="skip")["layers"], list)
    pair = [layers(1.0, 2.0, kind=tuple), layers(3.0, kind=tuple)]
    assert averaging.average(pair, missing="skip")["layers"][0]["w"].item() == 2.0
    assert isinstance(averaging.average(pair, missing="skip")["layers"], tuple)
    found = averaging.average([{"a": [np.zeros(1), np.ones(1)]}, {"a": {"1": np.ones(1)}}], missing="skip")
    assert found == {"a": {1: np.ones(1)}}
    assert list(
        averaging.average([{"a": np.ones(1), "b": np.ones(1)}, {"a": {"c": 1.0}, "b": np.ones(1)}], missing="skip")
    ) == ["b"]


def test_a_sweep_makes_one_model_at_least() -> None:
    for at_once in (0, -1):
        with pytest.raises(jc.CheckpointError, match=f"at_once is {at_once}; .* 1 at least"):
            averaging.wise_ft(TREE, TREE, fails, at_once=at_once)


def test_a_point_of_a_line_is_one_number() -> None:
    tree = {"w": jnp.ones(2)}
    for t in (jnp.array([0.25]), np.array([0.25]), [0.25]):
        with pytest.raises(jc.CheckpointError, match=r"t is float(32|64)\[1\]; it is one real number"):
            averaging.interpolate(tree, tree, t)
    with pytest.raises(jc.CheckpointError, match="one real number"):
        averaging.interpolate(tree, tree, 1j)
    assert averaging.interpolate(tree, tree, np.float32(0.25))["w"].tolist() == [1, 1]


def test_average_to_tells_of_its_arguments_before_the_work() -> None:
    with pytest.raises(TypeError, match=r"average_to\(\) got an unexpected argument 'polcy'; did you mean 'policy'"):
        averaging.average_to("memory://arguments/none", ["memory://arguments/nowhere"], polcy="first")
    with pytest.raises(TypeError, match=r"'bogus': it takes those of average\(\)"):
        averaging.average_to("memory://arguments/none", ["memory://arguments/nowhere"], bogus=1)
    with pytest.raises(jc.CheckpointError, match=r"metric is {'v': .*}, which cannot be kept as JSON: .*float32"):
        averaging.average_to("memory://arguments/none", ["memory://arguments/nowhere"], metric={"v": np.float32(1)})


def test_what_is_there_is_told_before_any_work() -> None:
    jc.save("memory://arguments/there", {"w": np.ones(1)})
    with pytest.raises(jc.AlreadyExistsError, match="holds a checkpoint already"):
        averaging.average_to("memory://arguments/there", [TREE], finalize=fails)
    jc.save("memory://arguments/there-1", {"w": np.ones(1)})
    with pytest.raises(jc.AlreadyExistsError, match="there-1/ holds a checkpoint already"):
        averaging.average_to("memory://arguments/there-{p}", [TREE], [[1.0], [2.0]], finalize=fails)
