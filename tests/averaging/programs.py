"""What the processes of the tests do; run by run_processes, results as JSON."""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.averaging.average import average, average_to
from jaxckpt.core.events import Restored, subscribe
from tests.averaging.oracle import ulps, weighted

K = 4
# Random: bfloat16 values and round weights may cancel to nothing, and then the oracle's rounding is all there is.
WEIGHTS = np.stack([np.random.default_rng(0).standard_normal(K), np.full(K, 0.25)])
SPECS = {
    "both": P("a", "b"),
    "rows": P("a"),
    "columns": P(None, "b"),
    "replicated": P(),
    "bf16": P("b", "a"),
}


def mesh_of(rows: int) -> jax.sharding.Mesh:
    return jax.make_mesh((rows, jax.device_count() // rows), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def values_of(k: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(k)
    dtypes = {"bf16": ml_dtypes.bfloat16}
    return {n: rng.standard_normal((256, 192), np.float32).astype(dtypes.get(n, np.float32)) for n in SPECS}


def place(tree: dict[str, np.ndarray], rows: int) -> dict[str, Any]:
    mesh = mesh_of(rows)
    return {
        n: jax.make_array_from_callback(x.shape, NamedSharding(mesh, SPECS[n]), x.__getitem__) for n, x in tree.items()
    }


def save_and_average(folder: str) -> dict[str, Any]:
    """Save K trees on one mesh and average them on another; the worst distance from the oracle, and bytes read."""
    for k in range(K):
        jc.save(f"{folder}/{k}", {**place(values_of(k), 4), "host": np.full(3, k, np.float32), "step": k}, timeout_s=60)
    like: dict[str, Any] = {
        n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh_of(2), SPECS[n]))
        for n, x in values_of(0).items()
    }
    like |= {"host": np.zeros(3, np.float32), "step": 0}
    paths = [f"{folder}/{k}" for k in range(K)]
    events: list[Any] = []
    stop = subscribe(events.append)
    found = average(paths, WEIGHTS, like=like)
    stop()
    live = [{**place(values_of(k), 4), "host": np.full(3, k, np.float32), "step": k} for k in (0, 1)]
    mixed = average([*live, *paths[2:]], WEIGHTS[0], like=like)
    mapped = average(
        paths,
        WEIGHTS[0],
        like={n: like[n] for n in SPECS},
        eval_params=lambda state: {n: state[n] * 2 if n == "both" else state[n] for n in SPECS},
    )
    average_to(f"{folder}/soup", paths, WEIGHTS[0], like=like, method="by hand")
    saved = jc.restore(f"{folder}/soup", like)
    return {
        "P": [worst(tree, WEIGHTS[p]) for p, tree in enumerate(found)],
        "mixed": worst(mixed, WEIGHTS[0]),
        "mapped": worst({**mapped, "both": mapped["both"] / 2}, WEIGHTS[0]),
        "saved": worst(saved, WEIGHTS[0]),
        "host": [float(found[1]["host"][0]), found[1]["step"]],
        "read": sum(event.read_bytes for event in events if isinstance(event, Restored)),
    }


def one_process_cannot_see(folder: str) -> str:
    """What this process is told when one of them has another path than the others."""
    jc.save(f"{folder}/a", place(values_of(0), 2), timeout_s=60)
    like = {
        n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh_of(2), SPECS[n]))
        for n, x in values_of(0).items()
    }
    other = "missing" if jax.process_index() == 1 else "a"
    try:
        average([f"{folder}/a", f"{folder}/{other}"], like=like)
    except jc.CheckpointError as error:
        return str(error)
    return ""


def worst(found: dict[str, Any], weights: np.ndarray) -> int:
    trees = [values_of(k) for k in range(K)]
    most = 0
    for name in SPECS:
        oracle = weighted(np.stack([tree[name] for tree in trees]), weights)
        most = max([most, *(ulps(shard.data, oracle[shard.index]) for shard in found[name].addressable_shards)])
    return most
