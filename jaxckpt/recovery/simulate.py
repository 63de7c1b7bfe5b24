"""Failures drawn from a seed, the same list for every method, and the arithmetic of a rollback."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from jaxckpt.core.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True, order=True)
class Failure:
    """A stage is lost at the start of an iteration."""

    iteration: int
    stage: int


def stage_failures(*, seed: int, rate: float, stages: int, iterations: int) -> tuple[Failure, ...]:
    """Independent losses, ``rate`` per stage and iteration, as in CheckFree (arXiv 2506.15461, section 5).

    A longer run begins with the failures of a shorter one, and a higher rate has all those of a lower one.

    Example:
        >>> stage_failures(seed=0, rate=0.05, stages=4, iterations=10)[:1]
        (Failure(iteration=0, stage=2),)
    """
    drawn = np.random.default_rng(seed).random((iterations, stages)) < rate
    return tuple(Failure(int(i), int(s)) for i, s in np.argwhere(drawn))


def rate_per_iteration(per_hour: float, iteration_s: float) -> float:
    """The chance per iteration that makes ``per_hour`` the chance per hour."""
    return 1.0 - (1.0 - per_hour) ** (iteration_s / 3600.0)


def rollback_iterations(
    *, progress: int, every: int, rate: float, stages: int, seed: int, counted: str = "progress"
) -> int:
    """Iterations run until ``progress`` are done, when each failure goes back to the last checkpoint.

    With p the chance that an iteration is struck, the mean inflation is ((1-p)^-N - 1) / (p N) where checkpoints lie
    at multiples of N of the progress, and p N / ((1-p) (1 - (1-p)^N)) where every N iterations run are one, repeated
    ones too. Six stages, rate 0.004, N = 100: 4.24 and 2.68.

    Args:
        counted: "progress" saves at steps that are multiples of ``every``, as a trainer does. "run" saves after every
            so many iterations whatever they did, as the script of CheckFree's authors counts.

    Example:
        >>> [rollback_iterations(progress=10_000, every=100, rate=0.004, stages=6, seed=0, counted=c) // 1000
        ...  for c in ("progress", "run")]
        [40, 26]
    """
    return with_rollback(_struck(seed, 1.0 - (1.0 - rate) ** stages), progress=progress, every=every, counted=counted)


def with_rollback(struck: Iterable[int], *, progress: int, every: int, counted: str = "progress") -> int:
    """The same for given failures: ``struck`` are the iterations, counted as they run, ascending. They are lost.

    Example:
        >>> with_rollback([25], progress=30, every=10)  # 20 are kept, the 26th is lost, 10 more are run
        36
    """
    if counted not in ("progress", "run"):
        raise InvalidArgumentError(f'counted={counted!r} is neither "progress" nor "run".')
    run = done = saved = 0
    for at in struck:
        if at < run:
            continue  # two stages in one iteration
        reached = done + at - run
        if reached >= progress:
            break
        newest = at // every * every if counted == "run" else run + reached // every * every - done
        if newest >= run:
            saved = done + newest - run
        run, done = at + 1, saved
    return run + progress - done


def _struck(seed: int, chance: float) -> Iterator[int]:
    generator = np.random.default_rng(seed)
    at = -1
    while chance > 0:
        at += int(generator.geometric(chance))
        yield at


def clock_hours(*, iterations: int, step_s: float, failures: int = 0, recovery_s: float = 0.0) -> float:
    """Hours of a run on a simulated clock."""
    return (iterations * step_s + failures * recovery_s) / 3600.0
