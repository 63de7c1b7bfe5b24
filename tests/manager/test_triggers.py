"""Signals and the advisor as policies of a manager: all processes save the same step, and the loop may end."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.events import Captured, Committed, Event, Preempted, SaveRequested, emit, subscribe
from jaxckpt.manager.policies import SaveContext
from jaxckpt.manager.triggers import Measure, OnSignal, Triggers
from jaxckpt.testing.processes import run_processes

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAMS = Path(__file__).parent / "trigger_programs.py"
TERM, USR1 = int(signal.SIGTERM), int(signal.SIGUSR1)
TREE = {"w": np.arange(8, dtype=np.float32)}


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    assert {one: signal.getsignal(one) for one in before} == before


@pytest.mark.parametrize("service", [False, True], ids=["own", "service"])
def test_sigterm_on_one_of_two_ends_the_loop_of_both_after_one_saved_step(tmp_path: Path, service: bool) -> None:
    env = {"JAX_ENABLE_PREEMPTION_SERVICE": str(int(service))}
    args: dict[str, Any] = {"root": str(tmp_path), "policy": "preemption", "most": 400, "signals": {"1": [[5, TERM]]}}
    results: Any = run_processes(f"{PROGRAMS}:train", 2, devices=1, args=args, env=env)
    (step,) = {result["last"] for result in results}
    assert step >= 5
    assert [(r["saved"], r["all"], r["preempted"]) for r in results] == [([step], [step], True)] * 2
    args |= {"signals": {}, "most": 3}
    results = run_processes(f"{PROGRAMS}:train", 2, devices=1, args=args, env=env)
    assert [(r["began_after"], r["last"], r["preempted"]) for r in results] == [(step, step + 3, False)] * 2


def test_each_signal_saves_a_step_and_the_loop_goes_on(tmp_path: Path) -> None:
    signals = {"1": [[5, USR1]], "0": [[150, USR1]]}
    args = {"root": str(tmp_path), "policy": "usr1", "most": 200, "signals": signals}
    results: Any = run_processes(f"{PROGRAMS}:train", 2, devices=1, args=args)
    one, two = results
    assert one["saved"] == two["saved"]
    assert len(one["saved"]) == 2
    assert [r["last"] for r in results] == [200, 200]
    assert not any(r["preempted"] for r in results)


def test_the_interval_that_wastes_least_is_the_same_on_all(tmp_path: Path) -> None:
    args = {"root": str(tmp_path), "policy": "optimal", "most": 150, "signals": {}}
    results: Any = run_processes(f"{PROGRAMS}:train", 2, devices=1, args=args)
    one, two = results
    assert one["saved"] == two["saved"]
    assert one["saved"][0] == 3
    assert len(one["saved"]) > 2
    assert "a save stalls training for" in one["explained"]


def test_alone_the_step_at_hand_is_saved_and_the_loop_told(tmp_path: Path) -> None:
    with jc.CheckpointManager(tmp_path, save=jc.on_preemption()) as manager:
        assert not manager.save(1, TREE)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not manager.preempted
        assert manager.save(2, TREE)
        assert manager.preempted
        assert not manager.save(3, TREE)
    assert manager.all_steps() == [2]


def test_a_loop_that_asks_first_gets_the_same_answer_again(tmp_path: Path) -> None:
    with jc.CheckpointManager(tmp_path, save=jc.on_signal(signal.SIGUSR1)) as manager:
        for step in range(1, 5):
            if step in (2, 4):
                os.kill(os.getpid(), signal.SIGUSR1)
            wanted = [manager.should_save(step), manager.should_save(step), manager.save(step, TREE)]
            assert wanted == [step in (2, 4)] * 3
        assert not manager.preempted
    assert manager.all_steps() == [2, 4]


@pytest.mark.parametrize("stop", [True, False])
def test_only_a_signal_that_ends_the_job_is_told_as_preemption(tmp_path: Path, stop: bool) -> None:
    told: list[Event] = []
    quiet = subscribe(told.append)
    with jc.CheckpointManager(tmp_path, save=jc.on_signal(signal.SIGUSR1, stop=stop)) as manager:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert manager.save(5, TREE)
        assert manager.preempted == stop
    quiet()
    kinds = [type(event) for event in told if isinstance(event, Preempted | SaveRequested)]
    assert kinds == [Preempted if stop else SaveRequested]


def test_a_forced_save_hears_of_the_signal_too(tmp_path: Path) -> None:
    with jc.CheckpointManager(tmp_path, save=jc.on_preemption()) as manager:
        os.kill(os.getpid(), signal.SIGTERM)
        assert manager.save(7, TREE, force=True)
        assert manager.preempted


def test_a_policy_of_triggers_is_a_pure_function_of_what_fired() -> None:
    policy = (jc.every(steps=10) & jc.on_signal(signal.SIGUSR1)) | jc.on_preemption()
    user, end = policy.triggers
    assert (user.signals, end.signals) == ((signal.SIGUSR1,), ())
    fired = [frozenset(), frozenset([user]), frozenset([end])]
    assert [policy.should_save(SaveContext(step=10, fired=one)) for one in fired] == [False, True, True]
    assert [policy.should_save(SaveContext(step=11, fired=one)) for one in fired] == [False, False, True]
    assert repr(policy) == "every(steps=10) & on_signal(signal.SIGUSR1) | on_preemption()"


def test_handlers_are_given_back_where_a_later_trigger_cannot_start() -> None:
    good, bad = (OnSignal(signals=(one,), stop=False, timeout_s=1.0) for one in (USR1, 4711))
    with pytest.raises(ValueError, match="4711"):
        Triggers([good, bad])


def test_steps_and_saves_are_measured_without_what_a_save_stalls() -> None:
    measure = Measure()
    try:
        measure.step(1, 10.0)
        emit(Captured(path="x", process=0, size_bytes=1, seconds=2.0))
        emit(Committed(path="x", step=1, size_bytes=1, seconds=5.0))
        measure.step(3, 16.0)
        assert (measure.stall_s, measure.save_s, measure.step_s) == (2.0, 5.0, 2.0)
    finally:
        measure.close()


@pytest.mark.parametrize("mtbf_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_failure_rate_that_makes_no_sense_is_refused(mtbf_s: float) -> None:
    with pytest.raises(InvalidArgumentError, match="mtbf_s"):
        jc.optimal(mtbf_s=mtbf_s)


def test_no_signal_is_no_policy() -> None:
    with pytest.raises(InvalidArgumentError, match="needs a signal"):
        jc.on_signal()
