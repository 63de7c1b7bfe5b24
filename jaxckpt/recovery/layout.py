"""Which leaves of a tree belong to which pipeline stage: rules over leaf names, the same for moments as for weights."""

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import SupportsIndex

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.tree import NamedLeaf


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacked:
    """Leaves with a stage axis. ``pattern`` is a run of name segments: ``stages`` matches ``opt.mu.stages.kernel``."""

    pattern: str
    stage_axis: int = 0
    repeat_axis: int | None = None  # circular: block repeat * stages + stage
    layers_axis: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One subtree per stage: ``stages.{stage}``, ``stage_{stage}``, or per block ``blocks.{block}``.

    Block ``b`` lies on stage ``b % stages``.
    """

    pattern: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where one leaf lies. ``kind`` is "stacked", "listed" or "outside"."""

    kind: str
    stage_axis: int = 0
    repeat_axis: int | None = None
    layers_axis: int | None = None
    block: int = -1  # listed
    key: str = ""  # listed: the name with the number left out, equal for congruent leaves


OUTSIDE = Placement(kind="outside")
STACKED_STATE, LISTED_STATE = "stacked_stages", "listed_stages"  # fields of the state of ``stage_optimizer``


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLayout:
    """The stages of a model.

    Args:
        stages: number of physical stages S.
        rules: the first that matches a leaf's name decides; leaves that match none are outside the pipeline.
        repeats: rounds R of a circular schedule; physical stage f holds the blocks r * S + f.
        axis: mesh axis over which stages lie.
        outside: patterns that are never part of a stage, whatever the rules say.
        swap: training ran half of the microbatches with the first two and the last two stages swapped.

    Example:
        >>> layout = StageLayout(stages=4, rules=(Stacked(pattern="stages"),))
        >>> layout.placement("opt_state.0.mu.stages.kernel").kind
        'stacked'
    """

    stages: int
    rules: tuple[Stacked | Listed, ...] = (Stacked(pattern="stages"),)
    repeats: int = 1
    axis: str = "stage"
    outside: tuple[str, ...] = ()
    swap: bool = False

    def __post_init__(self) -> None:
        if self.stages < 2 or self.repeats < 1:
            raise InvalidArgumentError(f"stages={self.stages}, repeats={self.repeats}: at least 2 stages and 1 repeat.")
        if self.swap and self.stages < 4:
            raise InvalidArgumentError(f"swap=True needs at least 4 stages; stages={self.stages}.")
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "outside", tuple(self.outside))

    def lost_stages(self, lost: SupportsIndex | Iterable[int]) -> tuple[int, ...]:
        """One stage or several as a tuple, ascending; an InvalidArgumentError for none, or one that there is not."""
        several = lost if isinstance(lost, Iterable) else (lost,)
        gone = tuple(sorted({operator.index(stage) for stage in several}))
        if not gone or gone[0] < 0 or gone[-1] >= self.stages:
            raise InvalidArgumentError(
                f"lost={gone}: the layout has stages={self.stages}, so they are 0 to {self.stages - 1}. "
                "Give one or more of these, or correct the layout."
            )
        return gone

    @property
    def blocks(self) -> int:
        """Number of logical blocks, repeats * stages."""
        return self.stages * self.repeats

    def placement(self, name: str) -> Placement:
        """Where the leaf called ``name`` lies."""
        return _placement(self, name)

    def neighbours(self, stage: int) -> tuple[int | None, int | None]:
        """The stages before and after; with repeats the pipeline is a ring."""
        left, right = stage - 1, stage + 1
        if self.repeats > 1:
            return left % self.stages, right % self.stages
        return (left if left >= 0 else None), (right if right < self.stages else None)

    def swap_partner(self, stage: int) -> int | None:
        """The stage that learned to stand in for this one (CheckFree+, arXiv 2506.15461, section 4.3)."""
        last = self.stages - 1
        pairs = {0: 1, 1: 0, last: last - 1, last - 1: last}
        return pairs.get(stage) if self.swap else None


