"""What the processes of the tests do; run by run_processes, results as JSON."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.core.events import Event, Flushed, Restored, subscribe
from jaxckpt.plan.save import ArraySpec, plan_save
from tests.processes.trees import (
    COMPRESSION,
    KEYS,
    LEAVES,
    everywhere,
    like_tree,
    make_tree,
    mesh_of,
    own_shardings,
    place,
    values_of,
    wrong_leaves,
)

TIMEOUT_S = 30


def save_and_restore(save_to: str, restore: list[str]) -> dict:
    """Save the tree of all leaves, and restore it and those of others in every way."""
    tree = make_tree(mesh_of(4))
    jc.save(save_to, tree, compression=COMPRESSION, timeout_s=TIMEOUT_S)
    return {path: restore_in_every_way(path, tree) for path in [*restore, save_to]}


def restore_in_every_way(path: str, tree: dict[str, Any]) -> dict[str, list[str]]:
    """By the name of each way: the leaves that came back wrong."""
    wrong = {}
    for way, like in {
        "same": like_tree(tree, everywhere(4, turn=False)),
        "turned": like_tree(tree, everywhere(2, turn=True)),
        "devices in reverse": like_tree(tree, everywhere(4, turn=False, reverse=True)),
        "one axis, turned": like_tree(tree, everywhere(8, turn=True, reverse=True)),
        "concrete": tree,
    }.items():
        wrong[way] = wrong_leaves(jc.restore(path, like), like)
    mesh = mesh_of(2)
    wrong["function"] = wrong_leaves(jc.restore(path, lambda name, spec: NamedSharding(mesh, P())))
    wrong["without like"] = wrong_leaves(jc.restore(path))
    wrong["on host"] = _wrong_on_host(jc.restore(path, jc.on_host))
    if jax.process_index() == 0:
        wrong["on host, process 0 alone"] = _wrong_on_host(jc.restore(path, jc.on_host))
    wrong["only"] = _wrong_in_part(path)
    wrong["cast"] = _wrong_cast(path)
    return wrong


def _wrong_on_host(found: dict[str, Any]) -> list[str]:
    for name in KEYS:  # they come as their uint32 data
        found[name] = jax.random.wrap_key_data(found[name], impl="threefry2x32")
    return wrong_leaves(found) + [n for n in LEAVES if not isinstance(found[n], np.ndarray)]


def _wrong_in_part(path: str) -> list[str]:
    like = like_tree({"rows": place("rows", *LEAVES["rows"][:2], mesh_sharding(2, P("b")))}, everywhere(2, turn=True))
    found = jc.restore(path, like, only="rows")
    values = values_of("rows", *LEAVES["rows"][:2])
    wrong = [] if list(found) == ["rows"] else [f"only: {list(found)}"]
    return wrong + [f"{s.index}" for s in found["rows"].addressable_shards if not _same(s.data, values[s.index])]


def _wrong_cast(path: str) -> list[str]:
    shape, _, _ = LEAVES["large"]
    like = {"large": jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16, sharding=mesh_sharding(2, P("b", "a")))}
    found = jc.restore(path, like, only="large", cast=True)["large"]
    values = values_of("large", *LEAVES["large"][:2]).astype(ml_dtypes.bfloat16)
    return [f"{s.index}" for s in found.addressable_shards if not _same(s.data, values[s.index])]


def _same(found: Any, expected: np.ndarray) -> bool:
    found = np.asarray(found)
    return found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


def mesh_sharding(rows: int, spec: P) -> Sharding:
    return NamedSharding(mesh_of(rows), spec)


# Bytes.

TREES = {
    "large": {f"large.{i}": (1024, 768) for i in range(3)} | {f"small.{i}": (64, 64) for i in range(20)},
    # Rows that 4 and 8 divide; everything else is odd.
    "small and odd": {f"odd.{i}": (8 * (1 + i % 5), 8 * (3 + i % 7)) for i in range(150)}
    | {f"vector.{i}": (37 + i,) for i in range(20)},
    "compressed": {f"large.{i}": (1024, 256) for i in range(4)} | {f"small.{i}": (64, 64) for i in range(20)},
}


def count_bytes(folder: str) -> dict:
    """Bytes that this process writes and reads, by tree and by how it is restored."""
    return {name: _count_bytes(f"{folder}/{name}", shapes, name) for name, shapes in TREES.items()}


def _count_bytes(path: str, shapes: dict[str, tuple[int, ...]], name: str) -> dict:
    saved = mesh_sharding(4, P("a", "b"))
    targets = {
        "same": saved,
        "transposed": mesh_sharding(4, P("b", "a")),
        "columns": mesh_sharding(8, P(None, "a")),
        "rows": mesh_sharding(8, P("a")),
        "replicated over data": mesh_sharding(4, P(None, "b")),
        "fully replicated": mesh_sharding(4, P()),
    }
    tree = {}
    for leaf, shape in shapes.items():
        sharding = saved if len(shape) == 2 else mesh_sharding(4, P())
        values = _repetitive(leaf, shape) if name == "compressed" else values_of(leaf, shape, np.float32)
        tree[leaf] = jax.make_array_from_callback(shape, sharding, values.__getitem__)
    level = 3 if name == "compressed" else None
    written = events_of(lambda: jc.save(path, tree, compression=level, timeout_s=TIMEOUT_S), Flushed)
    files = [p for p in Path(path).rglob("*") if p.is_file() and f"ocdbt.process_{jax.process_index()}" in p.parts]
    counts: dict[str, Any] = {
        "written": written[0].size_bytes,
        "stored": sum(file.stat().st_size for file in files),
        "read": {},
        "wrong": [],
    }
    for target, sharding in targets.items():
        like = {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding if v.ndim == 2 else mesh_sharding(4, P()))
            for k, v in tree.items()
        }
        found = {}
        read = events_of(lambda like=like, found=found: found.update(jc.restore(path, like)), Restored)
        counts["read"][target] = read[0].read_bytes
        for leaf, array in found.items():
            values = (
                _repetitive(leaf, array.shape) if name == "compressed" else values_of(leaf, array.shape, np.float32)
            )
            if not all(_same(s.data, values[s.index]) for s in array.addressable_shards):
                counts["wrong"].append(f"{leaf} {target}")
    return counts


def _repetitive(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return values_of(name, shape, np.int8).astype(np.float32)


def events_of(action: Callable[[], object], kind: type) -> list[Any]:
    events: list[Event] = []
    stop = subscribe(events.append)
    action()
    stop()
    return [event for event in events if isinstance(event, kind)]


REPLICATED = {
    "large and small": [(1000, 130), (512, 512), (43, 31), (3,), *[(64, 64)] * 5],
    "few small": [(128, 128)] * 3,
    "one": [(256, 100)],
    "many odd": [(17 + i, 31) for i in range(60)],
    "with sharded": [(1000, 130), (43, 31)],
}


def share_writes(folder: str) -> dict[str, list[int]]:
    """Bytes written by this process, and the plan that it made for all, by tree of replicated leaves."""
    loads = {}
    for name, shapes in REPLICATED.items():
        tree = {f"{i}": place(f"{i}", shape, np.float32, mesh_sharding(4, P())) for i, shape in enumerate(shapes)}
        if name == "with sharded":
            tree["sharded"] = place("sharded", (256, 256), np.float32, mesh_sharding(4, P("a", "b")))
            tree["over data"] = place("over data", (100, 256), np.float32, mesh_sharding(4, P(None, "b")))
        path = f"{folder}/{name}"
        written = events_of(lambda path=path, tree=tree: jc.save(path, tree, timeout_s=TIMEOUT_S), Flushed)
        loads[name] = written[0].size_bytes
    return loads


def plans() -> list[list[int]]:
    """For every rank, as this process plans it: the chunks of the tree that the rank writes, and the bytes of all."""
    tree = make_tree(mesh_of(4))
    names = [*LEAVES, *own_shardings()]
    specs = [ArraySpec(shape=tree[n].shape, itemsize=tree[n].dtype.itemsize, sharding=tree[n].sharding) for n in names]
    found = []
    for rank in range(jax.process_count()):
        plan = plan_save(specs, rank=rank, processes=jax.process_count())
        found.append([*plan.load_bytes.tolist(), *(int(x) for mine in plan.mine for x in [-1, *mine.tolist()])])
    return found


# Saves in the background, and over one another.


def save_in_a_row(folder: str) -> list[str]:
    """Save in the background after every step of a loop that donates its state, then all over one path."""
    first = _repetitive("x", (64, 64))
    x = jax.make_array_from_callback((64, 64), mesh_sharding(4, P("a", "b")), first.__getitem__)
    state: dict[str, Any] = {"x": x, "host": np.zeros(4)}
    del x
    step = jax.jit(lambda x: x * 2, donate_argnums=0)
    pending = []
    for i in range(4):
        pending.append(jc.save_async(f"{folder}/{i}", state, step=i, timeout_s=TIMEOUT_S))
        state["x"] = step(state["x"])
        state["host"] += 1
    for save in pending:
        save.result(timeout_s=TIMEOUT_S)
    wrong = []
    for i in range(4):
        found = jc.restore(f"{folder}/{i}", {"x": state["x"], "host": np.zeros(4)})
        wrong += [f"{i}" for s in found["x"].addressable_shards if not _same(s.data, (first * 2**i)[s.index])]
        wrong += [] if found["host"].tolist() == [i] * 4 else [f"host {i}"]
    for i in range(3):
        jc.save(f"{folder}/over", {"x": state["x"], "i": i}, overwrite=True, timeout_s=TIMEOUT_S)
        if jc.restore(f"{folder}/over", only="i") != {"i": i}:
            wrong.append(f"over {i}")
    try:
        jc.save(f"{folder}/over", {"x": state["x"], "i": 9}, timeout_s=TIMEOUT_S)
        wrong.append("no refusal")
    except (jc.AlreadyExistsError, jc.CoordinationError):
        pass
    expected = (first * 2**4)[:]
    found = jc.restore(f"{folder}/over", {"x": state["x"], "i": 0})
    wrong += ["over"] if found["i"] != 2 else []
    wrong += [f"over {s.index}" for s in found["x"].addressable_shards if not _same(s.data, expected[s.index])]
    if jax.process_index() == 0:
        data_files = [
            p for p in Path(f"{folder}/over").rglob("d/*") if p.parent.parent.name.startswith("ocdbt.process_")
        ]
        wrong += [] if len(data_files) == jax.process_count() else [f"left over: {data_files}"]
    return wrong


def count_all(folder: str) -> dict:
    """All that is counted, in one job."""
    return {"read": count_bytes(f"{folder}/read"), "written": share_writes(f"{folder}/written"), "plans": plans()}
