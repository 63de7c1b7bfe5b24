"""Processes that die, lag, fail and disagree in the midst of saves and restores; run by run_processes."""

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.checkpoint import exchange
from jaxckpt.checkpoint.source import OwnSource
from jaxckpt.coordination.jax_client import current_coordinator
from jaxckpt.core.events import Event, Flushed, subscribe
from tests.processes.programs import mesh_sharding
from tests.processes.trees import make_tree, mesh_of, own_shardings, place

LIMIT_S = 20


def small_tree(seed: str = "") -> dict[str, Any]:
    rows = jax.process_count()
    return {
        "sharded": place(f"sharded{seed}", (96, 64), np.float32, mesh_sharding(rows, P("a", "b"))),
        "replicated": place(f"replicated{seed}", (100, 200), np.float32, mesh_sharding(rows, P())),
        "step": 1,
    }


def own_arrays(path: str) -> dict:
    """Arrays that each process has on devices of its own, equal on all; and one that only process 1 has at all."""
    mesh = Mesh(np.array(jax.local_devices()), ("x",))
    tree = small_tree() | {
        "one": jnp.arange(5.0),
        "key": jax.random.key(3),
        "spread": jax.device_put(np.arange(64, dtype=np.float32), NamedSharding(mesh, P("x"))),
    }
    device = next(d for d in jax.devices() if d.process_index == 1)
    shards = [jax.device_put(np.full(4, 7, np.float32), device)] if jax.process_index() == 1 else []
    only = jax.make_array_from_single_device_arrays(
        (4,), jax.sharding.SingleDeviceSharding(device), shards, dtype=jnp.float32
    )
    jc.save_async(f"{path} async", tree, timeout_s=LIMIT_S).result(timeout_s=LIMIT_S)
    tree["only"] = only
    jc.save(path, tree, timeout_s=LIMIT_S)
    found = jc.restore(path, tree, timeout_s=LIMIT_S)
    return {
        name: np.array_equal(jax.random.key_data(found[name]), jax.random.key_data(tree[name]))
        if name == "key"
        else np.array_equal(found[name].addressable_data(0), tree[name].addressable_data(0))
        for name in ("one", "key", "spread", "sharded", "replicated")
    }


def killed_in_flush(path: str, victim: int, *, over: bool) -> dict:
    """One process is killed when its chunks are on storage and nobody knows of them."""
    if over:
        jc.save(path, small_tree(), timeout_s=LIMIT_S)
    if jax.process_index() == victim:
        subscribe(lambda event: os.kill(os.getpid(), signal.SIGKILL) if isinstance(event, Flushed) else None)
    return told(lambda: jc.save(path, small_tree("new"), overwrite=over, timeout_s=2))


def told(action: Callable[[], object]) -> dict:
    """The error that an action raises, and after how long."""
    started = time.monotonic()
    try:
        action()
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", []))
        return {"error": type(error).__name__, "message": f"{error} {notes}", "after_s": time.monotonic() - started}
    return {"error": "", "message": "", "after_s": time.monotonic() - started}


def meet(name: str) -> None:
    """Wait for all processes."""
    coordinator = current_coordinator()
    coordinator.put(f"test/{name}/{coordinator.rank}", b"")
    for rank in range(coordinator.size):
        coordinator.get(f"test/{name}/{rank}", timeout_s=LIMIT_S)


def many_faults(folder: str) -> dict:
    """Process 1 goes wrong in one way after the other; what each process hears of it."""
    rank = jax.process_index()
    seen = {}
    for fault in (
        _lag,
        _storage_fails,
        _another_tree,
        _other_names,
        _another_overwrite,
        _bad_leaf,
        _local_arrays,
        _host_values,
        _numbers,
        _damaged_shared,
        _damaged_own,
        _sees_no_files,
        _lags_in_restore,
        _another_like,
    ):
        seen[fault.__name__[1:]] = fault(f"{folder}/{fault.__name__[1:]}", rank == 1)
        meet(fault.__name__)
    jc.save(f"{folder}/lag", small_tree(), timeout_s=LIMIT_S)
    jc.save(f"{folder}/storage_fails", small_tree(), timeout_s=LIMIT_S)
    return seen


