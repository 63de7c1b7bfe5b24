"""One leaf of a lost stage: what arrives from where, and how it is combined. Runs inside the compiled program."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.recovery.combine import Weight, neighbour_weights, weighted_average
from jaxckpt.recovery.layout import Placement
from jaxckpt.recovery.plan import RecoveryPlan, StageStep

PART_BYTES = 2 * 1024 * 1024  # of a row, that travels at a time


class Cut(NamedTuple):
    """A part of a leaf: ``size`` places of an axis from ``start`` on."""

    axis: int
    start: Any
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The stage that is filled, and by what."""

    plan: RecoveryPlan
    step: StageStep
    mesh: Mesh | None  # None: no axis is manual, every row is here
    specs: dict[str, PartitionSpec]
    norms: Any
    norm_spec: PartitionSpec
    fresh: dict[str, Any] = field(default_factory=dict)  # leaves of the optimizer as ``init`` makes this stage's


def recovered_stacked(name: str, value: jax.Array, given: Any, row: Row) -> jax.Array:
    """A leaf (..., stages, ...) with the row of the lost stage replaced; ``value`` is this device's shard."""
    place = row.plan.layout.placement(name)
    axis, stage = place.stage_axis, row.step.stage
    optimizer = "opt_state" in name.split(".")
    spec = row.specs[name]
    if row.step.source == "replica":
        return _from_replica(value, spec, axis, row)
    if name in row.fresh:
        shape = value.shape[:axis] + value.shape[axis + 1 :]
        return _put(value, lambda: jnp.broadcast_to(row.fresh[name], shape).astype(value.dtype), spec, axis, row)
    if row.step.source in ("stale_copy", "same_step_copy", "checkpoint_stage"):
        if given is None:
            # Moments become fresh afterwards; a weight without a copy cannot.
            if optimizer:
                return _put(value, lambda: jnp.zeros_like(_local(value, stage, axis, spec, row)), spec, axis, row)
            raise InvalidArgumentError(f'Leaf "{name}" of the lost stage has no copy.')
        holder = stage if row.step.source == "checkpoint_stage" else (stage + 1) % row.plan.layout.stages

        def copied(value: jax.Array, cut: Cut | None) -> jax.Array:
            piece = _from_stage(given, holder, axis, spec, row, cut)
            return _put(value, lambda: piece.astype(value.dtype), spec, axis, row, cut)

        return _in_parts(value, copied, axis, row)
    if row.plan.policy.method == "random" and row.step.source == "average":
        return _put(value, lambda: jnp.zeros_like(_local(value, stage, axis, spec, row)), spec, axis, row)
    if optimizer and row.plan.policy.optimizer in ("fresh", "keep", "rescale"):
        return value  # replaced by fresh rows

    def averaged(value: jax.Array, cut: Cut | None) -> jax.Array:
        left, right = (None if n is None else _from_stage(value, n, axis, spec, row, cut) for n in row.step.neighbours)
        return _put(value, _combined(name, left, right, place, row), spec, axis, row, cut)

    by_element = row.plan.policy.method not in ("splice", "layerwise") and (
        row.plan.layout.repeats == 1 or place.repeat_axis is None
    )
    return _in_parts(value, averaged, axis, row) if by_element else averaged(value, None)


def recovered_listed(leaves: dict[str, Any], given: dict[str, Any], row: Row) -> dict[str, Any]:
    """New leaves of the lost stage's subtrees."""
    layout = row.plan.layout
    found = {(p.key, p.block): n for n in leaves for p in (layout.placement(n),)}
    new = {}
    for (key, block), name in found.items():
        if block % layout.stages != row.step.stage:
            continue
        if row.step.source in ("stale_copy", "same_step_copy", "checkpoint_stage"):
            if name in given:
                new[name] = given[name].astype(leaves[name].dtype)
            continue
        if row.step.source == "replica":
            raise InvalidArgumentError(
                f'Leaf "{name}" is of one stage in a list or dict, and has no row of a replica to be filled: give the '
                "replica's leaves as copies=, with Available(copies={stage: 0})."
            )
        if row.plan.policy.method == "random" and row.step.source == "average":
            continue
        if row.step.source == "edge_copy":
            partner = row.step.neighbours[0]
            assert partner is not None
            new[name] = leaves[found[key, block - row.step.stage + partner]]
            continue
        sides = [leaves.get(found.get((key, block + move), "")) for move in (-1, 1)]
        if sides[0] is None and sides[1] is None:
            continue
        a, b = _weights(row, block)
        new[name] = _merge(name, sides[0], sides[1], a, b, row)
    return new


