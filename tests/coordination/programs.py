"""What the processes of the tests do; run by run_processes, results as JSON."""

import hashlib
import os
import signal
import statistics
import time
from collections.abc import Callable

import jax

from jaxckpt.coordination.jax_client import current_coordinator
from jaxckpt.coordination.session import Session, session_name
from jaxckpt.core.errors import CoordinationError


def agree(operations: int) -> dict:
    """Operations that succeed, one after the other."""
    coordinator = current_coordinator()
    collected, durations_ms = [], []
    for _ in range(operations):
        started = time.perf_counter()
        session = Session(coordinator, session_name("run/step_1"))
        session.enter("writing")
        session.arrive("written", f"digest of {coordinator.rank}".encode())
        collected.append([payload.decode() for payload in session.collect("written", timeout_s=30)])
        session.enter("committing")
        if coordinator.rank == 0:
            session.arrive("committed", session.name.encode())
        collected.append(session.wait("committed", timeout_s=30).decode())
        session.close()
        durations_ms.append((time.perf_counter() - started) * 1e3)
    return {
        "rank": coordinator.rank,
        "size": coordinator.size,
        "local_devices": jax.local_device_count(),
        "devices": jax.device_count(),
        "collected": collected,
        "median_ms": statistics.median(durations_ms),
    }


def exchange(sizes: list[int]) -> list[str]:
    """Every process publishes values of these sizes under one key after another; hashes of all that were read."""
    coordinator = current_coordinator()
    hashes = []
    for number, size_bytes in enumerate(sizes):
        coordinator.put(f"test/{coordinator.rank}/{number}", _value(coordinator.rank, size_bytes))
        for rank in range(coordinator.size):
            value = coordinator.get(f"test/{rank}/{number}", timeout_s=60)
            hashes.append(f"{rank} {len(value)} {hashlib.sha256(value).hexdigest()}")
    return hashes


def expected_exchange(sizes: list[int], n: int) -> list[str]:
    """What ``exchange`` returns when all values are read as they were written."""
    return [
        f"{rank} {size_bytes} {hashlib.sha256(_value(rank, size_bytes)).hexdigest()}"
        for size_bytes in sizes
        for rank in range(n)
    ]


def keep_the_rules_of_the_store() -> dict:
    """What one process sees of put, get, count and delete."""
    coordinator = current_coordinator()
    seen: dict = {"rank": coordinator.rank}
    if coordinator.rank == 0:
        seen["absent"] = coordinator.try_get("rules/a")
        coordinator.put("rules/a", b"1")
        coordinator.put("rules/a", b"\0\xff" * (1 << 20))
        seen["big"] = len(coordinator.get("rules/a", timeout_s=1))
        coordinator.put("rules/a", b"")
        seen["overwritten"] = coordinator.get("rules/a", timeout_s=1).decode()
        coordinator.put("rules/ab", b"2")
        coordinator.put("rules/a/below", b"3")
        coordinator.delete("rules/a")
        coordinator.delete("rules/a")
        seen["after delete"] = [coordinator.try_get(f"rules/{k}") is not None for k in ("a", "a/below", "ab")]
        started = time.monotonic()
        try:
            coordinator.get("rules/a", timeout_s=0.2)
        except TimeoutError as error:
            seen["timeout"] = [str(error), time.monotonic() - started]
    seen["counts"] = [coordinator.count("rules/counter") for _ in range(5)]
    return seen


def one_is_killed(victim: int, timeout_s: float) -> dict:
    """``victim`` dies in stage "writing"; what the others are told, and after how long."""
    coordinator = current_coordinator()
    session = Session(coordinator, session_name("run/step_1"))
    session.enter("writing")
    if coordinator.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    session.arrive("written")
    return _told(session, "written", timeout_s)


def one_lags(laggard: int, timeout_s: float) -> dict:
    """``laggard`` arrives only when all others have given up; what each is told."""
    coordinator = current_coordinator()
    session = Session(coordinator, session_name("run/step_1"))
    if coordinator.rank != laggard:
        session.enter("writing")
        session.arrive("written")
        told = _told(session, "written", timeout_s)
        coordinator.put(f"test/gave up/{coordinator.rank}", b"")
        session.close()
        return told
    for rank in set(range(coordinator.size)) - {laggard}:
        coordinator.get(f"test/gave up/{rank}", timeout_s=30)
    session.enter("writing")
    session.arrive("written")
    told = _told(session, "written", 30)
    session.close()
    return told


def one_fails(culprit: int) -> dict:
    """``culprit`` cannot write; what the others are told, and after how long."""
    coordinator = current_coordinator()
    session = Session(coordinator, session_name("run/step_1"))
    session.enter("writing")
    if coordinator.rank == culprit:
        session.fail(OSError(28, "No space left on device"))
        session.close()
        return {"message": "", "after_s": 0.0}
    session.arrive("written")
    told = _told(session, "written", 60)
    session.close()
    return told


def leave_the_job() -> list[str]:
    """Both processes leave the job, and its store ends with process 0; what later calls on process 1 say."""
    coordinator = current_coordinator()
    jax.distributed.shutdown()
    if coordinator.rank == 0:
        return []
    session = Session(coordinator, "late")
    calls = (
        lambda: coordinator.get("test/never", timeout_s=30),
        lambda: coordinator.try_get("test/never"),
        lambda: coordinator.put("test/never", b""),
        lambda: coordinator.count("test/counter"),
        lambda: coordinator.delete("test"),
        lambda: session.enter("writing"),
        lambda: session.wait("committed", timeout_s=5),
    )
    messages = [_failure(call) for call in calls]
    untold = ValueError("bad tree")
    session.fail(untold)
    session.close()
    return [*messages, *untold.__notes__]


def _failure(call: Callable[[], object]) -> str:
    """What the call says when it fails: process 0 may have its store for a moment after both have left the job."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            call()
        except CoordinationError as error:
            return str(error)
        time.sleep(0.05)
    return "no error"


def coordinator_hangs() -> dict:
    """Process 0 is stopped while process 1 waits for it; what process 1 is told, and after how long."""
    coordinator = current_coordinator(answer_timeout_s=1)
    session = Session(coordinator, session_name("run/step_1"))
    session.enter("writing")
    if coordinator.rank == 0:
        # It may be stopped before the answer is here, and waits for that longer than it is stopped.
        current_coordinator().put("test/pid", str(os.getpid()).encode())
        return {"message": coordinator.get("test/woken", timeout_s=30).decode()}
    pid = int(coordinator.get("test/pid", timeout_s=30))
    os.kill(pid, signal.SIGSTOP)
    told = _told(session, "committed", 1)
    os.kill(pid, signal.SIGCONT)
    coordinator.put("test/woken", b"woken")
    return told


def _told(session: Session, stage: str, timeout_s: float) -> dict:
    started = time.monotonic()
    try:
        session.collect(stage, timeout_s=timeout_s)
    except CoordinationError as error:
        after_s = time.monotonic() - started
        session.fail(error)
        return {"message": str(error), "after_s": after_s}
    return {"message": "no error", "after_s": time.monotonic() - started}


def _value(rank: int, size_bytes: int) -> bytes:
    pattern = bytes((7 * i + rank) % 251 for i in range(251))
    return (pattern * (size_bytes // 251 + 1))[:size_bytes]
