"""The examples of integrations do what they print."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_llama_goes_on_on_another_mesh_with_the_same_losses(tmp_path: Path) -> None:
    lines = run("nnx_llama.py", str(tmp_path)).splitlines()
    told = [line for line in lines if ": loss " in line]
    before, after = [float(line.split("loss ")[1].split(";")[0]) for line in told]
    assert after == pytest.approx(before, abs=0.01)
    assert [line.split(" on ")[0].strip() for line in told] == ["steps 1-12", "steps 9-12"]
    assert all(line.endswith("there is [8]") for line in told)


def test_a_linen_classifier_learns_digits_over_a_restart(tmp_path: Path) -> None:
    printed = run("linen_digits.py", str(tmp_path))
    first, restored, last = [float(line.split("%")[0].split()[-1]) for line in printed.splitlines() if "%" in line]
    assert restored == first
    assert last >= 85


def test_four_processes_are_preempted_and_two_go_on_without_losing_a_sample(tmp_path: Path) -> None:
    printed = run("elastic_restart.py", str(tmp_path / "run"))
    assert "each once: True" in printed
    assert "['" in printed


def test_saving_to_s3(tmp_path: Path) -> None:
    assert "equal to the bit: True" in run("save_to_s3.py")
