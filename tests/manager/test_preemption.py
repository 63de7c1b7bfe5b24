"""One process is told that the job ends: all save one step, soon, and none hangs."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import jaxckpt as jc
from jaxckpt.coordination.local import LocalCoordinator, ThreadGroup
from jaxckpt.core.errors import CoordinationError, InvalidArgumentError
from jaxckpt.core.events import Preempted, subscribe
from jaxckpt.manager.preemption import SignalNotice, listen
from jaxckpt.testing.processes import run_processes

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAMS = Path(__file__).parent / "preemption_programs.py"
USR1 = int(signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests may have it ignored
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    assert {one: signal.getsignal(one) for one in before} == before


@pytest.mark.parametrize("service", [True, False], ids=["service", "own"])
@pytest.mark.parametrize("in_step", [True, False], ids=["in-step", "free"])
def test_sigterm_on_one_of_four_makes_all_save_the_same_step(tmp_path: Path, service: bool, in_step: bool) -> None:
    env = {"JAX_ENABLE_PREEMPTION_SERVICE": str(int(service))}
    args = {"root": str(tmp_path), "victims": {"2": 7}, "in_step": in_step, "every": 1, "signals": []}
    results: Any = run_processes(f"{PROGRAMS}:train", 4, devices=1, args=args, env=env, timeout_s=100)
    _check(results, tmp_path)
    assert all(result["service"] == service for result in results)
    if not service:
        assert all(result["reasons"][0].startswith("SIGTERM on process") for result in results)


@pytest.mark.parametrize("service", [True, False], ids=["service", "own"])
def test_a_loop_that_asks_at_every_tenth_step_saves_as_well(tmp_path: Path, service: bool) -> None:
    env = {"JAX_ENABLE_PREEMPTION_SERVICE": str(int(service))}
    args = {"root": str(tmp_path), "victims": {"1": 13}, "in_step": True, "every": 10, "signals": []}
    results: Any = run_processes(f"{PROGRAMS}:train", 2, devices=1, args=args, env=env)
    assert _check(results, tmp_path) % 10 == 0


def test_signals_on_several_processes_are_one_notice(tmp_path: Path) -> None:
    args = {"root": str(tmp_path), "victims": {"0": 5, "1": 5, "2": 6}, "in_step": True, "every": 1, "signals": [USR1]}
    _check(run_processes(f"{PROGRAMS}:train", 3, devices=1, args=args), tmp_path)


def _check(results: list[Any], root: Path) -> int:
    steps = {result["saved"] for result in results}
    assert len(steps) == 1
    (step,) = steps
    assert step is not None
    assert jc.restore(root / str(step), jc.on_host)["step"] == step
    assert [path.name for path in root.iterdir()] == [str(step)]
    assert not any(result["again"] for result in results)
    assert all(len(result["reasons"]) == 1 for result in results)
    return step


def test_who_has_left_is_not_waited_for() -> None:
    outcome: Any = run_processes(f"{PROGRAMS}:one_leaves_early", 2, devices=1, args={"victim": 0}, timeout_s=25)
    left, stayed = outcome
    assert left == [0]
    assert stayed[1] >= 2


def test_alone_the_step_at_hand_is_the_one() -> None:
    events: list[Any] = []
    stop = subscribe(events.append)
    notice = listen()
    assert not notice.reached(3)
    os.kill(os.getpid(), signal.SIGTERM)
    assert [notice.reached(step) for step in (4, 5)] == [True, False]
    notice.close()
    stop()
    assert events == [Preempted(step=4, reason="SIGTERM on process 0")]


def test_an_earlier_handler_is_called_too() -> None:
    called: list[int] = []

    def count(number: int, frame: object) -> None:
        called.append(number)

    before = signal.signal(signal.SIGUSR1, count)
    try:
        notice = listen(signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert notice.reached(1)
        notice.close()
        assert signal.getsignal(signal.SIGUSR1) is count
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert called == [signal.SIGUSR1]


def test_a_second_interrupt_ends_the_program_as_usual() -> None:
    notice = listen(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert notice.reached(1)
    notice.close()


def test_a_process_that_does_not_answer_is_named() -> None:
    here, _ = ThreadGroup(2).coordinators
    notice = SignalNotice((signal.SIGUSR1,), here, timeout_s=0.3)
    os.kill(os.getpid(), signal.SIGUSR1)
    notice.reached(1)
    assert notice._listener is not None
    notice._listener.join()
    with pytest.raises(CoordinationError, match=r"Process 1 of 2 did not reach .*preemption/SIGUSR1"):
        notice.reached(2)
    notice.close()


def test_handlers_are_refused_outside_the_main_thread() -> None:
    errors: list[Exception] = []

    def make() -> None:
        try:
            SignalNotice((signal.SIGUSR1,), LocalCoordinator())
        except InvalidArgumentError as error:
            errors.append(error)

    thread = threading.Thread(target=make, name="worker")
    thread.start()
    thread.join()
    assert "this is worker" in str(errors[0])
