"""How often to save: the interval that wastes least time, from what saving, restoring and failing cost.

Saving often stalls training, saving rarely loses more of it at a failure. Young (CACM 17(9), 1974) gave the first order
optimum of the two, ``sqrt(2 stall mtbf)``; Daly (Future Generation Computer Systems 22(3), 2006) the total time under
failures that come at random (his equation 20 for restarts of any length) and a higher order optimum (equation 37).
The minimum of that total time has a closed form in Lambert's W, which is solved here; theirs are kept to compare.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from jaxckpt.coordination.coordinator import AbstractCoordinator
from jaxckpt.core.errors import CoordinationError, InvalidArgumentError
from jaxckpt.core.events import Captured, Committed, Event, Restored, subscribe
from jaxckpt.core.text import counted

_RECENT = 0.3  # weight of the newest measurement in a moving mean
TIMEOUT_S = 60.0


def young(stall_s: float, mtbf_s: float) -> float:
    """Young's first order interval between saves, in seconds of training.

    Example:
        >>> round(young(stall_s=2.0, mtbf_s=3600.0))
        120
    """
    return math.sqrt(2 * stall_s * mtbf_s)


def daly(stall_s: float, mtbf_s: float) -> float:
    """Daly's higher order interval, in seconds of training (his equation 37).

    Example:
        >>> round(daly(stall_s=2.0, mtbf_s=3600.0), 1)
        118.7
    """
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = stall_s / (2 * mtbf_s)
    return young(stall_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_s


def best_interval(stall_s: float, mtbf_s: float) -> float:
    """The interval that minimises ``wasted``, in seconds of training: ``mtbf (1 + W(-exp(-stall / mtbf - 1)))``.

    How long a restart takes, and how late a save is durable, change the waste and not the best interval.

    Args:
        stall_s: training time that one save costs.
        mtbf_s: mean time between failures of the whole job (that of one host over their number).

    Example:
        >>> round(best_interval(stall_s=2.0, mtbf_s=3600.0), 1)
        118.7
    """
    _check(stall_s=stall_s, mtbf_s=mtbf_s)
    cost = stall_s / mtbf_s
    x = min(math.sqrt(2 * cost), 1.0)
    for _ in range(60):  # Newton on x - 1 + exp(-(x + cost)), which is convex and grows
        slope = -math.expm1(-(x + cost))
        step = (x + math.expm1(-(x + cost))) / slope if slope else 0.0
        x -= step
        if abs(step) <= 1e-14 * abs(x):
            break
    return x * mtbf_s


def wasted(
    interval_s: float, *, stall_s: float, mtbf_s: float, restore_s: float = 0.0, durable_after_s: float = 0.0
) -> float:
    """The part of all time that trains nothing new, between 0 and 1, with a save after each ``interval_s`` of training.

    Args:
        interval_s: training time between saves.
        stall_s: training time that one save costs.
        mtbf_s: mean time between failures of the job, which come at random (exponentially).
        restore_s: from a failure to the first new step: restart and restore.
        durable_after_s: from the capture of a save to its commit; a failure in between goes back one save more, which
            costs that long again.

    Example:
        >>> round(wasted(120.0, stall_s=2.0, mtbf_s=3600.0, restore_s=60.0), 3)
        0.049
    """
    _check(interval_s=interval_s, stall_s=stall_s, mtbf_s=mtbf_s, restore_s=restore_s, durable_after_s=durable_after_s)
    cycle, repeat = (interval_s + stall_s) / mtbf_s, (restore_s + durable_after_s) / mtbf_s
    if cycle + repeat > 700:
        return 1.0
    return 1 - interval_s / (mtbf_s * math.exp(repeat) * math.expm1(cycle))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one job was seen to cost, in seconds.

    Attributes:
        step_s: one training step.
        stall_s: how long a save keeps training waiting.
        save_s: from the call of a save to its commit.
        restore_s: a restore, with what a restart takes besides where that is known.
    """

    step_s: float
    stall_s: float
    save_s: float
    restore_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """How often to save, and why.

    Attributes:
        steps: training steps from one save to the next.
        interval_s: the same in seconds of training.
        waste: part of all time that trains nothing new, between 0 and 1.
        measured, mtbf_s: what it was worked out from.
    """

    steps: int
    interval_s: float
    waste: float
    measured: Measured
    mtbf_s: float

    def explain(self) -> str:
        """Inputs, formula and result, in a few lines.

        Example:
            >>> print(advise(Measured(step_s=0.5, stall_s=2.0, save_s=20.0, restore_s=60.0), mtbf_s=3600).explain())
            Save every 237 steps (1.98 min of training). Expected waste: 5.37 % of the time.
              a save stalls training for 2 s and is durable after 20 s; a step takes 0.5 s; a restore takes 1 min
              mean time between failures of the job: 1 h
              least waste at 1.98 min (Young: 2 min, Daly: 1.98 min); half or twice the interval wastes 6.14 %, 6.15 %
        """
        seen, best = self.measured, best_interval(self.measured.stall_s, self.mtbf_s)
        half, twice = (f"{100 * _waste(seen, factor * self.interval_s, self.mtbf_s):.3g} %" for factor in (0.5, 2.0))
        bound = ""
        if self.interval_s > 1.01 * best and self.steps > 1:
            bound = f"\n  saving that often is not possible: a save takes {_time(seen.save_s)}, and one runs at a time"
        return (
            f"Save every {counted(self.steps, 'step')} ({_time(self.interval_s)} of training). "
            f"Expected waste: {100 * self.waste:.3g} % of the time.\n"
            f"  a save stalls training for {_time(seen.stall_s)} and is durable after {_time(seen.save_s)}; "
            f"a step takes {_time(seen.step_s)}; a restore takes {_time(seen.restore_s)}\n"
            f"  mean time between failures of the job: {_time(self.mtbf_s)}\n"
            f"  least waste at {_time(best)} (Young: {_time(young(seen.stall_s, self.mtbf_s))}, "
            f"Daly: {_time(daly(seen.stall_s, self.mtbf_s))}); "
            f"half or twice the interval wastes {half}, {twice}{bound}"
        )


