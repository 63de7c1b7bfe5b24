"""The manager on two processes: one view of the steps, failures of one told by all, nobody waits in vain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import jaxckpt as jc
from jaxckpt.core.events import Swept, subscribe
from jaxckpt.testing.processes import run_processes

PROGRAMS = Path(__file__).parent / "manager_programs.py"


def run(name: str, n: int = 2, **args: Any) -> list[Any]:
    return run_processes(f"{PROGRAMS}:{name}", n, devices=2, args=args, timeout_s=100)


@pytest.mark.parametrize("seconds", [None, 0.06])
def test_all_processes_save_the_same_steps_and_see_the_same_ones(tmp_path: Path, seconds: float | None) -> None:
    first, second = run("train", root=str(tmp_path), seconds=seconds)
    assert first == second
    saved = first["saved"]
    assert saved == [2, 4, 6, 8] if seconds is None else saved
    assert first["fresh"] is None
    assert first["after wait"] == saved[-2:]
    assert first["best"] == saved[-1]
    assert first["after delete"] == saved[-1:]
    assert first["resumed"] == [saved[-1]] * 3
    assert not list(tmp_path.rglob("_runs/*"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_write_that_fails_on_one_process_is_told_once_on_all_and_the_step_can_be_saved_again(
    tmp_path: Path, victim: int
) -> None:
    for seen in run("one_cannot_write", root=str(tmp_path), victim=victim):
        (error,) = seen["errors"]
        assert "step 2" in error
        assert f"process {victim}" in error.lower()
        assert "File too large" in error
        assert (seen["state"], seen["listed"], seen["after"]) == ("failed", [1], [1, 2])


def test_a_step_that_was_being_saved_when_its_run_was_killed_is_swept_at_the_next_start(tmp_path: Path) -> None:
    args = {"root": str(tmp_path), "step": 2}
    run_processes(f"{PROGRAMS}:die_in_a_save", 1, devices=2, args=args, expect_failure={0})
    assert (tmp_path / "2.jaxckpt-tmp").is_dir()
    assert not (tmp_path / "2").exists()  # Orbax would list it
    assert list((tmp_path / "_runs").iterdir())
    events: list[Any] = []
    stop = subscribe(events.append)
    manager = jc.CheckpointManager(tmp_path)
    stop()
    assert manager.all_steps() == [1]
    assert not (tmp_path / "2.jaxckpt-tmp").exists()
    assert not list((tmp_path / "_runs").iterdir())
    assert [event.names for event in events if isinstance(event, Swept)] == [("2.jaxckpt-tmp",)]


def test_who_leaves_the_block_with_an_error_is_not_waited_for(tmp_path: Path) -> None:
    first, second = run("one_leaves", root=str(tmp_path))
    assert second == "KeyError: 'batch'"
    assert "KeyError" in first
    assert "Process 1 of 2" in first, first
