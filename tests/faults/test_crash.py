"""After a crash at any point there is the old checkpoint or the new one, whole (D6)."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxckpt as jc
from jaxckpt.core.errors import CheckpointError, NotFoundError, StorageError
from jaxckpt.storage.store import AbstractStore
from jaxckpt.storage.url import open_store
from jaxckpt.testing.stores import CrashAfter, SimulatedCrash
from tests.faults.cases import outcome, same, tree

OLD, NEW = 1, 2


def nothing(store: AbstractStore) -> None:
    """A fresh place."""


def ours(store: AbstractStore) -> None:
    jc.save(store, tree(OLD))


def leftovers(store: AbstractStore) -> None:
    with pytest.raises(SimulatedCrash):
        jc.save(CrashAfter(store, 6), tree(OLD))


def orbax(**options: Any) -> Callable[[AbstractStore], None]:
    def save(store: AbstractStore) -> None:
        path = store.url.removeprefix("file://").rstrip("/")
        handler = ocp.PyTreeCheckpointHandler(**options)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, ocp.args.PyTreeSave({"w": np.arange(100.0), "old": 1}))

    return save


BEFORE: dict[str, Callable[[AbstractStore], None]] = {
    "nothing": nothing,
    "ours": ours,
    "leftovers": leftovers,
    "orbax": orbax(),
    "orbax zarr2 folders": orbax(use_ocdbt=False),
}


@pytest.fixture(params=["file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], AbstractStore]:
    count = iter(range(10_000))
    base = tmp_path if request.param == "file" else f"memory://{tmp_path.name}"
    return lambda: open_store(f"{base}/{next(count)}/c")


@pytest.mark.parametrize("partial", [False, True], ids=["between", "within"])
@pytest.mark.parametrize("case", BEFORE)
def test_a_crash_at_any_write_leaves_the_old_or_the_new(
    place: Callable[[], AbstractStore], case: str, partial: bool
) -> None:
    before, overwrite = BEFORE[case], case not in ("nothing", "leftovers")
    if case.startswith("orbax") and place().url.startswith("memory"):
        return  # Orbax knows no memory://
    seen = set()
    for n in count(1):  # how many operations there are differs with the number of files that Orbax wrote
        store = place()
        before(store)
        old = jc.restore(store) if overwrite else None
        try:
            jc.save(CrashAfter(store, n, partial=partial), tree(NEW), overwrite=overwrite)
            break
        except SimulatedCrash:
            pass
        found = outcome(store)
        if isinstance(found, CheckpointError):
            assert not overwrite, f"crash at {n}: {found}"
            assert isinstance(found, NotFoundError), f"crash at {n}: {found}"
            seen.add("none")
        else:
            new = same(found, tree(NEW))
            assert new or (overwrite and same(found, old)), f"crash at {n}: a mixture"
            seen.add("new" if new else "old")
        committed = overwrite or not isinstance(found, CheckpointError)
        jc.save(store, tree(3), overwrite=committed)
        assert same(jc.restore(store), tree(3))
        assert jc.verify(store).ok
        fresh = place()
        jc.save(fresh, tree(3))
        assert len(store.names()) == len(fresh.names()), f"crash at {n}: {store.names()}"
    expected = {"old", "new"} if overwrite else {"none", "new"}
    assert seen == (expected if before is not nothing else {"none"})  # the marker is the last write of a fresh save


_SAVER = """
import sys
import numpy as np
import jaxckpt as jc
path, seed, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3]
tree = {f"l{i}": np.full((64, 1024), seed + i / 100, np.float32) for i in range(24)}
print("ready", flush=True)
if mode == "async":
    jc.save_async(path, tree, overwrite=True).result()
else:
    jc.save(path, tree, overwrite=True)
print("saved", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_sigkill_at_random_times_leaves_a_whole_checkpoint(tmp_path: Path, mode: str) -> None:
    path, rng, last = tmp_path / "c", random.Random(mode), -1.0
    for seed in range(7):
        command = [sys.executable, "-c", _SAVER, str(path), str(seed), mode]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as saver:
            assert saver.stdout is not None
            assert saver.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0, 0.08))  # the point of the test: a time that nobody chose
            os.kill(saver.pid, signal.SIGKILL)
            finished = "saved" in saver.stdout.read()
        found = outcome(path)
        if isinstance(found, CheckpointError):
            assert last < 0, f"lost checkpoint {last}: {found}"
            assert isinstance(found, NotFoundError)
            continue
        value = float(found["l0"][0, 0])
        assert value in (last, float(seed))
        assert not finished or value == seed
        assert all((found[f"l{i}"] == np.float32(value + i / 100)).all() for i in range(24))
        last = value


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_is_an_error_that_gives_the_space_back(small_disk: Path) -> None:
    small, large = {"w": np.ones(1000)}, {"w": np.random.default_rng(0).standard_normal(1_000_000)}
    with pytest.raises(StorageError) as caught:
        jc.save(small_disk / "c", large)
    assert caught.value.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == []
    jc.save(small_disk / "c", small)
    pending = jc.save_async(small_disk / "c", large, overwrite=True)
    with pytest.raises(StorageError):
        pending.result()
    assert pending.state == "failed"
    assert isinstance(pending.error(), StorageError)
    assert np.array_equal(jc.restore(small_disk / "c")["w"], small["w"])
    jc.save(small_disk / "c", {"w": np.zeros(1000)}, overwrite=True)
    assert not jc.restore(small_disk / "c")["w"].any()
