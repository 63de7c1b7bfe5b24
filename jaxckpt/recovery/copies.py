"""Copies of each stage on the next one, refreshed inside the training step every few steps.

Beyond the CheckFree paper: a lost stage returns from a copy a few steps old while the others go on, with no rollback.
The embedding and the head, which CheckFree+ (arXiv 2506.15461, section 4.3) copies as well, are best replicated over
the stage axis: ``recover_stage(..., fill_replicated=True)`` fills them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.tree import PyTree, flatten, rebuild
from jaxckpt.recovery.layout import StageLayout


class NeighbourCopies(NamedTuple):
    """``values`` is like the tree it was made of, with None for leaves outside the pipeline.

    Of stacked leaves the row of stage s + 1 (of stage 0: the last) is stage s's. Leaves of per-stage lists have their
    copy under their own name, on the same devices: a list gives no axis along which it could move.
    """

    values: PyTree
    taken: jax.Array  # int32 (): the step at which the copy was taken


def init_copies(tree: PyTree, layout: StageLayout, mesh: Mesh, *, step: int = 0) -> NeighbourCopies:
    """Copies of the stages' leaves in ``tree``: weights, or a whole state to keep moments too.

    Leaves outside the pipeline are left out. Costs the size of what is copied once more in memory.

    Raises:
        InvalidArgumentError: no leaf belongs to a stage.

    Example:
        >>> mesh = jax.make_mesh((1,), ("stage",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> copies = init_copies({"stages": jnp.arange(4.0), "head": jnp.ones(2)}, StageLayout(stages=4), mesh)
        >>> copies.values["stages"].tolist(), copies.values["head"]
        ([3.0, 0.0, 1.0, 2.0], None)
    """
    return jax.jit(lambda t: NeighbourCopies(_shifted(t, layout, mesh), jnp.asarray(step, jnp.int32)))(tree)


def refresh_copies(
    copies: NeighbourCopies, tree: PyTree, step: jax.Array | int, layout: StageLayout, mesh: Mesh, *, every: int = 1
) -> NeighbourCopies:
    """In the training step: take the copy anew where ``step`` is a multiple of ``every``, else keep it.

    Pass what the step ends with, the new weights (or the new state, where ``init_copies`` had one), and the number of
    updates that they had. With the old ones, which the update overwrites, XLA copies all of them in every step, whether
    a copy is taken or not.
    After a recovery call it with ``every=1``: the lost stage also held its neighbour's copy.
    """
    kept, now = {leaf.name for leaf in flatten(copies.values)[0]}, set(_staged(tree, layout))
    if kept != now:
        name = min(kept ^ now)
        raise InvalidArgumentError(
            f'Leaf "{name}" is in the {"copies" if name in kept else "tree"} alone: give refresh_copies the same '
            "leaves as init_copies."
        )
    step = jnp.asarray(step, jnp.int32)
    return jax.lax.cond(
        step % every == 0,
        lambda: NeighbourCopies(_shifted(tree, layout, mesh), step),
        lambda: copies,
    )


def copy_ages(copies: NeighbourCopies, step: int, layout: StageLayout) -> dict[int, int]:
    """For ``Available.copies``: the age of the copy of every stage that has one. Reads one number from the device."""
    age = step - int(copies.taken)
    places = [layout.placement(leaf.name) for leaf in flatten(copies.values)[0]]
    listed = {place.block % layout.stages for place in places if place.kind == "listed"}
    return dict.fromkeys(sorted(listed) or range(layout.stages), age)


def _shifted(tree: PyTree, layout: StageLayout, mesh: Mesh) -> PyTree:
    if not _staged(tree, layout):
        raise InvalidArgumentError(
            f"No leaf belongs to a stage; leaves are {[leaf.name for leaf in flatten(tree)[0]][:5]}. "
            f"Give the stages' weights or the whole state, or correct the layout's rules: {layout.rules}."
        )
    names = iter([leaf.name for leaf in flatten(tree)[0]])

    def one(_: object, value: jax.Array) -> jax.Array | None:
        place = layout.placement(next(names))
        if place.kind == "stacked":
            return _shift(value, place.stage_axis, layout, mesh)
        return jnp.copy(value) if place.kind == "listed" else None

    return rebuild(tree, one)


def _staged(tree: PyTree, layout: StageLayout) -> list[str]:
    return [leaf.name for leaf in flatten(tree)[0] if layout.placement(leaf.name).kind != "outside"]


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
