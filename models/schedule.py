"""Which stage works on which microbatch at which tick: a table worked out before anything is compiled.

A microbatch visits positions 0 ... repeats * stages - 1. In the plain order position p lies on device p % stages; in
the swapped order of CheckFree+ (arXiv 2506.15461, section 4.3) the first two and the last two stages change places. A
device does one position per tick and sends the result on; what arrives while it is busy waits in its buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Schedule:
    """Tables (ticks, stages), int32, and where the results end up.

    ``microbatch`` is -1 where a device idles. ``from_plain`` and ``from_swapped`` name the microbatch that arrives at
    the end of the tick over the plain ring and over the edges that only the swapped order has; -1 for none.
    """

    microbatch: np.ndarray
    repeat: np.ndarray
    from_plain: np.ndarray
    from_swapped: np.ndarray
    plain_edges: tuple[tuple[int, int], ...]
    swapped_edges: tuple[tuple[int, int], ...]
    last_stage: np.ndarray  # (microbatches,): the device on which a microbatch ends

    @property
    def ticks(self) -> int:
        return len(self.microbatch)


def stage_order(stages: int, *, swapped: bool) -> tuple[int, ...]:
    """The device at each position of one round."""
    order = list(range(stages))
    if swapped:
        if stages < 4:
            raise ValueError(f"Swapping the first two and the last two of stages={stages} needs at least 4.")
        order[0], order[1] = order[1], order[0]
        order[-1], order[-2] = order[-2], order[-1]
    return tuple(order)


@lru_cache(maxsize=32)
def make_schedule(stages: int, microbatches: int, repeats: int = 1, *, swap: bool = False) -> Schedule:
    """The shorter of two greedy schedules: oldest microbatch first, or the one that is farthest on.

    With ``swap`` every odd microbatch runs in the swapped order, so ``microbatches`` must be even.
    """
    if swap and microbatches % 2:
        raise ValueError(
            f"swap=True runs half of the microbatches in the other order; microbatches={microbatches} is odd."
        )
    paths = [stage_order(stages, swapped=swap and m % 2 == 1) * repeats for m in range(microbatches)]
    return min((_greedy(stages, paths, oldest) for oldest in (True, False)), key=lambda schedule: schedule.ticks)


def _greedy(stages: int, paths: list[tuple[int, ...]], oldest: bool) -> Schedule:
    position = [0] * len(paths)
    rows: list[tuple[list[int], list[int], list[int], list[int]]] = []
    plain = {(d, (d + 1) % stages) for d in range(stages)}
    other: set[tuple[int, int]] = set()
    used: set[tuple[int, int]] = set()
    while any(at < len(path) for at, path in zip(position, paths, strict=True)):
        work, repeat, first, second = ([-1] * stages for _ in range(4))
        for device in range(stages):
            ready = [m for m, path in enumerate(paths) if position[m] < len(path) and path[position[m]] == device]
            if ready:
                work[device] = min(ready, key=lambda m: (m if oldest else -position[m], m))
        for device, m in enumerate(work):
            if m < 0:
                repeat[device] = 0
                continue
            repeat[device] = position[m] // stages
            position[m] += 1
            if position[m] < len(paths[m]):
                edge = (device, paths[m][position[m]])
                used.add(edge)
                (first if edge in plain else second)[edge[1]] = m
                other |= {edge} - plain
        rows.append((work, repeat, first, second))
    tables = [np.asarray([row[i] for row in rows], np.int32) for i in range(4)]
    return Schedule(
        microbatch=tables[0],
        repeat=tables[1],
        from_plain=tables[2],
        from_swapped=tables[3],
        plain_edges=tuple(sorted(used & plain)),
        swapped_edges=tuple(sorted(other)),
        last_stage=np.asarray([path[-1] for path in paths], np.int32),
    )
