"""A restore that all processes go through together: each hears of the failure of any, within a deadline."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar, final

from jaxckpt.coordination.jax_client import current_coordinator
from jaxckpt.coordination.session import Session, session_name
from jaxckpt.core.errors import (
    CheckpointError,
    CoordinationError,
    CorruptionError,
    MismatchError,
    NotCommittedError,
    NotFoundError,
    StorageError,
)

_GRACE_S = 2.0  # for a process that still runs to say so
_KINDS = (CorruptionError, MismatchError, NotCommittedError, NotFoundError, StorageError)
_MOST_CHARS = 4000

Result = TypeVar("Result")


@final
class Together:
    """What the processes of one restore tell each other; a context manager that all of them enter and leave.

    They agree through the key-value store of the job, process 0 collecting: two small messages per process, and
    nothing on a device, so that a process that died is named at the deadline instead of being waited for by a device.

    Args:
        url: what is restored, for names and messages.
        timeout_s: how long one process waits for another.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        coordinator = current_coordinator()
        self._url = url
        self._timeout_s = timeout_s
        self._rank, self._size = coordinator.rank, coordinator.size
        # One count for all paths: a process that was told another path is still met, and told of its error.
        self._session = Session(coordinator, session_name("restore"), about=f"the restore of {url}")
        self._agreements = 0

    def __enter__(self) -> "Together":
        """Begin."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End; the others hear at once of an error that ends it here."""
        if error is not None:
            self._session.fail(error)
        self._session.close()

    def agree(self, error: Exception | None) -> None:
        """Raise on every process if one has an error; all call it equally often.

        Raises:
            CheckpointError: of the kind of the first process that has one, which it names.
            CoordinationError: a process did not come within the deadline; names it.
        """
        self._agreements += 1
        stage, verdict = f"part {self._agreements}", f"part {self._agreements}, all"
        words = b"" if error is None else f"{type(error).__name__}: {error}"[:_MOST_CHARS].encode()
        self._session.enter(stage)
        self._session.arrive(stage, words)
        if self._rank == 0:
            told = self._session.collect(stage, timeout_s=self._timeout_s)
            failed = next((rank for rank, one in enumerate(told) if one), None)
            self._session.arrive(verdict, b"" if failed is None else f"{failed} ".encode() + told[failed])
        try:
            found = self._verdict(stage, verdict)
        except CoordinationError as unheard:
            if error is None:
                raise
            error.add_note(f"The other processes: {unheard}")
            raise error from None
        if error is not None:
            raise error
        if found:
            rank, _, words_of = found.decode().partition(" ")
            kind = next((one for one in _KINDS if words_of.startswith(f"{one.__name__}:")), CheckpointError)
            raise kind(f"Process {rank} of {self._size} could not read its part of {self._url}: {words_of}")

    def _verdict(self, stage: str, verdict: str) -> bytes:
        try:
            return self._session.wait(verdict, rank=0, timeout_s=self._timeout_s)
        except CoordinationError:
            # If another process has not come, it is to blame, and not process 0, which waits for it as well.
            self._session.collect(stage, timeout_s=0)
            raise

    def exchange(self, work: Callable[[], Result]) -> Result:
        """What ``work``, a program that runs on devices of all processes, returns; not waited for longer than allowed.

        Raises:
            CoordinationError: it did not end, as a process died or was stopped in it; names the process. The devices
                may wait for it for ever: leave the process and start the job again.
        """
        if self._size == 1:
            return work()
        found: list[Result] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                found.append(work())
            except BaseException as error:  # raised again in the caller's thread
                failure.append(error)

        thread = threading.Thread(target=run, name=f"jaxckpt-exchange {self._url}", daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if thread.is_alive():
            stage = f"after exchange {self._agreements}"
            self._session.arrive(stage)
            self._session.collect(stage, timeout_s=_GRACE_S)
            raise CoordinationError(
                f"The exchange of what was read of {self._url} did not end within {self._timeout_s:g} s, though all "
                f"{self._size} processes are alive. Next step: raise timeout_s if the interconnect is slow."
            )
        if failure:
            raise failure[0]
        return found[0]
