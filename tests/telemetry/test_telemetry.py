"""Logs, totals and bars of real saves and restores; quiet where nobody looks."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt.core import events
from jaxckpt.core.errors import StorageError
from jaxckpt.core.events import (
    Captured,
    Committed,
    Event,
    Flushed,
    MetricMissing,
    Preempted,
    Progress,
    Recovered,
    Restored,
    SaveFailed,
    SaveRequested,
    SaveSkipped,
    StageEnded,
    StepDeleted,
    Swept,
    emit,
    subscribe,
)
from jaxckpt.telemetry import Recorder, log_to, progress
from jaxckpt.telemetry.log import describe, level_of

if TYPE_CHECKING:
    from pathlib import Path

TREE = {"w": np.arange(3 << 20, dtype=np.float32), "b": np.ones(5, np.float32)}
SIZE = 4 * ((3 << 20) + 5)

EXAMPLES: list[tuple[Event, int | None, str]] = [
    (Captured(path="/c/7", process=1, step=7, size_bytes=1024, seconds=0.5), logging.DEBUG, "captured /c/7 (step 7)"),
    (Flushed(path="/c/7", process=1, size_bytes=1024, seconds=0.5), logging.DEBUG, "1 KiB in 500 ms (2 KiB/s)"),
    (Committed(path="/c/7", step=7, size_bytes=1024, seconds=0.5), logging.INFO, "saved /c/7 (step 7)"),
    (Restored(path="/c/7", process=1, read_bytes=1024, seconds=0.0), logging.INFO, "restored /c/7 on process 1"),
    (StageEnded(stage="sync", path="/c/7", process=1, seconds=2.0), logging.DEBUG, "sync of /c/7 on process 1: 2 s"),
    (Progress(operation="save", path="/c/7", process=1, moved_bytes=9), None, "9 B more"),
    (SaveSkipped(path="/c/7", step=7, reason="no room"), logging.WARNING, "did not save /c/7 (step 7): no room"),
    (
        SaveFailed(path="/c/7", process=1, step=7, stage="write", error=StorageError("disk full")),
        logging.ERROR,
        "failed on process 1 in write: StorageError: disk full",
    ),
    (StepDeleted(path="/c/7", step=7), logging.INFO, "deleted /c/7 (step 7)"),
    (MetricMissing(path="/c", step=7, metric="loss"), logging.WARNING, "/c (step 7) without the metric 'loss'"),
    (Swept(path="/c", names=("8.tmp", "9.tmp")), logging.INFO, "left at /c: 8.tmp, 9.tmp"),
    (
        Preempted(step=7, reason="SIGTERM on process 2"),
        logging.INFO,
        "preempted (SIGTERM on process 2): all processes save step 7",
    ),
    (SaveRequested(step=7, reason="SIGUSR1 on process 2"), logging.INFO, "asked for a save (SIGUSR1 on process 2)"),
    (
        Recovered(step=7, stages=(1,), sources=("stale",), method="stale", seconds=0.5),
        logging.INFO,
        "recovered lost stages at step 7 (stale): 1 from stale; 500 ms",
    ),
]


@pytest.mark.parametrize(("event", "level", "text"), EXAMPLES, ids=[type(e).__name__ for e, _, _ in EXAMPLES])
def test_every_event_has_a_level_and_a_line(event: Event, level: int | None, text: str) -> None:
    assert level_of(event) == level
    assert text in describe(event)


def test_every_kind_of_event_is_among_the_examples() -> None:
    assert {type(event) for event, _, _ in EXAMPLES} == set(events.Event.__args__)


def test_saves_and_restores_are_logged_until_stopped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jaxckpt")
    stop = log_to()
    jc.save(tmp_path / "a", TREE, step=3)
    jc.restore(tmp_path / "a", jc.on_host)
    stop()
    jc.save(tmp_path / "b", TREE)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert "a/ (step 3): 12 MiB in" in caplog.messages[0]
    event: Any = caplog.records[0].__dict__["event"]
    assert isinstance(event, Committed)


def test_the_library_logs_nothing_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    jc.save(tmp_path / "a", TREE)
    assert [record for record in caplog.records if record.name.startswith("jaxckpt")] == []


def test_progress_adds_up_to_what_is_written_and_read(tmp_path: Path) -> None:
    seen: list[Event] = []
    stop = subscribe(seen.append)
    jc.save(tmp_path / "a", TREE, step=3)
    written = [event for event in seen if isinstance(event, Progress)]
    seen.clear()
    jc.restore(tmp_path / "a", jc.on_host)
    stop()
    assert {(event.operation, event.step, event.total_bytes) for event in written} == {("save", 3, SIZE)}
    assert sum(event.moved_bytes for event in written) == SIZE
    read = [event for event in seen if isinstance(event, Progress)]
    (restored,) = [event for event in seen if isinstance(event, Restored)]
    assert sum(event.moved_bytes for event in read) == restored.read_bytes
    assert restored.step == 3


def test_totals_of_stages(tmp_path: Path) -> None:
    with Recorder() as recorder:
        for name in "ab":
            jc.save_async(tmp_path / name, TREE).result(timeout_s=60)
        jc.restore(tmp_path / "a", jc.on_host)
    jc.save(tmp_path / "c", TREE)  # after its end
    assert {stage: recorder.total(stage).count for stage in ("save", "write", "restore")} == {
        "save": 2,
        "write": 2,
        "restore": 1,
    }
    save = recorder.total("save")
    assert save.size_bytes >= 2 * SIZE
    assert 0 < save.longest_s <= save.seconds
    assert save.bytes_per_s == pytest.approx(save.size_bytes / save.seconds)
    assert recorder.total("nothing").bytes_per_s == 0.0


def test_every_stage_of_a_save_and_a_restore_is_told(tmp_path: Path) -> None:
    seen: list[Event] = []
    stop = subscribe(seen.append)
    with jc.CheckpointManager(tmp_path) as manager:
        manager.save(3, TREE, extras={"note": 1})
        manager.wait()
        manager.restore(3, jc.on_host)
    stop()
    told = [event for event in seen if isinstance(event, StageEnded)]
    assert [event.stage for event in told] == ["plan", "sync", "extras", "commit", "seal", "plan"]
    assert {event.step for event in told} == {3}
    assert all(event.seconds >= 0 and event.process == 0 for event in told)


def test_counting_is_safe_from_many_threads() -> None:
    with Recorder() as recorder:

        def count() -> None:
            for _ in range(200):
                emit(StageEnded(stage="x", path="", process=0, size_bytes=1, seconds=0.0))

        threads = [threading.Thread(target=count) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert recorder.total("x").size_bytes == 1600


def test_a_listener_that_fails_costs_no_checkpoint(tmp_path: Path) -> None:
    def broken(event: Event) -> None:
        raise ValueError("no display")

    stop = subscribe(broken)
    with pytest.warns(RuntimeWarning, match="no display"):
        jc.save(tmp_path / "a", TREE)
    stop()
    stop()
    assert jc.restore(tmp_path / "a", jc.on_host)["b"].tolist() == [1.0] * 5


def test_nothing_is_drawn_without_a_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    with progress(stream=stream) as drawn:
        jc.save(tmp_path / "a", TREE)
    assert (drawn, stream.getvalue()) == (False, "")
    assert not events.is_heard()


def test_a_quiet_process_does_not_load_rich() -> None:
    code = "import sys; from jaxckpt.telemetry import progress\nwith progress(): print('rich' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_bars_are_drawn_on_a_terminal_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as terminal:
        chunks: list[bytes] = []
        reader = threading.Thread(target=_read_all, args=[leader, chunks])
        reader.start()
        with progress(stream=terminal) as drawn:
            assert drawn
            emit(Progress(operation="save", path="/ckpt/17", process=0, moved_bytes=1 << 20, total_bytes=4 << 20))
            jc.save(tmp_path / "a", TREE)
            emit(Progress(operation="save", path="/ckpt/17", process=0, moved_bytes=1 << 20, total_bytes=4 << 20))
    reader.join()
    os.close(leader)
    text = b"".join(chunks).decode()
    assert "save 17" in text
    assert "4.2 MB" in text or "4.0 MiB" in text or "2.0/4.0" in text
    assert not events.is_heard()


def _read_all(descriptor: int, chunks: list[bytes]) -> None:
    while True:
        try:
            chunk = os.read(descriptor, 1 << 16)
        except OSError:  # the other side has closed
            return
        if not chunk:
            return
        chunks.append(chunk)
