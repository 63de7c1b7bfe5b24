"""What dead runs left: steps half written or half deleted are removed, those of a live writer never.

A run names the steps that it writes or deletes in a lease, ``_runs/<id>.json``, for as long as it does. A run that dies
leaves its lease behind. On the host of its writer a lease is dead when that process is; elsewhere when its counter has
stood still for three of its own intervals by the clock of whoever looks, so clocks need not agree.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import final
from uuid import uuid4

from jaxckpt.core.errors import AlreadyExistsError, CheckpointError, NotFoundError
from jaxckpt.core.events import Swept, emit
from jaxckpt.manager.steps import exists, is_leftover, remove, unfinished, writing_folder
from jaxckpt.storage.store import AbstractStore

FOLDER = "_runs"
EVERY_S = 10.0
_PATIENCE = 3

_held_here: set[str] = set()  # runs of this very process that hold steps


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """What a lease says. ``host`` tells machine, boot and process namespace apart; ``beat`` counts up."""

    run: str
    host: str = ""
    hostname: str = ""
    pid: int = 0
    started: str = ""
    beat: int = 0
    every_s: float = EVERY_S
    steps: tuple[int, ...] = ()


@final
class Lease:
    """The lease of this run: there while it holds a step."""

    def __init__(self, root: AbstractStore, *, every_s: float = EVERY_S) -> None:
        self.run = uuid4().hex
        self._root, self._every_s = root, every_s
        self._lock = threading.Lock()
        self._steps: set[int] = set()
        self._beat = 0
        self._stop: threading.Event | None = None

    def hold(self, steps: Iterable[int]) -> None:
        """Name steps that this run is about to write or delete."""
        new = set(steps)
        with self._lock:
            self._steps |= new
            try:
                self._write()
            except CheckpointError:
                self._steps -= new
                raise
            _held_here.add(self.run)
            if self._stop is None:
                self._stop = threading.Event()
                thread = threading.Thread(target=self._keep, args=(self._stop,), name="jaxckpt-lease", daemon=True)
                thread.start()

    def release(self, steps: Iterable[int]) -> None:
        """These are whole, or gone. The lease ends with the last of them."""
        with self._lock:
            before = len(self._steps)
            self._steps -= set(steps)
            if self._steps or not before:
                return  # it goes on naming a step that is whole, until the next beat: that harms nothing
            if self._stop is not None:
                self._stop.set()
                self._stop = None
            _held_here.discard(self.run)
            self._root.delete(f"{FOLDER}/{self.run}.json")

    @contextmanager
    def held(self, steps: Iterable[int]) -> Iterator[None]:
        """``hold`` and ``release`` around a block."""
        named = list(steps)
        self.hold(named)
        try:
            yield
        finally:
            self.release(named)

    def _keep(self, stop: threading.Event) -> None:
        while not stop.wait(self._every_s):
            with self._lock:
                if stop.is_set():
                    return
                with suppress(CheckpointError):  # the next beat tries again; two may be missed
                    self._write()

    def _write(self) -> None:
        self._beat += 1
        record = LeaseRecord(
            run=self.run,
            host=_host(),
            hostname=socket.gethostname(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            beat=self._beat,
            every_s=self._every_s,
            steps=tuple(sorted(self._steps)),
        )
        self._root.write(f"{FOLDER}/{self.run}.json", json.dumps(asdict(record)).encode())


@final
class Sweeper:
    """Removes what dead runs left under a root. One process of a run has one."""

    def __init__(self, root: AbstractStore, own_run: str) -> None:
        self._root, self._own = root, own_run
        self._stop = threading.Event()
        self._watching: threading.Thread | None = None

    def start(self) -> None:
        """Remove what is known to be dead; leases of other hosts are watched in the background first."""
        unknown = self._sweep({})
        if unknown:
            self._watching = threading.Thread(target=self._watch, args=(unknown,), name="jaxckpt-sweep", daemon=True)
            self._watching.start()

    def make_room(self, step: int) -> None:
        """Remove what a dead run left of a step.

        Raises:
            AlreadyExistsError: a live run is at work on it, or there are files that are no part of a step.
        """
        naming = {one.run: one for one in self._leases() if step in one.steps}
        doubtful = {run: one for run, one in naming.items() if _is_alive(one) is None}
        dead = self._observe(doubtful) if doubtful else set()
        for one in naming.values():
            if _is_alive(one) is not False and one.run not in dead:
                raise AlreadyExistsError(
                    f"Step {step} of {self._root.url} is being written or deleted by another run, process {one.pid} on "
                    f"{one.hostname}. Nothing was begun. End that run, or use another folder."
                )
        there = [name for name in {str(step), writing_folder(self._root, step)} if self._root.child(name).names()]
        for name in there:
            if not naming and not is_leftover(self._root, name):
                raise AlreadyExistsError(
                    f"{self._root.url}{name} holds files that are no part of an unfinished step. Nothing was begun: "
                    "move them, or save another step."
                )
        for name in there:
            remove(self._root, name)
        if there:
            emit(Swept(path=self._root.url, names=tuple(sorted(there))))

    def close(self) -> None:
        """Watch no longer."""
        self._stop.set()
        if self._watching is not None:
            self._watching.join()
            self._watching = None

    def _watch(self, unknown: dict[str, LeaseRecord]) -> None:
        dead = self._observe(unknown)
        if not self._stop.is_set():
            with suppress(CheckpointError):  # the next start tries again
                self._sweep(dict.fromkeys(dead, False))

    def _observe(self, leases: dict[str, LeaseRecord]) -> set[str]:
        """Which of these stand still for their patience."""
        beats, deadline = {}, {}
        for run, one in leases.items():
            beats[run], deadline[run] = one.beat, time.monotonic() + _PATIENCE * one.every_s
        while not self._stop.is_set() and time.monotonic() < max(deadline.values()):
            self._stop.wait(min(one.every_s for one in leases.values()) / 2)
            now = {one.run: one.beat for one in self._leases()}
            if all(now.get(run) != beat for run, beat in beats.items()):
                return set()  # all live, or gone
        now = {one.run: one.beat for one in self._leases()}
        return set() if self._stop.is_set() else {run for run, beat in beats.items() if now.get(run) == beat}

    def _sweep(self, known: dict[str, bool]) -> dict[str, LeaseRecord]:
        """Remove what is dead; returns the leases that nothing is known of and that name unfinished steps."""
        leases = {one.run: one for one in self._leases()}
        alive = {run: known.get(run, _is_alive(one)) for run, one in leases.items()}
        spared = {step for run, one in leases.items() if alive[run] is not False for step in one.steps}
        told = {step for run, one in leases.items() if alive[run] is False for step in one.steps}
        gone = []
        for step, folder in unfinished(self._root):
            if step not in spared and (step in told or is_leftover(self._root, folder)):
                remove(self._root, folder)
                gone.append(folder)
        for run in [run for run in leases if alive[run] is False]:
            self._root.delete(f"{FOLDER}/{run}.json")
        if gone:
            emit(Swept(path=self._root.url, names=tuple(gone)))
        unsure = {run: one for run, one in leases.items() if alive[run] is None}
        return {run: one for run, one in unsure.items() if any(not exists(self._root, str(step)) for step in one.steps)}

    def _leases(self) -> list[LeaseRecord]:
        found = []
        for name in self._root.names(f"{FOLDER}/"):
            run = name.removeprefix(f"{FOLDER}/").removesuffix(".json")
            if run == self._own:
                continue
            with suppress(NotFoundError):  # released meanwhile
                found.append(_decode(run, self._root.read(name)))
        return found


def _decode(run: str, data: bytes) -> LeaseRecord:
    try:
        record = json.loads(data)
        return LeaseRecord(**{**record, "run": run, "steps": tuple(record["steps"])})
    except (ValueError, TypeError, KeyError):
        return LeaseRecord(run=run)  # damaged: watched as one of another host


def _is_alive(lease: LeaseRecord) -> bool | None:
    """Whether the writer lives; None where that cannot be seen from here."""
    if lease.run in _held_here:
        return True
    if not lease.host or lease.host != _host():
        return None
    return lease.pid != os.getpid() and _started(lease.pid) == lease.started


@cache
def _host() -> str:
    """This machine, this boot of it, and the namespace in which process ids are meant; empty where none can be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty where there is none, or one that only waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]