def _lag(path: str, faulty: bool) -> dict:
    coordinator = current_coordinator()

    def wait(event: Event) -> None:
        if isinstance(event, Flushed):
            for rank in (0, 2):
                coordinator.get(f"test/gave up/{rank}", timeout_s=LIMIT_S)

    stop = subscribe(wait) if faulty else lambda: None
    found = told(lambda: jc.save(path, small_tree(), timeout_s=1.5))
    coordinator.put(f"test/gave up/{coordinator.rank}", b"")
    stop()
    meet("all gave up")
    return found | {"restore": told(lambda: jc.restore(path))["error"]}


def _storage_fails(path: str, faulty: bool) -> dict:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if faulty:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    found = told(lambda: jc.save(path, small_tree(), timeout_s=LIMIT_S))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    meet("storage failed")
    left = sorted(str(p) for p in Path(path).rglob("*") if p.is_file())
    return found | {"restore": told(lambda: jc.restore(path))["error"], "left": left}


def _another_tree(path: str, faulty: bool) -> dict:
    tree = small_tree()
    if faulty:
        tree["more"] = place("more", (66, 2), np.float32, mesh_sharding(3, P("a")))
    return told(lambda: jc.save(path, tree, timeout_s=LIMIT_S)) | {"restore": told(lambda: jc.restore(path))["error"]}


def _other_names(path: str, faulty: bool) -> dict:
    tree = small_tree()
    if faulty:
        tree = {name.replace("sharded", "shared"): leaf for name, leaf in tree.items()}
    return told(lambda: jc.save(path, tree, timeout_s=LIMIT_S)) | {"restore": told(lambda: jc.restore(path))["error"]}


def _another_overwrite(path: str, faulty: bool) -> dict:
    jc.save(path, small_tree(), timeout_s=LIMIT_S)
    found = told(lambda: jc.save(path, small_tree("new") | {"step": 2}, overwrite=not faulty, timeout_s=LIMIT_S))
    meet("flags differed")
    return found | {"step": jc.restore(path, only="step")["step"]}


def _bad_leaf(path: str, faulty: bool) -> dict:
    tree = small_tree() | {"bad": object() if faulty else 1}
    return told(lambda: jc.save(path, tree, timeout_s=LIMIT_S))


def _local_arrays(path: str, faulty: bool) -> dict:
    tree = small_tree() | {"local": jnp.ones(3) * (2 if faulty else 1)}
    return told(lambda: jc.save(path, tree, timeout_s=LIMIT_S)) | {"restore": told(lambda: jc.restore(path))["error"]}


def _host_values(path: str, faulty: bool) -> dict:
    tree = small_tree() | {"host": np.arange(3) + faulty}
    return told(lambda: jc.save(path, tree, timeout_s=LIMIT_S)) | {"restore": told(lambda: jc.restore(path))["error"]}


def _numbers(path: str, faulty: bool) -> dict:
    tree = small_tree() | {"step": 7 + faulty}
    return told(lambda: jc.save(path, tree, timeout_s=LIMIT_S)) | {"restore": told(lambda: jc.restore(path))["error"]}


def _damaged_shared(path: str, faulty: bool) -> dict:
    tree = small_tree()
    jc.save(path, tree, timeout_s=LIMIT_S)
    if faulty:
        damage(path, np.asarray(tree["replicated"].addressable_data(0))[10])
    meet("damaged")
    return told(lambda: jc.restore(path, tree))


def _damaged_own(path: str, faulty: bool) -> dict:
    """A chunk that one process alone needs, in a batch of its own: leaves that all share come after it."""
    tree = {name: place(name, (16, 16), np.float32, sharding) for name, sharding in own_shardings().items()}
    tree["shared"] = small_tree()
    jc.save(path, tree, timeout_s=LIMIT_S)
    meet("saved own")
    if jax.process_index() == 2:
        damage(path, np.asarray(tree["last"].addressable_data(0)))
    meet("damaged own")
    return told(lambda: jc.restore(path, tree))


