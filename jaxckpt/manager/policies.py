"""Which steps to save and to keep: frozen values, combined with ``|`` and ``&``, that are pure functions of records."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, final

from jaxckpt.core.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveContext:
    """What a save policy may look at. Seconds are of process 0's monotonic clock; None: not measured yet.

    ``fired``: the triggers (signals, the advisor) that want this step; alike on all processes.
    """

    step: int
    latest_step: int | None = None
    since_save_s: float = 0.0
    preempting: bool = False
    stall_s: float | None = None
    save_s: float | None = None
    step_s: float | None = None
    fired: frozenset[Hashable] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A step that exists. ``time_s``: when it was saved, seconds since the epoch."""

    step: int
    time_s: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)


class SavePolicy(Protocol):
    """Whether to save a step."""

    @property
    def needs_agreement(self) -> bool:
        """Whether processes may answer differently, as by their clocks: process 0 then answers for all."""
        ...

    def should_save(self, context: SaveContext) -> bool:
        """A pure function of the context."""
        ...


class KeepPolicy(Protocol):
    """Which steps to keep."""

    def kept(self, steps: Sequence[StepRecord], now_s: float) -> set[int]:
        """A pure function of the steps that exist, in ascending order."""
        ...


class Policy:
    """A value for ``save=``, ``keep=`` or both; ``|`` is either, ``&`` is both.

    One of your own is a frozen dataclass below this class, with ``should_save`` or ``kept``.
    """

    __slots__ = ()

    @property
    def needs_agreement(self) -> bool:
        """See ``SavePolicy``."""
        return False

    @property
    def triggers(self) -> tuple[Any, ...]:
        """What a manager starts for it, see ``triggers.py``."""
        return ()

    @property
    def ranked_by(self) -> tuple[str, ...]:
        """The metrics that it compares steps by."""
        return ()

    def should_save(self, context: SaveContext) -> bool:
        """See ``SavePolicy``."""
        raise InvalidArgumentError(f"{self!r} says what to keep, not when to save; pass it as keep=.")

    def kept(self, steps: Sequence[StepRecord], now_s: float) -> set[int]:
        """See ``KeepPolicy``."""
        raise InvalidArgumentError(f"{self!r} says when to save, not what to keep; pass it as save=.")

    def __or__(self, other: "Policy") -> "Policy":
        return Both(self, other, either=True) if isinstance(other, Policy) else NotImplemented

    def __and__(self, other: "Policy") -> "Policy":
        return Both(self, other, either=False) if isinstance(other, Policy) else NotImplemented


@final
@dataclass(frozen=True, slots=True)
class Both(Policy):
    """Two policies joined. Both are asked every time: some take notes of the steps that they are asked about."""

    first: Policy
    second: Policy
    either: bool

    @property
    def needs_agreement(self) -> bool:
        """See ``SavePolicy``."""
        return self.first.needs_agreement or self.second.needs_agreement

    @property
    def triggers(self) -> tuple[Any, ...]:
        """See ``Policy``."""
        return self.first.triggers + self.second.triggers

    @property
    def ranked_by(self) -> tuple[str, ...]:
        """See ``Policy``."""
        return self.first.ranked_by + self.second.ranked_by

    def should_save(self, context: SaveContext) -> bool:
        """See ``SavePolicy``."""
        a, b = self.first.should_save(context), self.second.should_save(context)
        return a or b if self.either else a and b

    def kept(self, steps: Sequence[StepRecord], now_s: float) -> set[int]:
        """See ``KeepPolicy``."""
        a, b = self.first.kept(steps, now_s), self.second.kept(steps, now_s)
        return a | b if self.either else a & b

    def __repr__(self) -> str:
        inner = (f"({one!r})" if isinstance(one, Both) and one.either > self.either else repr(one) for one in self._two)
        return (" | " if self.either else " & ").join(inner)

    @property
    def _two(self) -> tuple[Policy, Policy]:
        return self.first, self.second


@final
@dataclass(frozen=True, slots=True)
class Triggered(Policy):
    """Save whenever a trigger has fired."""

    trigger: Any

    @property
    def triggers(self) -> tuple[Any, ...]:
        """See ``Policy``."""
        return (self.trigger,)

    def should_save(self, context: SaveContext) -> bool:
        """See ``SavePolicy``."""
        return self.trigger in context.fired

    def __repr__(self) -> str:
        return repr(self.trigger)


@final
@dataclass(frozen=True, slots=True)
class EverySteps(Policy):
    """See ``every``."""

    steps: int

    def should_save(self, context: SaveContext) -> bool:
        """See ``SavePolicy``."""
        return context.step % self.steps == 0

    def kept(self, steps: Sequence[StepRecord], now_s: float) -> set[int]:
        """See ``KeepPolicy``."""
        return {one.step for one in steps if one.step % self.steps == 0}

    def __repr__(self) -> str:
        return f"every(steps={self.steps})"


@final
@dataclass(frozen=True, slots=True)
class EverySeconds(Policy):
    """See ``every``."""

    seconds: float

    @property
    def needs_agreement(self) -> bool:
        """See ``SavePolicy``."""
        return True

    def should_save(self, context: SaveContext) -> bool:
        """See ``SavePolicy``."""
        return context.since_save_s >= self.seconds

    def __repr__(self) -> str:
        return f"every(seconds={self.seconds:g})"


