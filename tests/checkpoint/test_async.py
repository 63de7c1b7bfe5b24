"""save_async: captured when it returns, durable or an error when result() does, and nothing left behind."""

import os
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from tests.checkpoint.bits import assert_same_tree, raw


@pytest.mark.parametrize("size", [16, 2_000_000])
def test_numpy_leaves_may_change_as_soon_as_it_returns(tmp_path: Path, size: int) -> None:
    array = np.arange(size, dtype=np.float32)
    view, before = array[::2], raw(array)
    pending = jc.save_async(tmp_path / "c", {"a": array, "view": view})
    array[...] = -1
    pending.result(timeout_s=60)
    found = jc.restore(tmp_path / "c")
    assert raw(found["a"]) == before
    assert raw(found["view"]) == raw(np.frombuffer(before, np.float32)[::2])


@pytest.mark.parametrize("spec", [P(), P("data"), P("data", "model")], ids=str)
@pytest.mark.parametrize("size", [16, 1024])
def test_jax_leaves_may_be_donated_as_soon_as_it_returns(tmp_path: Path, mesh_4x2: Mesh, spec: P, size: int) -> None:
    sharding = NamedSharding(mesh_4x2, spec)
    data = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    array = jax.block_until_ready(jax.jit(lambda a: a + 0, out_shardings=sharding)(data))
    step = jax.jit(lambda a: a * 0 - 1, donate_argnums=0, out_shardings=sharding)
    before = raw(array)
    pending = jc.save_async(tmp_path / "c", {"w": array})
    del data
    for _ in range(3):
        array = step(array)
    array.block_until_ready()
    pending.result(timeout_s=60)
    assert raw(jc.restore(tmp_path / "c")["w"]) == before


def test_deleted_arrays_are_saved_all_the_same(tmp_path: Path) -> None:
    array = jnp.arange(300_000.0)
    before = raw(array)
    pending = jc.save_async(tmp_path / "c", {"w": array})
    array.delete()
    pending.result(timeout_s=60)
    assert raw(jc.restore(tmp_path / "c")["w"]) == before


def test_states_and_context_manager(tmp_path: Path) -> None:
    with jc.save_async(tmp_path / "c", {"w": np.ones(3)}) as pending:
        assert pending.state in ("captured", "durable")
    assert pending.done()
    assert pending.state == "durable"
    assert pending.error() is None
    pending.result()  # again
    assert (tmp_path / "c" / "commit_success.txt").exists()


def test_an_error_in_the_background_comes_from_result_each_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    try:
        pending = jc.save_async(tmp_path / "file" / "c", {"w": np.ones(3)})
    except jc.CheckpointError:
        return  # found out before anything ran in the background: as good
    for _ in range(2):
        with pytest.raises(jc.CheckpointError):
            pending.result(timeout_s=60)
    assert pending.state == "failed"
    assert isinstance(pending.error(), jc.CheckpointError)


def test_errors_of_the_call_come_from_the_call(tmp_path: Path) -> None:
    jc.save(tmp_path / "c", {"w": np.ones(3)})
    with pytest.raises(jc.AlreadyExistsError):
        jc.save_async(tmp_path / "c", {"w": np.ones(3)})
    with pytest.raises(TypeError):
        jc.save_async(tmp_path / "d", {"w": object()})


def test_several_saves_at_once_keep_their_own_bytes(tmp_path: Path) -> None:
    array = np.zeros(500_000, np.float32)
    pending = []
    for number in range(6):
        array[...] = number
        pending.append(jc.save_async(tmp_path / str(number), {"w": array, "n": number}))
    for save in pending:
        save.result(timeout_s=60)
    for number in range(6):
        assert_same_tree(jc.restore(tmp_path / str(number)), {"w": np.full(500_000, number, np.float32), "n": number})


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_files_and_threads_stay_flat_over_a_hundred_saves(tmp_path: Path) -> None:
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    array, owned = step(jnp.ones((512, 512))), np.ones((256, 1024), np.float32)
    modes: tuple[Any, ...] = ("auto", "pinned", "clone", "split")
    marks = []
    for number in range(100):
        with jc.save_async(tmp_path / "c", {"jax": array, "numpy": owned}, capture=modes[number % 4], overwrite=True):
            array = step(array)
        if number in (19, 99):
            counts = [len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")]
            marks.append((rss_bytes(), *counts, threading.active_count()))
    (rss, files, threads, ours), (rss_end, files_end, threads_end, ours_end) = marks
    assert rss_end - rss < 8 * 2**20  # of 2 MiB each: 80 that stayed would be 160
    assert files_end <= files
    assert ours_end <= ours  # all that the library starts are Python's
    assert threads_end <= threads + 2  # XLA's own pools may grow by one
