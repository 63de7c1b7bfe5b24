"""Real processes of a jax.distributed job agree, or say which of them is to blame."""

from pathlib import Path

import pytest

from jaxckpt.testing.processes import load_target, run_processes

PROGRAMS = Path(__file__).parent / "programs.py"
MIB = 1 << 20


@pytest.mark.parametrize("n", [1, 2, 4])
def test_payloads_are_collected_in_rank_order_in_every_operation(n: int):
    results = run_processes(f"{PROGRAMS}:agree", n, args={"operations": 3})
    digests = [f"digest of {rank}" for rank in range(n)]
    for rank, result in enumerate(results):
        assert result["collected"] == [x for i in range(3) for x in (digests, f"run/step_1#{i}")]
        assert (result["rank"], result["size"]) == (rank, n)
        assert (result["local_devices"], result["devices"]) == (2, 2 * n)


def test_agreement_takes_milliseconds():
    results = run_processes(f"{PROGRAMS}:agree", 2, args={"operations": 30})
    # About 5 ms on an idle machine; the bound allows for a busy one, and forbids any wait for a time slice.
    assert max(result["median_ms"] for result in results) < 60


def test_values_of_any_size_pass_between_processes():
    sizes = [0, 1, MIB - 1, MIB, MIB + 1, 10 * MIB]
    expected = load_target(f"{PROGRAMS}:expected_exchange")(sizes, 2)
    assert run_processes(f"{PROGRAMS}:exchange", 2, args={"sizes": sizes}) == [expected, expected]


def test_the_store_keeps_its_rules():
    seen, other = run_processes(f"{PROGRAMS}:keep_the_rules_of_the_store", 2)
    assert seen["absent"] is None
    assert seen["big"] == 2 * MIB
    assert seen["overwritten"] == ""
    assert seen["after delete"] == [False, False, True]
    message, waited_s = seen["timeout"]
    assert "rules/a" in message
    assert 0.19 < waited_s < 2
    assert sorted(seen["counts"] + other["counts"]) == list(range(1, 11))


@pytest.mark.parametrize(("n", "victim"), [(2, 1), (4, 2)])
def test_a_killed_process_is_named_with_its_stage_at_the_deadline(n: int, victim: int):
    results = run_processes(
        f"{PROGRAMS}:one_is_killed", n, args={"victim": victim, "timeout_s": 1.5}, expect_failure=[victim]
    )
    assert results.pop(victim) is None
    # The first to give up tells the others; each names the victim, on its own or in the words of the first.
    for told in results:
        assert f'Process {victim} of {n} did not reach stage "written" of run/step_1#0 within 1.5 s' in told["message"]
        assert 'last seen in stage "writing", for at least' in told["message"]
        assert told["after_s"] < 4


def test_a_process_that_never_came_is_named_and_hears_of_it_when_it_comes_late():
    laggard = 2
    results = run_processes(f"{PROGRAMS}:one_lags", 4, args={"laggard": laggard, "timeout_s": 1})
    late = results.pop(laggard)
    for told in results:
        assert 'Process 2 of 4 did not reach stage "written" of run/step_1#0 within 1 s' in told["message"]
        assert "it never entered this operation" in told["message"]
        assert told["after_s"] < 4
    assert 'gave up in stage "writing" of run/step_1#0: Process 2 of 4 did not reach stage "written"' in late["message"]
    assert late["after_s"] < 2


def test_a_failed_process_is_named_with_its_error_at_once():
    results = run_processes(f"{PROGRAMS}:one_fails", 4, args={"culprit": 3})
    for told in results[:3]:
        expected = (
            'Process 3 of 4 failed in stage "writing" of run/step_1#0: OSError: [Errno 28] No space left on device'
        )
        assert expected in told["message"]
        assert told["after_s"] < 5


def test_a_job_that_may_lose_processes_survives_the_heartbeat_and_still_names_the_dead():
    results = run_processes(
        f"{PROGRAMS}:one_is_killed",
        2,
        args={"victim": 1, "timeout_s": 6},
        expect_failure=[1],
        env={"JAX_ENABLE_RECOVERABILITY": "1"},
        heartbeat_timeout_s=2,
    )
    assert 'Process 1 of 2 did not reach stage "written"' in results[0]["message"]


def test_the_death_of_process_0_ends_the_others_in_time_with_or_without_our_error():
    # JAX aborts the others when its service is gone (see jax_client.py), most often before they can report an error.
    results = run_processes(
        f"{PROGRAMS}:one_is_killed", 2, args={"victim": 0, "timeout_s": 20}, expect_failure=[0, 1], timeout_s=30
    )
    assert results[0] is None
    assert results[1] is None or "coordinator process (0)" in results[1]["message"]


def test_a_store_that_has_ended_is_an_error_that_names_process_0():
    _, (*messages, note) = run_processes(f"{PROGRAMS}:leave_the_job", 2)
    assert len(messages) == 7
    for message in messages:
        assert "coordinator process (0), which hosts it, is unreachable" in message
    assert note.startswith("The other processes could not be told of this error: Could not ")


def test_a_store_that_hangs_is_an_error_that_names_process_0():
    woken, told = run_processes(f"{PROGRAMS}:coordinator_hangs", 2)
    assert woken == {"message": "woken"}
    assert "coordinator process (0), which hosts it, is unreachable" in told["message"]
    assert "no answer within 1 s" in told["message"]
    assert told["after_s"] < 6