def _sees_no_files(path: str, faulty: bool) -> dict:
    tree = small_tree()
    jc.save(path, tree, timeout_s=LIMIT_S)
    return told(lambda: jc.restore(f"{path}/elsewhere" if faulty else path, tree))


def _lags_in_restore(path: str, faulty: bool) -> dict:
    tree = small_tree()
    jc.save(path, tree, timeout_s=LIMIT_S)
    coordinator = current_coordinator()
    if faulty:
        for rank in (0, 2):
            coordinator.get(f"test/restore given up/{rank}", timeout_s=LIMIT_S)
    found = told(lambda: jc.restore(path, tree, timeout_s=1.5))
    coordinator.put(f"test/restore given up/{coordinator.rank}", b"")
    meet("restore given up by all")
    again = jc.restore(path, tree, timeout_s=LIMIT_S)
    same = all(np.array_equal(again[name].addressable_data(0), tree[name].addressable_data(0)) for name in ("sharded",))
    return found | {"again": same}


def stopped_in_restore(path: str, victim: int, how: int, *, exchanging: bool) -> dict:
    """One process is killed or stopped when it has read, or on its way into the exchange."""
    tree = small_tree()
    jc.save(path, tree, timeout_s=LIMIT_S)
    jc.restore(path, tree, timeout_s=LIMIT_S)  # programs are compiled
    coordinator = current_coordinator()
    meet("restored once")
    if jax.process_index() == victim:
        owner, name = (exchange, "_gather") if exchanging else (OwnSource, "read")
        setattr(owner, name, lambda *_, **__: os.kill(os.getpid(), how))
    coordinator.put(f"test/pid/{coordinator.rank}", str(os.getpid()).encode())
    found = told(lambda: jc.restore(path, tree, timeout_s=3))
    if coordinator.rank == 0 and how == signal.SIGSTOP:
        os.kill(int(coordinator.get(f"test/pid/{victim}", timeout_s=LIMIT_S)), signal.SIGKILL)
    return found


def _another_like(path: str, faulty: bool) -> dict:
    tree = small_tree()
    jc.save(path, tree, timeout_s=LIMIT_S)
    return told(lambda: jc.restore(path, tree | {"more": 1} if faulty else tree))


def damage(path: str, stored: np.ndarray) -> None:
    """Flip one bit of these bytes in whichever file they are."""
    for file in Path(path).rglob("*"):
        data = bytearray(file.read_bytes()) if file.is_file() else bytearray()
        where = data.find(stored.tobytes())
        if where >= 0:
            data[where + 5] ^= 1
            file.write_bytes(data)
            return
    raise AssertionError("these bytes are stored nowhere")


def without_collectives(folder: str) -> dict:
    """Saves of all kinds in a job whose devices cannot talk to each other, and the proof that they cannot."""
    jax.config.update("jax_cpu_collectives_implementation", None)  # before the first device is asked for
    tree = small_tree()

    def add(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x + 1, mesh_sharding(2, P()))

    collective = told(lambda: jax.block_until_ready(jax.jit(add)(tree["sharded"])))
    jc.save(f"{folder}/a", tree, timeout_s=LIMIT_S)
    jc.save_async(f"{folder}/b", tree, timeout_s=LIMIT_S).result(timeout_s=LIMIT_S)
    jc.save(f"{folder}/a", tree | {"step": 2}, overwrite=True, compression=3, timeout_s=LIMIT_S)
    keys = make_tree(mesh_of(2))
    jc.save(f"{folder}/all leaves", keys, timeout_s=LIMIT_S)
    steps = [jc.restore(f"{folder}/{name}", jc.on_host)["step"] for name in "ab"]
    return {"collective": collective, "steps": steps}