def check_congruent(leaves: list[NamedLeaf], layout: StageLayout) -> None:
    """Every block must have the same leaves with the same shapes.

    Raises:
        InvalidArgumentError: names the leaves, the stages, and both shapes.
    """
    found: dict[str, dict[int, tuple[str, tuple[int, ...], str]]] = {}
    for leaf in leaves:
        place = layout.placement(leaf.name)
        shape, dtype = tuple(getattr(leaf.value, "shape", ())), str(getattr(leaf.value, "dtype", type(leaf.value)))
        if place.kind == "listed":
            found.setdefault(place.key, {})[place.block] = (leaf.name, shape, dtype)
        elif place.kind == "stacked":
            for axis, want, what in (
                (place.stage_axis, layout.stages, "stages"),
                (place.repeat_axis, layout.repeats, "repeats"),
            ):
                if axis is not None and (axis >= len(shape) or shape[axis] != want):
                    raise InvalidArgumentError(
                        f'Leaf "{leaf.name}" has shape {shape}, but the layout says {what}={want} on axis {axis}. '
                        "Correct the rule, or list the leaf in `outside`."
                    )
    for key, blocks in found.items():
        missing = sorted(set(range(layout.blocks)) - blocks.keys())
        name, shape, dtype = next(iter(blocks.values()))
        if missing:
            raise InvalidArgumentError(
                f'Stages are not congruent: leaf "{name}" ({key}) has no counterpart in blocks {missing}.'
            )
        for other, other_shape, other_dtype in blocks.values():
            if (other_shape, other_dtype) != (shape, dtype):
                raise InvalidArgumentError(
                    f'Stages are not congruent: leaf "{name}" is {shape} {dtype}, leaf "{other}" is {other_shape} '
                    f"{other_dtype}. Recover from a copy or a checkpoint instead of from neighbours."
                )


@lru_cache(maxsize=65536)
def _placement(layout: StageLayout, name: str) -> Placement:
    if any(_regex(pattern).search(name) for pattern in layout.outside):
        return OUTSIDE
    if _regex(STACKED_STATE).search(name):
        for rule in layout.rules:
            if isinstance(rule, Stacked):
                return _stacked(rule)
    match = _regex(LISTED_STATE + ".{stage}").search(name)
    if match:
        place = _listed(match, layout, name)
        for rule in layout.rules:  # its leaves are named after parameters, whose number goes too
            inner = _regex(rule.pattern).search(place.key) if isinstance(rule, Listed) else None
            if inner is not None:
                return replace(place, key=_listed(inner, layout, place.key).key)
        return place
    for rule in layout.rules:
        match = _regex(rule.pattern).search(name)
        if match is None:
            continue
        return _stacked(rule) if isinstance(rule, Stacked) else _listed(match, layout, name)
    return OUTSIDE


def _stacked(rule: Stacked) -> Placement:
    return Placement(
        kind="stacked", stage_axis=rule.stage_axis, repeat_axis=rule.repeat_axis, layers_axis=rule.layers_axis
    )


def _listed(match: re.Match[str], layout: StageLayout, name: str) -> Placement:
    group = next(iter(match.groupdict()))
    number = int(match[group])
    limit = layout.blocks if group == "block" else layout.stages
    if number >= limit:
        raise InvalidArgumentError(f'Leaf "{name}" is of {group} {number}, but the layout has {limit}.')
    start, end = match.span(group)
    return Placement(kind="listed", block=number, key=f"{name[:start]}*{name[end:]}")


@lru_cache(maxsize=256)
def _regex(pattern: str) -> re.Pattern[str]:
    text = (
        re.escape(pattern.replace("/", "."))
        .replace(r"\{stage\}", r"(?P<stage>\d+)")
        .replace(r"\{block\}", r"(?P<block>\d+)")
    )
    return re.compile(rf"(?:^|\.){text.replace(chr(92) + '*', '[^.]*')}(?=\.|$)")
