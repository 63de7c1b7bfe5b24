"""Host memory of captured trees: a budget for all saves of this process, and buffers touched once and reused.

Source: DataStates-LLM (HPDC 2024), section 5: one host cache of fixed size per process, filled by all saves in turn;
who finds it full waits instead of allocating more.
"""

import os
import threading
from collections import deque

import numpy as np

from jaxckpt.transfer.arena import aligned

_GRAIN_BYTES = 64 * 1024
_PAGE_BYTES = 4096


def default_budget_bytes() -> int:
    """Half of the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class Staging:
    """Who may stage how much, in the order of asking, and the warm buffers that captured bytes are copied to."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._admitted_bytes = 0
        self._idle: list[np.ndarray] = []
        self._lent_bytes = 0

    @property
    def admitted_bytes(self) -> int:
        """Bytes that saves now running were admitted with."""
        return self._admitted_bytes

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all buffers, lent and idle."""
        with self._changed:
            return self._lent_bytes + sum(len(buffer) for buffer in self._idle)

    def admit(self, size_bytes: int, budget_bytes: int, *, wait: bool) -> int | None:
        """Reserve room for a save: the bytes reserved, or None where it would have to wait and must not.

        A save larger than the budget is admitted alone, with the budget as its room.
        """
        size = min(size_bytes, budget_bytes)
        ticket = object()
        with self._changed:
            if not wait and (self._waiting or self._admitted_bytes + size > budget_bytes):
                return None
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(
                    lambda: self._waiting[0] is ticket and self._admitted_bytes + size <= budget_bytes
                )
                self._admitted_bytes += size
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        return size

    def give_back(self, size_bytes: int) -> None:
        """Free room that ``admit`` reserved."""
        with self._changed:
            self._admitted_bytes -= size_bytes
            self._changed.notify_all()

    def lend(self, size_bytes: int, budget_bytes: int) -> np.ndarray:
        """A uint8 buffer of at least this size, 64-byte aligned and warm; ``take_back`` ends the loan.

        Idle buffers are dropped where a new one would bring their sum above the budget.
        """
        size = -(-size_bytes // _GRAIN_BYTES) * _GRAIN_BYTES
        with self._changed:
            fitting = [k for k, buffer in enumerate(self._idle) if size <= len(buffer) <= size + size // 4]
            if fitting:
                buffer = self._idle.pop(min(fitting, key=lambda k: len(self._idle[k])))
                self._lent_bytes += len(buffer)
                return buffer
            while self._idle and self._lent_bytes + size + sum(map(len, self._idle)) > budget_bytes:
                self._idle.pop(0)
            self._lent_bytes += size
        buffer = aligned(size)
        buffer[::_PAGE_BYTES] = 0  # touch every page: the first copy would pay for it otherwise
        return buffer

    def take_back(self, buffer: np.ndarray) -> None:
        """The buffer's bytes are not needed any more; it is kept for the next save."""
        with self._changed:
            self._lent_bytes -= len(buffer)
            self._idle.append(buffer)

    def drop_idle(self) -> None:
        """Return the memory of idle buffers to the system."""
        with self._changed:
            self._idle.clear()


STAGING = Staging()
