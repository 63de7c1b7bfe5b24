"""What the manager tells is true: failures once, damage with the way out, leftovers gone, on every store."""

from __future__ import annotations

import resource
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt.core.events import StepDeleted, subscribe
from jaxckpt.manager.policies import Policy, StepRecord
from jaxckpt.storage.url import open_store
from jaxckpt.testing.servers import seaweed_s3
from jaxckpt.testing.stores import FaultyStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

BIG = {"w": np.ones(1 << 20, np.float32)}


def tree(step: int) -> dict[str, np.ndarray]:
    return {"w": np.full((4, 2), step, np.float32)}


@contextmanager
def small_files() -> Iterator[None]:
    """The file system refuses large files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def damage(root: Path, step: int) -> None:
    (path,) = (root / str(step) / "default" / "ocdbt.process_0" / "d").iterdir()
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("told_by", ["save", "poll", "wait", "close"])
def test_a_failed_save_is_told_once_wherever_it_is_asked_first(tmp_path: Path, told_by: str) -> None:
    manager = jc.CheckpointManager(tmp_path)
    with small_files():
        manager.save(2, BIG)
        manager._running[2].wait()
    assert not (tmp_path / "2").exists()  # reclaimed in the background
    with pytest.raises(jc.CheckpointError, match=r"process 0, step 2: .*File too large"):
        manager.save(3, tree(3)) if told_by == "save" else getattr(manager, told_by)()
    assert manager.poll() == {2: "failed"}
    assert (manager.latest_step(), manager.all_steps()) == (None, [])
    manager.close()


def test_after_a_failure_the_timer_and_the_latest_step_are_those_of_the_save_before(tmp_path: Path) -> None:
    manager = jc.CheckpointManager(tmp_path, save=jc.every(seconds=1000))
    manager.save(1, tree(1), force=True)
    manager.wait()
    before = manager._history[-1]
    with small_files():
        manager.save(2, BIG, force=True)
        with pytest.raises(jc.CheckpointError):
            manager.wait()
    assert manager._history[-1] == before
    assert before[0] == 1
    manager.close()


def test_the_error_of_the_block_comes_first_and_notes_the_failed_save(tmp_path: Path) -> None:
    def run() -> None:
        with jc.CheckpointManager(tmp_path) as manager:
            manager.save(2, BIG)
            raise KeyError("batch")

    with small_files(), pytest.raises(KeyError, match="batch") as caught:
        run()
    assert any("Step 2" in note and "too large" in note for note in caught.value.__notes__)


def test_an_old_step_that_cannot_be_deleted_does_not_hide_that_the_new_one_is_saved(tmp_path: Path) -> None:
    manager = jc.CheckpointManager(tmp_path, keep=jc.latest(1))
    manager.save(1, tree(1), metrics={"loss": 1.0})
    manager.wait()
    (tmp_path / "1" / "metrics" / "metrics").write_text("{")
    manager._keeper._known.clear()
    manager.save(2, tree(2))
    with pytest.raises(jc.CheckpointError, match="step 2 is saved"):
        manager.wait()
    assert manager.poll() == {1: "durable", 2: "durable"}
    assert manager.all_steps() == [1, 2]


def test_a_damaged_newest_step_names_leaf_file_and_the_step_to_take(tmp_path: Path) -> None:
    with jc.CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, tree(step))
    damage(tmp_path, 3)
    manager = jc.CheckpointManager(tmp_path, keep=jc.latest(2))
    with pytest.raises(jc.CorruptionError, match=r"Step 3 .* the step before it is 2: .*\bw\b.*fallback=True"):
        manager.resume(like=tree(0))
    with pytest.warns(RuntimeWarning, match="Step 3 .* damaged.*Resuming from step 2"):
        step, found = manager.resume(like=tree(0), fallback=True)
    assert step == 2
    np.testing.assert_array_equal(found["w"], tree(2)["w"])
    manager.save(3, tree(30))  # the run comes to it again: the damaged one is replaced
    manager.close()
    assert manager.all_steps() == [2, 3]
    np.testing.assert_array_equal(manager.restore(3, tree(0))["w"], tree(30)["w"])


def test_a_step_that_is_missing_is_told_with_those_that_are_there(tmp_path: Path) -> None:
    with jc.CheckpointManager(tmp_path) as manager:
        manager.save(4, tree(4))
    for ask in (manager.restore, manager.delete):
        with pytest.raises(jc.NotFoundError, match=r"no step 7.* there: 4"):
            ask(7)


@pytest.fixture(params=["memory", "s3"])
def place(request: pytest.FixtureRequest) -> Iterator[tuple[str, jc.StorageOptions | None]]:
    if request.param == "memory":
        yield "memory://manager-truth/run", None
        return
    with seaweed_s3() as server:
        yield f"{server.url.rstrip('/')}/run", server.options


def test_a_run_lives_on_an_object_store(place: tuple[str, jc.StorageOptions | None]) -> None:
    url, options = place
    events: list[object] = []
    stop = subscribe(events.append)
    with jc.CheckpointManager(url, keep=jc.latest(2) | jc.best(1, "loss"), options=options) as manager:
        for step in range(5):
            manager.save(step, tree(step), metrics={"loss": abs(step - 1.0)})
            assert manager.should_save(step + 1)
    stop()
    again = jc.CheckpointManager(url, options=options)
    assert again.all_steps() == [1, 3, 4]
    assert again.best_step("loss") == 1
    assert sorted(event.step for event in events if isinstance(event, StepDeleted)) == [0, 2]
    step, found = again.resume(like=tree(0))
    assert step == 4
    np.testing.assert_array_equal(found["w"], tree(4)["w"])
    again.close()


@dataclass(frozen=True)
class Broken(Policy):
    """A policy of the user's with a mistake in it."""

    def kept(self, steps: Sequence[StepRecord], now_s: float) -> set[int]:
        raise KeyError("accuracy")


def test_a_step_that_another_process_deletes_while_the_best_is_sought_is_passed_over(tmp_path: Path) -> None:
    root = f"memory://{tmp_path.name}/vanishes"
    writer = jc.CheckpointManager(root)
    for step in (1, 2, 3):
        writer.save(step, {"w": np.ones(3)}, metrics={"loss": float(step)})
        writer.wait()
    asked: list[str] = []

    def delete_first(operation: str, name: str) -> None:
        if operation == "read" and name.startswith("1/") and not asked:
            asked.append(name)
            writer.delete(1)

    with jc.CheckpointManager(FaultyStore(open_store(root), delete_first)) as reader:
        assert reader.best_step("loss") == 2
    assert asked
    writer.close()


def test_a_keep_policy_that_raises_loses_no_step(tmp_path: Path) -> None:
    manager = jc.CheckpointManager(tmp_path, keep=Broken())
    manager.save(1, tree(1))
    with pytest.raises(jc.CheckpointError, match="step 1 is saved.*KeyError"):
        manager.wait()
    assert manager.all_steps() == [1]
    assert not list((tmp_path / "_runs").iterdir())


def test_threads_and_leases_do_not_pile_up(tmp_path: Path) -> None:
    with jc.CheckpointManager(tmp_path, keep=jc.latest(1)) as manager:
        manager.save(0, tree(0))
        manager.wait()
        before = threading.active_count()
        for step in range(1, 30):
            manager.save(step, tree(step))
        manager.wait()
        limit = time.monotonic() + 10
        while threading.active_count() > before and time.monotonic() < limit:
            threading.Event().wait(0.01)
        assert threading.active_count() <= before
    assert manager.all_steps() == [29]
