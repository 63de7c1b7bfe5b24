"""What several processes do with Orbax and with this library; run by run_processes, results as JSON."""

import os
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1

import jaxckpt as jc
from jaxckpt.interop.orbax_handler import Handler, registry

warnings.simplefilter("ignore")  # Orbax's own deprecations
LIMIT_S = 60


def values(seed: int = 0) -> dict[str, Any]:
    """The tree on the host."""
    rng = np.random.default_rng(seed)
    return {
        "blocks": rng.standard_normal((16, 8)).astype(np.float32),
        "rows": [rng.standard_normal((8, 6)).astype(jnp.bfloat16), rng.integers(0, 99, (24,)).astype(np.int32)],
        "all": {"w": rng.standard_normal((5, 3)).astype(np.float32)},
        "host": rng.integers(0, 9, (3, 3)),
        "step": 7 + seed,
    }


def placed(seed: int = 0, *, turned: bool = False) -> dict[str, Any]:
    """The tree over all processes, or over them in another way."""
    tree = values(seed)
    blocks, rows = (P("b", "a"), P("b")) if turned else (P("a", "b"), P(("a", "b")))
    return tree | {
        "blocks": place(tree["blocks"], blocks),
        "rows": [place(x, rows) for x in tree["rows"]],
        "all": {"w": place(tree["all"]["w"], P())},
    }


def place(value: np.ndarray, spec: P) -> jax.Array:
    mesh = jax.make_mesh((jax.process_count(), jax.local_device_count()), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), value.__getitem__)


def abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x, tree
    )


def differences(found: Any, like: Any, seed: int = 0) -> list[str]:
    """What is not as it should be on this process: values, dtypes, shardings where ``like`` has any."""
    wanted = dict(jax.tree_util.tree_leaves_with_path(values(seed)))
    places = dict(jax.tree_util.tree_leaves_with_path(like))
    wrong = []
    for path, x in jax.tree_util.tree_leaves_with_path(found):
        name, want = jax.tree_util.keystr(path), np.asarray(wanted.pop(path))
        if not isinstance(x, jax.Array):
            wrong += [name] * (np.asarray(x).tobytes() != want.tobytes())
            continue
        wrong += [name] * (x.dtype != want.dtype or x.shape != want.shape)
        wrong += [name] * any(np.asarray(s.data).tobytes() != want[s.index].tobytes() for s in x.addressable_shards)
        if isinstance(places[path], jax.Array):
            wrong += [f"{name} on {x.sharding}"] * (not x.sharding.is_equivalent_to(places[path].sharding, x.ndim))
    return wrong + [jax.tree_util.keystr(path) for path in wanted]


def v0(**options: Any) -> Callable[[str, Any], None]:
    def save(path: str, tree: Any) -> None:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
            checkpointer.save(path, ocp.args.PyTreeSave(tree))

    return save


def v0_standard(path: str, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


WRITERS: dict[str, Callable[[str, Any], Any]] = {
    "v0 pytree ocdbt": v0(),
    "v0 pytree zarr3": v0(use_zarr3=True),
    "v0 pytree folders": v0(use_ocdbt=False),
    "v0 standard": v0_standard,
    "v1": v1.save,
}


def read_pytree(path: str, like: Any) -> Any:
    args = ocp.checkpoint_utils.construct_restore_args(like)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(like, restore_args=args))


