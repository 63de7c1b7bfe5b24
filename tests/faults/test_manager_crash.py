"""A run that is killed while it saves, or whose disk is full, loses and lists nothing that is not whole."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1

import jaxckpt as jc
from jaxckpt.core.errors import CheckpointError
from jaxckpt.core.events import SaveFailed, subscribe
from jaxckpt.manager.manager import CheckpointManager
from jaxckpt.manager.policies import latest

_LOOP = """
import sys
import numpy as np
from jaxckpt.manager.manager import CheckpointManager
from jaxckpt.manager.policies import latest
with CheckpointManager(sys.argv[1], keep=latest(3)) as manager:
    start, _ = manager.resume()
    print(-1 if start is None else start, flush=True)
    for step in range(0 if start is None else start + 1, 100_000):
        manager.save(step, {f"l{i}": np.full((64, 1024), step + i / 8, np.float32) for i in range(8)})
"""


@pytest.mark.parametrize(
    ("kills", "seed"),
    [(4, 0), pytest.param(12, 1, marks=pytest.mark.slow), pytest.param(12, 2, marks=pytest.mark.slow)],
)
def test_every_step_listed_after_sigkills_is_whole_and_none_goes_back(tmp_path: Path, kills: int, seed: int) -> None:
    path, rng, newest = tmp_path / "run", random.Random(seed), -1
    rounds = 0
    while rounds < kills or (newest < 0 and rounds < 3 * kills):
        rounds += 1
        with subprocess.Popen([sys.executable, "-c", _LOOP, str(path)], stdout=subprocess.PIPE, text=True) as loop:
            assert loop.stdout is not None
            assert int(loop.stdout.readline()) == newest
            # The point of the test: a time that nobody chose. A loaded machine needs longer for its first step.
            time.sleep(rng.uniform(0.05, 0.6) * (rounds if newest < 0 else 1))
            os.kill(loop.pid, signal.SIGKILL)
        with CheckpointManager(path, keep=latest(3)) as manager:
            steps = manager.all_steps()
            assert max(steps, default=-1) >= newest
            for step in steps:
                found = manager.restore(step, jc.on_host)
                assert all((found[f"l{i}"] == np.float32(step + i / 8)).all() for i in range(8))
            assert {int(one.name) for one in path.iterdir() if one.name.isdigit()} == set(steps)
            newest = max(steps, default=-1)
    assert newest >= 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a disk of its own takes the rights of root: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def listed_by_orbax(path: Path) -> list[int]:
    with ocp.CheckpointManager(str(path)) as manager:
        return list(manager.all_steps())


@pytest.mark.filterwarnings("ignore")  # Orbax's own deprecations
@pytest.mark.parametrize("told_by", ["save", "poll", "wait", "close"])
def test_a_full_disk_fails_the_save_lists_nothing_and_gives_the_space_back(disk: Path, told_by: str) -> None:
    path = disk / "run"
    small, large = {"w": np.ones(1000)}, {"w": np.random.default_rng(0).standard_normal(1_000_000)}
    manager = CheckpointManager(path)
    manager.save(1, small)
    manager.wait()
    free = os.statvfs(disk).f_bfree
    ended = threading.Event()
    stop = subscribe(lambda event: ended.set() if isinstance(event, SaveFailed) else None)
    assert manager.save(2, large)
    assert ended.wait(60)
    stop()
    while any(thread.name.startswith("jaxckpt-save") for thread in threading.enumerate()):
        ended.wait(0.01)
    assert os.statvfs(disk).f_bfree >= free - 8  # before anybody asked
    with pytest.raises(CheckpointError, match=r"process 0, step 2: .*No space left"):
        manager.save(3, small) if told_by == "save" else getattr(manager, told_by)()
    assert manager.poll() == {1: "durable", 2: "failed"}
    assert manager.all_steps() == listed_by_orbax(path) == [1]
    if told_by == "close":  # which leaves a manager that is closed
        manager = CheckpointManager(path)
    assert manager.save(2, small)
    manager.close()
    assert manager.all_steps() == listed_by_orbax(path) == [1, 2]
    for step in (1, 2):
        assert np.array_equal(manager.restore(step, jc.on_host)["w"], small["w"])


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_is_being_saved_when_the_run_is_killed_is_listed_by_nobody(tmp_path: Path) -> None:
    loop = f"""
import os, signal
import numpy as np
from jaxckpt.core.events import Flushed, subscribe
from jaxckpt.manager.manager import CheckpointManager
manager = CheckpointManager({str(tmp_path)!r})
manager.save(1, {{"w": np.ones(3)}})
manager.wait()
subscribe(lambda event: os.kill(os.getpid(), signal.SIGKILL) if isinstance(event, Flushed) else None)
manager.save(2, {{"w": np.ones(3)}})
manager.wait()
"""
    assert subprocess.run([sys.executable, "-c", loop], check=False).returncode == -signal.SIGKILL
    assert any("ocdbt.process_0/d/" in str(path) for path in (tmp_path / "2.jaxckpt-tmp").rglob("*"))
    assert listed_by_orbax(tmp_path) == [1]
    with v1.training.Checkpointer(str(tmp_path)) as checkpointer:
        assert [one.step for one in checkpointer.checkpoints] == [1]
    with CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [1]
        manager.save(2, {"w": np.ones(3)})
    assert listed_by_orbax(tmp_path) == [1, 2]
