"""What process 0 decides, told to the other processes of a job: all go on alike, or all raise.

Through the coordination service alone, so that no device waits. A lone process decides for itself and sends nothing.
"""

import json
from collections.abc import Callable
from typing import Any, final

from jaxckpt.coordination.coordinator import AbstractCoordinator
from jaxckpt.coordination.session import Session, session_name
from jaxckpt.core import errors
from jaxckpt.core.errors import CheckpointError, CoordinationError

_IN_A_SESSION = 64  # decisions; the keys of older sessions are removed


@final
class Agreement:
    """Decisions in the order in which every process asks for them; all must ask for the same ones.

    Args:
        coordinator: of the job.
        name: what is decided about, the same on all processes.
        timeout_s: how long to wait for a process.
    """

    def __init__(self, coordinator: AbstractCoordinator, name: str, timeout_s: float) -> None:
        self.rank, self.size = coordinator.rank, coordinator.size
        self.alone, self.leads = coordinator.size == 1, coordinator.rank == 0
        self._coordinator, self._timeout_s = coordinator, timeout_s
        self._name = name if self.alone else session_name(name)
        self._session: Session | None = None
        self._count = 0

    def told(self, what: str, decide: Callable[[], Any]) -> Any:
        """What ``decide`` returns on process 0 (JSON), on all processes; what it raises there is raised on all."""
        if self.alone:
            return decide()
        session, stage = self._next()
        if self.leads:
            session.check()
            try:
                answer = decide()
            except Exception as error:
                session.arrive(stage, _packed(what, None, error))
                raise
            session.arrive(stage, _packed(what, answer, None))
            return answer
        try:
            data = session.wait(stage, rank=0, timeout_s=self._timeout_s)
        except CoordinationError as error:
            error.add_note(f"Process {self.rank} waited for process 0 to say: {what}.")
            raise
        return self._unpacked(data, what)

    def gathered(self, what: str, mine: Any) -> list[Any]:
        """What each process gives (JSON), by rank, on all processes."""
        if self.alone:
            return [mine]
        session, stage = self._next()
        session.arrive(stage, _packed(what, mine, None))
        return [self._unpacked(data, what) for data in session.collect(stage, timeout_s=self._timeout_s)]

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process leaves: whoever waits for it raises."""
        if not self.alone:
            session = self._session or self._next()[0]
            session.fail(error)

    def close(self) -> None:
        """End this process's part."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _next(self) -> tuple[Session, str]:
        if self._count % _IN_A_SESSION == 0:
            self.close()
        if self._session is None:
            self._session = Session(self._coordinator, f"{self._name}/{self._count // _IN_A_SESSION}-{self._count}")
            self._session.enter("decide together")
        self._count += 1
        return self._session, f"decision {self._count}"

    def _unpacked(self, data: bytes, what: str) -> Any:
        record = json.loads(data)
        if record["what"] != what:
            raise CoordinationError(
                f"Process {self.rank} asked {what!r} of {self._name} where another asked {record['what']!r}. All "
                "processes call the methods of a manager in the same order, with the same steps."
            )
        if record["error"] is None:
            return record["answer"]
        kind, text = record["error"]
        error = TimeoutError if kind == "TimeoutError" else getattr(errors, kind, CheckpointError)
        raise error(text)


def _packed(what: str, answer: Any, error: Exception | None) -> bytes:
    told = None
    if error is not None:
        known = isinstance(error, CheckpointError | TimeoutError)
        told = [type(error).__name__, str(error) if known else f"Process 0 failed: {type(error).__name__}: {error}"]
    return json.dumps({"what": what, "answer": answer, "error": told}).encode()
