"""When to save, from what happens rather than from the step: a signal, the end of the job, what a save costs.

A trigger is a value, as every policy; the manager starts those that its policy names, in the order in which they are
written, which is the same on every process. At each step each is asked once, on every process, and answers alike on
all of them: what has fired is part of the context that the policy is a pure function of.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

from jaxckpt.coordination.jax_client import current_coordinator
from jaxckpt.coordination.session import session_name
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.events import Captured, Committed, Event, subscribe
from jaxckpt.manager.advisor import Advisor
from jaxckpt.manager.policies import Policy, Triggered
from jaxckpt.manager.preemption import Notice, SignalNotice, listen

TIMEOUT_S = 60.0
_RECENT = 0.3  # weight of the newest measurement in a moving mean


def on_preemption(*, timeout_s: float = TIMEOUT_S) -> Policy:
    """Save when the job is to end: SIGTERM on any process, or JAX's preemption service where the job has it.

    All processes save the same step, and ``manager.preempted`` is True from then on.

    Args:
        timeout_s: how long to wait for the other processes once the signal has come.

    Example:
        >>> from jaxckpt.manager.policies import SaveContext, every
        >>> policy = every(steps=100) | on_preemption()
        >>> policy.should_save(SaveContext(step=7, fired=frozenset(policy.triggers)))
        True
    """
    return Triggered(OnSignal(signals=(), stop=True, timeout_s=timeout_s))


def on_signal(*signals: int, stop: bool = False, timeout_s: float = TIMEOUT_S) -> Policy:
    """Save when one of these signals comes to any process; all save the same step.

    Args:
        signals: as ``signal.SIGUSR1``. Those that come before the step is saved count once.
        stop: whether the job is to end after it: then ``manager.preempted`` is True, and later signals save nothing.
        timeout_s: how long to wait for the other processes once a signal has come.

    Example:
        >>> import signal
        >>> on_signal(signal.SIGUSR1)
        on_signal(signal.SIGUSR1)
    """
    if not signals:
        raise InvalidArgumentError("on_signal() needs a signal, as on_signal(signal.SIGUSR1).")
    return Triggered(OnSignal(signals=tuple(int(one) for one in signals), stop=stop, timeout_s=timeout_s))


def optimal(mtbf_s: float, *, first: int = 20, restart_s: float = 0.0) -> Policy:
    """Save as often as wastes least, from the stall and the time of the saves so far (Young 1974, Daly 2006).

    ``manager.explain()`` tells the interval in force and why. See ``jaxckpt.manager.advisor``.

    Args:
        mtbf_s: mean time between failures of the whole job, in seconds.
        first: steps between saves until one has been measured.
        restart_s: what a restart takes besides the restore: finding hosts, starting processes, compiling.

    Example:
        >>> optimal(mtbf_s=6 * 3600.0) | on_preemption()
        optimal(mtbf_s=21600) | on_preemption()
    """
    if not 0 < mtbf_s < float("inf"):
        raise InvalidArgumentError(f"optimal(mtbf_s={mtbf_s}): the mean time between failures is in seconds, above 0.")
    return Triggered(Optimal(mtbf_s=float(mtbf_s), first=first, restart_s=restart_s))


class RunningTrigger(Protocol):
    """A trigger that a manager has started."""

    stop: bool

    def fires(self, step: int, latest_step: int | None) -> bool:
        """Whether to save this step: asked once per step, alike on all processes."""
        ...

    def close(self) -> None:
        """Give back handlers and threads."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OnSignal:
    """A signal on any process; none named: the end of the job."""

    signals: tuple[int, ...]
    stop: bool
    timeout_s: float

    def __repr__(self) -> str:
        names = ", ".join(f"signal.{signal.Signals(one).name}" for one in self.signals)
        return f"on_signal({names}{', stop=True' if self.stop else ''})" if names else "on_preemption()"

    def start(self) -> RunningTrigger:
        """Install the handlers; in the main thread."""
        return _Listening(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimal:
    """The interval that wastes least."""

    mtbf_s: float
    first: int
    restart_s: float

    def __repr__(self) -> str:
        return f"optimal(mtbf_s={self.mtbf_s:g})"

    def start(self) -> RunningTrigger:
        """Begin to measure."""
        return _Advising(self)


Trigger = OnSignal | Optimal


@final
class Triggers:
    """The triggers of one manager, running. Made in the main thread, on all processes in the same order."""

    def __init__(self, triggers: Sequence[Trigger]) -> None:
        self._running: dict[Trigger, RunningTrigger] = {}
        self._asked: tuple[int, frozenset[Trigger]] | None = None
        self.preempted = False
        try:
            for one in triggers:
                if one not in self._running:
                    self._running[one] = one.start()
        except BaseException:
            self.close()
            raise

    def fired(self, step: int, latest_step: int | None) -> frozenset[Trigger]:
        """Those that want this step saved. Asked again for the same step, the answer is the same."""
        if self._asked is None or self._asked[0] != step:
            # Each is asked at every step: a notice that is not would keep the other processes waiting.
            found = frozenset([one for one, running in self._running.items() if running.fires(step, latest_step)])
            self._asked = (step, found)
            self.preempted = self.preempted or any(self._running[one].stop for one in found)
        return self._asked[1]

    def explain(self) -> str:
        """Why the advisor saves as often as it does; empty where the policy has none."""
        return "\n".join(one.explain() for one in self._running.values() if isinstance(one, _Advising))

    def close(self) -> None:
        """Close them all, the latest first: handlers of signals are restored in reverse."""
        while self._running:
            _, running = self._running.popitem()
            running.close()


@final
class Measure:
    """What saves and steps cost this process: moving means in seconds, None before the first."""

    def __init__(self) -> None:
        self.stall_s: float | None = None
        self.save_s: float | None = None
        self.step_s: float | None = None
        self._last: tuple[int, float] | None = None
        self._stalled_s = 0.0
        self.close = subscribe(self._listen)

    def step(self, step: int, now: float) -> None:
        """A step begins at ``now`` by a monotonic clock; the stalls of saves are not part of its time."""
        if self._last is not None and step > self._last[0]:
            trained_s = max(now - self._last[1] - self._stalled_s, 0.0)
            self.step_s = _mean(self.step_s, trained_s / (step - self._last[0]))
        if self._last is None or step != self._last[0]:
            self._last, self._stalled_s = (step, now), 0.0

    def _listen(self, event: Event) -> None:
        if isinstance(event, Captured):
            self.stall_s = _mean(self.stall_s, event.seconds)
            self._stalled_s += event.seconds
        elif isinstance(event, Committed):
            self.save_s = _mean(self.save_s, event.seconds)


@final
class _Listening:
    def __init__(self, trigger: OnSignal) -> None:
        self.stop = trigger.stop
        self._trigger = trigger
        self._notice: Notice = listen(*trigger.signals, stop=trigger.stop, timeout_s=trigger.timeout_s)

    def fires(self, step: int, latest_step: int | None) -> bool:
        fired = self._notice.reached(step)
        if fired and not self.stop and isinstance(self._notice, SignalNotice):
            self._notice.again()
        return fired

    def close(self) -> None:
        self._notice.close()


@final
class _Advising:
    stop = False

    def __init__(self, trigger: Optimal) -> None:
        self._advisor = Advisor(
            trigger.mtbf_s,
            first=trigger.first,
            restart_s=trigger.restart_s,
            coordinator=current_coordinator(),
            name=session_name(f"advisor/{trigger.mtbf_s:g}"),
        )

    def fires(self, step: int, latest_step: int | None) -> bool:
        return self._advisor.is_due(step, latest_step)

    def explain(self) -> str:
        return self._advisor.explain()

    def close(self) -> None:
        self._advisor.close()


def _mean(before: float | None, now: float) -> float:
    return now if before is None else before + _RECENT * (now - before)
