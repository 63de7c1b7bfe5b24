"""jaxckpt and Orbax behind one face: save a tree and be durable; restore it like an abstract tree, ready to use."""

# ruff: noqa: TC003 - scripts are read from the top: one block of imports
from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_utils

import jaxckpt as jc

OURS, V0, V0_PLAIN, V1 = "jaxckpt", "Orbax v0", "Orbax v0 uncompressed", "Orbax v1"

# Orbax logs and warns per call; what it prints is no part of the measurement.
logging.getLogger("absl").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="orbax")


class Contender(Protocol):
    def save(self, path: Path, tree: Any) -> None: ...
    def restore(self, path: Path, like: Any) -> Any: ...


class Jaxckpt:
    def save(self, path: Path, tree: Any) -> None:
        jc.save(path, tree)

    def restore(self, path: Path, like: Any) -> Any:
        return jax.block_until_ready(jc.restore(path, like))


class OrbaxV0:
    """The PyTree handler, which StandardCheckpointer and CheckpointManager use inside."""

    def __init__(self, *, compressed: bool) -> None:
        self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=compressed))

    def save(self, path: Path, tree: Any) -> None:
        self._checkpointer.save(path, args=ocp.args.PyTreeSave(tree))

    def restore(self, path: Path, like: Any) -> Any:
        how = checkpoint_utils.construct_restore_args(like)
        return jax.block_until_ready(
            self._checkpointer.restore(path, args=ocp.args.PyTreeRestore(item=like, restore_args=how))
        )


class OrbaxV1:
    def save(self, path: Path, tree: Any) -> None:
        ocp.v1.save(path, tree)

    def restore(self, path: Path, like: Any) -> Any:
        return jax.block_until_ready(ocp.v1.load(path, like))


MAKERS: dict[str, Callable[[], Contender]] = {
    OURS: Jaxckpt,
    V0: lambda: OrbaxV0(compressed=True),
    V0_PLAIN: lambda: OrbaxV0(compressed=False),
    V1: OrbaxV1,
}


def contenders() -> dict[str, Contender]:
    return {name: make() for name, make in MAKERS.items()}


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def raw_save(path: Path, views: list[np.ndarray]) -> None:
    """The floor of a durable save: the same bytes, appended to one file, and one fsync."""
    with path.open("wb", buffering=0) as file:
        for view in views:
            data = memoryview(view).cast("B")
            while len(data):
                data = data[file.write(data) :]
        os.fsync(file.fileno())


def raw_restore(path: Path, leaves: list[Any]) -> list[np.ndarray]:
    """The floor of a restore: ``np.fromfile`` leaf by leaf, all results kept."""
    with path.open("rb", buffering=0) as file:
        return [np.fromfile(file, leaf.dtype, int(np.prod(leaf.shape))) for leaf in leaves]


def host_views(leaves: list[jax.Array]) -> list[np.ndarray]:
    """The bytes of every leaf once, as contiguous host arrays that need no copy (on CPU)."""
    views = []
    for leaf in leaves:
        seen: dict[Any, np.ndarray] = {}
        for shard in leaf.addressable_shards:
            seen.setdefault(str(shard.index), np.asarray(shard.data))
        views += [
            view.view(np.uint8 if view.dtype.itemsize == 1 else f"u{view.dtype.itemsize}") for view in seen.values()
        ]
    return views
