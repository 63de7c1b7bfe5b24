"""Choose how a lost stage comes back: every source with its price, the cheapest that is possible. Pure.

Prices are seconds of training: what moving the bytes takes plus what the loss of information costs in steps. The
priors are those of CheckFree's own tables (arXiv 2506.15461; 20 to 85 steps per average, by the arithmetic of its
table 2) and give way to what is measured: ``observe``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import SupportsIndex

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.text import counted
from jaxckpt.recovery.layout import StageLayout

METHODS = ("weighted", "uniform", "copy", "random", "identity", "splice", "layerwise")
OPTIMIZER_MODES = ("fresh", "average", "nu_average", "rescale", "keep")
# In order of preference where prices are equal.
SOURCES = ("replica", "same_step_copy", "stale_copy", "average", "edge_copy", "checkpoint_stage", "rollback")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPolicy:
    """How a stage is made from its neighbours and how training goes on from it.

    Args:
        method: "weighted" (CheckFree), "uniform", "copy", "random", or the variants "identity" (average, but what adds
            to the residual stream is zero), "splice" (half of the units of each), "layerwise" (interpolated between
            the last layer before and the first after).
        power: 1 or 2, of the gradient norms. The paper prints the square, its code uses the norm.
        optimizer: what becomes of the lost stage's moments. "fresh": as ``init`` makes them. "average": like the
            weights. "nu_average": only the second. "rescale": zero, with a shared count, under
            ``scale_by_reset_age``. "keep": taken from the copy, else fresh. A source that has the stage's own weights
            and not its moments makes them fresh in every mode.
        lr_scale: factor on the lost stage's learning rate, where the optimizer has ``scale_by_stage_lr``; an exact
            source (replica, same-step copy) leaves it.
        lr_compound: a second loss multiplies again (Algorithm 1, read literally) instead of setting the factor.
        zero: patterns of the leaves that "identity" zeroes, such as ``attention.out``.
        units: for "splice", patterns to the axis of units (heads, hidden), counted from the end (negative).
    """

    method: str = "weighted"
    power: int = 1
    optimizer: str = "fresh"
    lr_scale: float = 1.1
    lr_compound: bool = False
    zero: tuple[str, ...] = ()
    units: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS or self.power not in (1, 2) or self.optimizer not in OPTIMIZER_MODES:
            raise InvalidArgumentError(
                f"method={self.method!r}, power={self.power!r}, optimizer={self.optimizer!r}: method is one of "
                f"{METHODS}, power 1 or 2, optimizer one of {OPTIMIZER_MODES}."
            )
        if self.method == "identity" and not self.zero:
            raise InvalidArgumentError('method="identity" needs zero=(...): which leaves add to the residual stream.')
        if self.method == "splice" and not self.units:
            raise InvalidArgumentError('method="splice" needs units=((pattern, axis), ...): what is taken by halves.')
        object.__setattr__(self, "zero", tuple(self.zero))
        object.__setattr__(self, "units", tuple(tuple(unit) for unit in self.units))


@dataclass(frozen=True, slots=True, kw_only=True)
class Available:
    """What survived.

    Args:
        replicas: lost stage -> (mesh axis, lost index, live index) of a data-parallel replica of it.
        copies: stage -> age in steps of the copy that the next stage keeps of it (``NeighbourCopies``).
        bad: stages that live but hold values that are not finite.
        congruent: stages have the same leaves and shapes (``check_congruent``).
        snapshot_age: steps since a snapshot of everything in memory, checkpoint_age: since the last checkpoint.
        checkpoint_path: for the record.
    """

    replicas: Mapping[int, tuple[str, int, int]] = field(default_factory=dict)
    copies: Mapping[int, int] = field(default_factory=dict)
    bad: frozenset[int] = frozenset()
    congruent: bool = True
    snapshot_age: int | None = None
    checkpoint_age: int | None = None
    checkpoint_path: str = ""

    def __post_init__(self) -> None:
        ages = {f"copies[{stage}]": age for stage, age in self.copies.items()}
        ages |= {"snapshot_age": self.snapshot_age or 0, "checkpoint_age": self.checkpoint_age or 0}
        if wrong := [f"{name} is {age}" for name, age in ages.items() if age < 0]:
            raise InvalidArgumentError(f"Ages are steps since then, 0 or more: {', '.join(wrong)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Bytes, rates and prices. ``*_steps`` are steps of training that a recovery costs."""

    step_s: float = 1.0
    stage_bytes: int = 0
    state_bytes: int = 0
    link_bytes_per_s: float = 10e9
    disk_bytes_per_s: float = 1e9
    average_steps: float = 50.0
    edge_copy_steps: float = 50.0
    stale_steps_per_age: float = 0.02
    max_stale_age: int = 200
    relaunch_s: float = 0.0  # paid by a rollback only

    def observe(self, source: str, steps: float, *, weight: float = 0.5) -> "CostModel":
        """A model whose prior for ``source`` has moved towards the ``steps`` that a recovery was seen to cost."""
        names = {"average": "average_steps", "edge_copy": "edge_copy_steps"}
        if source not in names:
            raise InvalidArgumentError(f"source={source!r} has no price to learn; it is one of {tuple(names)}.")
        old = getattr(self, names[source])
        return replace(self, **{names[source]: (1 - weight) * old + weight * max(0.0, steps)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One source for one stage. ``seconds`` is None where it is impossible; ``why`` says what it is or why not."""

    stage: int
    source: str
    seconds: float | None
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStep:
    """What to do for one stage. ``neighbours`` are those that weights come from."""

    stage: int
    source: str
    neighbours: tuple[int | None, int | None] = (None, None)
    replica: tuple[str, int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """What to do, why, and what everything else would have cost.

    ``rollback`` means that all stages go back together: restore the snapshot or the checkpoint and do not call
    ``recover_stage``.
    """

    lost: tuple[int, ...]
    layout: StageLayout
    policy: RecoveryPolicy
    steps: tuple[StageStep, ...]
    rollback: bool
    seconds: float
    why: str
    options: tuple[Option, ...]


def plan_recovery(
    lost: SupportsIndex | Iterable[int],
    layout: StageLayout,
    available: Available | None = None,
    cost: CostModel | None = None,
    *,
    policy: RecoveryPolicy | None = None,
    source: str | None = None,
) -> RecoveryPlan:
    """Choose a source for every lost stage.

    Args:
        lost: physical stages that are gone.
        source: use this one wherever it is possible, whatever it costs.

    Raises:
        InvalidArgumentError: a stage does not exist, or nothing can bring one back; lists every source and why not.

    Example:
        >>> plan = plan_recovery(2, StageLayout(stages=6), Available(checkpoint_age=300))
        >>> plan.steps[0].source, plan.steps[0].neighbours
        ('average', (1, 3))
    """
    available, cost, policy = available or Available(), cost or CostModel(), policy or RecoveryPolicy()
    gone = layout.lost_stages(lost)
    if source is not None and source not in SOURCES:
        raise InvalidArgumentError(f"source={source!r} is not one of {SOURCES}.")
    options = [option for stage in gone for option in _options(stage, gone, layout, available, cost, policy)]
    options.append(back := _rollback(available, cost))
    chosen = [_cheapest([o for o in options if o.stage == stage], source) for stage in gone]
    local = None if None in chosen else sum(o.seconds or 0.0 for o in chosen if o is not None)
    go_back = back.seconds is not None and (local is None or back.seconds < local)
    if source is not None:
        go_back = source == "rollback" and back.seconds is not None
    if not go_back and local is None:
        listing = "\n".join(f"  stage {o.stage}, {o.source}: {o.why}" for o in options)
        raise InvalidArgumentError(
            f"Stages {gone} of {layout.stages} cannot come back"
            f"{'' if source is None else f' by {source}'}:\n{listing}\n"
            "Keep a copy on a neighbour (NeighbourCopies) or a checkpoint."
        )
    if go_back:
        return RecoveryPlan(
            lost=gone, layout=layout, policy=policy, steps=(), rollback=True, seconds=back.seconds or 0.0,
            why=f"all stages go back: {back.why}", options=tuple(options),
        )  # fmt: skip
    steps = tuple(_step(o, layout, available) for o in chosen if o is not None)
    why = "; ".join(f"stage {o.stage} from {o.source}: {o.why}" for o in chosen if o is not None)
    return RecoveryPlan(
        lost=gone, layout=layout, policy=policy, steps=steps, rollback=False, seconds=local or 0.0, why=why,
        options=tuple(options),
    )  # fmt: skip


def _options(
    stage: int,
    gone: tuple[int, ...],
    layout: StageLayout,
    available: Available,
    cost: CostModel,
    policy: RecoveryPolicy,
) -> list[Option]:
    move = cost.stage_bytes / cost.link_bytes_per_s
    found = []

    def add(source: str, refusal: str | None, seconds: float, why: str) -> None:
        found.append(Option(stage=stage, source=source, seconds=None if refusal else seconds, why=refusal or why))

    replica = available.replicas.get(stage)
    add("replica", None if replica else "no live replica", move, "exact, from a live replica")
    age = available.copies.get(stage)
    holder = (stage + 1) % layout.stages
    refusal = None
    if age is None:
        refusal = "no neighbour keeps a copy"
    elif holder in gone:
        refusal = f"its holder, stage {holder}, is lost too"
    elif holder in available.bad:
        refusal = f"its holder, stage {holder}, holds values that are not finite"
    add(
        "same_step_copy",
        refusal or (None if not age else f"the copy is {counted(age, 'step')} old"),
        move,
        "exact, from its copy",
    )
    if not refusal and age is not None and age > cost.max_stale_age:
        refusal = f"the copy is {counted(age, 'step')} old, more than max_stale_age={cost.max_stale_age}"
    stale_s = move + (age or 0) * cost.stale_steps_per_age * cost.step_s
    add("stale_copy", refusal, stale_s, f"its own weights, {counted(age or 0, 'step')} old")

    neighbours = layout.neighbours(stage)
    needed = _needed(stage, layout, policy)
    averaged = policy.method not in ("copy", "random")
    refusal = _refusal(neighbours, needed, gone, layout, available, averaged=averaged)
    if policy.method == "random":
        add("average", None, cost.average_steps * cost.step_s, "fresh random weights")
    else:
        add(
            "average",
            refusal,
            len(needed) * move + cost.average_steps * cost.step_s,
            f"{policy.method} of {neighbours}",
        )
    partner = layout.swap_partner(stage)
    if partner is None:
        refusal = "no swap partner" if layout.swap else "training did not swap stages"
    else:
        refusal = _refusal((partner, None), (partner,), gone, layout, available)
    add("edge_copy", refusal, move + cost.edge_copy_steps * cost.step_s, f"copy of its swap partner, stage {partner}")
    old = available.checkpoint_age
    read_s = cost.stage_bytes / cost.disk_bytes_per_s + (old or 0) * cost.stale_steps_per_age * cost.step_s
    refusal = None if old is not None else "no checkpoint"
    if old is not None and old > cost.max_stale_age:
        refusal = f"the checkpoint is {counted(old, 'step')} old, more than max_stale_age={cost.max_stale_age}"
    add("checkpoint_stage", refusal, read_s, f"its own weights from the checkpoint, {counted(old or 0, 'step')} old")
    return found


def _needed(stage: int, layout: StageLayout, policy: RecoveryPolicy) -> tuple[int, ...]:
    left, right = layout.neighbours(stage)
    if policy.method == "copy":
        wanted = (right if left is None or (layout.repeats > 1 and stage == 0) else left,)
        if layout.repeats > 1 and stage == 0:
            wanted = (left, right)  # block 0 has none before it
    else:
        wanted = (left, right)
    return tuple(sorted({x for x in wanted if x is not None}))


def _refusal(
    neighbours: tuple[int | None, int | None],
    needed: tuple[int, ...],
    gone: tuple[int, ...],
    layout: StageLayout,
    available: Available,
    *,
    averaged: bool = False,
) -> str | None:
    if not available.congruent:
        return "stages are not congruent"
    if averaged and None in neighbours:
        edge = "first" if neighbours[0] is None else "last"
        return f"the {edge} stage has one neighbour only"
    for other in needed:
        if other in gone:
            return f"neighbour stage {other} is lost too"
        if other in available.bad:
            return f"neighbour stage {other} holds values that are not finite"
    return None


def _rollback(available: Available, cost: CostModel) -> Option:
    ages = {"snapshot": available.snapshot_age, "checkpoint": available.checkpoint_age}
    prices = {}
    for name, age in ages.items():
        if age is not None:
            rate = cost.disk_bytes_per_s if name == "checkpoint" else cost.link_bytes_per_s
            prices[name] = age * cost.step_s + cost.state_bytes / rate + cost.relaunch_s
    if not prices:
        return Option(stage=-1, source="rollback", seconds=None, why="no snapshot and no checkpoint")
    best = min(prices, key=lambda name: prices[name])
    why = f"to the {best} {counted(ages[best] or 0, 'step')} ago"
    return Option(stage=-1, source="rollback", seconds=prices[best], why=why)


def _cheapest(options: list[Option], source: str | None) -> Option | None:
    possible = [o for o in options if o.seconds is not None and source in (None, o.source)]
    return min(possible, key=lambda o: (o.seconds, SOURCES.index(o.source))) if possible else None


def _step(option: Option, layout: StageLayout, available: Available) -> StageStep:
    neighbours: tuple[int | None, int | None] = (None, None)
    if option.source == "average":
        neighbours = layout.neighbours(option.stage)
    elif option.source == "edge_copy":
        neighbours = (layout.swap_partner(option.stage), None)
    replica = available.replicas.get(option.stage) if option.source == "replica" else None
    return StageStep(stage=option.stage, source=option.source, neighbours=neighbours, replica=replica)
