"""The coordinator of a jax.distributed job, over JAX's own key-value store; the only place for private JAX names.

What JAX does when processes die (0.10 and 0.12 alike), as it bounds what any error of ours can say:

* Process 0 hosts the store. When it dies, JAX aborts all other processes within milliseconds (a fatal log line,
  SIGABRT), because each of them keeps a call open to the store. No option of ``jax.distributed.initialize`` prevents
  that. Only a process that JAX leaves alive sees CoordinationError: the call that fails before the abort, or one made
  after this process has left the job with ``jax.distributed.shutdown()``.
* When another process dies, the store notices after ``heartbeat_timeout_seconds`` (100 by default), and JAX then
  aborts all processes likewise, unless ``jax_enable_recoverability`` was set before ``initialize``. To see our error,
  which names the process and its stage, let deadlines here be shorter than the heartbeat time-out, or set that option.
* When process 0 hangs, a blocking get keeps its deadline, but every other call of the client waits without limit.
  Those run in a thread of their own here, so that we can stop waiting for them.
"""

import itertools
import json
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol, TypeVar, final

import jax
from jax._src import distributed

from jaxckpt.coordination.coordinator import AbstractCoordinator
from jaxckpt.coordination.local import LocalCoordinator
from jaxckpt.core.errors import CoordinationError

# gRPC refuses messages above 4 MiB where nobody has raised its limit.
_PART_BYTES = 1 << 20
# The client takes milliseconds as an int; longer waits are made of several.
_LONGEST_WAIT_S = 3600.0
# Calls of the client that know no deadline take under a millisecond, or some tens for a part of a big value.
_ANSWER_TIMEOUT_S = 10.0
# For which each further call waits while an earlier one is still unanswered: an error on its way up makes several.
_SILENT_TIMEOUT_S = 0.5
# The first byte of a stored value.
_WHOLE, _IN_PARTS = b"w", b"p"

Answer = TypeVar("Answer")

_ALONE = LocalCoordinator()
_serial = itertools.count()
_unanswered: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


def current_coordinator(*, answer_timeout_s: float = _ANSWER_TIMEOUT_S) -> AbstractCoordinator:
    """The coordinator of this process's jax.distributed job, or that of a lone process.

    ``answer_timeout_s`` bounds every call that should take milliseconds; waiting for others has deadlines of its own.
    """
    state = distributed.global_state
    if state.client is None or state.num_processes <= 1:
        return _ALONE
    return JaxCoordinator(state.client, state.process_id, size=state.num_processes, answer_timeout_s=answer_timeout_s)


def preemption_service() -> Callable[[int], bool] | None:
    """JAX's preemption service (``jax_enable_preemption_service``) where this job has it, as a function of the step.

    It hears SIGTERM on any process, by a handler outside Python, and says at which step all should save.
    """
    if distributed.global_state.preemption_sync_manager is None:
        return None
    from jax.experimental import multihost_utils  # costs a tenth of a second, and few want it

    return multihost_utils.reached_preemption_sync_point