def advise(measured: Measured, mtbf_s: float) -> Advice:
    """The number of steps between saves that wastes least; a save is over before the next begins.

    Example:
        >>> advise(Measured(step_s=0.5, stall_s=2.0, save_s=20.0), mtbf_s=3600).steps
        237
    """
    _check(step_s=measured.step_s, stall_s=measured.stall_s, save_s=measured.save_s, mtbf_s=mtbf_s)
    step_s = max(measured.step_s, 1e-9)
    best = best_interval(measured.stall_s, mtbf_s) / step_s
    fewest = max(math.ceil((measured.save_s - measured.stall_s) / step_s), 1)
    near = {max(int(best), fewest), max(int(best) + 1, fewest)}
    steps = min(sorted(near), key=lambda n: _waste(measured, n * step_s, mtbf_s))
    interval_s = steps * step_s
    return Advice(
        steps=steps,
        interval_s=interval_s,
        waste=_waste(measured, interval_s, mtbf_s),
        measured=measured,
        mtbf_s=mtbf_s,
    )


@final
class Advisor:
    """Measures a running job, and says at which steps to save it.

    Until the first save has been measured, saves are due every ``first`` steps. The advice is renewed at every save,
    by process 0 for all: measurements differ among processes, and all must save the same steps.

    Args:
        mtbf_s: mean time between failures of the whole job.
        first: steps to the first save.
        restart_s: what a restart takes besides the restore: finding hosts, starting processes, compiling.
        coordinator: of the job; None: a lone process.
        name: of this advisor among those of the job; the same on all processes.
        clock: seconds, by default ``time.monotonic``.
    """

    def __init__(
        self,
        mtbf_s: float,
        *,
        first: int = 20,
        restart_s: float = 0.0,
        coordinator: AbstractCoordinator | None = None,
        name: str = "advisor",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check(mtbf_s=mtbf_s, restart_s=restart_s, first=first)
        self._mtbf_s, self._restart_s, self._first = mtbf_s, restart_s, max(first, 1)
        self._coordinator = coordinator if coordinator is not None and coordinator.size > 1 else None
        self._root, self._clock = f"jaxckpt/advisor/{name}", clock
        self._stall_s = self._save_s = self._restore_s = self._step_s = None
        self._seen: tuple[int, float] | None = None  # the last step asked about, and when
        self._unsaid_stall_s = 0.0  # stalls since then, which are not the step's time
        self._base: int | None = None  # the step that the interval counts from
        self._steps = self._first
        self._advice: Advice | None = None
        self._stop = subscribe(self._listen)

    def is_due(self, step: int, latest_step: int | None) -> bool:
        """Whether to save now; ``latest_step`` is the one saved last. Alike on all processes."""
        now = self._clock()
        self._measure_step(step, now)
        base = self._base if latest_step is None else latest_step
        if base is None:
            base = step - 1
        if base != self._base:
            if self._base is not None:
                self._renew(base)
            self._base = base
        return step - base >= self._steps

    @property
    def advice(self) -> Advice | None:
        """The advice in force; None before a save has been measured, and on processes other than the first."""
        return self._advice

    def explain(self) -> str:
        """Why it saves as often as it does."""
        if self._advice is not None:
            return self._advice.explain()
        if self._coordinator is not None and self._coordinator.rank:
            return f"Save every {counted(self._steps, 'step')}, as process 0 measures and explains."
        return f"Save every {counted(self._steps, 'step')} until a save has been measured."

    def close(self) -> None:
        """Stop measuring."""
        self._stop()

    def _listen(self, event: Event) -> None:
        if isinstance(event, Captured):
            self._stall_s = _mean(self._stall_s, event.seconds)
            self._unsaid_stall_s += event.seconds
        elif isinstance(event, Committed):
            self._save_s = _mean(self._save_s, event.seconds)
        elif isinstance(event, Restored):
            self._restore_s = _mean(self._restore_s, event.seconds)

    def _measure_step(self, step: int, now: float) -> None:
        if self._seen is not None and step > self._seen[0]:
            trained_s = max(now - self._seen[1] - self._unsaid_stall_s, 0.0)
            self._step_s = _mean(self._step_s, trained_s / (step - self._seen[0]))
            self._unsaid_stall_s = 0.0
        self._seen = (step, now)

    def _renew(self, base: int) -> None:
        if self._coordinator is None or self._coordinator.rank == 0:
            if self._stall_s is not None and self._step_s is not None:
                measured = Measured(
                    step_s=self._step_s,
                    stall_s=self._stall_s,
                    save_s=max(self._save_s or 0.0, self._stall_s),
                    restore_s=(self._restore_s or 0.0) + self._restart_s,
                )
                self._advice = advise(measured, self._mtbf_s)
                self._steps = self._advice.steps
            if self._coordinator is not None:
                self._coordinator.put(f"{self._root}/{base}/steps", str(self._steps).encode())
        else:
            self._steps = self._told(self._coordinator, f"{self._root}/{base}")

    def _told(self, coordinator: AbstractCoordinator, key: str) -> int:
        try:
            steps = int(coordinator.get(f"{key}/steps", timeout_s=TIMEOUT_S))
        except TimeoutError:
            raise CoordinationError(
                f"Process 0 did not say within {TIMEOUT_S:g} s when to save after the last save ({key}): it is not in "
                "the training loop any more, or far behind. Next step: see its log."
            ) from None
        if coordinator.count(f"{key}/read") == coordinator.size - 1:
            coordinator.delete(key)
        return steps


def _waste(measured: Measured, interval_s: float, mtbf_s: float) -> float:
    return wasted(
        interval_s,
        stall_s=measured.stall_s,
        mtbf_s=mtbf_s,
        restore_s=measured.restore_s,
        durable_after_s=max(measured.save_s - measured.stall_s, 0.0),
    )


def _mean(before: float | None, now: float) -> float:
    return now if before is None else before + _RECENT * (now - before)


def _check(**values: float) -> None:
    for name, value in values.items():
        lowest = "more than 0" if name in ("mtbf_s", "interval_s") else "0 or more"
        if not math.isfinite(value) or value < 0 or (value == 0 and lowest == "more than 0"):
            raise InvalidArgumentError(f"{name}={value} must be a finite number, {lowest}.")


def _time(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 or not seconds else f"{seconds:.2g} s"