def refilled(name: str, value: jax.Array, row: Row) -> jax.Array:
    """A leaf that all stages hold, copied to the lost stage's devices from a living one's."""
    assert row.mesh is not None
    layout = row.plan.layout
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = refilled(name, jax.random.key_data(value), row)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    used = {n for entry in row.specs[name] for n in (entry if isinstance(entry, tuple) else (entry,))}
    if layout.axis in used:
        raise InvalidArgumentError(
            f'Leaf "{name}" is split over {layout.axis!r} and outside the pipeline: keep a copy (NeighbourCopies).'
        )
    size = row.mesh.shape[layout.axis]
    per_device = layout.stages // size
    owner = row.step.stage // per_device
    gone = {stage // per_device for stage in row.plan.lost}
    living = next((d % size for d in range(owner + 1, owner + size) if d % size not in gone), None)
    if living is None:
        raise InvalidArgumentError(f'Leaf "{name}": no device of another stage is left to copy it from.')
    moved = jax.lax.ppermute(value, layout.axis, [(living, owner)])
    return jnp.where(jax.lax.axis_index(layout.axis) == owner, moved, value)


def _combined(name: str, left: Any, right: Any, place: Placement, row: Row) -> Callable[[], Any]:
    """What makes the lost row. Everything that travels has arrived when this returns."""
    layout, stage = row.plan.layout, row.step.stage
    if row.step.source == "edge_copy":
        return lambda: left
    repeats = layout.repeats
    if repeats == 1 or place.repeat_axis is None:
        weights = _weights(row, stage)
        return lambda: _merge(name, left, right, *weights, row)
    # Blocks r * S + stage: at the ends of a round the neighbour belongs to the round before or after.
    axis = place.repeat_axis - (place.repeat_axis > place.stage_axis)
    each = [_weights(row, r * layout.stages + stage) for r in range(repeats)]

    def make() -> Any:
        out = []
        for r in range(repeats):
            before, after = r - (stage == 0), r + (stage == layout.stages - 1)
            one = None if before < 0 else jax.lax.index_in_dim(left, before, axis, keepdims=False)
            two = None if after >= repeats else jax.lax.index_in_dim(right, after, axis, keepdims=False)
            out.append(_merge(name, one, two, *each[r], row))
        return jnp.stack(out, axis)

    return make


def _merge(name: str, left: Any, right: Any, a: Weight, b: Weight, row: Row) -> Any:
    policy = row.plan.policy
    if left is None or right is None:
        return right if left is None else left
    if not jnp.issubdtype(left.dtype, jnp.inexact):
        # A count of steps: the smaller one makes the smaller update.
        return jnp.minimum(left, right) if jnp.issubdtype(left.dtype, jnp.integer) else left
    if policy.method == "copy":
        return left
    if policy.method == "identity" and _matches(name, policy.zero):
        return jnp.zeros_like(left)
    if policy.method == "splice":
        for pattern, axis in policy.units:
            if _matches(name, (pattern,)):
                half = left.shape[axis] // 2
                index = jax.lax.broadcasted_iota(jnp.int32, left.shape, axis % left.ndim)
                return jnp.where(index < half, left, right)
    if policy.method == "layerwise":
        return _between_layers(name, left, right, row)
    return weighted_average(left, right, a, b)


def _between_layers(name: str, left: jax.Array, right: jax.Array, row: Row) -> jax.Array:
    place = row.plan.layout.placement(name)
    if place.layers_axis is None:
        raise InvalidArgumentError(f'method="layerwise": the rule for "{name}" has no layers_axis.')
    axis = place.layers_axis - sum(
        x is not None and x < place.layers_axis for x in (place.stage_axis, place.repeat_axis)
    )
    layers = left.shape[axis]
    first = jax.lax.index_in_dim(left, layers - 1, axis)
    last = jax.lax.index_in_dim(right, 0, axis)
    share = (jnp.arange(layers, dtype=jnp.float32) + 1) / (layers + 1)
    share = share.reshape([-1 if i == axis else 1 for i in range(left.ndim)])
    return weighted_average(
        jnp.broadcast_to(first, left.shape), jnp.broadcast_to(last, right.shape), (1 - share, None), (share, None)
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(f".{pattern.replace('/', '.')}." in f".{name}." for pattern in patterns)


def _weights(row: Row, block: int) -> tuple[Weight, Weight]:
    one = (jnp.ones(()), None)
    if row.plan.policy.method != "weighted" or row.norms is None:
        return one, one
    layout = row.plan.layout
    sides = [block - 1, block + 1]
    if sides[0] < 0 or sides[1] >= layout.blocks:
        return one, one
    return neighbour_weights(_norm(row, sides[0]), _norm(row, sides[1]), row.plan.policy.power)


def _norm(row: Row, block: int) -> jax.Array:
    layout = row.plan.layout
    repeat, stage = divmod(block, layout.stages)
    norms = row.norms
    axis = norms.ndim - 1
    value = _from_stage(norms, stage, axis, row.norm_spec, row)
    return value if axis == 0 else value[repeat]


def _per_device(spec: PartitionSpec, axis: int, row: Row) -> int:
    """Stages per device along the mesh axis; all of them where the leaf is not split there."""
    layout = row.plan.layout
    names = spec[axis] if axis < len(spec) else None
    names = names if isinstance(names, tuple) else (names,)
    if row.mesh is None or layout.axis not in names:
        return layout.stages
    if names != (layout.axis,):
        raise InvalidArgumentError(f"The stage axis is split over mesh axes {names}; it must be {layout.axis!r} alone.")
    return layout.stages // row.mesh.shape[layout.axis]


def _in_parts(value: jax.Array, fill: Callable[[jax.Array, Cut | None], jax.Array], axis: int, row: Row) -> jax.Array:
    """``fill`` for one part of the row after the other: what travels takes the memory of a part, and not of the row."""
    if row.mesh is None:  # nothing travels, and a cut may cross shards
        return fill(value, None)
    along = max((d for d in range(value.ndim) if d != axis), key=lambda d: value.shape[d], default=axis)
    row_bytes = math.prod(value.shape[:axis] + value.shape[axis + 1 :]) * value.dtype.itemsize
    parts = min(-(-row_bytes // PART_BYTES), value.shape[along])
    if parts < 2 or along == axis:
        return fill(value, None)
    size = -(-value.shape[along] // parts)
    whole, rest = divmod(value.shape[along], size)
    value = jax.lax.fori_loop(0, whole, lambda i, value: fill(value, Cut(along, i * size, size)), value)
    return fill(value, Cut(along, whole * size, rest)) if rest else value


def _local(x: jax.Array, stage: int, axis: int, spec: PartitionSpec, row: Row, cut: Cut | None = None) -> jax.Array:
    if cut is not None:
        x = jax.lax.dynamic_slice_in_dim(x, cut.start, cut.size, cut.axis)
    return jax.lax.index_in_dim(x, stage % _per_device(spec, axis, row), axis, keepdims=False)


def _from_stage(
    x: jax.Array, source: int, axis: int, spec: PartitionSpec, row: Row, cut: Cut | None = None
) -> jax.Array:
    """The row of stage ``source``, or a part of it, on the device of the lost stage."""
    per_device = _per_device(spec, axis, row)
    piece = _local(x, source, axis, spec, row, cut)
    pair = (source // per_device, row.step.stage // per_device)
    return piece if pair[0] == pair[1] else jax.lax.ppermute(piece, row.plan.layout.axis, [pair])


def _put(
    x: jax.Array, make: Callable[[], Any], spec: PartitionSpec, axis: int, row: Row, cut: Cut | None = None
) -> jax.Array:
    """The row, or a part of it, written where it lies. Only there is it computed: all other devices do nothing."""
    per_device = _per_device(spec, axis, row)
    stage = row.step.stage

    def written(x: jax.Array) -> jax.Array:
        where: list[Any] = [0] * x.ndim
        where[axis] = stage % per_device
        if cut is not None:
            where[cut.axis] = cut.start
        return jax.lax.dynamic_update_slice(x, jnp.expand_dims(make(), axis), where)

    if per_device == row.plan.layout.stages:
        return written(x)
    mine = jax.lax.axis_index(row.plan.layout.axis) == stage // per_device
    return jax.lax.cond(mine, written, lambda x: x, x)


def _from_replica(x: jax.Array, spec: PartitionSpec, axis: int, row: Row) -> jax.Array:
    assert row.step.replica is not None
    name, lost, live = row.step.replica
    layout = row.plan.layout
    used = {n for entry in spec for n in (entry if isinstance(entry, tuple) else (entry,))}
    if row.mesh is None or name not in row.mesh.shape or name in used:
        raise InvalidArgumentError(f"No replica along mesh axis {name!r}: the leaf's sharding is {spec}.")
    per_device = _per_device(spec, axis, row)
    piece = _local(x, row.step.stage, axis, spec, row)
    size = row.mesh.shape[name]
    if per_device == layout.stages:
        moved = jax.lax.ppermute(piece, name, [(live, lost)])
    else:
        owner = row.step.stage // per_device
        moved = jax.lax.ppermute(piece, (layout.axis, name), [(owner * size + live, owner * size + lost)])
    here = jax.lax.axis_index(name) == lost
    return jnp.where(here, _put(x, lambda: moved, spec, axis, row), x)
