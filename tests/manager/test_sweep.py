"""What dead runs left goes, what a live one writes stays."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt.core.events import Event, Flushed, subscribe
from jaxckpt.manager.sweep import FOLDER, Lease, Sweeper
from jaxckpt.storage.url import open_store

if TYPE_CHECKING:
    from pathlib import Path

TREE = {"w": np.ones(64, np.float32)}


def half_written(root: Path, step: int) -> Path:
    """A step whose tree misses its marker."""
    jc.save(root / str(step) / "default", TREE)
    (root / str(step) / "default" / "commit_success.txt").unlink()
    return root / str(step)


def foreign_lease(root: Path, steps: list[int], beat: int = 1, every_s: float = 0.05) -> Path:
    """A lease of a writer on another host."""
    record = {"host": "elsewhere", "hostname": "elsewhere", "pid": 1, "beat": beat, "every_s": every_s, "steps": steps}
    path = root / FOLDER / "other.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(".jaxckpt-tmp-x")
    temporary.write_text(json.dumps(record))
    temporary.rename(path)
    return path


def test_a_half_written_and_a_half_deleted_step_that_no_run_holds_are_swept(tmp_path: Path) -> None:
    with jc.CheckpointManager(tmp_path) as manager:
        manager.save(1, TREE)
        manager.save(2, TREE)
    (tmp_path / "2" / "_CHECKPOINT_METADATA").unlink()
    (tmp_path / "2" / "default" / "commit_success.txt").unlink()
    half_written(tmp_path, 3)
    assert jc.CheckpointManager(tmp_path).all_steps() == [1]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != FOLDER) == ["1"]


def test_what_was_being_written_or_deleted_beside_a_whole_step_is_swept_unless_a_run_holds_it(tmp_path: Path) -> None:
    with jc.CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, TREE)
    for name in ("2.jaxckpt-tmp", "step_000007.jaxckpt-tmp", "5.jaxckpt-tmp"):
        jc.save(tmp_path / name / "default", TREE)  # whole below, and never sealed
    (tmp_path / "mine.jaxckpt-tmp").mkdir()
    lease = Lease(open_store(tmp_path))
    lease.hold([5])
    assert jc.CheckpointManager(tmp_path).all_steps() == [1, 2]
    names = sorted(path.name for path in tmp_path.iterdir() if path.name != FOLDER)
    assert names == ["1", "2", "5.jaxckpt-tmp", "mine.jaxckpt-tmp"]
    lease.release([5])
    with jc.CheckpointManager(tmp_path) as manager:
        assert manager.save(5, TREE)
    assert jc.verify(tmp_path / "5" / "default").ok
    assert not (tmp_path / "5.jaxckpt-tmp").exists()


def test_a_step_that_turns_up_where_one_is_to_be_sealed_is_not_replaced(tmp_path: Path) -> None:
    manager = jc.CheckpointManager(tmp_path)

    def intrude(event: Event) -> None:
        if isinstance(event, Flushed) and not (tmp_path / "1").exists():
            (tmp_path / "1").mkdir()
            (tmp_path / "1" / "notes.txt").write_text("mine")

    stop = subscribe(intrude)
    manager.save(1, TREE)
    with pytest.raises(jc.CheckpointError, match="step 1: Could not rename .* to 1: Directory not empty"):
        manager.wait()
    stop()
    manager.close()
    assert [path.name for path in tmp_path.iterdir() if path.name != FOLDER] == ["1"]
    assert (tmp_path / "1" / "notes.txt").read_text() == "mine"


def test_what_is_no_part_of_a_step_stays_and_is_not_saved_over(tmp_path: Path) -> None:
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "notes.txt").write_text("mine")
    jc.save(tmp_path / "4" / "default", TREE)  # whole, by somebody who needs no manager
    manager = jc.CheckpointManager(tmp_path)
    for step in (3, 4):
        with pytest.raises(jc.AlreadyExistsError, match=f"{step} holds files"):
            manager.save(step, TREE)
    assert (tmp_path / "3" / "notes.txt").read_text() == "mine"
    assert jc.verify(tmp_path / "4" / "default").ok
    manager.close()


def test_a_step_of_a_live_run_is_neither_swept_nor_saved_over(tmp_path: Path) -> None:
    root = open_store(tmp_path)
    lease = Lease(root)
    lease.hold([5])
    folder = half_written(tmp_path, 5)
    manager = jc.CheckpointManager(tmp_path)
    assert folder.is_dir()
    with pytest.raises(jc.AlreadyExistsError, match=r"Step 5 .* another run, process \d+ on "):
        manager.save(5, TREE)
    lease.release([5])
    assert manager.save(5, TREE)
    manager.close()
    assert manager.all_steps() == [5]


def test_a_lease_of_another_host_that_stands_still_is_dead(tmp_path: Path) -> None:
    folder, lease = half_written(tmp_path, 5), foreign_lease(tmp_path, [5])
    sweeper = Sweeper(open_store(tmp_path), "own")
    sweeper.start()
    assert sweeper._watching is not None
    sweeper._watching.join(10)
    assert not folder.exists()
    assert not lease.exists()


def test_a_lease_of_another_host_whose_counter_moves_is_alive(tmp_path: Path) -> None:
    folder = half_written(tmp_path, 5)
    stop, beats = threading.Event(), 0
    foreign_lease(tmp_path, [5])

    def beat() -> None:
        nonlocal beats
        while not stop.wait(0.02):
            beats += 1
            foreign_lease(tmp_path, [5], beat=beats + 1)

    writer = threading.Thread(target=beat)
    writer.start()
    try:
        manager = jc.CheckpointManager(tmp_path)
        with pytest.raises(jc.AlreadyExistsError, match="on elsewhere"):
            manager.save(5, TREE)
        manager.close()
    finally:
        stop.set()
        writer.join()
    assert folder.exists()


def test_a_lease_lasts_as_long_as_a_step_is_held(tmp_path: Path) -> None:
    lease = Lease(open_store(tmp_path), every_s=0.01)
    lease.hold([1])
    lease.hold([2])
    (path,) = (tmp_path / FOLDER).glob("*.json")
    first: Any = json.loads(path.read_text())["beat"]
    moved = threading.Event()
    while json.loads(path.read_text())["beat"] == first:
        assert not moved.wait(0.01)
    lease.release([1])
    assert path.exists()
    lease.release([2])
    assert not path.exists()
    names = {thread.name for thread in threading.enumerate() if thread.is_alive()}
    assert "jaxckpt-sweep" not in names
