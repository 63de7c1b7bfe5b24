"""The rules of a session, with threads in the place of processes."""

import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxckpt.coordination.coordinator import AbstractCoordinator
from jaxckpt.coordination.local import LocalCoordinator, ThreadGroup
from jaxckpt.coordination.session import Session, session_name
from jaxckpt.core.errors import CoordinationError


def test_all_processes_collect_the_payloads_in_rank_order():
    def play(coordinator: AbstractCoordinator) -> list[bytes]:
        session = Session(coordinator, "save")
        session.enter("writing")
        session.arrive("written", bytes([coordinator.rank]))
        return session.collect("written", timeout_s=10)

    assert ThreadGroup(5).run(play) == [[b"\0", b"\1", b"\2", b"\3", b"\4"]] * 5


def test_all_wait_for_one_process():
    def play(coordinator: AbstractCoordinator) -> bytes:
        session = Session(coordinator, "save")
        if coordinator.rank == 2:
            session.arrive("committed", b"generation 7")
        return session.wait("committed", rank=2, timeout_s=10)

    assert ThreadGroup(3).run(play) == [b"generation 7"] * 3


def test_an_arrival_ends_the_wait_at_once():
    group = ThreadGroup(2)
    waiting = threading.Event()

    def play(coordinator: AbstractCoordinator) -> float:
        session = Session(coordinator, "save")
        if coordinator.rank == 0:
            waiting.wait(10)
            session.arrive("committed")
            return time.monotonic()
        threading.Timer(0.5, waiting.set).start()
        session.wait("committed", timeout_s=10)
        return time.monotonic()

    arrived, heard = group.run(play)
    assert heard - arrived < 0.1


@settings(max_examples=15, deadline=None)
@given(data=st.data(), n=st.integers(2, 5))
def test_every_process_that_did_not_arrive_is_named_and_no_other(data: st.DataObject, n: int):
    present = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1))

    def play(coordinator: AbstractCoordinator) -> str:
        if coordinator.rank not in present:
            return ""
        session = Session(coordinator, "save")
        session.arrive("written")
        with pytest.raises(CoordinationError) as told:
            session.collect("written", timeout_s=0.05)
        return str(told.value).lower()

    for rank, message in enumerate(ThreadGroup(n).run(play)):
        assert [f"process {r} " in message for r in range(n)] == [
            rank in present and r not in present for r in range(n)
        ]


def test_the_message_names_stage_operation_deadline_and_next_step():
    group = ThreadGroup(4)
    for rank, session in enumerate([Session(c, "run/step_7#0") for c in group.coordinators]):
        if rank != 3:
            session.enter("writing")
        if rank < 2:
            session.arrive("written")
    Session(group[3], "run/step_6#0").enter("committing")
    with pytest.raises(CoordinationError) as told:
        Session(group[0], "run/step_7#0").collect("written", timeout_s=0.1)
    message = str(told.value)
    assert message.startswith(
        'Process 2 of 4 did not reach stage "written" of run/step_7#0 within 0.1 s '
        '(last seen in stage "writing", for at least 0.'
    )
    assert "nor did process 3 (it never entered this operation; the latest that it entered is run/step_6#0)" in message
    assert "Next step: see the logs of these processes; if they are alive but slow, raise timeout_s." in message


def test_the_age_of_a_stage_starts_anew_when_the_process_enters_another():
    group = ThreadGroup(2)
    slow, observer = (Session(c, "save") for c in (group[1], group[0]))
    slow.enter("offloading")
    threading.Timer(0.6, slow.enter, ["writing"]).start()
    with pytest.raises(CoordinationError, match=r'last seen in stage "writing", for at least 0\.?\d* s'):
        observer.wait("written", rank=1, timeout_s=1.2)


def test_many_missing_processes_make_a_short_message():
    group = ThreadGroup(1000)
    with pytest.raises(CoordinationError, match="nor did 992 more") as told:
        Session(group[0], "save").collect("written", timeout_s=0.05)
    assert len(str(told.value)) < 1000


def test_a_failure_reaches_those_who_wait_within_a_fraction_of_a_second():
    group = ThreadGroup(3)

    def play(coordinator: AbstractCoordinator) -> tuple[str, float]:
        session = Session(coordinator, "save")
        session.enter("writing")
        if coordinator.rank == 1:
            session.fail(ValueError("disk on fire"))
            return "", 0.0
        session.arrive("written")
        started = time.monotonic()
        with pytest.raises(CoordinationError) as told:
            session.collect("written", timeout_s=60)
        return str(told.value), time.monotonic() - started

    for rank, (message, after_s) in enumerate(group.run(play)):
        if rank != 1:
            assert 'Process 1 of 3 failed in stage "writing" of save: ValueError: disk on fire' in message
            assert after_s < 2


def test_one_who_has_failed_after_arriving_stops_the_commit():
    group = ThreadGroup(2)
    leader, other = (Session(c, "save") for c in group.coordinators)
    leader.arrive("written")
    other.enter("writing")
    other.arrive("written")
    other.fail(TimeoutError("gave up"))
    with pytest.raises(CoordinationError, match="gave up"):
        leader.collect("written", timeout_s=10)


