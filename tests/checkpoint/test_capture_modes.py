"""Every way of capturing gives the same bytes, whatever training does to the tree as soon as the call returns."""

import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.core.errors import StorageError
from jaxckpt.core.events import Captured, SaveFailed, SaveSkipped, subscribe
from jaxckpt.storage.url import open_store
from jaxckpt.testing.stores import FaultyStore
from jaxckpt.transfer.capture import views_are_safe
from jaxckpt.transfer.staging import STAGING
from tests.checkpoint.bits import raw

CALLED = ("auto", "pinned", "clone", "split")


def is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def make(mesh: Mesh) -> dict[str, Any]:
    """Large and small shards, replicas, all the odd dtypes, a key; in memory that XLA can reuse."""
    rng = np.random.default_rng(0)

    def put(data: Any, *spec: str | None) -> jax.Array:
        return jax.device_put(data, NamedSharding(mesh, P(*spec)))

    tree = {
        "large": put(rng.normal(size=(1024, 2048)).astype(np.float32), "data", "model"),
        "replicated": put(rng.normal(size=(700, 500)).astype(np.float32)),
        "many": [put(rng.normal(size=(16, 8 + i)).astype(np.float32)) for i in range(20)],
        "bf16": put(jnp.asarray(rng.normal(size=(64, 64)), jnp.bfloat16), "data"),
        "bool": put(rng.random((8, 8)) > 0.5),
        "int4": put(jnp.arange(16).astype(jnp.int4)),
        "complex": put((rng.normal(size=5) + 1j).astype(np.complex64)),
        "empty": put(np.zeros((0, 4), np.float32)),
        "number": put(np.int32(3)),
        "key": jax.device_put(jax.random.key(7), NamedSharding(mesh, P())),
    }
    fresh = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=jax.tree.map(lambda a: a.sharding, tree))
    return jax.block_until_ready(fresh(tree))


def train(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    return jax.tree.map(lambda a: a if is_key(a) else jnp.zeros_like(a), state), x * 2


def bits(tree: Any) -> list[bytes]:
    return [raw(jax.random.key_data(a) if is_key(a) else a) for a in jax.tree.leaves(tree)]


def assert_same(path: Path, reference: Path) -> None:
    """The same values, and the same entries: shapes, dtypes, memory kinds, shardings."""
    assert not jc.diff(reference, path)
    jc.verify(path)
    for ours, theirs in zip(jc.inspect(path).leaves, jc.inspect(reference).leaves, strict=True):
        assert ours == theirs


@pytest.mark.parametrize("mode", [*CALLED, "in_step"])
def test_all_modes_give_the_bytes_of_a_save_that_waits(tmp_path: Path, mesh_4x2: Mesh, mode: Any) -> None:
    jc.save(tmp_path / "reference", make(mesh_4x2))
    state = make(mesh_4x2)
    out_shardings = (jax.tree.map(lambda a: a.sharding, state), NamedSharding(mesh_4x2, P()))
    step = jax.jit(train, donate_argnums=0, out_shardings=out_shardings)
    if mode == "in_step":
        (state, _), before = jc.with_capture(step).capture(state, jnp.ones(()))
        pending = jc.save_async(tmp_path / "c", before)
    else:
        pending = jc.save_async(tmp_path / "c", state, capture=mode)
    for _ in range(3):
        state, _ = step(state, jnp.ones(()))
    pending.result(timeout_s=60)
    assert_same(tmp_path / "c", tmp_path / "reference")


@pytest.mark.parametrize("mode", CALLED)
def test_a_tree_that_is_still_being_computed_is_saved_as_it_will_be(tmp_path: Path, mode: Any) -> None:
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, y: jnp.sin(y) + 1, x))
    x = slow(jnp.zeros(500_000))
    want = raw(slow(jnp.zeros(500_000)))
    step = jax.jit(lambda x: x * 0, donate_argnums=0)
    x = slow(jnp.zeros(500_000))
    pending = jc.save_async(tmp_path / "c", {"x": x}, capture=mode)
    step(x)
    pending.result(timeout_s=60)
    assert raw(jc.restore(tmp_path / "c")["x"]) == want