@final
@dataclass(frozen=True, slots=True)
class At(Policy):
    """See ``at``."""

    steps: frozenset[int]

    def should_save(self, context: SaveContext) -> bool:
        """See ``SavePolicy``."""
        return context.step in self.steps

    def kept(self, steps: Sequence[StepRecord], now_s: float) -> set[int]:
        """See ``KeepPolicy``."""
        return {one.step for one in steps if one.step in self.steps}

    def __repr__(self) -> str:
        return f"at({{{', '.join(map(str, sorted(self.steps)))}}})"


@final
@dataclass(frozen=True, slots=True)
class Latest(Policy):
    """See ``latest``."""

    n: int

    def kept(self, steps: Sequence[StepRecord], now_s: float) -> set[int]:
        """See ``KeepPolicy``."""
        return {one.step for one in steps[-self.n :]}

    def __repr__(self) -> str:
        return f"latest({self.n})"


@final
@dataclass(frozen=True, slots=True)
class Best(Policy):
    """See ``best``."""

    n: int
    metric: str
    mode: Literal["min", "max"]

    @property
    def ranked_by(self) -> tuple[str, ...]:
        """See ``Policy``."""
        return (self.metric,)

    def kept(self, steps: Sequence[StepRecord], now_s: float) -> set[int]:
        """See ``KeepPolicy``."""
        return set(ranked(steps, self.metric, self.mode)[: self.n])

    def __repr__(self) -> str:
        return f"best({self.n}, {self.metric!r}, {self.mode!r})"


@final
@dataclass(frozen=True, slots=True)
class NewerThan(Policy):
    """See ``newer_than``."""

    seconds: float

    def kept(self, steps: Sequence[StepRecord], now_s: float) -> set[int]:
        """See ``KeepPolicy``."""
        return {one.step for one in steps if now_s - one.time_s < self.seconds}

    def __repr__(self) -> str:
        return f"newer_than({self.seconds:g})"


def every(*, steps: int | None = None, seconds: float | None = None) -> Policy:
    """Save, or keep, every so many steps; or save once so many seconds have passed since the last save.

    In a job of several processes, process 0's clock counts the seconds, and tells the others at every step.

    Example:
        >>> every(steps=100) | every(seconds=600)
        every(steps=100) | every(seconds=600)
    """
    if (steps is None) == (seconds is None) or (steps or seconds or 0) <= 0:
        raise InvalidArgumentError(f"every(steps={steps}, seconds={seconds}) takes one of the two, more than 0.")
    return EverySteps(steps) if steps is not None else EverySeconds(seconds or 0.0)


def at(steps: Iterable[int]) -> Policy:
    """Save, or keep, these steps.

    Example:
        >>> at({1, 2, 4}).should_save(SaveContext(step=4))
        True
    """
    return At(frozenset(steps))


def latest(n: int) -> Policy:
    """Keep the newest ``n`` steps.

    Example:
        >>> latest(2).kept([StepRecord(step=step) for step in (1, 2, 3)], now_s=0.0)
        {2, 3}
    """
    _check_count("latest", n)
    return Latest(n)


def best(n: int, metric: str, mode: Literal["min", "max"] = "min") -> Policy:
    """Keep the ``n`` steps best in a metric, of equals the newer. The newest step is kept besides them.

    Example:
        >>> best(1, "loss").kept([StepRecord(step=1, metrics={"loss": 0.1}), StepRecord(step=2)], now_s=0.0)
        {1}
    """
    _check_count("best", n)
    _check_mode(mode)
    return Best(n, metric, mode)


def newer_than(seconds: float) -> Policy:
    """Keep the steps saved within so many seconds, by the clock of whoever saves.

    Example:
        >>> newer_than(60).kept([StepRecord(step=1, time_s=0.0), StepRecord(step=2, time_s=50.0)], now_s=100.0)
        {2}
    """
    if not seconds > 0:
        raise InvalidArgumentError(f"newer_than({seconds}) would keep nothing; seconds are more than 0.")
    return NewerThan(seconds)


def ranked(found: Sequence[StepRecord], metric: str, mode: Literal["min", "max"]) -> list[int]:
    """Steps that have a metric (no NaN), the best first, of equals the newer."""
    _check_mode(mode)
    sign = 1 if mode == "min" else -1
    rated = [(sign * one.metrics[metric], -one.step) for one in found if metric in one.metrics]
    return [-step for _, step in sorted(rate for rate in rated if rate[0] == rate[0])]


def to_delete(found: Sequence[StepRecord], keep: KeepPolicy | None, now_s: float) -> list[int]:
    """The steps to delete, oldest first; never the newest, whatever the policy says."""
    if keep is None or not found:
        return []
    ordered = sorted(found, key=lambda one: one.step)
    kept = keep.kept(ordered, now_s) | {ordered[-1].step}
    return [one.step for one in ordered if one.step not in kept]


def _check_count(name: str, n: int) -> None:
    if n < 1:
        raise InvalidArgumentError(f"{name}({n}) would keep nothing; n is 1 or more.")


def _check_mode(mode: str) -> None:
    if mode not in ("min", "max"):
        raise InvalidArgumentError(f'mode={mode!r} is neither "min" nor "max".')
