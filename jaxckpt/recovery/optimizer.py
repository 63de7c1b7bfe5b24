"""Optimizers that know stages: one state per stage with its own count, and a learning rate per stage.

The optax transformations here need optax; importing this module does not.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.tree import PyTree, flatten, rebuild
from jaxckpt.recovery.layout import Stacked, StageLayout


class StageOptimizerState(NamedTuple):
    """States by kind of leaf. Their parameters are dicts from leaf name to leaf."""

    stacked_stages: Any  # every leaf, counts too, has the stage axis (and repeat axis) of the parameters
    listed_stages: dict[str, Any]  # block -> state
    outside: Any


class StageLrState(NamedTuple):
    """The factor on each stage's learning rate, and the updates since it was recovered."""

    stage_lr_scale: jax.Array  # float32 (stages,)
    stage_age: jax.Array  # int32 (stages,)


class ResetAgeState(NamedTuple):
    """Updates since each stage's moments were zeroed; large at first, where it has no effect."""

    stage_age: jax.Array  # int32 (stages,)


def stage_optimizer(tx: Any, layout: StageLayout) -> Any:
    """``tx`` for every stage on its own, so that one stage can start afresh with a count of zero.

    With one count for all stages, zeroing moments makes Adam's next updates up to six times too large. What ``tx``
    does over a whole tree, such as clipping by the global norm, becomes per stage: put the global one outside.
    In a circular layout each block has its own state.

    Example:
        >>> import optax
        >>> tx = stage_optimizer(optax.adam(1e-3), StageLayout(stages=4))
        >>> state = tx.init({"stages": jnp.ones((4, 2)), "head": jnp.ones(3)})
        >>> state.stacked_stages[0].count.shape
        (4,)
    """
    from optax import GradientTransformation as Transformation

    axes = _axes(layout)

    def init(params: PyTree) -> StageOptimizerState:
        stacked, listed, outside = _split(params, layout)
        with _mesh_of(stacked):
            made = _vmap(tx.init, axes)(stacked) if stacked else ()
        return StageOptimizerState(
            _placed(made, stacked) if stacked else (),
            {block: tx.init(part) for block, part in listed.items()},
            tx.init(outside) if outside else (),
        )

    def update(
        updates: PyTree, state: StageOptimizerState, params: PyTree = None
    ) -> tuple[PyTree, StageOptimizerState]:
        # Optax itself is written for standard promotion.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            grads = _split(updates, layout)
            values = _split(params, layout) if params is not None else None
            new: dict[str, Any] = {}
            stacked_state, outside_state, listed_state = state.stacked_stages, state.outside, {}
            if grads[0]:
                arguments = (grads[0], stacked_state, *(() if values is None else (values[0],)))
                done, stacked_state = _vmap(tx.update, axes)(*arguments)
                new |= done
            for block, part in grads[1].items():
                done, listed_state[block] = tx.update(
                    part, state.listed_stages[block], None if values is None else values[1][block]
                )
                new |= done
            if grads[2]:
                done, outside_state = tx.update(grads[2], outside_state, None if values is None else values[2])
                new |= done
        return _joined(updates, new), StageOptimizerState(stacked_state, listed_state, outside_state)

    return Transformation(init, update)  # pyright: ignore[reportArgumentType]


def scale_by_stage_lr(layout: StageLayout, *, decay_steps: int | None = None) -> Any:
    """Multiply each stage's updates by its factor, which ``recover_stage`` sets to ``policy.lr_scale``.

    Algorithm 1 of CheckFree (arXiv 2506.15461). Put it after the optimizer: ``chain(stage_optimizer(adam), this)``.

    Args:
        decay_steps: the factor returns to 1 linearly over so many updates; None keeps it for good.
    """
    from optax import GradientTransformation as Transformation

    def init(params: PyTree) -> StageLrState:
        del params
        return StageLrState(jnp.ones(layout.stages, jnp.float32), jnp.zeros(layout.stages, jnp.int32))

    def update(updates: PyTree, state: StageLrState, params: PyTree = None) -> tuple[PyTree, StageLrState]:
        del params
        scale = state.stage_lr_scale
        if decay_steps is not None:
            left = jnp.maximum(0.0, 1.0 - state.stage_age.astype(jnp.float32) / decay_steps)
            scale = 1.0 + (scale - 1.0) * left
        return _scaled(updates, scale, layout), StageLrState(state.stage_lr_scale, state.stage_age + 1)

    return Transformation(init, update)  # pyright: ignore[reportArgumentType]


