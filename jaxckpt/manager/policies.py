"""Which steps to save and to keep: frozen values, combined with ``|`` and ``&``, that are pure functions of records."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from jaxckpt.core.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveContext:
    """What a save policy may look at. Seconds are of process 0's monotonic clock; None: not measured yet."""

    step: int
    latest_step: int | None = None
    since_save_s: float = 0.0
    preempting: bool = False
    stall_s: float | None = None
    save_s: float | None = None
    step_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A step that exists. ``time_s``: when it was saved, seconds since the epoch."""

    step: int
    time_s: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)


class SavePolicy(Protocol):
    """Whether to save a step."""

    def should_save(self, context: SaveContext) -> bool:
        """A pure function of the context."""
        ...


class KeepPolicy(Protocol):
    """Which steps to keep."""

    def kept(self, steps: Sequence[StepRecord], now_s: float) -> set[int]:
        """A pure function of the steps that exist, in ascending order."""
        ...


@dataclass(frozen=True, slots=True)
class Policy:
    """A value for ``save=``, ``keep=`` or both; ``|`` is either, ``&`` is both."""

    save: Callable[[SaveContext], bool] | None = None
    keep: Callable[[Sequence[StepRecord], float], set[int]] | None = None

    def should_save(self, context: SaveContext) -> bool:
        """See ``SavePolicy``."""
        if self.save is None:
            raise InvalidArgumentError("This policy says what to keep, not when to save; pass it as keep=.")
        return self.save(context)

    def kept(self, steps: Sequence[StepRecord], now_s: float) -> set[int]:
        """See ``KeepPolicy``."""
        if self.keep is None:
            raise InvalidArgumentError("This policy says when to save, not what to keep; pass it as save=.")
        return self.keep(steps, now_s)

    def __or__(self, other: "Policy") -> "Policy":
        return Policy(
            lambda c: self.should_save(c) or other.should_save(c),
            lambda s, now: self.kept(s, now) | other.kept(s, now),
        )

    def __and__(self, other: "Policy") -> "Policy":
        return Policy(
            lambda c: self.should_save(c) and other.should_save(c),
            lambda s, now: self.kept(s, now) & other.kept(s, now),
        )


def every(*, steps: int | None = None, seconds: float | None = None) -> Policy:
    """Save, or keep, every so many steps; or save once so many seconds have passed since the last save."""
    if (steps is None) == (seconds is None) or (steps or seconds or 0) <= 0:
        raise InvalidArgumentError(f"every(steps={steps}, seconds={seconds}) takes one of the two, more than 0.")
    if steps is not None:
        return Policy(
            lambda c: c.step % steps == 0, lambda found, _: {one.step for one in found if one.step % steps == 0}
        )
    return Policy(lambda c: c.since_save_s >= (seconds or 0))


def at(steps: set[int]) -> Policy:
    """Save, or keep, these steps."""
    chosen = frozenset(steps)
    return Policy(lambda c: c.step in chosen, lambda found, _: {one.step for one in found if one.step in chosen})


def latest(n: int) -> Policy:
    """Keep the newest ``n`` steps."""
    _check_count("latest", n)
    return Policy(keep=lambda found, _: {one.step for one in found[-n:]})


def best(n: int, metric: str, mode: Literal["min", "max"] = "min") -> Policy:
    """Keep the ``n`` steps best in a metric; of equals the newer."""
    _check_count("best", n)
    return Policy(keep=lambda found, _: set(ranked(found, metric, mode)[:n]))


def newer_than(seconds: float) -> Policy:
    """Keep the steps saved within so many seconds."""
    return Policy(keep=lambda found, now_s: {one.step for one in found if now_s - one.time_s < seconds})


def ranked(found: Sequence[StepRecord], metric: str, mode: Literal["min", "max"]) -> list[int]:
    """Steps that have a metric (no NaN), the best first, of equals the newer."""
    if mode not in ("min", "max"):
        raise InvalidArgumentError(f'mode={mode!r} is neither "min" nor "max".')
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
