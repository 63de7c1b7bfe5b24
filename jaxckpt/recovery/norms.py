"""Gradient norms per stage, inside the training step and with no exchange between stages."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxckpt.core.tree import PyTree, flatten
from jaxckpt.recovery.layout import StageLayout


class StageNorms(NamedTuple):
    """L2 norms of the last gradients, float32 (stages,) or (repeats, stages)."""

    raw: jax.Array
    clipped: jax.Array  # at most ``clip``, plus 1e-4: what the authors' code weighs by
    ema: jax.Array  # of the raw ones


def stage_norms(grads: PyTree, layout: StageLayout) -> jax.Array:
    """L2 norm of each stage's gradients, float32 (stages,), or (repeats, stages) in a circular layout.

    Reduced over all other axes, so nothing moves along the stage axis; axes that shard a leaf within a stage add one
    sum of scalars. Call it after gradients are summed over data parallelism.

    Example:
        >>> stage_norms({"stages": jnp.asarray([[3.0, 4.0], [0.0, 1.0]])}, StageLayout(stages=2)).tolist()
        [5.0, 1.0]
    """
    total = jnp.zeros((layout.repeats, layout.stages), jnp.float32)
    for leaf in flatten(grads)[0]:
        place = layout.placement(leaf.name)
        if place.kind == "outside" or not jnp.issubdtype(leaf.value.dtype, jnp.inexact):
            continue
        square = jnp.square(jnp.abs(leaf.value).astype(jnp.float32))
        if place.kind == "listed":
            repeat, stage = divmod(place.block, layout.stages)
            total = total.at[repeat, stage].add(jnp.sum(square))
            continue
        kept = [axis for axis in (place.repeat_axis, place.stage_axis) if axis is not None]
        part = jnp.sum(square, axis=tuple(i for i in range(square.ndim) if i not in kept))
        if len(kept) == 2 and kept[0] > kept[1]:
            part = part.T
        total = total + part.reshape(-1, layout.stages)
    norms = jnp.sqrt(total)
    return norms[0] if layout.repeats == 1 else norms


def init_norms(layout: StageLayout) -> StageNorms:
    """All zero: neighbours weigh the same until the first step."""
    shape = (layout.stages,) if layout.repeats == 1 else (layout.repeats, layout.stages)
    # Three arrays: one buffer cannot be donated thrice.
    return StageNorms(*(jnp.zeros(shape, jnp.float32) for _ in range(3)))


def update_norms(
    norms: StageNorms, grads: PyTree, layout: StageLayout, *, clip: float = 1.0, decay: float = 0.9
) -> StageNorms:
    """Norms of new gradients; an average that is not finite (a lost stage's) starts again."""
    raw = stage_norms(grads, layout)
    fresh = ~jnp.isfinite(norms.ema) | (norms.ema == 0)
    return StageNorms(raw, jnp.minimum(raw, clip) + 1e-4, jnp.where(fresh, raw, decay * norms.ema + (1 - decay) * raw))


def finite_stages(tree: PyTree, layout: StageLayout) -> jax.Array:
    """bool (stages,): whether all of a stage's floating leaves are finite."""
    good = jnp.ones(layout.stages, bool)
    for leaf in flatten(tree)[0]:
        place = layout.placement(leaf.name)
        if place.kind == "outside" or not jnp.issubdtype(leaf.value.dtype, jnp.inexact):
            continue
        finite = jnp.isfinite(leaf.value)
        if place.kind == "listed":
            stage = place.block % layout.stages
            good = good.at[stage].set(good[stage] & finite.all())
        else:
            good &= finite.all(axis=tuple(i for i in range(finite.ndim) if i != place.stage_axis))
    return good
