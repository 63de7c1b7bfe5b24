"""Extras of jobs of several processes: other numbers of them, one that cannot store its own, a damaged file of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxckpt.testing.processes import run_processes

PROGRAMS = Path(__file__).parent / "extras_programs.py"


def run(name: str, n: int, **args: Any) -> list[Any]:
    return run_processes(f"{PROGRAMS}:{name}", n, devices=1, args=args)


def test_a_manager_goes_on_over_4_2_3_processes_and_no_sample_is_lost_or_repeated(tmp_path: Path) -> None:
    seen: list[int] = []
    for n, steps in ((4, 3), (2, 2), (3, None)):
        for samples in run("train", n, root=str(tmp_path), steps=steps, length=97):
            seen += samples
    assert sorted(seen) == list(range(97))


def test_all_hear_of_the_process_whose_extra_cannot_be_stored_and_the_step_can_be_saved_again(tmp_path: Path) -> None:
    results = run("one_cannot_store", 2, root=str(tmp_path))
    for rank, (told, steps, value) in enumerate(results):
        assert "step 1" in told
        assert "Process 1" in told
        assert "The extra x is a set" in told
        assert (steps, value) == ([1], rank)


def test_damage_in_the_extras_of_one_process_is_told_to_all(tmp_path: Path) -> None:
    for _ in range(2):
        run("train", 2, root=str(tmp_path), steps=1, length=480)
    path = tmp_path / "2" / "extras" / "process_1.json"
    path.write_bytes(path.read_bytes().replace(b'"steps":', b'"stepz":'))
    for told, steps in run("resume_damaged", 2, root=str(tmp_path)):
        assert told.startswith("CorruptionError")
        assert "2/extras/process_1.json is damaged" in told
        assert steps == [1, 2]
