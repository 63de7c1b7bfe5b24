"""The end of a job, announced: one process hears of it, all save the same step.

A signal only sets a flag. The next step of that process tells the others through the coordinator; a thread of every
process answers with the step it is at, and the step after the largest of these is the one that all save: it lies ahead
of everyone, so nobody has to go back. JAX's preemption service agrees in the same way (``max + 1``); where a job has
it, SIGTERM is left to it, because its handler and ours would exclude each other. Nothing here runs on a device, and
every wait has a deadline.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol, final

from jaxckpt.coordination.coordinator import AbstractCoordinator
from jaxckpt.coordination.jax_client import current_coordinator, preemption_service
from jaxckpt.coordination.session import Session, session_name
from jaxckpt.core.errors import CoordinationError, InvalidArgumentError
from jaxckpt.core.events import Preempted, SaveRequested, emit

TIMEOUT_S = 60.0
# How long a thread that listens waits at a time, which delays close() by as much, and what each process adds to it.
_SLICE_S = 0.2
_SLICE_PER_PROCESS_S = 0.002
# JAX's service wants to see every step; of a larger jump it sees the last ones.
_MOST_STEPS_TOLD = 10_000


class Notice(Protocol):
    """Where the news comes from."""

    def reached(self, step: int) -> bool:
        """Whether this is the step that all processes save: true once, at the same step on all of them."""
        ...

    def close(self) -> None:
        """Stop listening."""
        ...


def listen(*signals: int, stop: bool = True, timeout_s: float = TIMEOUT_S) -> Notice:
    """Listen for these signals on all processes of the job, SIGTERM by JAX's preemption service where there is one.

    Every process calls it, and then ``reached`` with the same increasing steps.

    Args:
        signals: SIGTERM if none is given.
        stop: whether they mean the end of the job, and ``Preempted`` is told; else ``SaveRequested`` is.
        timeout_s: how long to wait for the other processes once a signal has come.

    Raises:
        InvalidArgumentError: called outside the main thread, where Python allows no signal handlers.

    Example:
        >>> import os, signal
        >>> notice = listen(signal.SIGUSR1)
        >>> notice.reached(1)
        False
        >>> os.kill(os.getpid(), signal.SIGUSR1)
        >>> notice.reached(2), notice.reached(3)
        (True, False)
        >>> notice.close()
    """
    wanted = tuple(dict.fromkeys(signals or (signal.SIGTERM,)))
    service = preemption_service()
    if service is not None and wanted == (signal.SIGTERM,):
        return _ServiceNotice(service)
    if service is not None and signal.SIGTERM in wanted:
        rest = tuple(one for one in wanted if one != signal.SIGTERM)
        own = SignalNotice(rest, current_coordinator(), stop=stop, timeout_s=timeout_s)
        return _Either((_ServiceNotice(service), own))
    return SignalNotice(wanted, current_coordinator(), stop=stop, timeout_s=timeout_s)


@final
class SignalNotice:
    """Signals of this process, agreed upon with the others through a coordinator."""

    def __init__(
        self,
        signals: tuple[int, ...],
        coordinator: AbstractCoordinator,
        *,
        stop: bool = True,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._coordinator = coordinator
        self._timeout_s = timeout_s
        self._event = Preempted if stop else SaveRequested
        self._names = "preemption/" + "-".join(signal.Signals(one).name for one in signals)
        self._state = threading.Lock()  # held while the processes agree, so that no step begins meanwhile
        self._step: int | None = None
        self._closing = threading.Event()
        self._listener: threading.Thread | None = None
        self._reason = ""  # set by the handler
        self._handlers = _install(signals, self._note)
        self._begin()

    def again(self) -> None:
        """Listen for the next signal; all processes call it after ``reached`` has said True, at that step.

        Signals that came in between are one with the last.
        """
        if self._listener is not None:
            self._listener.join()
        self._reason = ""
        self._begin()

    def _begin(self) -> None:
        self._told = False
        self._agreed: int | None = None
        self._error: CoordinationError | None = None
        self._saved = False
        name = session_name(self._names)
        self._key = f"jaxckpt/{name}/notice"
        self._session: Session | None = None
        if self._coordinator.size > 1:
            self._session = Session(self._coordinator, name)
            self._listener = threading.Thread(target=self._listen, name="jaxckpt-preemption", daemon=True)
            self._listener.start()

    def reached(self, step: int) -> bool:
        """See ``Notice``; CoordinationError where a process did not answer in time."""
        if self._reason and not self._told:
            self._told = True
            self._tell()
        with self._state:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            self._step = step
            if self._agreed is None or self._saved or step < self._agreed:
                return False
            self._saved = True
        emit(self._event(step=step, reason=self._reason))
        return True

    def close(self) -> None:
        """Put the earlier handlers back, and let the others no longer wait for this process."""
        self._closing.set()
        for number, (ours, earlier) in self._handlers.items():
            if signal.getsignal(number) is ours and threading.current_thread() is threading.main_thread():
                signal.signal(number, earlier)
        self._handlers = {}
        if self._listener is not None:
            self._listener.join()
            self._listener = None

    def _note(self, number: int) -> None:
        """In the signal handler, where nothing may wait."""
        self._reason = f"{signal.Signals(number).name} on process {self._coordinator.rank}"

    def _tell(self) -> None:
        if self._session is None:
            with self._state:
                self._agreed = 0  # the only process: whatever step it is at
        else:
            self._coordinator.put(self._key, self._reason.encode())

    def _listen(self) -> None:
        session, size = self._session, self._coordinator.size
        assert session is not None
        try:
            while not self._closing.is_set():
                if self._reason and not self._told:
                    self._told = True  # the step that this process is in may be a long one: the others hear of it now
                    self._tell()
                try:
                    notice = self._coordinator.get(self._key, timeout_s=_SLICE_S + size * _SLICE_PER_PROCESS_S)
                except TimeoutError:
                    continue
                self._agree(session, notice.decode())
                return
            # Nothing to save any more: those who hear of a signal from now on do not wait for this process.
            session.arrive("step", str(self._step if self._step is not None else -1).encode())
        except CoordinationError as error:
            with self._state:
                self._error = error
        finally:
            session.close()

    def _agree(self, session: Session, reason: str) -> None:
        with self._state:
            self._reason = reason
            self._told = True
            try:
                session.enter("agree on the step to save")
                session.arrive("step", str(self._step if self._step is not None else -1).encode())
                steps = [int(told) for told in session.collect("step", timeout_s=self._timeout_s)]
                self._agreed = max(steps) + 1
            except CoordinationError as error:
                session.fail(error)
                self._error = error


@final
class _ServiceNotice:
    """JAX's own service, which wants to be asked at every step."""

    def __init__(self, service: Callable[[int], bool]) -> None:
        self._service = service
        self._last: int | None = None
        self._saved = False

    def reached(self, step: int) -> bool:
        """See ``Notice``. Steps in between are told as well, so that the agreed one is never jumped over."""
        first = step if self._last is None else max(self._last + 1, step - _MOST_STEPS_TOLD)
        self._last = step
        if self._saved:
            return False
        for one in range(first, step + 1):
            if self._service(one):
                self._saved = True
                emit(Preempted(step=step, reason="JAX's preemption service"))
                return True
        return False

    def close(self) -> None:
        """The service belongs to JAX."""


