"""Logical axis names of parameters to shardings on a mesh with the axes "data" and "model"."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any

# Tensor parallelism after Megatron-LM: heads and hidden units are split, what they are summed into is whole.
TENSOR_PARALLEL: dict[str, str] = {"vocab": "model", "heads": "model", "kv_heads": "model", "mlp": "model"}
# And fully sharded data parallelism (ZeRO-3): the remaining axis is split over the data axis.
FSDP: dict[str, str] = TENSOR_PARALLEL | {"embed": "data"}


def make_mesh(data: int, model: int) -> Mesh:
    """A mesh of the first ``data * model`` devices."""
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def shardings_of(tree: PyTree, mesh: Mesh, *, fsdp: bool = False) -> PyTree:
    """A tree of NamedShardings with the structure of ``tree``.

    A variable goes by its ``axes`` wherever it stands, so that the moments in an optimizer's state are split like the
    parameters that they belong to. All other leaves are replicated.
    """
    rules = FSDP if fsdp else TENSOR_PARALLEL

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        spec = partition_spec(leaf.get_metadata().get("axes", ()), leaf.shape, mesh, rules)
        return leaf.replace(NamedSharding(mesh, spec))

    return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def partition_spec(
    axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, rules: dict[str, str] = TENSOR_PARALLEL
) -> PartitionSpec:
    """An axis that the mesh does not divide stays whole: two kv heads cannot be split four ways."""
    names = (rules.get(axis) for axis in axes)
    return PartitionSpec(
        *(
            name if name in mesh.shape and size % mesh.shape[name] == 0 else None
            for name, size in zip(names, shape, strict=False)
        )
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples over "data", each of them whole."""
    return NamedSharding(mesh, PartitionSpec("data"))
