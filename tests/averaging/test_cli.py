"""The command ``jaxckpt average``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt.averaging.posthoc import power_weights


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


def test_the_power_profile_is_over_the_steps_of_the_checkpoints(tmp_path: Path) -> None:
    steps = [10, 20, 100]
    for step in steps:
        jc.save(tmp_path / f"run/ckpt-{step + 1}", {"w": np.full(1, float(step))}, step=step)
    expected = power_weights(steps, 0.2)
    named = jaxckpt(
        tmp_path / "a", *(tmp_path / f"run/ckpt-{s + 1}" for s in steps), "--method=power", "--sigma-rel=0.2"
    )
    assert named.returncode == 0, named.stderr
    assert jaxckpt(tmp_path / "b", "--of", tmp_path / "run", "--method=power", "--sigma-rel=0.2").returncode == 0
    for name in ("a", "b"):
        assert [one["weight"] for one in jc.inspect(tmp_path / name).parents] == pytest.approx(expected.tolist())
    for name in ("x", "y"):
        jc.save(tmp_path / name, {"w": np.zeros(1)})
    wrong = jaxckpt(tmp_path / "c", tmp_path / "x", tmp_path / "y", "--method=power")
    assert (wrong.returncode, "/x/ tells no step" in wrong.stderr) == (2, True)


def test_a_policy_for_no_leaf_is_told(run: Path) -> None:
    wrong = jaxckpt(run / "out", run / "1", run / "2", "--policy", "stp=first")
    assert (wrong.returncode, 'policy: "stp" matches no leaf; the nearest name is "step"' in wrong.stderr) == (2, True)
    assert not (run / "out").exists()
