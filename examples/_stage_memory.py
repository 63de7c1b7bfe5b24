"""For stage_recovery.py: what a process holds, kept outside of it, so that it outlives the process."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

KEPT = 2  # steps: when one process dies, another may be one step ahead


class HostMemory:
    """This process's shards of a tree at the last steps, as files in a folder: best in /dev/shm, which is memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def steps(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.npz"))

    def write(self, step: int, tree: Any, facts: dict[str, Any]) -> None:
        """Whole or not at all, whenever the process is killed."""
        half = self.folder / "half-written.npz"
        np.savez(half, allow_pickle=False, facts=np.array(json.dumps(facts)), **shards(tree))
        os.replace(half, self.folder / f"{step}.npz")
        for old in self.steps():
            if not step - KEPT < old <= step:
                (self.folder / f"{old}.npz").unlink()

    def read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        with np.load(self.folder / f"{step}.npz") as file:
            found = {name: file[name] for name in file.files}
        return found, json.loads(str(found.pop("facts")))


def shards(tree: Any) -> dict[str, np.ndarray]:
    """The distinct shards that this process holds, by leaf and place."""
    return {
        _key(path, shard.index, leaf.shape): np.asarray(shard.data)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        for shard in leaf.addressable_shards
    }


def assemble(abstract: Any, found: dict[str, np.ndarray]) -> Any:
    """Arrays over all processes of what each has found; a process that found nothing contributes NaN."""

    def one(path: Any, leaf: Any) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            empty = np.nan if np.issubdtype(leaf.dtype, np.floating) else np.iinfo(leaf.dtype).max
            shape = [len(range(*part.indices(size))) for part, size in zip(index, leaf.shape, strict=True)]
            return found.get(_key(path, index, leaf.shape), np.full(shape, empty, leaf.dtype))

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)

    return jax.tree_util.tree_map_with_path(one, abstract)


def bits(parts: dict[str, np.ndarray]) -> int:
    """A number for the bits of some shards; stages' rates and ages are left out: everybody has those of all stages."""
    total = 0
    for name in sorted(parts):
        total = total if "stage_lr_scale" in name or "stage_age" in name else zlib.crc32(parts[name].tobytes(), total)
    return total


def tell_all(mine: dict[str, Any]) -> list[dict[str, Any]]:
    """What every process says, by rank. All call it together."""
    line = np.frombuffer(json.dumps(mine).encode().ljust(1 << 15), np.uint8)
    told = np.asarray(process_allgather(line)).reshape(-1, line.size)
    return [json.loads(bytes(row)) for row in told]


def _key(path: Any, index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    starts = ",".join(str(part.indices(size)[0]) for part, size in zip(index, shape, strict=True))
    return f"{jax.tree_util.keystr(path, simple=True, separator='.')}@{starts}"
