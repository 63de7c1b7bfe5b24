"""Coordinators within one process: the lone process, and threads that play the processes of a job."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, final

from jaxckpt.coordination.coordinator import AbstractCoordinator

Result = TypeVar("Result")


@final
class ThreadGroup:
    """``n`` coordinators over one board, so that threads can play the processes of a job."""

    def __init__(self, n: int) -> None:
        self._board = _Board()
        self.coordinators = tuple(LocalCoordinator(rank, n, self._board) for rank in range(n))

    def __len__(self) -> int:
        return len(self.coordinators)

    def __getitem__(self, rank: int) -> "LocalCoordinator":
        return self.coordinators[rank]

    def run(self, play: Callable[[AbstractCoordinator], Result]) -> list[Result | Exception]:
        """Call ``play`` with every coordinator, each in its own thread: what each returned or raised, by rank."""
        with ThreadPoolExecutor(len(self)) as threads:
            futures = [threads.submit(play, coordinator) for coordinator in self.coordinators]
        outcomes: list[Result | Exception] = []
        for future in futures:
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            outcomes.append(future.result() if error is None else error)
        return outcomes

    def list_keys(self) -> list[str]:
        """All keys on the board, sorted."""
        with self._board.changed:
            return sorted([*self._board.values, *self._board.counters])


class _Board:
    """What the threads of a group share."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.values: dict[str, bytes] = {}
        self.counters: dict[str, int] = {}


@final
class LocalCoordinator(AbstractCoordinator):
    """Process 0 of 1, or with a board of others one process of a ThreadGroup."""

    def __init__(self, rank: int = 0, size: int = 1, board: _Board | None = None) -> None:
        self.rank = rank
        self.size = size
        self._board = board if board is not None else _Board()

    def put(self, key: str, value: bytes) -> None:
        """Publish a copy of ``value`` and wake those who wait."""
        with self._board.changed:
            self._board.values[key] = bytes(value)
            self._board.changed.notify_all()

    def get(self, key: str, *, timeout_s: float) -> bytes:
        """Wait on the condition of the board until the key has a value."""
        values = self._board.values
        with self._board.changed:
            if not self._board.changed.wait_for(lambda: key in values, timeout=max(timeout_s, 0)):
                raise TimeoutError(f"No value for key {key!r} within {timeout_s:g} s.")
            return values[key]

    def try_get(self, key: str) -> bytes | None:
        """Read the value now, or None."""
        with self._board.changed:
            return self._board.values.get(key)

    def count(self, key: str) -> int:
        """Count up under the lock of the board."""
        with self._board.changed:
            self._board.counters[key] = self._board.counters.get(key, 0) + 1
            return self._board.counters[key]

    def delete(self, prefix: str) -> None:
        """Remove the key and all below it, counters too."""
        with self._board.changed:
            for table in (self._board.values, self._board.counters):
                for key in [k for k in table if k == prefix or k.startswith(prefix + "/")]:
                    del table[key]
