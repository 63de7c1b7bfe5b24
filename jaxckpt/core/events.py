"""Events: what stages tell to whoever listens. Only subscribers log, count or draw.

Sizes are in bytes, times in seconds. ``step`` is None where what happened belongs to no step of a run: a checkpoint
saved by path, or one whose saver gave no lineage.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """This process's part of a save is safe from training; ``seconds`` is what the caller was blocked for."""

    path: str
    process: int
    step: int | None = None
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Flushed:
    """This process's chunks are durable on storage."""

    path: str
    process: int
    step: int | None = None
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A checkpoint exists; ``seconds`` since the save began, ``size_bytes`` over all processes."""

    path: str
    step: int | None
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A restore ended on this process, which read ``read_bytes`` from storage."""

    path: str
    process: int
    step: int | None = None
    read_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEnded:
    """One stage of a save or restore, other than those with events of their own, ended on this process.

    ``plan`` comes first, in a restore too. Then a save has ``sync`` (the files' names are durable), ``extras``, ``wait
    for all`` (process 0, for the other processes), ``commit`` (metadata and marker) and ``seal`` (a step is listed).
    Emitted only while somebody listens.
    """

    stage: str
    path: str
    process: int
    step: int | None = None
    size_bytes: int = 0
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """This process has moved ``moved_bytes`` more, of ``total_bytes`` in the whole operation where that is known.

    Emitted from the threads that read and write, and only while somebody listens.
    """

    operation: Literal["save", "read"]
    path: str
    process: int
    step: int | None = None
    moved_bytes: int
    total_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSkipped:
    """A save that was due was not begun, and why: an earlier one still runs, the step exists already."""

    path: str
    step: int | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed:
    """A save failed on this process, in ``stage``: the checkpoint does not exist."""

    path: str
    process: int
    step: int | None
    stage: str
    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDeleted:
    """A step was removed: its retention ended, or the caller asked for it."""

    path: str
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricMissing:
    """A step was saved without a metric that the steps to keep are ranked by: it is never the best. Told once a run."""

    path: str
    step: int
    metric: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What dead runs left under ``path`` was removed: half-written and half-deleted steps, by ``names``."""

    path: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted:
    """The job is to end: all processes save ``step`` and exit. ``reason`` names the signal or service."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequested:
    """A signal asked for a save: all processes save ``step`` and go on. ``reason`` names the signal."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """Lost pipeline stages were filled in; ``seconds`` until the program was started, compiling included."""

    step: int | None
    stages: tuple[int, ...]
    sources: tuple[str, ...]  # of each stage
    method: str
    seconds: float


Event = (
    Captured
    | Flushed
    | Committed
    | Restored
    | StageEnded
    | Progress
    | SaveSkipped
    | SaveFailed
    | StepDeleted
    | MetricMissing
    | Swept
    | Preempted
    | SaveRequested
    | Recovered
)

_subscribers: tuple[Callable[[Event], None], ...] = ()


def subscribe(listener: Callable[[Event], None]) -> Callable[[], None]:
    """Call ``listener`` with every event from now on; returns a function that ends it, which may be called twice.

    Events come from the thread in which they happen, several at a time: a listener must be quick and safe to call from
    any thread. What it raises becomes a RuntimeWarning: a broken display must not cost a checkpoint.
    """

    def tell(event: Event) -> None:
        try:
            listener(event)
        except Exception as error:
            warnings.warn(f"{listener!r} failed on {event!r}: {error!r}", RuntimeWarning, stacklevel=3)

    _replace((*_subscribers, tell))
    return lambda: _replace(tuple(one for one in _subscribers if one is not tell))


def is_heard() -> bool:
    """Whether anybody listens: what tells of every batch asks first."""
    return bool(_subscribers)


def emit(event: Event) -> None:
    """Tell all subscribers."""
    for tell in _subscribers:
        tell(event)


def _replace(subscribers: tuple[Callable[[Event], None], ...]) -> None:
    global _subscribers  # replaced whole and never changed, so that emit() needs no lock
    _subscribers = subscribers
