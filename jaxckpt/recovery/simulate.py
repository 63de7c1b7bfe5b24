"""Failures drawn from a seed, the same list for every method, and the arithmetic of a rollback."""

from dataclasses import dataclass

import numpy as np


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


def rollback_iterations(*, progress: int, every: int, rate: float, stages: int, seed: int) -> int:
    """Iterations run until ``progress`` are done, when each failure goes back to the last multiple of ``every``."""
    generator = np.random.default_rng(seed)
    chance = 1.0 - (1.0 - rate) ** stages
    done = run = 0
    while done < progress:
        whole = int(generator.geometric(chance)) - 1 if chance > 0 else progress
        if done + whole >= progress:
            return run + progress - done
        run += whole
        done += whole
        done -= done % every
        run += 1  # the iteration that the failure strikes is lost
    return run


def clock_hours(*, iterations: int, step_s: float, failures: int = 0, recovery_s: float = 0.0) -> float:
    """Hours of a run on a simulated clock."""
    return (iterations * step_s + failures * recovery_s) / 3600.0
