"""The examples run as their first lines say, alone and as a job of two processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxckpt.testing.processes import run_processes

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PLAIN = sorted(path for path in EXAMPLES.glob("*.py") if "demo" not in path.name)


def launch(name: str, *arguments: str, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run(name: str, *arguments: str, timeout_s: float = 100) -> str:
    return launch(name, *arguments, timeout_s=timeout_s).stdout


def test_save_restore_runs_in_one_process(tmp_path: Path) -> None:
    assert "0 differ" in run("save_restore.py", str(tmp_path / "state"))


def test_save_restore_without_a_path_says_where_it_saves() -> None:
    printed = run("save_restore.py")
    place = Path(printed.splitlines()[0].removeprefix("saving to "))
    assert "0 differ" in printed
    assert (place / "jaxckpt.json").exists()
    shutil.rmtree(place.parent)


def test_every_example_is_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text()
    runnable = {path.name for path in EXAMPLES.glob("[a-z]*.py")}
    assert {name for name in runnable if f"]({name})" in table} == runnable
    assert set(re.findall(r"\]\((\w+\.py)\)", table)) == runnable


def test_save_restore_runs_in_two_processes(tmp_path: Path) -> None:
    differing = run_processes(
        f"{EXAMPLES / 'save_restore.py'}:save_and_restore",
        n=2,
        devices=2,
        args={"path": str(tmp_path / "state")},
        timeout_s=120,
    )
    assert differing == [0, 0]


def test_orbax_both_ways_runs(tmp_path: Path) -> None:
    printed = run("orbax_both_ways.py", str(tmp_path))
    assert printed.count("equal to the bit: True") == 4


def test_orbax_both_ways_gives_orbax_no_reason_to_warn(tmp_path: Path) -> None:
    done = launch("orbax_both_ways.py", str(tmp_path))
    assert "sharding" not in done.stderr.lower(), done.stderr


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 100


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_proves_what_it_claims() -> None:
    assert "proofs hold" in run("demo.py", timeout_s=500)
