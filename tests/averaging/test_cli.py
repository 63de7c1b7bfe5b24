"""The command ``jaxckpt average``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxckpt as jc


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in range(1, 5):
        tree = {"params": {"w": np.full(3, step, np.float32), "wide": np.full(2, step, np.float64)}, "step": step}
        jc.save(tmp_path / f"run/{step}", tree, step=step)
    return tmp_path / "run"


def jaxckpt(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxckpt.cli.main", "average", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path.cwd(), env=os.environ, timeout=60
    )


def test_given_weights(run: Path) -> None:
    done = jaxckpt(run / "out", run / "1", run / "4", "--weights=-1,2", "--metric", "loss=0.25")
    assert done.returncode == 0, done.stderr
    assert "given weights: -1 2" in done.stdout
    found = jc.restore(run / "out")
    assert found["params"]["w"].tolist() == [7, 7, 7]
    assert found["params"]["wide"].dtype == np.float64
    info = jc.inspect(run / "out")
    assert [parent["weight"] for parent in info.parents] == [-1, 2]
    assert info.metadata["averaging"]["metric"] == {"name": "loss", "value": 0.25}
    assert info.step == 4


def test_the_newest_steps_of_a_run(run: Path) -> None:
    done = jaxckpt(run / "out", "--of", run, "--newest", 2, "--method", "ema", "--decay", 0.75, "--only", "params.w")
    assert done.returncode == 0, done.stderr
    assert jc.restore(run / "out") == {"params": {"w": pytest.approx([3.25] * 3)}}


def test_mistakes_are_told_and_leave_nothing(run: Path) -> None:
    both = jaxckpt(run / "out", run / "1", "--of", run)
    assert (both.returncode, "--of" in both.stderr) == (2, True)
    wrong = jaxckpt(run / "out", run / "1", run / "2", "--weights=1")
    assert wrong.returncode == 2
    assert "for 2 sources" in wrong.stderr
    assert not (run / "out").exists()
    assert jaxckpt(run / "1", run / "2", run / "3").returncode == 2