@final
class _Either:
    def __init__(self, notices: tuple[Notice, ...]) -> None:
        self._notices = notices

    def reached(self, step: int) -> bool:
        return any([notice.reached(step) for notice in self._notices])

    def close(self) -> None:
        for notice in self._notices:
            notice.close()


def _install(signals: tuple[int, ...], note: Callable[[int], None]) -> dict[int, tuple[Any, Any]]:
    """Handlers that call ``note`` and then the one that was there: signal -> (ours, the earlier one)."""
    if threading.current_thread() is not threading.main_thread():
        raise InvalidArgumentError(
            f"Signal handlers can be set in the main thread alone, and this is {threading.current_thread().name}. Make "
            "the manager in the main thread, or leave on_signal and on_preemption out."
        )
    return {number: _install_one(number, note) for number in signals}


def _install_one(number: int, note: Callable[[int], None]) -> tuple[Any, Any]:
    earlier = signal.getsignal(number)
    if earlier is None:
        raise InvalidArgumentError(
            f"{signal.Signals(number).name} is handled by code outside Python, which could not be called any more. "
            "Listen for another signal."
        )
    # The defaults would end the process now, and the point is to save first.
    chained = earlier if callable(earlier) and earlier is not signal.default_int_handler else None

    def handle(signum: int, frame: FrameType | None) -> None:
        note(signum)
        if chained is not None:
            chained(signum, frame)
        elif earlier is signal.default_int_handler:
            signal.signal(signum, earlier)  # a second Ctrl-C ends the program as usual

    signal.signal(number, handle)
    return handle, earlier