def scale_by_reset_age(layout: StageLayout, *, b1: float = 0.9, b2: float = 0.999) -> Any:
    """For one shared Adam count: shrink a recovered stage's updates to what its own count would have made them.

    After zeroed moments Adam with a large count is off by (1 - b1^t) / sqrt(1 - b2^t), t updates after; this undoes it.
    """
    from optax import GradientTransformation as Transformation

    old = 1 << 20

    def init(params: PyTree) -> ResetAgeState:
        del params
        return ResetAgeState(jnp.full(layout.stages, old, jnp.int32))

    def update(updates: PyTree, state: ResetAgeState, params: PyTree = None) -> tuple[PyTree, ResetAgeState]:
        del params
        t = state.stage_age.astype(jnp.float32) + 1.0
        factor = jnp.where(state.stage_age >= old, 1.0, jnp.sqrt(1.0 - b2**t) / (1.0 - b1**t))
        return _scaled(updates, factor, layout), ResetAgeState(jnp.minimum(state.stage_age + 1, 1 << 30))

    return Transformation(init, update)  # pyright: ignore[reportArgumentType]


def _scaled(updates: PyTree, scale: jax.Array, layout: StageLayout) -> PyTree:
    new = {}
    for name, value in _named(updates):
        place = layout.placement(name)
        if place.kind == "stacked":
            shape = [layout.stages if i == place.stage_axis else 1 for i in range(value.ndim)]
            value = (value * scale.reshape(shape)).astype(value.dtype)
        elif place.kind == "listed":
            value = (value * scale[place.block % layout.stages]).astype(value.dtype)
        new[name] = value
    return _joined(updates, new)


def _split(tree: PyTree, layout: StageLayout) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
    stacked: dict[str, Any] = {}
    listed: dict[str, dict[str, Any]] = {}
    outside: dict[str, Any] = {}
    for name, value in _named(tree):
        place = layout.placement(name)
        if place.kind == "stacked":
            stacked[name] = value
        elif place.kind == "listed":
            listed.setdefault(str(place.block), {})[name] = value
        else:
            outside[name] = value
    return stacked, listed, outside


def _named(tree: PyTree) -> list[tuple[str, Any]]:
    """Leaves by name. Flax NNX hands its optimizers variables at first and their values later: one name for both."""
    return [(leaf.name.removesuffix(".value"), leaf.value) for leaf in flatten(tree)[0]]


def _joined(like: PyTree, values: dict[str, Any]) -> PyTree:
    names = iter([name for name, _ in _named(like)])
    return rebuild(like, lambda _, __: values[next(names)])


def _mesh_of(stacked: dict[str, Any]) -> AbstractContextManager[Any]:
    """The mesh in force where its axes are Explicit: jax 0.10 needs that for ``zeros_like`` under ``vmap``."""
    first = next(iter(stacked.values()), None)
    sharding = None if isinstance(first, Tracer) else getattr(first, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return nullcontext()
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return jax.set_mesh(sharding.mesh) if explicit and jax.sharding.get_abstract_mesh().empty else nullcontext()


def _placed(state: PyTree, stacked: dict[str, Any]) -> PyTree:
    """Moments as their parameters lie, counts along the stages: ``init`` under ``vmap`` leaves all on one device."""
    first = next(iter(stacked.values()))
    if isinstance(first, Tracer) or not isinstance(getattr(first, "sharding", None), NamedSharding):
        return state

    def one(path: Any, value: Any) -> Any:
        like = stacked.get(str(path[-1]) if path else "", first)
        sharding = getattr(like, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return value
        if value.shape != like.shape:
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: value.ndim]))
            if value.shape != like.shape[: value.ndim]:
                return value
        return jax.device_put(value, sharding)

    return rebuild(state, one)


def _axes(layout: StageLayout) -> tuple[int, ...]:
    found = {
        tuple(sorted(a for a in (r.stage_axis, r.repeat_axis) if a is not None))
        for r in layout.rules
        if isinstance(r, Stacked)
    }
    if len(found) > 1 or any(axes not in ((0,), (0, 1)) for axes in found):
        raise InvalidArgumentError(
            "stage_optimizer needs one set of stage and repeat axes, the leading ones, for all rules; "
            f"found {sorted(found)}."
        )
    return next(iter(found), (0,))


def _vmap(function: Any, axes: tuple[int, ...]) -> Any:
    for _ in axes:
        function = jax.vmap(function)
    return function