def read_standard(path: str, like: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


READERS: dict[str, Callable[[str, Any], Any]] = {
    "v0 pytree": read_pytree,
    "v0 standard": read_standard,
    "v1": v1.load,
}


def ours_saves(folder: str) -> None:
    jc.save(f"{folder}/ours by {jax.process_count()}", placed(), timeout_s=LIMIT_S)


def both(folder: str) -> dict[str, Any]:
    """Orbax saves and we restore; we have saved, here and with other processes, and Orbax restores."""
    wrong: dict[str, list[str]] = {}
    tree = placed()
    for name, write in WRITERS.items():
        write(f"{folder}/{name}", tree)
        for turned in (False, True):
            like = placed(turned=turned)
            found = jc.restore(f"{folder}/{name}", abstract(like), timeout_s=LIMIT_S)
            wrong[f"{name}, restored by us, turned={turned}"] = differences(found, like)
        wrong[f"{name}, restored by us as it was"] = differences(jc.restore(f"{folder}/{name}"), tree)
    ours_saves(folder)
    for n in (2, 4):
        for name, read in READERS.items():
            for turned in (False, True):
                like = placed(turned=turned)
                found = read(f"{folder}/ours by {n}", abstract(like))
                wrong[f"ours by {n}, restored by {name}, turned={turned}"] = differences(found, like)
    return wrong


def managers(root: str) -> dict[str, Any]:
    """Orbax's manager with our handler, then without it, then with it again."""
    seen: dict[str, Any] = {}
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    like = abstract(placed(turned=True))
    with ocp.CheckpointManager(root, options=options, handler_registry=registry()) as manager:
        for step in range(3):
            manager.save(step, args=ocp.args.StandardSave(placed(step)))
        manager.wait_until_finished()
        seen["steps"] = list(manager.all_steps())
        seen["ours"] = differences(manager.restore(2, args=ocp.args.StandardRestore(like)), like, 2)
        seen["untold"] = differences(manager.restore(1), placed(1), 1)
    with ocp.CheckpointManager(root, options=options) as manager:
        seen["by orbax"] = differences(manager.restore(2, args=ocp.args.StandardRestore(like)), like, 2)
        manager.save(3, args=ocp.args.StandardSave(placed(3)))
    with ocp.CheckpointManager(root, options=options, handler_registry=registry()) as manager:
        seen["of orbax"] = differences(manager.restore(3, args=ocp.args.StandardRestore(like)), like, 3)
        seen["steps then"] = list(manager.all_steps())
    with jc.CheckpointManager(root, timeout_s=LIMIT_S) as own:
        step, found = own.resume(like)
        seen["our manager"] = [step, differences(found, like, 3)]
    return seen


def one_cannot_write(root: str) -> dict[str, Any]:
    """The file system refuses what process 1 writes for Orbax's manager with our handler."""
    big = {"w": place(np.arange(1 << 16, dtype=np.float32).reshape(256, 256), P("a"))}
    manager = ocp.CheckpointManager(root, handler_registry=registry())
    manager.save(1, args=ocp.args.StandardSave(placed()))
    manager.wait_until_finished()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if jax.process_index() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    started, message = time.monotonic(), ""
    try:
        manager.save(2, args=ocp.args.StandardSave(big))
        manager.wait_until_finished()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finished = sorted(name for name in os.listdir(root) if name.isdecimal())
    return {"message": message, "after_s": time.monotonic() - started, "finished": finished}


def one_cannot_read(folder: str) -> dict[str, Any]:
    """Process 1 sees nothing of a checkpoint of Orbax, or half of one; what each hears."""
    heard: dict[str, Any] = {}
    for name in ("v0 pytree ocdbt", "v0 pytree folders"):
        tree, path = placed(), f"{folder}/{name}"
        WRITERS[name](path, tree)
        if jax.process_index() == 1:
            shutil.copytree(path, f"{path} halved")
            files = [file for file in Path(f"{path} halved").rglob("*") if is_data(file)]
            for file in files:
                os.truncate(file, file.stat().st_size // 2)
        multihost_utils.sync_global_devices(name)
        for what, other in {"nothing": "elsewhere", "half": f"{path} halved"}.items():
            there = other if jax.process_index() == 1 else path
            ways = {"by us": by_us}
            if what == "half":  # of a folder that is not there Orbax itself speaks
                ways["by Orbax with our handler"] = with_handler
            for by, read in ways.items():
                started = time.monotonic()
                try:
                    read(there, abstract(tree))
                    heard[f"{what} of {name} {by}"] = ["", "", 0.0]
                except Exception as error:
                    heard[f"{what} of {name} {by}"] = [type(error).__name__, str(error), time.monotonic() - started]
        heard[f"then {name}"] = differences(jc.restore(path, abstract(tree), timeout_s=LIMIT_S), tree)
    return heard


def by_us(path: str, like: Any) -> Any:
    return jc.restore(path, like, timeout_s=LIMIT_S)


def with_handler(path: str, like: Any) -> Any:
    with ocp.Checkpointer(Handler(timeout_s=LIMIT_S)) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.StandardRestore(like))


def is_data(file: Path) -> bool:
    """A file with chunks: of a database, or a chunk alone."""
    return file.is_file() and (file.parent.name == "d" or file.name.replace(".", "").isdigit())