@pytest.mark.parametrize("mode", CALLED)
def test_deleted_arrays_are_saved_all_the_same(tmp_path: Path, mode: Any) -> None:
    array = jax.jit(lambda: jnp.arange(300_000.0))()
    pending = jc.save_async(tmp_path / "c", {"w": array}, capture=mode)
    array.delete()
    pending.result(timeout_s=60)
    assert raw(jc.restore(tmp_path / "c")["w"]) == raw(np.arange(300_000, dtype=np.float32))


@pytest.mark.parametrize("mode", CALLED)
def test_numpy_leaves_are_copied_in_every_mode(tmp_path: Path, mode: Any) -> None:
    array, fortran = np.arange(500_000.0), np.asfortranarray(np.arange(12.0).reshape(3, 4))
    pending = jc.save_async(tmp_path / "c", {"a": array, "part": array[::3], "f": fortran}, capture=mode)
    array[...] = fortran[...] = -1
    pending.result(timeout_s=60)
    found = jc.restore(tmp_path / "c")
    assert found["a"].tolist() == list(range(500_000))
    assert found["part"][1] == 3
    assert found["f"].tolist() == np.arange(12.0).reshape(3, 4).tolist()


def test_this_runtime_leaves_a_donated_buffer_alone_while_it_is_viewed() -> None:
    assert views_are_safe()


def test_views_let_go_of_donated_memory_once_it_is_written(tmp_path: Path) -> None:
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = step(jnp.zeros(1_000_000))
    jc.save_async(tmp_path / "c", {"x": x}).result(timeout_s=60)
    before = x.unsafe_buffer_pointer()
    assert step(x).unsafe_buffer_pointer() == before


@pytest.mark.parametrize("mode", CALLED)
def test_no_second_host_copy_stays_on_the_arrays(tmp_path: Path, mesh_4x2: Mesh, mode: Any) -> None:
    state = make(mesh_4x2)
    jc.save_async(tmp_path / "c", state, capture=mode).result(timeout_s=60)
    assert all(getattr(leaf, "_npy_value", None) is None for leaf in jax.tree.leaves(state))


def test_arrays_in_host_memory_are_saved_by_every_mode(tmp_path: Path) -> None:
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    for mode in CALLED:
        array = jax.device_put(jnp.arange(400_000.0), host)
        pending = jc.save_async(tmp_path / mode, {"w": array}, capture=mode)
        array.delete()
        pending.result(timeout_s=60)
        assert raw(jc.restore(tmp_path / mode, jc.on_host)["w"]) == raw(np.arange(400_000, dtype=np.float32))


