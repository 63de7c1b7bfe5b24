"""Copies of each stage on the next one, refreshed inside the training step every few steps.

Beyond the CheckFree paper: a lost stage returns from a copy a few steps old while the others go on, with no rollback.
The same mechanism with ``every=1`` keeps the embedding and the head of CheckFree+ (arXiv 2506.15461, section 4.3)
exact, where those are leaves with a stage axis.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.tree import PyTree, flatten, rebuild
from jaxckpt.recovery.layout import StageLayout


class NeighbourCopies(NamedTuple):
    """``values`` is like the tree it was made of: the row of stage s + 1 (of stage 0: the last) is stage s's."""

    values: PyTree
    taken: jax.Array  # int32 (): the step at which the copy was taken


def init_copies(tree: PyTree, layout: StageLayout, mesh: Mesh, *, step: int = 0) -> NeighbourCopies:
    """Copies of the stacked leaves of ``tree`` (weights, or moments too). Costs their size once more in memory."""
    return jax.jit(lambda t: NeighbourCopies(_shifted(t, layout, mesh), jnp.asarray(step, jnp.int32)))(tree)


def refresh_copies(
    copies: NeighbourCopies, tree: PyTree, step: jax.Array | int, layout: StageLayout, mesh: Mesh, *, every: int = 1
) -> NeighbourCopies:
    """In the training step: take the copy anew where ``step`` is a multiple of ``every``, else keep it.

    Pass what the step ends with, the new weights, and the number of updates that they had. With the old ones, which the
    update overwrites, XLA copies all of them in every step, whether a copy is taken or not.
    After a recovery call it with ``every=1``: the lost stage also held its neighbour's copy.
    """
    step = jnp.asarray(step, jnp.int32)
    return jax.lax.cond(
        step % every == 0,
        lambda: NeighbourCopies(_shifted(tree, layout, mesh), step),
        lambda: copies,
    )


def copy_ages(copies: NeighbourCopies, step: int, layout: StageLayout) -> dict[int, int]:
    """For ``Available.copies``: the age of every stage's copy. Reads one number from the device."""
    age = step - int(copies.taken)
    return dict.fromkeys(range(layout.stages), age)


def _shifted(tree: PyTree, layout: StageLayout, mesh: Mesh) -> PyTree:
    leaves, _ = flatten(tree)
    for leaf in leaves:
        if layout.placement(leaf.name).kind != "stacked":
            raise InvalidArgumentError(f'Leaf "{leaf.name}" has no stage axis: give the stacked leaves only.')
    names = iter([leaf.name for leaf in leaves])
    return rebuild(tree, lambda _, value: _shift(value, layout.placement(next(names)).stage_axis, layout, mesh))


def _shift(value: jax.Array, axis: int, layout: StageLayout, mesh: Mesh) -> jax.Array:
    size = mesh.shape.get(layout.axis, 1)
    if size == 1:
        return jnp.roll(value, 1, axis)

    def body(x: jax.Array) -> jax.Array:
        last = jax.lax.index_in_dim(x, x.shape[axis] - 1, axis)
        moved = jax.lax.ppermute(last, layout.axis, [(i, (i + 1) % size) for i in range(size)])
        return jnp.concatenate([moved, jax.lax.slice_in_dim(x, 0, x.shape[axis] - 1, axis=axis)], axis)

    spec = PartitionSpec(*[layout.axis if i == axis else None for i in range(value.ndim)])
    return jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={layout.axis})(value)
