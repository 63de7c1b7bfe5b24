"""The cheapest possible source is chosen, the others are listed, and what is impossible says why."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

import jaxckpt as jc
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.recovery.layout import StageLayout
from jaxckpt.recovery.plan import Available, CostModel, RecoveryPolicy, plan_recovery
from jaxckpt.recovery.record import RecoveryLog, ValidationGuard
from jaxckpt.recovery.simulate import (
    clock_hours,
    rate_per_iteration,
    rollback_iterations,
    stage_failures,
    with_rollback,
)

if TYPE_CHECKING:
    from pathlib import Path

SIX = StageLayout(stages=6)
COST = CostModel(step_s=10.0, stage_bytes=10**9, state_bytes=2 * 10**10)


@pytest.mark.parametrize(
    ("available", "source"),
    [
        (Available(replicas={2: ("data", 0, 1)}, copies={2: 0}, checkpoint_age=5), "replica"),
        (Available(copies={2: 0}, checkpoint_age=5), "same_step_copy"),
        (Available(copies={2: 50}, checkpoint_age=300), "stale_copy"),
        (Available(copies={2: 500}, checkpoint_age=300), "average"),
        (Available(checkpoint_age=40), "checkpoint_stage"),
        (Available(bad=frozenset({1}), checkpoint_age=300), "rollback"),
        (Available(congruent=False, checkpoint_age=300), "rollback"),
        (Available(snapshot_age=1), "rollback"),
    ],
)
def test_the_cheapest_source_is_chosen(available: Available, source: str) -> None:
    plan = plan_recovery(2, SIX, available, COST)
    assert ("rollback" if plan.rollback else plan.steps[0].source) == source
    assert {o.source for o in plan.options} >= {"average", "stale_copy", "rollback"}
    assert plan.seconds == min(o.seconds for o in plan.options if o.seconds is not None)


def test_adjacent_stages_do_not_average() -> None:
    with pytest.raises(InvalidArgumentError, match="neighbour stage 3 is lost too"):
        plan_recovery((2, 3), SIX)
    plan = plan_recovery((2, 3), SIX, Available(copies={2: 1, 3: 1}, checkpoint_age=20))
    assert [s.source for s in plan.steps] == ["checkpoint_stage", "stale_copy"]  # stage 3 held the copy of 2


def test_two_stages_apart_are_recovered_together() -> None:
    assert [s.neighbours for s in plan_recovery((4, 1), SIX).steps] == [(0, 2), (3, 5)]


def test_edges_need_swapping_or_repeats() -> None:
    with pytest.raises(InvalidArgumentError, match="first stage has one neighbour"):
        plan_recovery(0, SIX)
    assert plan_recovery(0, dataclasses.replace(SIX, swap=True)).steps[0].neighbours == (1, None)
    assert plan_recovery(5, dataclasses.replace(SIX, swap=True)).steps[0].source == "edge_copy"
    assert plan_recovery(0, dataclasses.replace(SIX, repeats=2)).steps[0].neighbours == (5, 1)
    assert plan_recovery(0, SIX, policy=RecoveryPolicy(method="copy")).steps[0].neighbours == (None, 1)


def test_measured_prices_replace_priors() -> None:
    dear = COST.observe("average", 1000.0).observe("average", 1000.0)
    available = Available(checkpoint_age=300)
    assert plan_recovery(2, SIX, available, COST).steps[0].source == "average"
    assert plan_recovery(2, SIX, available, dear).rollback


def test_a_source_may_be_asked_for() -> None:
    plan = plan_recovery(2, SIX, Available(copies={2: 0}), source="average")
    assert plan.steps[0].source == "average"
    with pytest.raises(InvalidArgumentError, match="by replica"):
        plan_recovery(2, SIX, source="replica")


def test_recoveries_stand_in_the_next_checkpoint(tmp_path: Path) -> None:
    log = RecoveryLog().add(plan_recovery(2, SIX), step=7, norms=[1.0, float("nan")])
    jc.save(tmp_path / "a", {"w": 1.0}, step=8, metadata=log.metadata())
    again = RecoveryLog.from_metadata(jc.inspect(tmp_path / "a").metadata)
    assert again == log
    assert again.rolled_back(5).records[0].undone
    assert not again.rolled_back(7).records[0].undone


def test_the_guard_rolls_back_what_got_worse() -> None:
    guard = ValidationGuard(step=100, before=1.5, delta=0.2, steps=10)
    assert guard.check(105, 9.0) == "wait"
    assert guard.check(110, 1.6) == "accept"
    assert guard.check(110, 1.8) == "rollback"
    assert guard.check(101, float("nan")) == "rollback"


def test_failures_are_the_same_for_every_method() -> None:
    few = stage_failures(seed=1, rate=0.002, stages=6, iterations=2000)
    assert few == stage_failures(seed=1, rate=0.002, stages=6, iterations=2000)
    longer = stage_failures(seed=1, rate=0.002, stages=6, iterations=4000)
    assert longer[: len(few)] == few
    assert set(few) <= set(stage_failures(seed=1, rate=0.004, stages=6, iterations=2000))


@pytest.mark.parametrize("counted", ["progress", "run"])
@pytest.mark.parametrize("rate", [0.0009, 0.002, 0.004])
def test_rollback_costs_what_arithmetic_says(rate: float, counted: str) -> None:
    chance = 1 - (1 - rate) ** 6
    for every in (10, 100):
        want = ((1 - chance) ** -every - 1) / chance / every
        if counted == "run":
            want = chance * every / (1 - chance) / (1 - (1 - chance) ** every)
        runs = [
            rollback_iterations(progress=10_000, every=every, rate=rate, stages=6, seed=s, counted=counted)
            for s in range(5)
        ]
        assert sum(runs) / 50_000 == pytest.approx(want, rel=0.08)


@pytest.mark.parametrize("counted", ["progress", "run"])
@pytest.mark.parametrize("seed", range(5))
def test_rollback_is_what_a_loop_over_iterations_finds(seed: int, counted: str) -> None:
    struck = [f.iteration for f in stage_failures(seed=seed, rate=0.02, stages=6, iterations=5000)]
    run = done = saved = 0
    while done < 200:
        if run % 10 == 0 and counted == "run" or done % 10 == 0 and counted == "progress":
            saved = done
        done = saved if run in struck else done + 1
        run += 1
    assert with_rollback(struck, progress=200, every=10, counted=counted) == run


def test_the_clock_adds_recoveries() -> None:
    assert clock_hours(iterations=3600, step_s=1.0, failures=2, recovery_s=1800.0) == 2.0
    assert rate_per_iteration(0.10, 91.35) == pytest.approx(0.00267, rel=0.01)
