"""The demo's comparison: Orbax reads our checkpoint, a damaged copy is refused, and both are timed on one state."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from _demo_state import differing, emit, like, mesh_of, read_record
from orbax.checkpoint import checkpoint_utils

import jaxckpt as jc
from models.training import TrainState

Result = TypeVar("Result")
Tree = Any


def main() -> None:
    """Each fact worth showing is printed as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--mesh", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--many", type=int, default=500, help="leaves of the tree of many small arrays")
    args = parser.parse_args()

    target = like(mesh_of(args.mesh))
    saved = read_record(args.records, int(args.checkpoint.name))["leaves"]
    by_orbax = Orbax(compressed=True).restore(args.checkpoint, target)
    emit("orbax_read", version=ocp.__version__, leaves=len(saved), differing=differing(by_orbax, saved))
    emit("damaged", **restore_damaged(args.checkpoint, args.scratch / "damaged", target))
    state = jc.restore(args.checkpoint, target)
    emit("timing", what="this state")
    emit("timed", what="state", **time_all(state, target, args.scratch, rounds=args.rounds))
    many, target = many_arrays(args.many, mesh_of(args.mesh))
    emit("timing", what=f"{args.many} arrays of 16 KiB")
    emit("timed", what="many", **time_all(many, target, args.scratch, rounds=args.rounds))


def many_arrays(count: int, mesh: jax.sharding.Mesh) -> tuple[Tree, Tree]:
    """Arrays of 16 KiB over all devices, as deep models with their moments have by the thousand; and their ``like``."""
    sharding = jax.NamedSharding(mesh, jax.P(tuple(mesh.axis_names)))
    values = np.arange(count * 4096, dtype=np.float32).reshape(count, 64, 64)
    tree = {f"layer{i}": jax.device_put(values[i], sharding) for i in range(count)}
    return tree, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def restore_damaged(checkpoint: Path, copy: Path, target: TrainState) -> dict[str, str | None]:
    """What restoring says when one bit of the largest file is flipped; ``error`` is None if it says nothing."""
    shutil.copytree(checkpoint, copy)
    largest = max((path for path in copy.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    try:
        jc.restore(copy, target)
    except jc.CheckpointError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


class Ours:
    """jaxckpt as a user calls it."""

    def save(self, path: Path, state: Tree) -> None:
        jc.save(path, state)

    def save_async(self, path: Path, state: Tree) -> Callable[[], object]:
        pending = jc.save_async(path, state)
        return lambda: pending.result(timeout_s=60)

    def restore(self, path: Path, target: Tree) -> Tree:
        return jc.restore(path, target)


class Orbax:
    """Orbax v0 with its defaults, or without compression."""

    def __init__(self, *, compressed: bool) -> None:
        def handler() -> ocp.PyTreeCheckpointHandler:
            return ocp.PyTreeCheckpointHandler(use_compression=compressed)

        self._checkpointer = ocp.Checkpointer(handler())
        self._async = ocp.AsyncCheckpointer(handler())

    def save(self, path: Path, state: Tree) -> None:
        self._checkpointer.save(path, args=ocp.args.PyTreeSave(state))

    def save_async(self, path: Path, state: Tree) -> Callable[[], object]:
        self._async.save(path, args=ocp.args.PyTreeSave(state))
        return self._async.wait_until_finished

    def restore(self, path: Path, target: Tree) -> Tree:
        how = checkpoint_utils.construct_restore_args(target)
        return self._checkpointer.restore(path, args=ocp.args.PyTreeRestore(item=target, restore_args=how))


def time_all(state: Tree, target: Tree, scratch: Path, *, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each contender's save, stall and restore; the first round only warms up."""
    contenders = {"jaxckpt": Ours(), "orbax": Orbax(compressed=True), "orbax_raw": Orbax(compressed=False)}
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in contenders}
    for turn in range(rounds + 1):
        # All in every round and each first in turn, so that a busy moment of the machine favours none.
        names = list(contenders)
        for name in names[turn % 3 :] + names[: turn % 3]:
            for what, seconds in time_one(contenders[name], state, target, scratch / f"{name}-{turn}").items():
                if turn:
                    taken[name].setdefault(what, []).append(seconds)
            shutil.rmtree(scratch / f"{name}-{turn}")
        emit("round", done=turn, of=rounds)
    return {name: {what: median(times) for what, times in kinds.items()} for name, kinds in taken.items()}


def time_one(contender: Ours | Orbax, state: Tree, target: Tree, folder: Path) -> dict[str, float]:
    """Seconds until durable, until training may go on, and until every array is restored."""
    folder.mkdir()
    save_s, _ = _seconds(lambda: contender.save(folder / "0", state))
    stall_s, wait = _seconds(lambda: contender.save_async(folder / "1", state))
    wait()
    restore_s, _ = _seconds(lambda: jax.block_until_ready(contender.restore(folder / "0", target)))
    return {"save": save_s, "stall": stall_s, "restore": restore_s}


def _seconds(work: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
