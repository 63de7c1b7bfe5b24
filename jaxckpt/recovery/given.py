"""What a recovery is given, checked before anything is compiled: copies, norms, the optimizer, and where stages lie."""

from collections.abc import Collection, Sequence
from typing import Any

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.tree import NamedLeaf
from jaxckpt.recovery.moments import OPT_STATE, is_own, is_renewed
from jaxckpt.recovery.plan import RecoveryPlan, StageStep


def check_given(
    plan: RecoveryPlan, leaves: list[NamedLeaf], norms: Any, given: Collection[str] | None, tx: Any, init: Any
) -> None:
    """Raise an InvalidArgumentError for what the plan needs and was not given; ``given``: leaves of the copies."""
    layout, policy = plan.layout, plan.policy
    sources = {s.source for s in plan.steps}
    shapes = ((layout.stages,), (layout.repeats, layout.stages))
    shape = tuple(getattr(norms, "shape", ()))
    if "average" in sources and policy.method == "weighted" and (norms is None or shape not in shapes):
        have = type(norms).__name__ if not hasattr(norms, "shape") else shape
        raise InvalidArgumentError(
            f'method="weighted" needs norms, an array of shape {shapes[0]} or {shapes[1]}; got {have}. '
            "Of a StageNorms pass one of its fields."
        )
    _check_devices(leaves, plan)
    own = {s for s in sources if is_own(s)}
    if own and given is None:
        raise InvalidArgumentError(f"The plan takes stages from {sorted(sources)}: pass copies=.")
    if "checkpoint_stage" in own and len(own) > 1:
        raise InvalidArgumentError(
            f"The plan takes stages {[s.stage for s in plan.steps if is_own(s.source)]} from {sorted(own)}: copies on "
            "neighbours and rows of a checkpoint are laid out differently, and one copies= cannot be both. Recover one "
            "stage after the other, each with a plan of its own (Available(bad=...) names the other)."
        )
    if "average" in sources and policy.method == "random" and init is None:
        raise InvalidArgumentError('method="random" needs init=: a function that makes fresh weights.')
    renewed = renewed_leaves(leaves, plan, given or ())
    if renewed and tx is None:
        raise InvalidArgumentError(
            f'optimizer="{policy.optimizer}" makes moments as the optimizer does where there are none to take: pass '
            f'tx= (leaf "{renewed[0].name}").'
        )
    if renewed and not any(leaf.name.split(".")[0] == "params" for leaf in leaves):
        raise InvalidArgumentError(
            'Fresh moments are made of the weights, which are to lie under "params" of the state.'
        )
    has_age = any(
        leaf.name.split(".")[-1] == "stage_age" and "stage_lr_scale" not in beside(leaf, leaves) for leaf in leaves
    )
    if policy.optimizer == "rescale" and has_age:
        return
    # Zero moments under a count that is shared and large: the first Adam updates are up to six times too large.
    optimizer = [leaf for leaf in leaves if OPT_STATE in leaf.name.split(".")]
    parents = {leaf.path[:-1]: leaf.name for leaf in optimizer if leaf.path[-1] == "count" and not leaf.value.shape}
    for leaf in renewed:
        if policy.optimizer == "nu_average" and "nu" not in leaf.name.split("."):
            continue  # small first moments over full second ones: small updates
        for parent, count in parents.items():
            place = layout.placement(count)
            if place.kind == "outside" and leaf.path[: len(parent)] == parent:
                raise InvalidArgumentError(
                    f'"{count}" is one count for all stages, so fresh moments of "{leaf.name}" would make the first '
                    'updates up to 6 times too large. Use stage_optimizer(tx, layout), or optimizer="average" or '
                    '"nu_average" (with moments to take), or "rescale" under scale_by_reset_age.'
                )


def beside(leaf: NamedLeaf, leaves: Sequence[NamedLeaf]) -> set[str]:
    """Last parts of the names of the leaves beside this one, its own among them."""
    return {other.name.split(".")[-1] for other in leaves if other.path[:-1] == leaf.path[:-1]}


def _check_devices(leaves: Sequence[NamedLeaf], plan: RecoveryPlan) -> None:
    """One program recovers a stage: what it takes must lie on the same devices."""
    first: NamedLeaf | None = None
    for leaf in leaves:
        devices = getattr(getattr(leaf.value, "sharding", None), "device_set", None)
        # Those that nobody has placed go wherever the program runs.
        if devices is None or not getattr(leaf.value, "committed", True):
            continue
        if plan.layout.placement(leaf.name).kind != "listed":
            continue
        first = first or leaf
        if devices != first.value.sharding.device_set:
            raise InvalidArgumentError(
                f'Leaves "{first.name}" and "{leaf.name}" lie on different devices, and one program cannot take both. '
                "Next step: jax.device_put the neighbours of the lost stage to its devices, recover a state of these "
                "stages there, and put the recovered stage back into yours."
            )


def is_setting(name: str) -> bool:
    """Whether a leaf is an optimizer's setting of all stages, and no part of one."""
    return bool({"stage_lr_scale", "stage_age"} & set(name.split(".")))


def moments_of(leaves: Sequence[NamedLeaf], plan: RecoveryPlan) -> list[NamedLeaf]:
    """The optimizer's leaves that belong to stages."""
    found = [leaf for leaf in leaves if OPT_STATE in leaf.name.split(".") and not is_setting(leaf.name)]
    return [leaf for leaf in found if plan.layout.placement(leaf.name).kind != "outside"]


def renewed_leaves(
    leaves: Sequence[NamedLeaf], plan: RecoveryPlan, given: Collection[str], steps: Sequence[StageStep] | None = None
) -> list[NamedLeaf]:
    """Those of them that become fresh for one of these steps, or of the plan's."""
    steps = plan.steps if steps is None else steps
    return [
        leaf
        for leaf in moments_of(leaves, plan)
        if any(is_renewed(leaf.name, leaf.value.dtype, step, plan, given) for step in steps)
    ]
