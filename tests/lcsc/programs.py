"""What the processes of the tests do; run by run_processes, results as JSON."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt import lcsc

K = 6
SPECS = {"w": P("model"), "b": P()}


def values_of(k: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(k)
    return {"w": rng.standard_normal((64, 32), np.float32), "b": rng.standard_normal(32, np.float32)}


def objective(params: Any, key: jax.Array) -> Any:
    return jnp.mean(params["w"] ** 2) + jnp.mean(params["b"] ** 2) + 0.01 * jax.random.normal(key, ())


def search(folder: str, how: dict[str, Any], spreads: bool, killed_at: int = 0) -> dict[str, Any]:
    """Save checkpoints that are sharded over all processes, and search; if killed, twice."""
    mesh = jax.make_mesh((2, jax.device_count() // 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    home = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    for k in range(K):
        tree = {n: jax.make_array_from_callback(x.shape, home[n], x.__getitem__) for n, x in values_of(k).items()}
        jc.save(f"{folder}/{k}", tree, timeout_s=60)
    like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home[n]) for n, x in values_of(0).items()}
    given: Any = {"like": like, "mesh": mesh if spreads else None, "held_out": objective, "budget": 300, **how}
    paths = [f"{folder}/{k}" for k in range(K)]

    def stop(seen: lcsc.Advance) -> None:
        if seen.generation == killed_at:
            raise KeyboardInterrupt

    if killed_at:
        try:
            lcsc.search(paths, objective, state=f"{folder}/state", progress=stop, **given)
        except KeyboardInterrupt:
            given["state"] = f"{folder}/state"
    found = lcsc.search(paths, objective, progress=False, **given)
    merged = sum(c * values_of(k)["w"].astype(np.float64) for k, c in enumerate(found.coefficients))
    shards = found.params["w"].addressable_shards
    return {
        "coefficients": found.coefficients.tolist(),
        "wrong": max(float(np.abs(np.asarray(s.data) - merged[s.index]).max()) for s in shards),
        "spec": str(found.params["w"].sharding.spec),
        "placement": found.report.placement,
    }