@final
class JaxCoordinator(AbstractCoordinator):
    """One process's view of the store that process 0 of a jax.distributed job hosts.

    A value above 1 MiB is stored in parts, under names of their own, and then announced under its key: a reader never
    meets half of a value, nor parts of two.
    """

    def __init__(self, client: "_Client", rank: int, *, size: int, answer_timeout_s: float = _ANSWER_TIMEOUT_S) -> None:
        self.rank = rank
        self.size = size
        self._client = client
        self._answer_timeout_s = answer_timeout_s

    def put(self, key: str, value: bytes) -> None:
        """Publish ``value``, a big one in parts; they stay in the store until the key is deleted."""
        if len(value) <= _PART_BYTES:
            self._set(key, _WHOLE + value)
            return
        # A fresh name for every value; they lie below the key, so that its deletion takes them along.
        folder = f"{key}/parts-{self.rank}-{next(_serial)}"
        starts = range(0, len(value), _PART_BYTES)
        for number, start in enumerate(starts):
            self._set(f"{folder}/{number}", value[start : start + _PART_BYTES])
        self._set(key, _IN_PARTS + json.dumps({"folder": folder, "parts": len(starts)}).encode())

    def get(self, key: str, *, timeout_s: float) -> bytes:
        """Wait for a value; returns as soon as it is published, without polling."""
        deadline = time.monotonic() + timeout_s
        while True:
            value = self._join(self._wait(key, deadline))
            if value is not None:
                return value
            # Deleted between the announcement and the parts: wait for the next value.

    def try_get(self, key: str) -> bytes | None:
        """Read the value now; None also when it is being deleted at this moment."""
        stored = self._read(key)
        return None if stored is None else self._join(stored)

    def count(self, key: str) -> int:
        """Count up in the store itself, so that no two processes get the same number."""
        return self._answer(f"count up {key!r}", lambda: self._client.key_value_increment(key, 1))

    def delete(self, prefix: str) -> None:
        """Remove the key, and below it the parts of a big value."""
        self._answer(f"delete {prefix!r}", lambda: self._client.key_value_delete(prefix))

    def _join(self, stored: bytes) -> bytes | None:
        if stored[:1] == _WHOLE:
            return stored[1:]
        header = json.loads(stored[1:])
        parts: list[bytes] = []
        for number in range(header["parts"]):
            part = self._read(f"{header['folder']}/{number}")
            if part is None:
                return None
            parts.append(part)
        return b"".join(parts)

    def _set(self, key: str, stored: bytes) -> None:
        self._answer(f"publish {key!r}", lambda: self._client.key_value_set_bytes(key, stored, True))

    def _read(self, key: str) -> bytes | None:
        def read() -> bytes | None:
            try:
                return self._client.key_value_try_get_bytes(key)
            except jax.errors.JaxRuntimeError as error:
                if str(error).startswith("NOT_FOUND"):
                    return None
                raise

        return self._answer(f"read {key!r}", read)

    def _wait(self, key: str, deadline: float) -> bytes:
        while True:
            left_s = deadline - time.monotonic()
            try:
                wait_ms = max(1, int(min(left_s, _LONGEST_WAIT_S) * 1000))
                return self._client.blocking_key_value_get_bytes(key, wait_ms)
            except jax.errors.JaxRuntimeError as error:
                if not str(error).startswith("DEADLINE_EXCEEDED"):
                    raise _unreachable(f"wait for {key!r}", str(error)) from error
                if left_s <= _LONGEST_WAIT_S:
                    raise TimeoutError(f"No value for key {key!r} at the deadline.") from None

    def _answer(self, action: str, call: Callable[[], Answer]) -> Answer:
        """What ``call`` returns, or CoordinationError where the store refuses or does not answer in time."""
        answers: list[Answer] = []
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                answers.append(call())
            except BaseException as error:  # re-raised below, in the thread that asked
                errors.append(error)

        limit_s = self._answer_timeout_s
        if any([thread.is_alive() for thread in list(_unanswered)]):
            limit_s = min(limit_s, _SILENT_TIMEOUT_S)
        thread = threading.Thread(target=ask, name="jaxckpt-store-call", daemon=True)
        thread.start()
        thread.join(limit_s)
        if answers:
            return answers[0]
        if not errors:
            _unanswered.add(thread)
            raise _unreachable(action, f"no answer within {limit_s:g} s")
        if isinstance(errors[0], jax.errors.JaxRuntimeError):
            raise _unreachable(action, str(errors[0])) from errors[0]
        raise errors[0]


class _Client(Protocol):
    """What we use of JAX's client."""

    def blocking_key_value_get_bytes(self, key: str, timeout_in_ms: int, /) -> bytes: ...
    def key_value_try_get_bytes(self, key: str, /) -> bytes: ...
    def key_value_set_bytes(self, key: str, value: bytes, allow_overwrite: bool, /) -> None: ...
    def key_value_increment(self, key: str, increment: int, /) -> int: ...
    def key_value_delete(self, key: str, /) -> None: ...


def _unreachable(action: str, reason: str) -> CoordinationError:
    return CoordinationError(
        f"Could not {action} in the store of the jax.distributed job: the coordinator process (0), which hosts it, is "
        f"unreachable. Next step: look at the log of process 0, then restart the job. What JAX said: {reason}"
    )
