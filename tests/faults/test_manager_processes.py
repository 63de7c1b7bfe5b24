"""A process that dies or stops while a manager saves: the others say who and where within the deadline, no step is
listed that is not whole, and a new job of any size goes on from the last that is."""

import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt.manager.steps import find_steps
from jaxckpt.storage.url import open_store
from jaxckpt.testing.processes import run_processes

PROGRAMS = Path(__file__).parent / "manager_faults.py"
DEADLINE_S = 2.0
SLACK_S = 8.0  # for a machine that does other things as well


def run(name: str, n: int, *, expect_failure: tuple[int, ...] = (), **args: Any) -> list[Any]:
    return run_processes(f"{PROGRAMS}:{name}", n, devices=1, args=args, expect_failure=expect_failure)


def assert_named(told: dict[str, Any], victim: int, stage: str) -> None:
    assert f'rocess {victim} of 4 did not reach stage "write"' in told["message"]
    if stage in ("write", "written"):
        assert 'last seen in stage "write"' in told["message"]
    assert "step 2" in told["message"]
    assert told["after_s"] < DEADLINE_S + SLACK_S
    assert told["listed"] == [1]


@pytest.mark.parametrize(
    ("victim", "stage", "waits"),
    [
        (2, "written", False),
        pytest.param(3, "written", True, marks=pytest.mark.slow),
        pytest.param(1, "write", False, marks=pytest.mark.slow),
        pytest.param(1, "write", True, marks=pytest.mark.slow),
        pytest.param(2, "capture", False, marks=pytest.mark.slow),
        pytest.param(3, "extras", True, marks=pytest.mark.slow),
        pytest.param(1, "step", False, marks=pytest.mark.slow),
    ],
)
def test_a_process_killed_in_a_save_is_named_and_a_new_job_resumes_from_the_step_before(
    tmp_path: Path, victim: int, stage: str, waits: bool
) -> None:
    args = {"root": str(tmp_path), "victim": victim, "stage": stage, "how": int(signal.SIGKILL), "waits": waits}
    results = run("killed", 4, expect_failure=(victim,), **args)
    assert results.pop(victim) is None
    for told in results:
        assert_named(told, victim, stage)
    for n in (4, 2):
        for found in run("resumed", n, root=str(tmp_path)):
            assert found == {"step": 1, "whole": True, "then": [1, 2]}
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "_runs") == ["1"]


@pytest.mark.parametrize(
    ("victim", "stage", "waits"),
    [
        (3, "write", False),
        pytest.param(1, "written", True, marks=pytest.mark.slow),
        pytest.param(2, "extras", False, marks=pytest.mark.slow),
        pytest.param(3, "step", True, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_stops_in_a_save_is_named_and_the_job_goes_on_when_it_is_back(
    tmp_path: Path, victim: int, stage: str, waits: bool
) -> None:
    args = {"root": str(tmp_path), "victim": victim, "stage": stage, "how": int(signal.SIGSTOP), "waits": waits}
    results = run("killed", 4, **args)
    for rank, told in enumerate(results):
        if rank != victim:
            assert_named(told, victim, stage)
        else:
            assert f"rocess {victim} of 4 did not reach" in told["message"]
        assert (told["again"], told["whole"]) == ([1, 2], True)
    assert jc.verify(tmp_path / "2" / "default").ok


@pytest.mark.slow
def test_process_0_that_stops_in_a_save_is_named(tmp_path: Path) -> None:
    root = tmp_path / "run"
    args = {"root": str(root), "victim": 0, "stage": "written", "how": int(signal.SIGSTOP), "waits": True}
    for told in run("killed", 4, **args)[1:]:
        assert "process (0), which hosts it, is unreachable" in told["message"]
        # It hosts the store: what it answers to is waited for a little longer.
        assert told["after_s"] < DEADLINE_S + 15 + SLACK_S
        assert told["listed"] == [1]


@pytest.mark.parametrize(
    ("kills", "seed"),
    [(2, 0), pytest.param(12, 1, marks=pytest.mark.slow), pytest.param(12, 2, marks=pytest.mark.slow)],
)
def test_a_job_of_two_killed_at_random_never_goes_backwards(tmp_path: Path, kills: int, seed: int) -> None:
    path, rng, newest = tmp_path / "run", random.Random(seed), None
    for _ in range(kills):
        victims = rng.choice([[0], [1], [0, 1]])
        delays = {str(rank): rng.uniform(0.02, 0.6) for rank in victims}
        # JAX aborts the others when process 0 dies.
        gone = (0, 1) if 0 in victims else (1,)
        for found in run("train", 2, expect_failure=gone, root=str(path), kills=delays):
            if found is not None:
                assert (found["start"], found["whole"]) == (newest, True)
                assert ("coordinator process (0)" if 0 in victims else "rocess 1 of 2") in found["message"]
        steps = {int(one.name) for one in path.iterdir() if one.name.isdecimal()}
        assert set(find_steps(open_store(path))) == steps  # looked at as the kill left it: nothing is swept
        for step in steps:
            tree = jc.restore(path / str(step) / "default", jc.on_host)
            assert tree["step"] == step
            assert all((tree[f"l{i}"] == np.float32(step + i / 8)).all() for i in range(4))
        now = max(steps, default=None)
        assert newest is None or (now is not None and now >= newest)
        newest = now
    assert newest is not None
