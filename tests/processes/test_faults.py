"""Processes that die, lag, fail or disagree: the others say who and where, nobody hangs, nothing half is committed."""

import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt.testing.processes import run_processes
from tests.processes.trees import values_of

PROGRAMS = Path(__file__).parent / "faults.py"


def assert_holds(path: Path, seed: str, step: int) -> None:
    found = jc.restore(path, jc.on_host)
    assert found["sharded"].tobytes() == values_of(f"sharded{seed}", (96, 64), np.float32).tobytes()
    assert found["replicated"].tobytes() == values_of(f"replicated{seed}", (100, 200), np.float32).tobytes()
    assert found["step"] == step
    assert jc.verify(path).ok


def test_a_process_killed_in_its_flush_is_named_with_its_stage_and_nothing_is_committed(tmp_path: Path):
    path = tmp_path / "new"
    args = {"path": str(path), "victim": 2, "over": False}
    results = run_processes(f"{PROGRAMS}:killed_in_flush", 4, args=args, expect_failure=[2])
    assert results.pop(2) is None
    for told in results:
        assert told["error"] == "CoordinationError"
        assert 'Process 2 of 4 did not reach stage "write"' in told["message"]
        assert 'last seen in stage "write"' in told["message"]
        assert told["after_s"] < 10
    with pytest.raises(jc.NotCommittedError):
        jc.restore(path)
    jc.save(path, {"x": jax.numpy.ones(3)})
    assert jc.restore(path)["x"].tolist() == [1, 1, 1]
    assert not list(path.glob("ocdbt.process_2/d/*"))


@pytest.mark.parametrize("victim", [0, 1])
def test_an_old_checkpoint_stays_whole_when_a_process_is_killed_while_it_is_replaced(tmp_path: Path, victim: int):
    path = tmp_path / "old"
    args = {"path": str(path), "victim": victim, "over": True}
    # JAX aborts the others when process 0 dies.
    run_processes(f"{PROGRAMS}:killed_in_flush", 2, args=args, expect_failure=[victim, 1])
    assert_holds(path, "", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, list[dict]]:
    """By fault: what each of three processes heard when process 1 went wrong."""
    results = run_processes(f"{PROGRAMS}:many_faults", 3, args={"folder": str(folder)})
    return {fault: [result[fault] for result in results] for fault in results[0]}


def test_a_process_that_lags_is_named_by_all_at_the_deadline(told: dict[str, list[dict]]):
    for rank in (0, 2):
        heard = told["lag"][rank]
        assert heard["error"] == "CoordinationError"
        assert 'Process 1 of 3 did not reach stage "write"' in heard["message"]
        assert 'last seen in stage "write"' in heard["message"]
        assert 1.4 < heard["after_s"] < 8
    assert "gave up" in told["lag"][1]["message"]
    assert [heard["restore"] for heard in told["lag"]] == ["NotCommittedError"] * 3


def test_a_process_whose_storage_fails_is_named_at_once_with_its_error(told: dict[str, list[dict]]):
    heard = told["storage_fails"]
    assert [h["error"] for h in heard] == ["CoordinationError", "StorageError", "CoordinationError"]
    for rank in (0, 2):
        assert 'Process 1 of 3 failed in stage "write"' in heard[rank]["message"]
        assert "File too large" in heard[rank]["message"]
        assert heard[rank]["after_s"] < 10  # of 20 that it may take
    assert [h["restore"] for h in heard] == ["NotCommittedError"] * 3


@pytest.mark.parametrize("fault", ["lag", "storage_fails"])
def test_a_failed_save_can_be_repeated(told: dict[str, list[dict]], folder: Path, fault: str):
    assert_holds(folder / fault, "", 1)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("another_tree", "it has more leaves"),
        ("other_names", '"sharded" (array (96, 64) float32'),
    ],
)
def test_processes_that_save_different_trees_hear_of_the_leaf(told: dict[str, list[dict]], fault: str, words: str):
    for heard in told[fault]:
        assert heard["error"] == "CoordinationError"
        assert "Process 1 of 3 saves another tree than process 0" in heard["message"]
        assert words in heard["message"]
        assert heard["after_s"] < 10


@pytest.mark.parametrize("fault", ["another_tree", "other_names"])
def test_different_trees_are_not_committed(told: dict[str, list[dict]], fault: str):
    assert [heard["restore"] for heard in told[fault]] == ["NotCommittedError"] * 3