def test_a_step_that_captures_does_what_the_step_does(mesh_4x2: Mesh) -> None:
    def train(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        return {**state, "w": state["w"] * x, "n": state["n"] + 1}, x.sum()

    sharding = NamedSharding(mesh_4x2, P("data"))
    step = jc.with_capture(train)
    state = {"w": jax.device_put(np.ones((8, 4), np.float32), sharding), "n": 0, "host": np.ones(2)}
    (captured, loss), before = step.capture(dict(state), np.float32(2))
    state["w"] = jax.device_put(np.ones((8, 4), np.float32), sharding)
    plain, want = step(state, np.float32(2))
    assert raw(captured["w"]) == raw(plain["w"])
    assert captured["w"].sharding == plain["w"].sharding
    assert loss == want
    assert before.tree["n"] == 0
    assert before.tree["host"] is state["host"]
    assert before.tree["w"].sharding.memory_kind == "pinned_host"


def test_a_jitted_step_keeps_its_shardings_when_it_captures(mesh_4x2: Mesh) -> None:
    sharding = NamedSharding(mesh_4x2, P("data"))
    jitted = jax.jit(lambda state: state + 1, donate_argnums=0, out_shardings=sharding)
    state = jax.device_put(np.ones((8, 4), np.float32), sharding)
    new, before = jc.with_capture(jitted).capture(state)
    assert new.sharding == sharding
    assert state.is_deleted()
    assert raw(before.tree) == raw(np.ones((8, 4), np.float32))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"capture": "fast"}, "pinned"),
        ({"capture": "in_step"}, "with_capture"),
        ({"when_busy": "no"}, "skip"),
        ({"host_budget_bytes": 0}, "host_budget_bytes=0"),
    ],
)
def test_wrong_arguments_are_refused_by_name(tmp_path: Path, wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(jc.CheckpointError, match=told):
        jc.save_async(tmp_path / "c", {"w": np.ones(3)}, **wrong)
    assert STAGING.admitted_bytes == 0


@pytest.mark.parametrize("mode", ["pinned", "clone"])
def test_a_tree_larger_than_the_budget_passes_through_it(tmp_path: Path, mode: Any) -> None:
    mib = 2**20
    tree = [jax.jit(lambda k=k: jnp.full(2 * mib, k, jnp.float32))() for k in range(24)]
    STAGING.drop_idle()
    pending = jc.save_async(
        tmp_path / "c", tree, capture=mode, host_budget_bytes=16 * mib, device_budget_bytes=30 * mib
    )
    for array in tree:
        array.delete()
    pending.result(timeout_s=60)
    assert [a[0] for a in jc.restore(tmp_path / "c", jc.on_host)] == list(range(24))
    assert STAGING.admitted_bytes == 0
    assert STAGING.buffer_bytes < 48 * mib  # of 192: the budget, a leaf beyond it, and one that lands


def test_the_next_save_waits_for_room_and_comes_in_turn(tmp_path: Path) -> None:
    gate = threading.Event()
    budget = 3_000_000
    array = np.ones(500_000, np.float32)
    first = jc.save_async(held_back(tmp_path / "a", gate), {"a": array}, host_budget_bytes=budget)
    others: list[jc.PendingSave] = []

    def more() -> None:
        others.append(jc.save_async(tmp_path / "b", {"a": array}, host_budget_bytes=budget))

    thread = threading.Thread(target=more)
    thread.start()
    thread.join(timeout=0.2)
    assert thread.is_alive()
    gate.set()
    thread.join(timeout=60)
    for pending in [first, *others]:
        pending.result(timeout_s=60)
    assert STAGING.admitted_bytes == 0


def test_a_save_that_would_wait_is_skipped_and_reported(tmp_path: Path) -> None:
    heard: list[Any] = []
    unsubscribe = subscribe(heard.append)
    gate = threading.Event()
    array = np.ones(500_000, np.float32)
    try:
        first = jc.save_async(
            held_back(tmp_path / "a", gate), {"a": array}, when_busy="skip", host_budget_bytes=3_000_000
        )
        second = jc.save_async(tmp_path / "b", {"a": array}, step=4, when_busy="skip", host_budget_bytes=3_000_000)
        assert second.state == "skipped"
        assert second.done()
        second.result()
        assert first.state == "captured"
        gate.set()
        first.result(timeout_s=60)
    finally:
        gate.set()
        unsubscribe()
    assert [e.step for e in heard if isinstance(e, SaveSkipped)] == [4]
    assert [e.size_bytes for e in heard if isinstance(e, Captured)] == [2_000_000]
    assert not (tmp_path / "b").exists()
    assert STAGING.admitted_bytes == 0


@pytest.mark.parametrize("mode", CALLED)
def test_a_failure_while_bytes_still_land_gives_everything_back(tmp_path: Path, mode: Any) -> None:
    def fail(operation: str, name: str) -> Exception | None:
        return StorageError("disk full") if operation == "append" else None

    heard: list[Any] = []
    unsubscribe = subscribe(heard.append)
    mib = 2**20
    tree = [jax.jit(lambda k=k: jnp.full(mib // 4, k, jnp.float32))() for k in range(16)]
    try:
        store = FaultyStore(open_store(tmp_path / "c", None), fail)
        pending = jc.save_async(store, tree, capture=mode, host_budget_bytes=4 * mib, step=3)
        with pytest.raises(StorageError, match="disk full"):
            pending.result(timeout_s=60)
    finally:
        unsubscribe()
    assert pending.state == "failed"
    assert [(e.step, e.stage) for e in heard if isinstance(e, SaveFailed)] == [(3, "write")]
    assert STAGING.admitted_bytes == 0
    jc.save_async(tmp_path / "c", tree, capture=mode).result(timeout_s=60)  # the next save works


def held_back(path: Path, gate: threading.Event) -> FaultyStore:
    """A store that opens no data file before the gate is set."""

    def wait(operation: str, name: str) -> Exception | None:
        if operation == "open_data":
            gate.wait(60)
        return None

    return FaultyStore(open_store(path, None), wait)
