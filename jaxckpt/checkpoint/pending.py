"""A save in the background: ask for its state, wait for it, or learn what went wrong."""

import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import final

NICENESS = 5
_running: "weakref.WeakSet[PendingSave]" = weakref.WeakSet()


@final
class PendingSave:
    """A save whose tree is captured (safe to donate or change) and whose bytes are on their way to storage.

    Also a context manager: leaving the block waits for the save, and raises what went wrong.
    """

    def __init__(self, path: str, work: Callable[[], None] | None) -> None:
        """``work`` runs in a thread of its own; None for a save that was skipped."""
        self.path = path
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        if work is None:
            self._done.set()
            return
        # Not a daemon: an interpreter that exits waits for its saves.
        self._thread = threading.Thread(target=self._run, args=(work,), name=f"jaxckpt-save {path}")
        _running.add(self)
        self._go = threading.Event()
        self._thread.start()
        self._go.set()

    def _run(self, work: Callable[[], None]) -> None:
        # A new thread that went to work at once would keep the interpreter's lock for its first milliseconds, and the
        # caller, who waits for it to start, blocked for as long.
        self._go.wait()
        _give_way()
        try:
            work()
        except BaseException as error:  # noqa: BLE001 kept, and raised by result()
            self._error = error
        finally:
            del work
            self._done.set()

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self._done.is_set()

    @property
    def state(self) -> str:
        """ "captured", "durable", "failed" or "skipped"."""
        if not self._done.is_set():
            return "captured"
        if self._thread is None:
            return "skipped"
        return "durable" if self._error is None else "failed"

    def error(self) -> BaseException | None:
        """What went wrong; None while the save runs and after it succeeded."""
        return self._error

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the save has ended, well or not; whether it has."""
        ended = self._done.wait(timeout_s)
        if ended and self._thread is not None:
            self._thread.join()
        return ended

    def result(self, timeout_s: float | None = None) -> None:
        """Wait until the checkpoint is durable. Returns at once for a save that was skipped: ask for its ``state``.

        Raises:
            TimeoutError: not yet; the save goes on.
            CheckpointError: the save failed; the checkpoint does not exist.
        """
        if not self.wait(timeout_s):
            raise TimeoutError(f"The save of {self.path} is still being written after {timeout_s} s; it goes on.")
        if self._error is not None:
            raise self._error

    def __enter__(self) -> "PendingSave":
        return self

    def __exit__(self, *_: object) -> None:
        self.result()


def _give_way() -> None:
    """Let training have the cores first: this thread, and those it starts, take what is left. Linux alone can."""
    if sys.platform == "linux":
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, max(os.getpriority(os.PRIO_PROCESS, own), NICENESS))
