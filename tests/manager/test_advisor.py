"""The advised interval is the one that wastes least, by numeric minimisation and by simulated failures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxckpt.coordination.local import ThreadGroup
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.events import Captured, Committed, emit
from jaxckpt.core.text import counted
from jaxckpt.manager.advisor import Advisor, Measured, advise, best_interval, daly, wasted, young

if TYPE_CHECKING:
    from jaxckpt.coordination.coordinator import AbstractCoordinator

STALLS = st.floats(1e-3, 1e4)
MTBFS = st.floats(60.0, 1e7)


def _least(stall_s: float, mtbf_s: float, **costs: float) -> float:
    """By golden section over the logarithm of the interval."""
    low, high, ratio = np.log(stall_s / 100), np.log(100 * mtbf_s), (np.sqrt(5) - 1) / 2

    def waste(x: float) -> float:
        return wasted(float(np.exp(x)), stall_s=stall_s, mtbf_s=mtbf_s, **costs)

    for _ in range(80):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if waste(a) <= waste(b) else (a, high)
    return waste((low + high) / 2)


@given(STALLS, MTBFS, st.floats(0, 0.5), st.floats(0, 0.5))
def test_no_interval_wastes_less(stall_s: float, mtbf_s: float, restore: float, durable: float) -> None:
    costs = {"restore_s": restore * mtbf_s, "durable_after_s": durable * mtbf_s}
    found = wasted(best_interval(stall_s, mtbf_s), stall_s=stall_s, mtbf_s=mtbf_s, **costs)
    assert found <= _least(stall_s, mtbf_s, **costs) + 1e-9


@given(MTBFS, st.floats(1e-8, 1e-3))
def test_young_and_daly_come_near_where_saves_are_cheap(mtbf_s: float, cost: float) -> None:
    best = best_interval(cost * mtbf_s, mtbf_s)
    assert daly(cost * mtbf_s, mtbf_s) == pytest.approx(best, rel=1e-4)
    assert young(cost * mtbf_s, mtbf_s) == pytest.approx(best, rel=np.sqrt(cost))


@given(MTBFS, st.floats(1e-3, 0.5))
def test_daly_is_nearer_than_young_where_saves_are_dear(mtbf_s: float, cost: float) -> None:
    best = best_interval(cost * mtbf_s, mtbf_s)
    assert abs(daly(cost * mtbf_s, mtbf_s) - best) < abs(young(cost * mtbf_s, mtbf_s) - best)


@given(st.floats(1e-3, 100), STALLS, st.floats(1, 50), MTBFS)
def test_no_other_number_of_steps_wastes_less(step_s: float, stall_s: float, factor: float, mtbf_s: float) -> None:
    advice = advise(Measured(step_s=step_s, stall_s=stall_s, save_s=stall_s), mtbf_s)
    for other in (1, advice.steps - 1, advice.steps + 1, round(factor * advice.steps)):
        if other >= 1:
            assert wasted(other * step_s, stall_s=stall_s, mtbf_s=mtbf_s) >= advice.waste - 1e-9
    assert f"every {counted(advice.steps, 'step')} (" in advice.explain()


def test_the_waste_is_that_of_simulated_failures() -> None:
    rng = np.random.default_rng(0)
    interval_s, stall_s, mtbf_s, restore_s = 120.0, 10.0, 600.0, 30.0
    elapsed, trained = 0.0, 0.0
    for to_failure in rng.exponential(mtbf_s, 20_000):
        # Each life begins with a restore, in which it may fail as well.
        cycles = max(to_failure - restore_s, 0) // (interval_s + stall_s)
        elapsed += to_failure
        trained += cycles * interval_s
    found = wasted(interval_s, stall_s=stall_s, mtbf_s=mtbf_s, restore_s=restore_s)
    assert found == pytest.approx(1 - trained / elapsed, abs=0.01)


def test_a_save_is_over_before_the_next_begins() -> None:
    advice = advise(Measured(step_s=1.0, stall_s=0.01, save_s=300.0), mtbf_s=3600)
    assert advice.steps == 300
    assert "a save takes 5 min, and one runs at a time" in advice.explain()


@pytest.mark.parametrize("mtbf_s", [0.0, -1.0, float("nan"), float("inf")])
def test_senseless_failure_rates_are_refused(mtbf_s: float) -> None:
    with pytest.raises(InvalidArgumentError, match="mtbf_s="):
        Advisor(mtbf_s)


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _train(advisor: Advisor, clock: _Clock, steps: int, *, step_s: float, stall_s: float, save_s: float) -> list[int]:
    """A loop that saves when told to: the steps saved."""
    saved: list[int] = []
    for step in range(1, steps + 1):
        clock.now += step_s
        if advisor.is_due(step, saved[-1] if saved else None):
            saved.append(step)
            clock.now += stall_s
            emit(Captured(path="", process=0, size_bytes=0, seconds=stall_s))
            emit(Committed(path="", step=step, size_bytes=0, seconds=save_s))
    return saved


def test_it_measures_saves_and_then_keeps_to_what_wastes_least() -> None:
    clock = _Clock()
    advisor = Advisor(3600, first=5, clock=clock)
    assert advisor.explain() == "Save every 5 steps until a save has been measured."
    saved = _train(advisor, clock, 1000, step_s=0.5, stall_s=2.0, save_s=20.0)
    advisor.close()
    best = advise(Measured(step_s=0.5, stall_s=2.0, save_s=20.0), 3600).steps
    assert saved[:2] == [5, 5 + best]
    assert set(np.diff(saved)) == {best}
    assert advisor.advice is not None
    assert advisor.explain() == advisor.advice.explain()


def test_it_follows_when_saves_become_dearer() -> None:
    clock = _Clock()
    advisor = Advisor(3600, first=5, clock=clock)
    cheap = _train(advisor, clock, 2000, step_s=0.5, stall_s=0.5, save_s=1.0)
    dear = _train(advisor, clock, 20_000, step_s=0.5, stall_s=8.0, save_s=10.0)
    advisor.close()
    assert np.diff(dear)[-1] == pytest.approx(4 * np.diff(cheap)[-1], rel=0.1)


def test_all_processes_save_the_steps_that_the_first_one_finds() -> None:
    group = ThreadGroup(3)

    def play(coordinator: AbstractCoordinator) -> list[int]:
        clock = _Clock()
        advisor = Advisor(3600, first=5, coordinator=coordinator, clock=clock)
        saved: list[int] = []
        for step in range(1, 1200):
            clock.now += 0.5 * (1 + coordinator.rank)  # to others a step seems longer
            if advisor.is_due(step, saved[-1] if saved else None):
                saved.append(step)
                advisor._listen(Captured(path="", process=coordinator.rank, size_bytes=0, seconds=2.0))
                advisor._listen(Committed(path="", step=step, size_bytes=0, seconds=2.0))
        advisor.close()
        return saved

    first, *others = group.run(play)
    assert isinstance(first, list)
    assert len(first) > 3
    assert others == [first, first]
    assert len(group.list_keys()) <= 2  # those of the last save, which nobody asked about
