"""What the demo's processes share: the state, its digests, and lines of JSON to the process that shows them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxckpt as jc
from models import text
from models.llama import PRESETS
from models.sharding import batch_sharding, make_mesh
from models.training import TrainState, abstract_state, eval_loss

CONFIG = PRESETS["demo"]
BATCH, LENGTH = 8, 96


def emit(kind: str, **facts: Any) -> None:
    print(json.dumps({"kind": kind, **facts}), flush=True)


def mesh_of(shape: str) -> jax.sharding.Mesh:
    data, model = map(int, shape.split("x"))
    return make_mesh(data, model)


def like(mesh: jax.sharding.Mesh) -> TrainState:
    """What to restore, and where to: shapes, dtypes and shardings, no values."""
    return abstract_state(CONFIG, mesh, fsdp=True)


def held_out_loss(state: TrainState, mesh: jax.sharding.Mesh) -> float:
    """Loss on the same unseen text at each call, without dropout."""
    tokens = jax.device_put(text.eval_batch(batch=BATCH, length=LENGTH), batch_sharding(mesh))
    return float(eval_loss(CONFIG)(state.params, tokens))


def digests(tree: Any) -> dict[str, str]:
    """Leaf name to dtype, shape and sha256 of the values: two leaves with one digest are equal to the bit."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): _digest(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def differing(tree: Any, saved: dict[str, str]) -> list[str]:
    """Names of the leaves that are missing, unexpected, or not what was saved."""
    found = digests(tree)
    return sorted(name for name in found.keys() | saved.keys() if found.get(name) != saved.get(name))


def write_record(folder: Path, step: int, record: dict[str, Any]) -> None:
    """Outside of the checkpoint, so that a checkpoint cannot vouch for itself."""
    temporary = folder / f".{step}.json"
    temporary.write_text(json.dumps(record))
    os.replace(temporary, folder / f"{step}.json")


def read_record(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / f"{step}.json").read_text())


def newest_committed(root: Path) -> tuple[int | None, list[int]]:
    """The newest step that was committed, and the newer ones that were not."""
    torn: list[int] = []
    for step in sorted((int(path.name) for path in root.iterdir() if path.name.isdigit()), reverse=True):
        try:
            jc.inspect(root / str(step))
        except jc.NotFoundError:  # NotCommittedError is one of these
            torn.append(step)
        else:
            return step, torn
    return None, torn


def size_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _digest(leaf: Any) -> str:
    dtype = str(leaf.dtype)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    values = np.ascontiguousarray(leaf)
    return f"{dtype}{list(leaf.shape)} {hashlib.sha256(values.view(np.uint8) if values.ndim else values).hexdigest()}"
