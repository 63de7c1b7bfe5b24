"""A run that is killed while it saves, or whose disk is full, loses and lists nothing that is not whole."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt.core.errors import CheckpointError
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
    for _ in range(kills):
        with subprocess.Popen([sys.executable, "-c", _LOOP, str(path)], stdout=subprocess.PIPE, text=True) as loop:
            assert loop.stdout is not None
            assert int(loop.stdout.readline()) == newest
            time.sleep(rng.uniform(0.05, 0.6))  # the point of the test: a time that nobody chose
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


def test_a_full_disk_fails_the_save_lists_nothing_and_gives_the_space_back(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
    try:
        small, large = {"w": np.ones(1000)}, {"w": np.random.default_rng(0).standard_normal(1_000_000)}
        with CheckpointManager(disk / "run") as manager:
            manager.save(1, small)
            manager.wait()
            before = os.statvfs(disk).f_bfree
            manager.save(2, large)
            with pytest.raises(CheckpointError, match=r"process 0, step 2"):
                manager.wait()
            assert manager.all_steps() == [1]
            assert os.statvfs(disk).f_bfree >= before - 8
            manager.save(2, small)
            manager.wait()
            assert manager.all_steps() == [1, 2]
            for step in (1, 2):
                assert np.array_equal(manager.restore(step, jc.on_host)["w"], small["w"])
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
