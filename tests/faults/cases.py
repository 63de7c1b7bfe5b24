"""Small trees with every kind of leaf, and what "the same checkpoint" means."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.core.errors import CheckpointError
from jaxckpt.core.tree import flatten


def tree(seed: int) -> dict[Any, Any]:
    """About 20 leaves; all values depend on the seed."""
    rng = np.random.default_rng(seed)
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharded = jax.device_put(rng.standard_normal((16, 8)).astype(np.float32), NamedSharding(mesh, P("d", "m")))
    return {
        "sharded": sharded,
        "tied": sharded,
        "bf16": jnp.asarray(rng.standard_normal(7), jnp.bfloat16),
        "packed": jnp.asarray(rng.integers(-3, 3, (4, 4)), jnp.int4),
        "key": jax.random.key(seed),
        "numpy": rng.integers(0, 99, 5),
        "empty": jnp.zeros((0, 3)),
        "zipped": jnp.arange(64, dtype=jnp.int32) + seed,
        "bytes": b"some bytes %d" % seed,
        "text": f"text {seed}",
        "step": seed,
        "rate": seed + 0.1,
        "flag": True,
        "none": None,
        1: [np.float32(seed), {}],
    }


def same(a: Any, b: Any) -> bool:
    """Whether two trees have the same nodes, keys, kinds and bits."""
    (left, shape_a), (right, shape_b) = flatten(a), flatten(b)
    return shape_a == shape_b and all(_bits(x.value) == _bits(y.value) for x, y in zip(left, right, strict=True))


def outcome(path: Any) -> Any:
    """What restoring gives: a tree, or the CheckpointError that it raised. Anything else is a failure of the test."""
    try:
        return jc.restore(path)
    except CheckpointError as error:
        return error


def files_of(root: Path) -> list[Path]:
    """All files of a checkpoint."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def _bits(value: Any) -> tuple[Any, ...]:
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return ("key", str(jax.random.key_impl(value)), np.asarray(jax.random.key_data(value)).tobytes())
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        array = np.asarray(value)
        return (isinstance(value, jax.Array), array.dtype.name, array.shape, array.tobytes())
    return (type(value), repr(value))
