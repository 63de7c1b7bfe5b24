"""Average whole runs: the snapshots of each, then the runs, with a policy for the head."""

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxckpt.averaging.average import average
from jaxckpt.averaging.lawa import newest
from jaxckpt.averaging.plan import Weights
from jaxckpt.core.errors import InvalidArgumentError

Head = Literal["average", "first"]


def run_average(
    runs: Sequence[Sequence[Any] | str | os.PathLike[str]],
    *,
    head: Sequence[str] | str = (),
    head_policy: Head = "average",
    **how: Any,
) -> Any:
    """The average over runs of the average of each run's snapshots, in one pass over all of them.

    "Free Lunch" (ACL 2023, arXiv 2305.16834): uniform over the snapshots of a run, then uniform over runs. Across runs
    the heads must fit each other: from one shared initialisation (``head_policy="average"``), or else that of the first
    run is kept (``"first"``).

    Args:
        runs: the snapshots (paths or trees) of each run, or the folder of the run: all its steps; their numbers may
            differ.
        head: names, subtrees or globs of the head's leaves.
        head_policy: ``"average"`` over all runs, or ``"first"``: over the first run alone.
        how: the other arguments of ``average``, as ``like``.

    Example:
        >>> a, b = {"body": np.zeros(1), "head": np.zeros(1)}, {"body": np.ones(1), "head": np.ones(1)}
        >>> found = run_average([[a], [b, b]], head="head", head_policy="first")
        >>> found["body"].item(), found["head"].item()
        (0.5, 0.0)
    """
    options = how.get("options")
    runs = [
        [path for _, path in newest(run, None, options=options)] if isinstance(run, str | os.PathLike) else run
        for run in runs
    ]
    weights = run_weights([len(run) for run in runs])
    if head_policy not in ("average", "first"):
        raise InvalidArgumentError(f'head_policy is {head_policy!r}; it is "average" or "first".')
    sources = [snapshot for run in runs for snapshot in run]
    names = [head] if isinstance(head, str) else list(head)
    if not names:
        return average(sources, weights, **how)
    first = np.where(np.arange(len(sources)) < len(runs[0]), 1 / len(runs[0]), 0)
    by_path = {**dict.fromkeys(names, first if head_policy == "first" else weights), "*": weights}
    return average(sources, Weights(by_path, len(sources), "head"), **how)


def run_weights(counts: Sequence[int]) -> np.ndarray:
    """float64 [K]: equal weights within each run and among runs.

    Example:
        >>> run_weights([1, 2]).tolist()
        [0.5, 0.25, 0.25]
    """
    if not counts or min(counts) < 1:
        raise InvalidArgumentError(f"Runs have {list(counts)} snapshots; each has one at least.")
    return np.repeat(1 / (len(counts) * np.array(counts, np.float64)), counts)
