"""The wrappers of stores that other tests rely on."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from jaxckpt.core.errors import StorageError
from jaxckpt.storage.local import LocalStore
from jaxckpt.testing.stores import CountingStore, CrashAfter, FaultyStore, SimulatedCrash, SlowStore

if TYPE_CHECKING:
    from pathlib import Path

    from jaxckpt.storage.store import AbstractStore

BYTES = np.arange(10, dtype=np.uint8)


def _mutate(store: AbstractStore) -> None:
    store.write("a", b"1")
    store.write_all({"b": b"2", "c": b"3"})
    store.create("d", b"4")
    writer = store.child("sub").open_data("e")
    writer.append(BYTES)
    writer.close()
    store.delete("a")
    store.delete_prefix("sub/")


def test_without_n_all_mutations_are_counted(tmp_path: Path) -> None:
    store = CrashAfter(LocalStore(tmp_path))
    _mutate(store)
    assert store.operations == 9
    assert store.child("sub").operations == 9
    assert not store.crashed
    assert store.names() == ["b", "c", "d"]


@pytest.mark.parametrize("n", range(1, 10))
def test_a_crash_at_n_leaves_what_came_before(tmp_path: Path, n: int) -> None:
    real = LocalStore(tmp_path)
    store = CrashAfter(real, n)
    with pytest.raises(SimulatedCrash, match=f"mutation {n}"):
        _mutate(store)
    assert store.crashed
    assert store.operations == n
    after = [[], ["a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]]
    after += [["a", "b", "c", "d", "sub/e"]] * 3 + [["b", "c", "d", "sub/e"]]
    assert real.names() == after[n - 1]
    for operation in (lambda: store.read("a"), store.names, store.folders, store.sync, lambda: store.exists("a")):
        with pytest.raises(SimulatedCrash):
            operation()
    with pytest.raises(SimulatedCrash):
        store.child("sub").write("x", b"")


@pytest.mark.parametrize(("partial", "left"), [(True, BYTES[:5].tobytes()), (False, b"")])
def test_a_torn_append_leaves_half(tmp_path: Path, partial: bool, left: bytes) -> None:
    store = CrashAfter(LocalStore(tmp_path), 2, partial=partial)
    writer = store.open_data("e")
    with pytest.raises(SimulatedCrash) as caught:
        writer.append(BYTES)
    assert type(caught.value) is SimulatedCrash
    with pytest.raises(SimulatedCrash):
        writer.abort()
    assert (tmp_path / "e").read_bytes() == left


def test_bytes_and_calls_are_counted_over_children_and_threads(tmp_path: Path) -> None:
    store = CountingStore(LocalStore(tmp_path))

    def use(i: int) -> None:
        child = store.child(f"{i}")
        child.write("a", bytes(10))
        child.read("a")
        child.read("a", start=2, stop=5)
        child.read_into("a", 8, np.empty(2, np.uint8))
        assert child.create("b", bytes(3))
        assert not child.create("b", bytes(3))
        writer = child.open_data("c")
        writer.append(BYTES)
        writer.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(32)))
    assert store.bytes_read == 32 * 15
    assert store.bytes_written == 32 * 23
    assert store.bytes_read_by_name == {f"{i}/a": 15 for i in range(32)}
    written = {"a": 10, "b": 3, "c": 10}
    assert store.bytes_written_by_name == {f"{i}/{name}": n for i in range(32) for name, n in written.items()}
    per_child = {"write": 1, "read": 2, "read_into": 1, "create": 2, "open_data": 1, "append": 1, "close": 1}
    assert store.calls == {name: 32 * count for name, count in per_child.items()}


def test_a_slow_store_waits_for_its_event(tmp_path: Path) -> None:
    event = threading.Event()
    store = SlowStore(LocalStore(tmp_path), event)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(store.child("sub").write, "a", b"1")
        assert store.reached.wait(10)
        assert not future.done()
        assert not (tmp_path / "sub/a").exists()
        event.set()
        future.result(10)
    assert store.read("sub/a") == b"1"


def test_a_slow_store_does_not_wait_for_ever(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nobody set the event"):
        SlowStore(LocalStore(tmp_path), threading.Event(), timeout_s=0.01).write("a", b"")


def test_a_faulty_store_fails_where_it_is_told(tmp_path: Path) -> None:
    def fail(operation: str, name: str) -> Exception | None:
        return StorageError("full") if (operation, name) == ("append", "sub/e") else None

    store = FaultyStore(LocalStore(tmp_path), fail)
    store.write("a", b"1")
    writer = store.child("sub").open_data("e")
    with pytest.raises(StorageError, match="full"):
        writer.append(BYTES)
    writer.abort()
    assert store.names() == ["a"]