@pytest.mark.parametrize(
    ("fault", "error"), [("another_overwrite", "AlreadyExistsError"), ("bad_leaf", "UnsupportedLeafError")]
)
def test_a_call_that_is_wrong_on_one_process_fails_on_all(told: dict[str, list[dict]], fault: str, error: str):
    heard = told[fault]
    assert [h["error"] for h in heard] == ["CoordinationError", error, "CoordinationError"]
    for rank in (0, 2):
        assert 'Process 1 of 3 failed in stage "capture" of' in heard[rank]["message"]
        assert error in heard[rank]["message"]
        assert heard[rank]["after_s"] < 10


@pytest.mark.parametrize(("fault", "name"), [("local_arrays", "local"), ("host_values", "host"), ("numbers", "step")])
def test_values_that_should_be_equal_and_are_not_are_named_and_not_committed(
    told: dict[str, list[dict]], fault: str, name: str
):
    for heard in told[fault]:
        assert heard["error"] == "CoordinationError"
        assert f'Leaf "{name}" has another value on process 1 of 3 than on process 0' in heard["message"]
    assert [heard["restore"] for heard in told[fault]] == ["NotCommittedError"] * 3


def test_arrays_on_devices_of_each_process_are_saved_once(tmp_path: Path):
    path = tmp_path / "state"
    for result in run_processes(f"{PROGRAMS}:own_arrays", 3, args={"path": str(path)}):
        assert result == dict.fromkeys(("one", "key", "spread", "sharded", "replicated"), True)
    assert_holds(path, "", 1)
    found = jc.restore(path, jc.on_host)
    assert found["one"].tolist() == [0, 1, 2, 3, 4]
    assert found["spread"].tolist() == list(range(64))
    assert found["only"].tolist() == [7] * 4
    assert jc.verify(f"{path} async").ok


def test_a_checkpoint_that_one_process_would_not_replace_stays(told: dict[str, list[dict]]):
    assert [heard["step"] for heard in told["another_overwrite"]] == [1, 1, 1]


@pytest.mark.parametrize(
    ("fault", "leaf", "reader"), [("damaged_shared", "replicated", None), ("damaged_own", "last", 2)]
)
def test_a_damaged_chunk_raises_on_all_processes(
    told: dict[str, list[dict]], fault: str, leaf: str, reader: int | None
):
    heard = told[fault]
    assert [h["error"] for h in heard] == ["CorruptionError"] * 3
    assert all(f'Leaf "{leaf}", chunk' in h["message"] for h in heard)
    readers = [rank for rank, h in enumerate(heard) if not h["message"].startswith("Process")]
    assert len(readers) == 1
    assert reader in (None, *readers)
    for rank in {0, 1, 2} - set(readers):
        assert f"Process {readers[0]} of 3 could not read its part" in heard[rank]["message"]


@pytest.mark.parametrize(("fault", "error"), [("sees_no_files", "NotFoundError"), ("another_like", "MismatchError")])
def test_a_restore_that_fails_on_one_process_raises_on_all(told: dict[str, list[dict]], fault: str, error: str):
    heard = told[fault]
    assert [h["error"] for h in heard] == [error] * 3
    for rank in (0, 2):
        assert "Process 1 of 3 could not read its part of" in heard[rank]["message"]
        assert error in heard[rank]["message"]


def test_a_process_that_lags_in_a_restore_is_named_at_the_deadline_and_the_next_restore_works(
    told: dict[str, list[dict]],
):
    heard = told["lags_in_restore"]
    for rank in (0, 2):
        assert heard[rank]["error"] == "CoordinationError"
        assert 'Process 1 of 3 did not reach stage "part 1" of the restore of' in heard[rank]["message"]
        assert 1.4 < heard[rank]["after_s"] < 8
    assert heard[1]["error"] == "CoordinationError"
    assert [h["again"] for h in heard] == [True] * 3


@pytest.mark.parametrize(("how", "exchanging"), [(signal.SIGKILL, False), (signal.SIGSTOP, True)])
def test_a_process_that_is_killed_or_stopped_in_a_restore_is_named(tmp_path: Path, how: int, exchanging: bool):
    args = {"path": str(tmp_path / "state"), "victim": 1, "how": how, "exchanging": exchanging}
    results = run_processes(f"{PROGRAMS}:stopped_in_restore", 3, args=args, expect_failure=[1])
    for rank in (0, 2):
        assert results[rank]["error"] == "CoordinationError"
        assert "rocess 1 of 3 did not reach stage" in results[rank]["message"]
        assert results[rank]["after_s"] < 10


def test_saves_need_no_collective(tmp_path: Path):
    for result in run_processes(f"{PROGRAMS}:without_collectives", 2, devices=4, args={"folder": str(tmp_path)}):
        # These devices cannot do any: the proof that no save asked for one.
        assert "Multiprocess computations aren't implemented" in result["collective"]["message"]
        assert result["steps"] == [2, 1]
    for name in ("a", "b", "all leaves"):
        assert jc.verify(tmp_path / name).ok
