"""Events: what stages tell to whoever listens. Only subscribers log, count or draw."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Flushed:
    """This process's chunks are durable on storage."""

    path: str
    process: int
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A checkpoint exists; ``seconds`` since the save began, ``size_bytes`` over all processes."""

    path: str
    size_bytes: int
    seconds: float
    step: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A restore ended on this process, which read ``read_bytes`` from storage."""

    path: str
    process: int
    read_bytes: int
    seconds: float


Event = Flushed | Committed | Restored

_subscribers: list[Callable[[Event], None]] = []


def subscribe(listener: Callable[[Event], None]) -> Callable[[], None]:
    """Call ``listener`` with every event from now on; returns a function that ends it."""
    _subscribers.append(listener)
    return lambda: _subscribers.remove(listener)


def emit(event: Event) -> None:
    """Tell all subscribers."""
    for listener in tuple(_subscribers):
        listener(event)
