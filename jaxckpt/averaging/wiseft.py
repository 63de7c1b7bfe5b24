"""WiSE-FT: the line between a model and its fine-tuned self, swept."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxckpt.averaging.average import average
from jaxckpt.core.errors import InvalidArgumentError

PyTree = Any


class Point(NamedTuple):
    """One model of the sweep, and what ``evaluate`` said of it."""

    alpha: float
    score: Any


def wise_ft(
    zero_shot: Any,
    fine_tuned: Any,
    evaluate: Callable[[PyTree], Any],
    *,
    alphas: Sequence[float] = tuple(np.linspace(0, 1, 11).tolist()),
    at_once: int = 1,
    **how: Any,
) -> list[Point]:
    """Evaluate ``(1 - alpha) zero_shot + alpha fine_tuned`` for every alpha (Wortsman et al. 2022, "Robust
    fine-tuning of zero-shot models", arXiv 2109.01903, section 3, equation 1; the paper takes 0.5 where nothing can be
    tuned).

    Args:
        zero_shot: a checkpoint or tree.
        fine_tuned: the same.
        evaluate: ``params -> score``: any value, as a number or a pair of in- and out-of-distribution accuracies.
        alphas: in the order of the result; outside [0, 1] they extrapolate.
        at_once: models made in one pass over storage, and held in memory together.
        how: the other arguments of ``average``, as ``like``.

    Example:
        >>> points = wise_ft({"w": np.zeros(1)}, {"w": np.ones(1)}, lambda p: p["w"].item(), alphas=(0, 0.5, 1))
        >>> [point.score for point in points]
        [0.0, 0.5, 1.0]
    """
    if at_once < 1:
        raise InvalidArgumentError(f"at_once is {at_once}; it is the number of models made together, 1 at least.")
    points = []
    for start in range(0, len(alphas), at_once):
        some = [float(alpha) for alpha in alphas[start : start + at_once]]
        models = average([zero_shot, fine_tuned], [[1 - alpha, alpha] for alpha in some], **how)
        # Popped: a model is freed once it was evaluated.
        points += [Point(alpha, evaluate(models.pop(0))) for alpha in some]
    return points
