"""Fill a lost stage in one compiled program: neighbours' shards travel, nothing of the lost stage is read.

CheckFree and CheckFree+ (arXiv 2506.15461, sections 4.2 and 4.3). The program is ``shard_map`` with ``ppermute`` and
donates the state; every other stage stays where it is. What goes to a stage is selected there, never multiplied by
zero: the lost rows may be NaN.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.events import Recovered, emit
from jaxckpt.core.tree import PyTree, flatten, rebuild
from jaxckpt.recovery.copies import NeighbourCopies
from jaxckpt.recovery.given import beside, check_given, is_setting, renewed_leaves
from jaxckpt.recovery.layout import StageLayout, check_congruent
from jaxckpt.recovery.moments import OPT_STATE, fresh_leaves, is_renewed
from jaxckpt.recovery.plan import RecoveryPlan, StageStep
from jaxckpt.recovery.rows import Row, recovered_listed, recovered_stacked, refilled


def recover_stage(
    state: PyTree,
    plan: RecoveryPlan,
    mesh: Mesh,
    *,
    norms: jax.Array | None = None,
    copies: PyTree = None,
    tx: Any = None,
    init: Callable[[], PyTree] | None = None,
    fill_replicated: bool = False,
    step: int | None = None,
) -> PyTree:
    """The state with the lost stages filled in. ``state`` is donated.

    Args:
        state: any tree; leaves whose name has a segment ``opt_state`` are the optimizer's, all other floating leaves
            of a stage are weights.
        norms: gradient norms, float32 (stages,) or (repeats, stages): the weights of "weighted".
        copies: for the sources ``stale_copy`` and ``same_step_copy`` the ``values`` of ``NeighbourCopies``; for
            ``checkpoint_stage`` a tree like ``state`` (or only its weights) restored from the checkpoint.
        tx: the optax transformation, when moments become fresh.
        init: makes fresh weights, a tree like ``state["params"]``, for ``method="random"``.
        fill_replicated: leaves outside the pipeline (embedding, head, counts) are copied to the lost stage's devices
            from a neighbour's: for a process that starts empty. Costs their bytes in addition.
        step: for the event.

    Raises:
        InvalidArgumentError: the plan is a rollback, something the plan needs was not given, or leaves do not fit.

    Example:
        >>> layout = StageLayout(stages=4)
        >>> mesh = jax.make_mesh((1,), ("stage",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> from jaxckpt.recovery.plan import plan_recovery
        >>> plan = plan_recovery(1, layout)
        >>> rows = jnp.asarray([1.0, jnp.nan, 3.0, 4.0])
        >>> recover_stage({"stages": rows}, plan, mesh, norms=jnp.ones(4))["stages"].tolist()
        [1.0, 2.0, 3.0, 4.0]
    """
    began = time.perf_counter()
    program, arguments = _program(state, plan, mesh, norms, copies, tx, init, fill_replicated)
    new = program(*arguments)
    emit(
        Recovered(
            step=step,
            stages=plan.lost,
            sources=tuple(s.source for s in plan.steps),
            method=plan.policy.method,
            seconds=time.perf_counter() - began,
        )
    )
    return new


def lower_recovery(
    state: PyTree,
    plan: RecoveryPlan,
    mesh: Mesh,
    *,
    norms: Any = None,
    copies: PyTree = None,
    tx: Any = None,
    init: Callable[[], PyTree] | None = None,
    fill_replicated: bool = False,
) -> jax.stages.Lowered:
    """The program of ``recover_stage``, lowered: to compile ahead, or to look at. Abstract arrays will do."""
    program, arguments = _program(state, plan, mesh, norms, copies, tx, init, fill_replicated)
    return program.lower(*arguments)


def _program(
    state: PyTree, plan: RecoveryPlan, mesh: Mesh, norms: Any, copies: PyTree, tx: Any, init: Any, fill_replicated: bool
) -> tuple[Any, tuple[Any, ...]]:
    if plan.rollback:
        raise InvalidArgumentError(f"The plan is a rollback ({plan.why}): restore the state instead.")
    leaves, _ = flatten(state)
    layout = plan.layout
    if any(step.source in ("average", "edge_copy") for step in plan.steps):
        check_congruent(leaves, layout)
    copies = copies.values if isinstance(copies, NeighbourCopies) else copies
    values = {leaf.name: leaf.value for leaf in leaves}
    given = {leaf.name: leaf.value for leaf in flatten(copies)[0]} if copies is not None else {}
    # Copies may be of the weights alone: ``params`` need not be spelt out.
    renamed = {name: name if name in values else f"params.{name}" for name in given}
    if unknown := [name for name, full in renamed.items() if full not in values]:
        raise InvalidArgumentError(f'Leaf "{unknown[0]}" of copies has no counterpart in the state.')
    given = {renamed[name]: value for name, value in given.items()}
    check_given(plan, leaves, norms, given if copies is not None else None, tx, init)
    staged = [s for n, s in ((x.name, getattr(x.value, "sharding", None)) for x in leaves) if _is_stacked(n, layout)]
    on_mesh = any(_on(sharding, mesh) for sharding in staged)
    if fill_replicated and not (on_mesh and layout.axis in mesh.shape):
        raise InvalidArgumentError(
            f"fill_replicated=True fills along the axis {layout.axis!r} of the mesh, and no stage of the state is "
            "sharded over it: copy the leaves outside the pipeline yourself (jax.device_put)."
        )
    program = _compiled(
        replace(plan, options=(), why="", seconds=0.0),
        mesh if on_mesh else None,
        tuple((leaf.name, _spec(leaf.value)) for leaf in leaves),
        _spec(norms),
        jax.tree.structure(state),
        tuple(s if _on(s, mesh) else None for s in (getattr(x, "sharding", None) for x in jax.tree.leaves(state))),
        tx,
        init,
        fill_replicated,
    )
    return program, (state, norms, given)


# Losing the same stage again compiles nothing.
@lru_cache(maxsize=32)
def _compiled(
    plan: RecoveryPlan,
    mesh: Mesh | None,
    specs: tuple[tuple[str, PartitionSpec], ...],
    norm_spec: PartitionSpec,
    structure: Any,
    shardings: tuple[Any, ...],
    tx: Any,
    init: Callable[[], PyTree] | None,
    fill_replicated: bool,
) -> Any:
    def run(state: PyTree, norms: Any, given: dict[str, Any]) -> PyTree:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            inner = flatten(state)[0]  # jit has sorted the keys of dictionaries
            flat = {leaf.name: leaf.value for leaf in inner}
            fresh = fresh_leaves(state, plan, tx) if renewed_leaves(inner, plan, given) and tx is not None else {}
            rows = _rows(flat, plan, norms, given, mesh, dict(specs), norm_spec, fill_replicated, fresh)
            names = iter([leaf.name for leaf in inner])
            state = rebuild(state, lambda _, __: rows[next(names)])
            state = _with_init(state, plan, init)
            return _with_optimizer(state, plan, tx, given)

    out = {"out_shardings": jax.tree.unflatten(structure, shardings)} if mesh is not None else {}
    return jax.jit(run, donate_argnums=0, **out)


def _rows(
    flat: dict[str, Any],
    plan: RecoveryPlan,
    norms: Any,
    given: dict[str, Any],
    mesh: Mesh | None,
    specs: dict[str, PartitionSpec],
    norm_spec: PartitionSpec,
    fill_replicated: bool,
    fresh: dict[str, Any],
) -> dict[str, Any]:
    layout = plan.layout
    stacked = {n: v for n, v in flat.items() if _is_stacked(n, layout)}
    shared = {n: v for n, v in flat.items() if layout.placement(n).kind == "outside" or is_setting(n)}
    listed = {n: v for n, v in flat.items() if layout.placement(n).kind == "listed"}
    given_stacked = {n: v for n, v in given.items() if n in stacked}

    def renewed(n: str, v: Any, step: StageStep) -> bool:
        return is_renewed(n, v.dtype, step, plan, given)

    # One number for all elements is written where it belongs; rows of several would first lie on every device.
    numbers = {n: v for n, v in fresh.items() if n in stacked and not isinstance(v, jax.Array)}
    fresh_rows = {
        step.stage: {
            n: jax.lax.index_in_dim(v, step.stage, layout.placement(n).stage_axis, keepdims=False)
            for n, v in fresh.items()
            if n in stacked and n not in numbers and renewed(n, v, step)
        }
        for step in plan.steps
    }

    def body(
        stacked: dict[str, Any], given: dict[str, Any], norms: Any, shared: dict[str, Any], fresh_rows: dict[int, Any]
    ) -> Any:
        for step in plan.steps:
            row = Row(
                plan=plan, step=step, mesh=mesh, specs=specs, norms=norms, norm_spec=norm_spec,
                fresh=fresh_rows[step.stage] | {n: v for n, v in numbers.items() if renewed(n, v, step)},
            )  # fmt: skip
            stacked = {n: recovered_stacked(n, v, given.get(n), row) for n, v in stacked.items()}
            shared = {n: refilled(n, v, row) for n, v in shared.items()}
        return stacked, shared

    if mesh is None or layout.axis not in mesh.shape:
        new, _ = body(stacked, given_stacked, norms, {}, fresh_rows)
    else:
        if not fill_replicated:
            shared = {}
        chosen, held = {n: specs[n] for n in stacked}, {n: specs[n] for n in shared}
        new, shared = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(
                chosen,
                {n: specs[n] for n in given_stacked},
                norm_spec,
                held,
                {
                    stage: {n: _without(specs[n], layout.placement(n).stage_axis) for n in rows}
                    for stage, rows in fresh_rows.items()
                },
            ),
            out_specs=(chosen, held),
            check_vma=False,  # what is replicated stays so: the same select runs on every copy
        )(stacked, given_stacked, norms, shared, fresh_rows)
        new = new | shared
    for step in plan.steps:
        row = Row(plan=plan, step=step, mesh=None, specs=specs, norms=norms, norm_spec=norm_spec)
        listed |= recovered_listed(listed, given, row)
    return flat | new | listed


def _with_init(state: PyTree, plan: RecoveryPlan, init: Callable[[], PyTree] | None) -> PyTree:
    if plan.policy.method != "random" or init is None:
        return state
    fresh = {f"params.{leaf.name}": leaf.value for leaf in flatten(init())[0]}
    stages = [s.stage for s in plan.steps if s.source == "average"]
    return _replace(state, fresh, plan.layout, stages)


def _with_optimizer(state: PyTree, plan: RecoveryPlan, tx: Any, given: Collection[str]) -> PyTree:
    """Leaves of the optimizer that ``init`` makes of the weights, and those of listed stages."""
    inner = flatten(state)[0]
    if tx is not None and renewed_leaves(inner, plan, given):
        constant = fresh_leaves(state, plan, tx)
        params = state["params"] if isinstance(state, dict) else state.params
        made = {f"{OPT_STATE}.{leaf.name}": leaf.value for leaf in flatten(tx.init(params))[0]}
        done = {n for n in constant if _is_stacked(n, plan.layout)}
        for step in plan.steps:
            fresh = {n: v for n, v in made.items() if n not in done and is_renewed(n, v.dtype, step, plan, given)}
            state = _replace(state, fresh, plan.layout, [step.stage])
    again = [step for step in plan.steps if renewed_leaves(inner, plan, given, [step])]
    return _with_settings(state, plan, again)


def _without(spec: PartitionSpec, axis: int) -> PartitionSpec:
    return PartitionSpec(*(entry for i, entry in enumerate(spec) if i != axis))


def _replace(state: PyTree, fresh: dict[str, Any], layout: StageLayout, stages: list[int]) -> PyTree:
    """Rows of the given stages from ``fresh``, elementwise: nothing moves."""
    leaves, _ = flatten(state)
    names = iter([leaf.name for leaf in leaves])

    def one(_: Any, old: Any) -> Any:
        name = next(names)
        place = layout.placement(name)
        if name not in fresh or is_setting(name) or place.kind == "outside":
            return old
        if place.kind == "listed":
            return fresh[name].astype(old.dtype) if place.block % layout.stages in stages else old
        index = jax.lax.broadcasted_iota(jnp.int32, old.shape, place.stage_axis)
        mask = jnp.zeros(old.shape, bool)
        for stage in stages:
            mask |= index == stage
        return jnp.where(mask, fresh[name].astype(old.dtype), old)

    return rebuild(state, one)


def _with_settings(state: PyTree, plan: RecoveryPlan, renewed: Sequence[StageStep]) -> PyTree:
    """The learning rate's factor, where weights are no longer exact, and the age of moments that became fresh."""
    leaves, _ = flatten(state)
    inner = iter(leaves)

    def of(steps: Sequence[StageStep]) -> jax.Array:
        mask = jnp.zeros(plan.layout.stages, bool)
        for step in steps:
            mask |= jnp.arange(plan.layout.stages) == step.stage
        return mask

    changed = [step for step in plan.steps if step.source not in ("replica", "same_step_copy")]

    def one(_: Any, old: Any) -> Any:
        leaf = next(inner)
        name = leaf.name.split(".")
        if "stage_lr_scale" in name:
            base = jnp.where(jnp.isfinite(old), old, 1.0) if plan.policy.lr_compound else jnp.ones_like(old)
            return jnp.where(of(changed), base * plan.policy.lr_scale, old)
        if "stage_age" in name:
            # Beside the factor it is the age of that, elsewhere of the moments.
            return jnp.where(of(changed if "stage_lr_scale" in beside(leaf, leaves) else renewed), 0, old)
        return old

    return rebuild(state, one)


def _is_stacked(name: str, layout: StageLayout) -> bool:
    return layout.placement(name).kind == "stacked" and not is_setting(name)


def _on(sharding: Any, mesh: Mesh) -> bool:
    return isinstance(sharding, NamedSharding) and sharding.mesh == mesh


def _spec(value: Any) -> PartitionSpec:
    sharding = getattr(value, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
