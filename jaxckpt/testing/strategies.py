"""Hypothesis strategies: abstract meshes, partition specs, arrays' plans and trees."""

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jaxckpt.plan.save import ArraySpec


@st.composite
def meshes(draw: st.DrawFn, *, max_devices: int = 16) -> AbstractMesh:
    """Abstract meshes of one to three axes whose sizes are powers of two."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3))
    while math.prod(sizes) > max_devices:
        sizes.pop()
    return AbstractMesh(tuple(sizes), tuple("xyz"[: len(sizes)]))


@st.composite
def array_specs(draw: st.DrawFn, mesh: AbstractMesh, *, max_blocks: int = 6) -> ArraySpec:
    """Arrays of up to three dimensions with any partition of the mesh's axes that divides them."""
    ndim = draw(st.integers(0, 3))
    axes: list[list[str]] = [[] for _ in range(ndim)]
    for name in draw(st.permutations(list(mesh.axis_names))):
        place = draw(st.integers(-1, ndim - 1))
        if place >= 0:
            axes[place].append(name)
    parts = [math.prod(mesh.shape[name] for name in names) for names in axes]
    shape = tuple(part * draw(st.integers(0 if part == 1 else 1, max_blocks)) for part in parts)
    spec = PartitionSpec(*[tuple(names) if names else None for names in axes])
    itemsize = draw(st.sampled_from([1, 2, 4, 8, 16]))
    return ArraySpec(shape=shape, itemsize=itemsize, sharding=NamedSharding(mesh, spec))


def trees(leaves: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[Any]:
    """Trees of dictionaries with str and int keys, lists, tuples and None."""
    values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text("ab./~1", max_size=4))
    keys = st.one_of(st.text("ab./~1", max_size=4), st.integers(-2, 12))
    return st.recursive(
        leaves if leaves is not None else st.one_of(values, st.builds(np.int32, st.integers(0, 9))),
        lambda below: st.one_of(
            st.lists(below, max_size=3),
            st.lists(below, max_size=3).map(tuple),
            st.dictionaries(keys, below, max_size=3),
        ),
        max_leaves=12,
    )
