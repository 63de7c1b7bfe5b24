"""The store within one process keeps the rules of every coordinator."""

import threading

import pytest

from jaxckpt.coordination.jax_client import current_coordinator
from jaxckpt.coordination.local import LocalCoordinator, ThreadGroup


def test_without_a_jax_job_this_process_is_alone():
    coordinator = current_coordinator()
    assert (type(coordinator), coordinator.rank, coordinator.size) == (LocalCoordinator, 0, 1)


def test_lone_coordinators_share_nothing():
    LocalCoordinator().put("a", b"1")
    assert LocalCoordinator().try_get("a") is None


def test_a_value_is_seen_by_all_and_may_be_overwritten():
    group = ThreadGroup(2)
    group[0].put("a", b"1")
    group[0].put("a", b"2")
    assert group[1].try_get("a") == b"2"
    assert group[1].get("a", timeout_s=0) == b"2"


def test_what_was_put_does_not_change_with_the_buffer():
    coordinator, buffer = LocalCoordinator(), bytearray(b"1")
    coordinator.put("a", buffer)
    buffer[0] = 0
    assert coordinator.try_get("a") == b"1"


def test_get_waits_for_the_value_and_gives_up_at_the_deadline():
    group = ThreadGroup(2)
    threading.Timer(0.1, group[0].put, ["a", b"1"]).start()
    assert group[1].get("a", timeout_s=10) == b"1"
    with pytest.raises(TimeoutError, match="'b' within 0.05 s"):
        group[1].get("b", timeout_s=0.05)


def test_delete_takes_the_key_and_all_below_but_no_namesake():
    coordinator = LocalCoordinator()
    for key in ("a", "a/b", "a/b/c", "ab", "b/a"):
        coordinator.put(key, b"")
    coordinator.count("a/counter")
    coordinator.delete("a")
    coordinator.delete("a")
    assert [k for k in ("a", "a/b", "a/b/c", "ab", "b/a") if coordinator.try_get(k) is not None] == ["ab", "b/a"]
    assert coordinator.count("a/counter") == 1


def test_a_counter_gives_every_caller_another_number():
    counted = ThreadGroup(4).run(lambda coordinator: [coordinator.count("n") for _ in range(50)])
    assert sorted(sum(counted, [])) == list(range(1, 201))


def test_run_gives_what_each_thread_returned_or_raised():
    def play(coordinator):
        if coordinator.rank == 1:
            raise ValueError("one")
        return coordinator.rank

    zero, one, two = ThreadGroup(3).run(play)
    assert (zero, str(one), two) == (0, "one", 2)
