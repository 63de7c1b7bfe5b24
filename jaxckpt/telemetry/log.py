"""Events as lines of a standard logger."""

import logging
from collections.abc import Callable

from jaxckpt.core.events import (
    Captured,
    Committed,
    Event,
    Flushed,
    MetricMissing,
    Preempted,
    Progress,
    Recovered,
    Restored,
    SaveFailed,
    SaveRequested,
    SaveSkipped,
    StageEnded,
    StepDeleted,
    Swept,
    subscribe,
)
from jaxckpt.telemetry.text import rate, seconds, size


def log_to(logger: logging.Logger | str = "jaxckpt") -> Callable[[], None]:
    """Log what happens from now on; returns a function that ends it.

    Finished saves and restores, deletions and preemptions are INFO, stages DEBUG, failed saves ERROR. Skipped ones are
    WARNING, and so is the first without a metric that steps are kept by. Each record carries the event as
    ``record.event``, for handlers that want its members.

    Args:
        logger: where to; a name, or a logger of your own.

    Example:
        >>> import jaxckpt as jc, logging
        >>> stop = log_to(logging.getLogger("my.training"))
        >>> stop()
    """
    target = logging.getLogger(logger) if isinstance(logger, str) else logger

    def write(event: Event) -> None:
        level = level_of(event)
        if level is not None and target.isEnabledFor(level):
            target.log(level, "%s", describe(event), extra={"event": event})

    return subscribe(write)


def level_of(event: Event) -> int | None:
    """The level of an event; None: not logged."""
    match event:
        case Progress():
            return None
        case StageEnded() | Captured() | Flushed():
            return logging.DEBUG
        case SaveSkipped() | MetricMissing():
            return logging.WARNING
        case SaveFailed():
            return logging.ERROR
        case _:
            return logging.INFO


def describe(event: Event) -> str:
    """One line about an event.

    Example:
        >>> describe(Committed(path="/ckpt/7", step=7, size_bytes=3 << 30, seconds=2.0))
        'saved /ckpt/7 (step 7): 3 GiB in 2 s (1.5 GiB/s)'
    """
    match event:
        case Captured():
            return f"captured {_what(event)} on process {event.process}: {_moved(event.size_bytes, event.seconds)}"
        case Flushed():
            return f"wrote {_what(event)} on process {event.process}: {_moved(event.size_bytes, event.seconds)}"
        case Committed():
            return f"saved {_what(event)}: {_moved(event.size_bytes, event.seconds)}"
        case Restored():
            return f"restored {_what(event)} on process {event.process}: {_moved(event.read_bytes, event.seconds)} read"
        case StageEnded():
            moved = _moved(event.size_bytes, event.seconds) if event.size_bytes else seconds(event.seconds)
            return f"{event.stage} of {_what(event)} on process {event.process}: {moved}"
        case Progress():
            return f"{event.operation} of {_what(event)} on process {event.process}: {size(event.moved_bytes)} more"
        case SaveSkipped():
            return f"did not save {_what(event)}: {event.reason}"
        case SaveFailed():
            return (
                f"the save of {_what(event)} failed on process {event.process} in {event.stage}: "
                f"{type(event.error).__name__}: {event.error}"
            )
        case StepDeleted():
            return f"deleted {_what(event)}"
        case MetricMissing():
            return (
                f"saved {event.path} (step {event.step}) without the metric {event.metric!r}, by which the steps to "
                f'keep are ranked: it is never the best. Next step: save(..., metrics={{"{event.metric}": ...}})'
            )
        case Swept():
            return f"removed what dead runs left at {event.path}: {', '.join(event.names)}"
        case Preempted():
            return f"preempted ({event.reason}): all processes save step {event.step}"
        case SaveRequested():
            return f"asked for a save ({event.reason}): all processes save step {event.step}"
        case Recovered():
            stages = ", ".join(f"{k} from {source}" for k, source in zip(event.stages, event.sources, strict=True))
            at = "" if event.step is None else f" at step {event.step}"
            return f"recovered lost stages{at} ({event.method}): {stages}; {seconds(event.seconds)}"


def _what(
    event: Captured | Flushed | Committed | Restored | StageEnded | Progress | SaveSkipped | SaveFailed | StepDeleted,
) -> str:
    return event.path if event.step is None else f"{event.path} (step {event.step})"


def _moved(size_bytes: int, time_s: float) -> str:
    return f"{size(size_bytes)} in {seconds(time_s)} ({rate(size_bytes, time_s)})"
