"""Model soups: uniform, weighted and greedy (Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482)."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxckpt.averaging.average import average
from jaxckpt.averaging.sources import check_sources, identity, open_sources
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.text import counted

PyTree = Any


def uniform_soup(sources: Sequence[Any], **how: Any) -> PyTree:
    """The equal average of all (uniform soup). Other arguments are those of ``average``.

    Example:
        >>> uniform_soup([{"w": np.zeros(1)}, {"w": np.ones(1)}])["w"].item()
        0.5
    """
    return average(sources, **how)


def weighted_soup(
    sources: Sequence[Any],
    scores: Sequence[float],
    *,
    temperature: float,
    mode: Literal["max", "min"] = "max",
    **how: Any,
) -> PyTree:
    """The average with weights ``softmax(scores / temperature)``: better models count more.

    Args:
        sources: as of ``average``.
        scores: a validation score of each.
        temperature: in the unit of the scores; small takes the best alone, large all alike.
        mode: whether large or small scores are good.
        how: the other arguments of ``average``.

    Example:
        >>> weighted_soup([{"w": np.zeros(1)}, {"w": np.ones(1)}], [1, 1], temperature=0.1)["w"].item()
        0.5
    """
    check_scores(scores, check_sources(sources))
    return average(sources, score_weights(scores, temperature=temperature, mode=mode), **how)


def score_weights(scores: Sequence[float], *, temperature: float, mode: Literal["max", "min"] = "max") -> np.ndarray:
    """float64 [K]: ``softmax(scores / temperature)``, or of the negative scores for ``mode="min"``."""
    values = np.asarray(scores, np.float64) * _sign(mode)
    if temperature <= 0 or not np.isfinite(values).all():
        raise InvalidArgumentError(f"temperature is {temperature} and scores are {list(scores)}: above 0, and finite.")
    found = np.exp((values - values.max()) / temperature)
    return found / found.sum()


class GreedySoup(NamedTuple):
    """``weights`` float64 [K] over the sources, ``score`` of ``params``, and every trial in turn."""

    params: PyTree
    weights: np.ndarray
    score: float
    scores: list[float]  # of each source alone
    trials: list[dict[str, Any]]  # {"source", "score", "kept"}


def greedy_soup(
    sources: Sequence[Any],
    evaluate: Callable[[PyTree], float],
    *,
    mode: Literal["max", "min"] = "max",
    scores: Sequence[float] | None = None,
    progress: str | Path | None = None,
    **how: Any,
) -> GreedySoup:
    """Add models in order of their own scores, best first; keep each that does not make the soup worse (recipe 1).

    Every soup is summed anew from its members, so nothing is rounded twice; a trial with n members reads n checkpoints.

    Args:
        sources: checkpoints (paths) or trees.
        evaluate: ``params -> score`` on held-out data; deterministic, or a resumed search may differ. NaN is the worst
            score.
        mode: whether large or small scores are good.
        scores: of each source alone, where they are known; otherwise they are evaluated first.
        progress: a JSON file of all scores so far. Where it exists, the search goes on from it: nothing that was
            evaluated is evaluated again. It tells its sources by digests of their content (those of other libraries by
            their places); the file of a search over others is refused.
        how: the other arguments of ``average``, as ``like``.

    Example:
        >>> trees = [{"w": np.array([x])} for x in (0.0, 1.0, 9.0)]
        >>> soup = greedy_soup(trees, lambda p: -abs(p["w"].item() - 0.5))
        >>> soup.weights.tolist(), soup.score
        ([0.5, 0.5, 0.0], -0.0)
    """
    sign, count = _sign(mode), check_sources(sources)
    if scores is not None:
        check_scores(scores, count)
    origins = [identity(one) for one in open_sources(sources, None, how.get("options"))] if progress else []
    log = _Log(progress, origins, mode)
    if scores is not None:
        log.scores = [float(score) for score in scores]
    for k in range(len(log.scores), count):
        log.scores.append(float(evaluate(average([sources[k]], [1.0], **_alone(how, k)))))
        log.write()
    order = sorted(range(count), key=lambda k: (math.isnan(log.scores[k]), -sign * log.scores[k]))
    if math.isnan(log.scores[order[0]]):
        raise InvalidArgumentError(f"evaluate gave NaN for each of the {count} sources alone: none can be a start.")
    chosen, best = [order[0]], log.scores[order[0]]
    for place, k in enumerate(order[1:]):
        if place < len(log.trials):
            score = float(log.trials[place]["score"])
        else:
            score = float(evaluate(_soup(sources, [*chosen, k], how)))
        kept = sign * score >= sign * best
        if place < len(log.trials):
            log.check_trial(place, k, kept=kept)
        if place == len(log.trials):
            log.trials.append({"source": k, "score": score, "kept": kept})
            log.write()
        if kept:
            chosen, best = [*chosen, k], score
    weights = np.zeros(count)
    weights[chosen] = 1 / len(chosen)
    return GreedySoup(_soup(sources, chosen, how), weights, best, log.scores, log.trials)


def _soup(sources: Sequence[Any], chosen: Sequence[int], how: dict[str, Any]) -> PyTree:
    members = sorted(chosen)  # in one order, whatever the order of the trials: equal soups are equal to the bit
    function = how.get("eval_params")
    if isinstance(function, list | tuple):
        how = how | {"eval_params": [function[k] for k in members]}
    return average([sources[k] for k in members], **how)


def _alone(how: dict[str, Any], k: int) -> dict[str, Any]:
    function = how.get("eval_params")
    return how | {"eval_params": function[k]} if isinstance(function, list | tuple) else how


class _Log:
    """What was evaluated, in a file that is replaced whole."""

    def __init__(self, path: str | Path | None, origins: list[str], mode: str) -> None:
        self.path = Path(path) if path else None
        self.head = {"mode": mode, "sources": origins}
        self.scores: list[float] = []
        self.trials: list[dict[str, Any]] = []
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise InvalidArgumentError(f"progress is {self.path}, and {self.path.parent} is no folder: make it first.")
        if self.path.exists():
            record = self._read(self.path)
            if record.get("mode") != mode:
                self._refuse(f'its mode is {record.get("mode")!r}, and now "{mode}"')
            found = record.get("sources")
            if found != origins:
                self._refuse(_difference(found, origins))
            self.scores, self.trials = record["scores"], record["trials"]

    def check_trial(self, place: int, source: int, *, kept: bool) -> None:
        """Raise unless a trial of the file is what the scores and the trials before it lead to."""
        trial = self.trials[place]
        if (trial["source"], trial["kept"]) != (source, kept):
            words = [
                f"source {k}{', kept' if keep else ', not kept'}"
                for k, keep in ((trial["source"], trial["kept"]), (source, kept))
            ]
            self._refuse(f"its trial {place} is of {words[0]}, and by the scores of now of {words[1]}")

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise InvalidArgumentError(
                f"{path} is no progress file: {error}. Give another file, or remove it."
            ) from error
        if not isinstance(record, dict) or not {"scores", "trials"} <= record.keys():
            raise InvalidArgumentError(f"{path} is no progress file. Give another file, or remove it.")
        return record

    def _refuse(self, why: str) -> None:
        raise InvalidArgumentError(
            f"{self.path} is the progress of another search: {why}. Give another file, or remove it to begin anew."
        )

    def write(self) -> None:
        if self.path is None:
            return
        text = json.dumps({**self.head, "scores": self.scores, "trials": self.trials})
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text(text)
        beside.replace(self.path)


def _difference(found: Any, origins: list[str]) -> str:
    if not isinstance(found, list):
        return "it does not tell its sources (an earlier version wrote it)"
    if len(found) != len(origins):
        return f"it has {counted(len(found), 'source')}, this one {len(origins)}"
    k = next(k for k, (one, other) in enumerate(zip(found, origins, strict=True)) if one != other)
    return f"its source {k} is {found[k]}, and now {origins[k]}"


def check_scores(scores: Sequence[float], count: int) -> None:
    """Raise unless there is a score of every source."""
    if len(scores) != count:
        raise InvalidArgumentError(f"scores has {len(scores)} of them for {counted(count, 'source')}: one of each.")


def _sign(mode: str) -> int:
    if mode not in ("max", "min"):
        raise InvalidArgumentError(f'mode is {mode!r}; it is "max" or "min".')
    return 1 if mode == "max" else -1
