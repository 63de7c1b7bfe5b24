"""Policies are values: they compare, print, combine, and answer as the table says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxckpt as jc
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.manager.policies import Policy, SaveContext, StepRecord, to_delete

if TYPE_CHECKING:
    from collections.abc import Callable

RECORDS = [StepRecord(step=s, time_s=10.0 * s, metrics={"loss": v}) for s, v in ((1, 3.0), (2, 1.0), (3, float("nan")))]
RECORDS += [StepRecord(step=4, time_s=40.0, metrics={"loss": 1.0}), StepRecord(step=6, time_s=60.0)]

KEEP = [
    (jc.latest(1), {6}),
    (jc.latest(2), {4, 6}),
    (jc.latest(99), {1, 2, 3, 4, 6}),
    (jc.best(1, "loss"), {4}),
    (jc.best(2, "loss"), {2, 4}),
    (jc.best(1, "loss", "max"), {1}),
    (jc.best(9, "other"), set()),
    (jc.every(steps=2), {2, 4, 6}),
    (jc.at({1, 5, 6}), {1, 6}),
    (jc.newer_than(25), {4, 6}),
    (jc.latest(2) | jc.at({1}), {1, 4, 6}),
    (jc.latest(2) & jc.every(steps=4), {4}),
    (jc.at({1}) | jc.latest(4) & jc.best(1, "loss"), {1, 4}),
]

SAVE = [
    (jc.every(steps=5), {"step": 10}, True),
    (jc.every(steps=5), {"step": 11}, False),
    (jc.every(seconds=60), {"step": 1, "since_save_s": 59.9}, False),
    (jc.every(seconds=60), {"step": 1, "since_save_s": 60.0}, True),
    (jc.at({3}), {"step": 3}, True),
    (jc.every(steps=5) | jc.at({3}), {"step": 3}, True),
    (jc.every(steps=5) & jc.every(seconds=60), {"step": 5, "since_save_s": 1.0}, False),
]

VALUES = st.recursive(
    st.one_of(
        st.integers(1, 9).map(jc.latest),
        st.integers(1, 9).map(lambda n: jc.best(n, "loss")),
        st.integers(1, 9).map(lambda n: jc.every(steps=n)),
        st.sets(st.integers(0, 50)).map(jc.at),
        st.integers(1, 90).map(jc.newer_than),
    ),
    lambda inner: st.tuples(inner, inner, st.booleans()).map(lambda t: t[0] | t[1] if t[2] else t[0] & t[1]),
    max_leaves=4,
)
FOUND = st.dictionaries(st.integers(0, 50), st.floats(), max_size=12).map(
    lambda found: [StepRecord(step=s, time_s=float(s), metrics={"loss": v}) for s, v in sorted(found.items())]
)


@pytest.mark.parametrize(("policy", "kept"), KEEP, ids=repr)
def test_what_is_kept(policy: Policy, kept: set[int]) -> None:
    assert policy.kept(RECORDS, 60.0) == kept
    assert to_delete(RECORDS, policy, 60.0) == sorted({1, 2, 3, 4} - kept)


@pytest.mark.parametrize(("policy", "context", "wanted"), SAVE, ids=repr)
def test_what_is_saved(policy: Policy, context: dict[str, Any], wanted: bool) -> None:
    assert policy.should_save(SaveContext(**context)) == wanted


@given(VALUES, FOUND)
def test_a_policy_prints_as_what_makes_it_again(policy: Policy, found: list[StepRecord]) -> None:
    names = {name: getattr(jc, name) for name in ("latest", "best", "every", "at", "newer_than")}
    again = eval(repr(policy), names)
    assert repr(again) == repr(policy)
    assert again.kept(found, 50.0) == policy.kept(found, 50.0)


@given(FOUND, VALUES, VALUES)
def test_or_keeps_what_either_keeps_and_and_what_both_do(found: list[StepRecord], a: Policy, b: Policy) -> None:
    assert (a | b).kept(found, 50.0) == a.kept(found, 50.0) | b.kept(found, 50.0)
    assert (a & b).kept(found, 50.0) == a.kept(found, 50.0) & b.kept(found, 50.0)


@given(FOUND, VALUES)
def test_the_newest_is_never_deleted_and_asking_again_deletes_nothing_more(
    found: list[StepRecord], keep: Policy
) -> None:
    gone = to_delete(found, keep, 50.0)
    assert not found or found[-1].step not in gone
    assert gone == sorted(gone)


def test_policies_are_values() -> None:
    assert jc.latest(2) | jc.every(steps=3) == jc.latest(2) | jc.every(steps=3)
    assert jc.latest(2) != jc.latest(3)
    assert len({jc.best(1, "loss"), jc.best(1, "loss"), jc.at([1])}) == 2
    assert repr((jc.latest(2) | jc.at({1})) & jc.every(steps=3)) == "(latest(2) | at({1})) & every(steps=3)"
    assert (jc.every(steps=2) | jc.every(seconds=60)).needs_agreement
    assert not (jc.every(steps=2) & jc.at({2})).needs_agreement


@pytest.mark.parametrize(
    "make",
    [
        lambda: jc.every(),
        lambda: jc.every(steps=1, seconds=1),
        lambda: jc.every(steps=0),
        lambda: jc.latest(0),
        lambda: jc.best(1, "loss", "least"),  # type: ignore[arg-type]
        lambda: jc.newer_than(0),
        lambda: jc.latest(1).should_save(SaveContext(step=1)),
        lambda: jc.every(seconds=1).kept([], 0.0),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidArgumentError):
        make()