def test_what_process_0_has_committed_stays_committed_whoever_fails_then():
    group = ThreadGroup(3)
    leader, follower, failed = (Session(c, "save") for c in group.coordinators)
    leader.arrive("committed", b"yes")
    failed.fail(ValueError("too late"))
    assert follower.wait("committed", timeout_s=10) == b"yes"


def test_the_first_failure_is_the_one_all_hear_of():
    group = ThreadGroup(3)
    first, second, third = (Session(c, "save") for c in group.coordinators)
    first.fail(ValueError("the cause"))
    first.fail(ValueError("again"))
    second.fail(ValueError("a consequence"))
    with pytest.raises(CoordinationError, match="before its first stage of save: ValueError: the cause") as told:
        third.wait("committed", timeout_s=10)
    third.fail(told.value)
    with pytest.raises(CoordinationError, match="Process 0 of 3 failed.*the cause"):
        Session(group[1], "save").wait("committed", timeout_s=10)


def test_close_of_the_last_process_removes_all_keys_of_the_session():
    group = ThreadGroup(3)
    kept = Session(group[0], "save/b")
    kept.enter("writing")
    for coordinator in group.coordinators:
        session = Session(coordinator, "save")
        session.enter("writing")
        session.arrive("written", b"payload")
        if coordinator.rank == 2:
            session.fail(ValueError("x"))
        assert any("session/save/" in key for key in group.list_keys())
        session.close()
        session.close()
    remaining = [key for key in group.list_keys() if "latest" not in key]
    assert remaining == ["jaxckpt/session/save%2Fb/stage/0"]


def test_nothing_is_removed_while_a_process_may_still_read_it():
    group = ThreadGroup(2)
    leader, follower = (Session(c, "save") for c in group.coordinators)
    leader.arrive("committed", b"yes")
    leader.close()
    assert follower.wait("committed", timeout_s=1) == b"yes"
    follower.close()
    assert group.list_keys() == []


def test_a_thousand_sessions_leave_no_more_keys_than_one():
    group = ThreadGroup(2)

    def play(coordinator: AbstractCoordinator) -> None:
        for step in range(1000):
            session = Session(coordinator, f"run/step_{step}")
            session.enter("writing")
            session.arrive("written")
            session.collect("written", timeout_s=30)
            session.close()

    assert group.run(play) == [None, None]
    assert group.list_keys() == ["jaxckpt/latest/0", "jaxckpt/latest/1"]


def test_a_lone_process_touches_no_store_and_calls_one_function_per_step():
    coordinator = LocalCoordinator()
    session = Session(coordinator, "save")
    entered: list[str] = []

    def profile(frame, event, _):
        if event == "call":
            entered.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        session.enter("writing")
        session.arrive("written", b"digest")
        collected = session.collect("written", timeout_s=1)
        waited = session.wait("written", timeout_s=1)
        session.fail(ValueError("x"))
        session.close()
    finally:
        sys.setprofile(None)
    assert (collected, waited) == ([b"digest"], b"digest")
    assert entered == ["enter", "arrive", "collect", "wait", "fail", "close"]
    assert coordinator.try_get("jaxckpt/latest/0") is None


def test_names_count_the_operations_of_each_path_apart():
    assert [session_name(p) for p in ("a/x", "a/y", "a/x", "a/x")] == ["a/x#0", "a/y#0", "a/x#1", "a/x#2"]


def test_names_with_any_characters_do_not_meet_each_other():
    group = ThreadGroup(2)
    names = ["gs://b/a", "gs:/b/a", "a b", "a%20b", "ä", "a/written"]
    for name in names:
        Session(group[0], name).arrive("a/b", name.encode())
    assert [Session(group[1], name).wait("a/b", timeout_s=1) for name in names] == [n.encode() for n in names]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(2, 6))
def test_a_claim_and_those_who_abandon_never_both_succeed(data: st.DataObject, n: int):
    """Process 0 claims; the others abandon, at once or after a pause, all in a race of threads."""
    gates = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    group, barrier = ThreadGroup(n), threading.Barrier(n)

    def play(coordinator: AbstractCoordinator) -> bool:
        session = Session(coordinator, "save")
        barrier.wait(10)
        for _ in range(gates[coordinator.rank]):
            session.enter("waiting")  # a turn on the board, while others go on
        return session.claim() if coordinator.rank == 0 else session.abandon()

    claimed, *abandoned = group.run(play)
    assert not (claimed and any(abandoned))
    # When all is over it is known who came first, so one who asks again is sure.
    assert Session(group[1], "save").abandon() == (not claimed)


@given(st.permutations(range(4)), st.integers(0, 3))
def test_whoever_comes_first_decides_between_claim_and_abandon(order: list[int], claimer: int):
    group = ThreadGroup(4)
    sessions = [Session(coordinator, "save") for coordinator in group.coordinators]
    found = {rank: sessions[rank].claim() if rank == claimer else sessions[rank].abandon() for rank in order}
    first = order[0] == claimer
    assert found == {rank: first if rank == claimer else not first for rank in order}


def test_one_who_abandons_is_unsure_while_the_first_has_yet_to_say_so():
    """Between the count and the word of the first to abandon, a second cannot tell it from a claim: it must not
    delete anything."""
    group = ThreadGroup(3)
    assert group[1].count("jaxckpt/session/save/claimed") == 1  # rank 1 is in the middle of abandon()
    assert not Session(group[2], "save").abandon()
    assert not Session(group[0], "save").claim()
