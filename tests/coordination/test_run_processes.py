"""The harness of real processes reports what happened in each, and leaves none behind."""

import os
import time
from pathlib import Path

import pytest

from jaxckpt.testing.processes import run_processes

HERE = Path(__file__)


def describe(greeting: str) -> dict:
    import jax

    rank = jax.process_index()
    return {"greeting": f"{greeting} {rank}", "of": jax.process_count(), "devices": jax.local_device_count()}


def environment(name: str) -> str | None:
    return os.environ.get(name)


def complain_on(rank: int) -> str:
    import jax

    print(f"process {jax.process_index()} is about to begin")
    if jax.process_index() == rank:
        raise ValueError(f"process {rank} has had enough")
    return "fine"


def exit_on(rank: int) -> str:
    import jax

    if jax.process_index() == rank:
        os._exit(7)
    return "fine"


def hang_in_a_child(pid_path: str) -> None:
    import subprocess

    child = subprocess.Popen(["sleep", "600"])
    Path(pid_path).write_text(f"{os.getpid()} {child.pid}")
    child.wait()


def not_json() -> object:
    return object()


def test_a_lone_process_needs_no_job_but_can_have_one():
    for distributed in (None, True):
        results = run_processes(f"{HERE}:describe", 1, args={"greeting": "hi"}, devices=3, distributed=distributed)
        assert results == [{"greeting": "hi 0", "of": 1, "devices": 3}]


def test_a_target_may_be_named_by_its_module_and_see_given_variables():
    assert run_processes("os:getcwd", 1) == [os.getcwd()]
    assert run_processes(f"{HERE}:environment", 1, args={"name": "GIVEN"}, env={"GIVEN": "yes"}) == ["yes"]


def test_an_error_is_shown_with_the_output_of_all_processes():
    with pytest.raises(AssertionError) as told:
        run_processes(f"{HERE}:complain_on", 2, args={"rank": 1})
    message = str(told.value)
    assert message.startswith("Process 1 of 2 raised ValueError: process 1 has had enough.")
    assert "process 0 is about to begin" in message
    assert "Traceback (most recent call last)" in message


def test_an_exit_without_result_is_an_error_unless_expected():
    with pytest.raises(AssertionError, match="Process 1 of 2 exited with 7 without a result"):
        run_processes(f"{HERE}:exit_on", 2, args={"rank": 1})
    assert run_processes(f"{HERE}:exit_on", 2, args={"rank": 1}, expect_failure=[1]) == ["fine", None]
    assert run_processes(f"{HERE}:complain_on", 2, args={"rank": 0}, expect_failure=[0]) == [None, "fine"]


def test_a_result_that_is_not_json_is_an_error():
    with pytest.raises(AssertionError, match="not JSON serializable"):
        run_processes(f"{HERE}:not_json", 1)


def test_a_hanging_process_shows_its_stacks_and_is_killed_with_its_children(tmp_path: Path):
    pid_path = tmp_path / "pids"
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)was not done after 4\.\d s.*in hang_in_a_child"):
        run_processes(f"{HERE}:hang_in_a_child", 1, args={"pid_path": str(pid_path)}, timeout_s=4)
    assert time.monotonic() - started < 8
    process, child = (int(pid) for pid in pid_path.read_text().split())
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    """Whether a process that is not ours to wait for is alive; when killed it may remain as a zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
