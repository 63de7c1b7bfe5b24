"""A tree as a training run has it, and what the real Orbax makes of one."""

from __future__ import annotations

from collections import namedtuple
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

if TYPE_CHECKING:
    from collections.abc import Callable

Pair = namedtuple("Pair", "first second")


class Model(nnx.Module):
    """An embedding whose weight a head may share, and a layer in bfloat16."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, param_dtype=jnp.bfloat16, rngs=rngs) for _ in range(2)])


def mesh_of(*shape: int) -> Mesh:
    """A mesh with axes "data" and "model"."""
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def training_state() -> dict[str, Any]:
    """Everything that both libraries can save: model, optimizer, key, step, narrow types, tuples, int keys, empties."""
    mesh = mesh_of(4, 2)

    def place(x: jax.Array, *spec: Any) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    model = jax.tree.map(
        lambda x: place(x, *(["data", "model"] if x.ndim == 2 else [])), nnx.to_pure_dict(nnx.state(Model(nnx.Rngs(0))))
    )
    optimizer = optax.adam(1e-3).init(model)
    return {
        "model": model,
        "optimizer": jax.tree.map(lambda x: x + 1, optimizer),
        "key": jax.random.key(3),
        "keys": place(jax.random.split(jax.random.key(2, impl="rbg"), 8), "data"),
        "step": 7,
        "rate": 0.1,
        "narrow": {
            "fp8": [jnp.arange(8).astype(jnp.float8_e4m3fn), place(jnp.arange(8).astype(jnp.float8_e5m2), "data")],
            "int4": place(jnp.arange(-4, 4).astype(jnp.int4), "data"),
            "flag": place(jnp.arange(8) % 2 == 0, "model"),
            "complex": jnp.full((2, 2), 1 - 2j, jnp.complex64),
        },
        "tied": {"embed": model["embed"]["embedding"]},
        "replicated": place(jnp.arange(5.0)),
        "numpy": np.arange(6).reshape(2, 3),
        "pair": Pair(jnp.ones(2), (jnp.zeros(1), np.ones(1))),
        "int_keys": {1: jnp.ones(1), 12: np.ones(1)},
        "empty": {"dict": {}, "list": [], "tuple": (), "none": None},
    }


def ours_only() -> dict[str, Any]:
    """What Orbax reads but refuses to write, or keeps as something else."""
    return {"zero_size": jnp.zeros((0, 4)), "numpy_scalar": np.float32(0.5), "bytes": b"abc", "complex": 1 - 2j}


def abstract(tree: Any, sharding: Callable[[jax.Array], Any] | None = None) -> Any:
    """Arrays become ShapeDtypeStructs with their own sharding or another."""
    place = sharding or (lambda x: x.sharding)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)) if isinstance(x, jax.Array) else x, tree
    )


def elsewhere(x: jax.Array) -> Any:
    """Another mesh, and rows in place of blocks."""
    if x.ndim and x.shape[0] % 2 == 0 and x.shape[0]:
        return NamedSharding(mesh_of(2, 4), P("data"))
    return SingleDeviceSharding(jax.devices()[3])


def as_orbax_keeps(tree: Any) -> Any:
    """The tree without ``like``: string keys, dicts for namedtuples, lists for tuples."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        children = dict(zip(tree._fields, tree, strict=True))
        return {name: as_orbax_keeps(child) for name, child in children.items()} or None
    if isinstance(tree, list) or (isinstance(tree, tuple) and tree):
        return [as_orbax_keeps(child) for child in tree]
    if isinstance(tree, dict):
        return {str(key): as_orbax_keeps(child) for key, child in tree.items()}
    return tree
