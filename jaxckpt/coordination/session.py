"""One operation that all processes go through together: their stages, outcomes and failures, with deadlines."""

import itertools
import json
import threading
import time
from dataclasses import dataclass
from typing import final
from urllib.parse import quote

from jaxckpt.coordination.coordinator import AbstractCoordinator
from jaxckpt.core.errors import CoordinationError

TIMEOUT_S = 600.0  # for which one process waits for another, unless told

# While waiting, a look at the failures is taken between two blocking gets. An arrival ends such a get at once, so the
# length of a get delays only the news of a failure, and the load on the store stays the same however many wait.
_FIRST_SLICE_S = 0.02
_LONGEST_SLICE_S = 0.2
_SLICE_PER_PROCESS_S = 0.001

_MOST_ERROR_CHARS = 4000
_MOST_PROCESSES_TOLD = 8

_counters: dict[str, "itertools.count[int]"] = {}
_counters_lock = threading.Lock()


def session_name(path: str) -> str:
    """A name for the next operation on ``path``, the same on all processes.

    Every process counts its own operations on the path, so all must call this equally often: call it before anything
    that could fail on one process alone.
    """
    with _counters_lock:
        return f"{path}#{next(_counters.setdefault(path, itertools.count()))}"


@final
class Session:
    """One operation (say, one save) that all processes go through together.

    A process announces each stage as it begins (``enter``) and the outcome of those that others depend on
    (``arrive``); others wait for it (``wait`` for one process, ``collect`` for all). A process that cannot go on tells
    the others (``fail``). At the end every process calls ``close``, after success and failure alike.

    With one process nothing is sent anywhere.

    Args:
        coordinator: the store.
        name: of this operation, the same on all processes and used once (``session_name``).
        about: what messages call it; ``name`` by default.
    """

    def __init__(self, coordinator: AbstractCoordinator, name: str, *, about: str = "") -> None:
        self.name = about or name
        self._coordinator = coordinator
        self._alone = coordinator.size == 1
        self._root = f"jaxckpt/session/{quote(name, safe='')}"
        self._stage = ""
        self._stages_entered = 0
        self._payloads: dict[str, bytes] = {}
        self._failure_is_known = False
        self._closed = False

    def enter(self, stage: str) -> None:
        """Publish where this process is, for the error messages of the others."""
        self._stage = stage
        if self._alone:
            return
        if self._stages_entered == 0:
            self._coordinator.put(f"jaxckpt/latest/{self._coordinator.rank}", self.name.encode())
        self._stages_entered += 1
        record = json.dumps([self._stages_entered, stage]).encode()
        self._coordinator.put(f"{self._root}/stage/{self._coordinator.rank}", record)

    def arrive(self, stage: str, payload: bytes = b"") -> None:
        """Publish that this process has done ``stage``, with what came out of it; once per stage."""
        self._payloads[stage] = payload
        if self._alone:
            return
        self._coordinator.put(self._arrival_key(stage, self._coordinator.rank), payload)

    def collect(self, stage: str, *, timeout_s: float) -> list[bytes]:
        """What every process arrived with, in rank order, once all have.

        CoordinationError at once when any process has failed, and at the deadline when some have not arrived.
        """
        if self._alone:
            return [self._payloads[stage]]
        ranks = range(self._coordinator.size)
        payloads = self._await(stage, list(ranks), timeout_s)
        # All have arrived, but one may have failed or given up since: do not go on without it.
        self._raise_failure()
        return [payloads[rank] for rank in ranks]

    def wait(self, stage: str, *, rank: int = 0, timeout_s: float) -> bytes:
        """What process ``rank`` arrived with; errors as for ``collect``."""
        if self._alone:
            return self._payloads[stage]
        return self._await(stage, [rank], timeout_s)[rank]

    def check(self) -> None:
        """CoordinationError if another process has failed."""
        if not self._alone:
            self._raise_failure()

    def claim(self) -> bool:
        """Pass the point of no return: False if another process has abandoned the operation before."""
        return self._alone or self._coordinator.count(f"{self._root}/claimed") == 1

    def abandon(self) -> bool:
        """Give the operation up: whether it is sure that nobody passes ``claim`` any more, nor has."""
        if self._alone:
            return True
        try:
            if self.claim():
                self._coordinator.put(f"{self._root}/abandoned", b"")
                return True
            return self._coordinator.try_get(f"{self._root}/abandoned") is not None
        except CoordinationError:
            return False

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process cannot go on. The first failure told is the one they hear of."""
        if self._alone or self._closed or self._failure_is_known:
            return
        self._failure_is_known = True
        try:
            # An earlier failure of another process is likely the cause of this one.
            if self._coordinator.try_get(f"{self._root}/failure") is None:
                record = {
                    "rank": self._coordinator.rank,
                    "stage": self._stage,
                    "gave_up": isinstance(error, CoordinationError),
                    "error": _text(error),
                }
                self._coordinator.put(f"{self._root}/failure", json.dumps(record).encode())
        except Exception as untold:  # fail() is called while ``error`` is on its way up, and must not replace it
            error.add_note(f"The other processes could not be told of this error: {untold}")

    def close(self) -> None:
        """End this process's part. The last process to close removes the keys of all, as nobody reads them then.

        When a process has died, the keys of its session stay until the job ends.
        """
        if self._alone or self._closed:
            return
        self._closed = True
        try:
            if self._coordinator.count(f"{self._root}/closed") == self._coordinator.size:
                self._coordinator.delete(self._root)
        except CoordinationError:
            # The store is gone, and the keys with it; whether the operation succeeded is known by now.
            return

    def _await(self, stage: str, ranks: list[int], timeout_s: float) -> dict[int, bytes]:
        """The payloads of ``ranks``, or CoordinationError."""
        started = time.monotonic()
        deadline = started + timeout_s
        longest_slice_s = _LONGEST_SLICE_S + _SLICE_PER_PROCESS_S * self._coordinator.size
        slice_s = _FIRST_SLICE_S
        next_look = started
        sightings: dict[int, _Sighting] = {}
        payloads: dict[int, bytes] = {}
        if self._coordinator.rank in ranks and stage in self._payloads:
            payloads[self._coordinator.rank] = self._payloads[stage]
        for rank in ranks:
            while rank not in payloads:
                left_s = max(deadline - time.monotonic(), 0)
                key = self._arrival_key(stage, rank)
                try:
                    payloads[rank] = self._coordinator.get(key, timeout_s=min(slice_s, left_s))
                    break
                except TimeoutError:
                    if self._has_failure():
                        # It may have arrived and failed since, and what arrived is what the process is asked for.
                        arrived = self._coordinator.try_get(key)
                        if arrived is None:
                            self._raise_failure()
                        else:
                            payloads[rank] = arrived
                            break
                slice_s = min(2 * slice_s, longest_slice_s)
                now = time.monotonic()
                if now >= deadline:
                    missing = self._still_missing(stage, ranks, payloads)
                    if missing:
                        sightings = self._look(missing, sightings)
                        raise CoordinationError(self._missing_message(stage, missing, sightings, timeout_s))
                elif now >= next_look:
                    # Rarely, as it costs a read per process: after 0, 1, 3, 7, 15 ... seconds.
                    sightings = self._look([r for r in ranks if r not in payloads], sightings)
                    next_look = now + (now - started) + 1
        return payloads

    def _still_missing(self, stage: str, ranks: list[int], payloads: dict[int, bytes]) -> list[int]:
        """At the deadline: who has really not arrived, as only one process was waited for at a time."""
        for rank in ranks:
            if rank not in payloads:
                payload = self._coordinator.try_get(self._arrival_key(stage, rank))
                if payload is not None:
                    payloads[rank] = payload
        return [rank for rank in ranks if rank not in payloads]

    def _look(self, ranks: list[int], before: "dict[int, _Sighting]") -> "dict[int, _Sighting]":
        """In which stage each rank is, and since when by our own clock: those of other hosts may differ."""
        now = time.monotonic()
        sightings: dict[int, _Sighting] = {}
        for rank in ranks:
            record = self._coordinator.try_get(f"{self._root}/stage/{rank}")
            number, stage = json.loads(record) if record is not None else (0, "")
            earlier = before.get(rank)
            if earlier is not None and earlier.number == number:
                sightings[rank] = earlier
            else:
                sightings[rank] = _Sighting(number=number, stage=stage, since=now)
        return sightings

    def _has_failure(self) -> bool:
        return self._coordinator.try_get(f"{self._root}/failure") is not None

    def _raise_failure(self) -> None:
        record = self._coordinator.try_get(f"{self._root}/failure")
        if record is None:
            return
        self._failure_is_known = True
        failure = json.loads(record)
        where = f'in stage "{failure["stage"]}"' if failure["stage"] else "before its first stage"
        who = f"Process {failure['rank']} of {self._coordinator.size}"
        if failure["gave_up"]:
            # Its message names the processes to blame, and ends with a next step.
            raise CoordinationError(f"{who} gave up {where} of {self.name}: {failure['error']}")
        raise CoordinationError(
            f"{who} failed {where} of {self.name}: {failure['error']}. Next step: see the log of process "
            f"{failure['rank']}; once its trouble is mended, repeat the operation."
        )

    def _missing_message(
        self, stage: str, missing: list[int], sightings: "dict[int, _Sighting]", timeout_s: float
    ) -> str:
        told = missing[:_MOST_PROCESSES_TOLD]
        places = [self._whereabouts(rank, sightings[rank]) for rank in told]
        clauses = [
            f"Process {told[0]} of {self._coordinator.size} did not reach stage "
            f'"{stage}" of {self.name} within {timeout_s:g} s ({places[0]})'
        ]
        clauses += [f"nor did process {rank} ({place})" for rank, place in zip(told[1:], places[1:], strict=True)]
        if len(missing) > len(told):
            clauses.append(f"nor did {len(missing) - len(told)} more")
        return (
            f"{'; '.join(clauses)}. Next step: see the logs of these processes; if they are alive but slow, raise "
            f"timeout_s."
        )

    def _whereabouts(self, rank: int, sighting: "_Sighting") -> str:
        if sighting.number:
            return f'last seen in stage "{sighting.stage}", for at least {time.monotonic() - sighting.since:.2g} s'
        latest = self._coordinator.try_get(f"jaxckpt/latest/{rank}")
        if latest is None:
            return "it never entered this operation, nor any before"
        return f"it never entered this operation; the latest that it entered is {latest.decode()}"

    def _arrival_key(self, stage: str, rank: int) -> str:
        return f"{self._root}/arrived/{quote(stage, safe='')}/{rank}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sighting:
    """A process was in its ``number``-th stage (0: in none) from ``since`` on, as far as this process saw."""

    number: int
    stage: str
    since: float


def _text(error: BaseException) -> str:
    named = str(error) if isinstance(error, CoordinationError) else f"{type(error).__name__}: {error}".rstrip(". ")
    return named[:_MOST_ERROR_CHARS]
