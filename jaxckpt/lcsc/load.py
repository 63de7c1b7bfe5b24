"""Where the checkpoints of a search are: stacked on devices if they fit, else streamed for each chunk."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxckpt.averaging.average import average
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.lcsc.evaluate import Called, Evaluator, Resident, Streamed, chunk_of
from jaxckpt.lcsc.space import Space

PyTree = Any
Placement = Literal["auto", "device", "stream"]
_SHARE = 0.5  # of free device memory that the stack may take


def make_evaluator(
    sources: Sequence[Any],
    space: Space,
    *,
    how: dict[str, Any],
    placement: Placement,
    is_jitted: bool,
    population: int,
    memory_bytes: int,
    mesh: Mesh | None,
    axis: str,
) -> Evaluator:
    """What evaluates populations, by the place that the checkpoints have."""
    if placement not in ("auto", "device", "stream"):
        raise InvalidArgumentError(f'placement is {placement!r}; it is "auto", "device" or "stream".')
    if mesh is not None and axis not in mesh.axis_names:
        raise InvalidArgumentError(f"axis is {axis!r}; the mesh has {mesh.axis_names}.")
    first = average(sources[:1], [1.0], **how)
    space.group_of(first)
    model_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(jax.tree.map(jnp.asarray, first)))
    chunk = chunk_of(population, model_bytes, memory_bytes, 1 if mesh is None else mesh.shape[axis])
    if placement == "stream" or (placement == "auto" and not _fits(model_bytes * space.count, first)):
        return Streamed(sources=sources, space=space, chunk=chunk, how=how, is_jitted=is_jitted)
    stacked = stack([first, *(average([one], [1.0], **how) for one in sources[1:])])
    if not is_jitted:
        return Called(stacked=stacked, space=space)
    return Resident(stacked=stacked, space=space, chunk=chunk, mesh=mesh, axis=axis)


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Leaves [K, ...], sharded on their trailing axes as the trees' are; every device holds its part of all K."""

    def one(*leaves: Any) -> jax.Array:
        sharding = getattr(leaves[0], "sharding", None)
        if isinstance(sharding, NamedSharding):
            wanted = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
            return jax.jit(lambda *parts: jnp.stack(parts), out_shardings=wanted)(*leaves)
        return jnp.stack([jnp.asarray(leaf) for leaf in leaves])

    return jax.tree.map(one, *trees)


def _fits(stack_bytes: int, first: PyTree) -> bool:
    """Whether the stack leaves memory to evaluate in; true where the backend does not tell."""
    placed = [leaf for leaf in jax.tree.leaves(first) if isinstance(leaf, jax.Array)]
    devices = {one for leaf in placed for one in leaf.sharding.addressable_devices} or set(jax.local_devices()[:1])
    free = 0.0
    for device in devices:
        stats = device.memory_stats()
        free += math.inf if not stats or "bytes_limit" not in stats else stats["bytes_limit"] - stats["bytes_in_use"]
    return stack_bytes <= _SHARE * free
