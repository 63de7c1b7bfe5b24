"""Which samples of a run are still to come, whatever number of hosts took those before: pure arithmetic.

A run's samples form one global sequence of *positions*, 0 to ``length * epochs``; ``Order`` says which sample lies at a
position. What is still to come is ``Remaining``: some holes and everything from a frontier on. Every host takes a
pattern of places of it (``Strand``), at its own pace. To go on with other hosts, the patterns of all are joined: what
nobody took is the new ``Remaining``, for any number of hosts. Splitting and merging the loader's state on a change of
hosts is ByteCheckpoint's (NSDI 2025, sections 3.2 and 4.4); there token buffers are cut, here positions as well.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxckpt.core.errors import InvalidArgumentError, MismatchError
from jaxckpt.core.text import counted

_ROUNDS = 8
_MOST_SAMPLES = 1 << 62
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Which sample lies at which position: ``epochs`` passes over ``length`` samples, each shuffled anew.

    Attributes:
        length: samples in the source.
        seed: of the shuffling; None: in their own order.
        epochs: passes; None: without end.
    """

    length: int
    seed: int | None = None
    epochs: int | None = 1

    def __post_init__(self) -> None:
        if self.length < 0 or (self.length == 0 and self.epochs is None):
            raise InvalidArgumentError(f"length={self.length}, epochs={self.epochs}: nothing to go through.")
        if self.epochs is not None and self.epochs < 0:
            raise InvalidArgumentError(f"epochs={self.epochs} must be 0 or more, or None for no end.")

    @property
    def total(self) -> int:
        """All positions; a huge number where there is no end."""
        return _MOST_SAMPLES if self.epochs is None else self.length * self.epochs

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """The samples at these positions, both int64.

        The shuffle costs no memory: a Feistel network over the index (Luby and Rackoff, SIAM J. Comput. 17(2), 1988),
        repeated until it falls below ``length`` (cycle walking: Black and Rogaway, CT-RSA 2002, section 3).

        Example:
            >>> Order(length=5, seed=1, epochs=2).samples(np.arange(5)).tolist()
            [4, 3, 0, 2, 1]
        """
        epochs, indices = np.divmod(np.asarray(positions, np.int64), max(self.length, 1))
        if self.seed is None or self.length < 2:
            return indices
        keys = _mix(np.uint64(self.seed % (1 << 64)) ^ _mix(epochs.astype(np.uint64)))
        half = np.uint64(max((self.length - 1).bit_length() + 1, 2) // 2)
        found = _feistel(indices.astype(np.uint64), keys, half)
        outside = found >= self.length
        while outside.any():
            found[outside] = _feistel(found[outside], keys[outside], half)
            outside = found >= self.length
        return found.astype(np.int64)

    def record(self) -> dict[str, Any]:
        """For the saved state."""
        return {"length": self.length, "seed": self.seed, "epochs": self.epochs}


def _feistel(values: np.ndarray, keys: np.ndarray, half: np.uint64) -> np.ndarray:
    """A permutation of the numbers of 2 * half bits, another one for each key."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for number in range(1, _ROUNDS + 1):
        left, right = right, left ^ (_mix(right ^ _mix(keys + np.uint64(number))) & mask)
    return (left << half) | right


def _mix(values: Any) -> np.ndarray:
    """Bits well stirred: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, figure 13)."""
    mixed = np.atleast_1d(np.asarray(values, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@dataclass(frozen=True, slots=True, kw_only=True)
class Remaining:
    """Positions still to come: ``holes`` ([start, stop) ranges below ``frontier``), then ``frontier`` and all after it.

    A *place* is a number in this list: place 0 is the first position of the first hole.
    """

    holes: tuple[tuple[int, int], ...] = ()
    frontier: int = 0

    @property
    def held(self) -> int:
        """How many positions the holes have."""
        return sum(stop - start for start, stop in self.holes)

    def size(self, total: int) -> int:
        """How many positions are still to come of ``total`` ones in all."""
        return self.held + max(total - self.frontier, 0)

    def positions(self, places: np.ndarray) -> np.ndarray:
        """The positions at these places, both int64.

        Example:
            >>> Remaining(holes=((3, 5),), frontier=8).positions(np.arange(4)).tolist()
            [3, 4, 8, 9]
        """
        places = np.asarray(places, np.int64)
        if not self.holes:
            return self.frontier + places
        starts = np.array([start for start, _ in self.holes] + [self.frontier], np.int64)
        before = np.cumsum([0] + [stop - start for start, stop in self.holes], dtype=np.int64)
        which = np.searchsorted(before, places, side="right") - 1
        return starts[which] + places - before[which]

    def record(self) -> dict[str, Any]:
        """For the saved state."""
        return {"holes": [list(hole) for hole in self.holes], "frontier": self.frontier}


def remaining_of(record: dict[str, Any]) -> Remaining:
    """From a saved state."""
    return Remaining(holes=tuple((start, stop) for start, stop in record["holes"]), frontier=record["frontier"])


class Strand(NamedTuple):
    """Places taken: ``count`` blocks of ``width`` places, starting ``stride`` apart."""

    start: int
    stride: int
    count: int
    width: int = 1

    @property
    def stop(self) -> int:
        """One more than the last place taken."""
        return self.start + (self.count - 1) * self.stride + self.width if self.count and self.width else 0

    def places(self, low: int) -> np.ndarray:
        """The places taken from ``low`` on."""
        first = max(-(-(low - self.start - self.width + 1) // self.stride), 0) if self.stride else 0
        starts = self.start + np.arange(first, max(self.count, first), dtype=np.int64) * self.stride
        found = (starts[:, None] + np.arange(self.width, dtype=np.int64)).reshape(-1)
        return found[found >= low]


def after(remaining: Remaining, strands: Iterable[Strand]) -> Remaining:
    """What is still to come when all these places have been taken.

    Costs as much as the fastest host is ahead of the slowest one.

    Raises:
        MismatchError: a place was taken twice.

    Example:
        >>> after(Remaining(), [Strand(0, 2, 3), Strand(1, 2, 1)])  # places 0, 2, 4 and 1
        Remaining(holes=((3, 4),), frontier=5)
    """
    strands = list(strands)
    low, stop = _surely_taken(strands), max([strand.stop for strand in strands], default=0)
    if stop == 0:
        return remaining
    times = np.zeros(max(stop - low, 0), np.int64)
    for strand in strands:
        np.add.at(times, strand.places(low) - low, 1)
    if (times > 1).any():
        twice = remaining.positions(low + np.flatnonzero(times > 1)[:5]).tolist()
        raise MismatchError(
            f"Several hosts say that they took the samples at positions {twice} of the run: these states are not those "
            "of the hosts of one run at one step. Give the states of all hosts, each once."
        )
    held = remaining.held
    left = [low + np.flatnonzero(times == 0)]
    if stop < held:
        left.append(np.arange(stop, held, dtype=np.int64))
    frontier = remaining.frontier + max(stop - held, 0)
    return Remaining(holes=_ranges(remaining.positions(np.concatenate(left))), frontier=frontier)


def _surely_taken(strands: Sequence[Strand]) -> int:
    """All places below this one have been taken, known without looking at each."""
    period = max([strand.stride for strand in strands], default=0)
    regular = [strand for strand in strands if strand.stride == period]
    first = sorted((strand.start, strand.start + strand.width) for strand in regular)
    edge = 0
    for start, stop in first:
        if start == edge:
            edge = stop
    return period * min(strand.count for strand in regular) if regular and edge == period else 0


def _ranges(positions: np.ndarray) -> tuple[tuple[int, int], ...]:
    if not len(positions):
        return ()
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(positions, cuts))


def deal(items: Sequence[Item], rank: int, size: int) -> list[Item]:
    """The part of ``items`` that goes to one of ``size`` hosts: even, in order, each item to one host.

    Example:
        >>> [deal("abcde", rank, 3) for rank in range(3)]
        [['a'], ['b', 'c'], ['d', 'e']]
    """
    low, high = share(len(items), rank, size)
    return list(items[low:high])


def share(n: int, rank: int, size: int) -> tuple[int, int]:
    """[low, high) of ``n`` things that goes to one of ``size`` hosts."""
    return rank * n // size, (rank + 1) * n // size


def by_rank(states: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One state of each host of the run that saved them, by rank; hosts that share a rank took the same samples.

    Raises:
        MismatchError: the state of some host is missing, or two of one rank differ.
    """
    found: dict[int, dict[str, Any]] = {}
    for state in states:
        if found.setdefault(state["rank"], state) != state:
            raise MismatchError(f"Two states say that they are of rank {state['rank']}, and differ: {state}")
    sizes = sorted({state["size"] for state in states})
    if len(sizes) != 1 or sorted(found) != list(range(sizes[0])):
        told = " and ".join(counted(size, "host") for size in sizes) or "no hosts"
        raise MismatchError(
            f"States of ranks {sorted(found)} were given, of {told}: what was "
            "taken is known only from one state of every host. Give the states of all of them."
        )
    return [found[rank] for rank in range(sizes[0])]


def common(states: Sequence[dict[str, Any]], key: str) -> Any:
    """The value that is replicated on all hosts; MismatchError where they differ."""
    values = [state[key] for state in states]
    for state, value in zip(states, values, strict=True):
        if value != values[0]:
            raise MismatchError(
                f'The hosts of the run that saved this had different "{key}": {values[0]} on rank '
                f"{states[0]['rank']}, {value} on rank {state['rank']}. They were not of one run."
            )
    return values[0]


def check_order(saved: dict[str, Any], order: Order) -> None:
    """Raise MismatchError unless the source and its order are those of the saved state."""
    if saved != order.record():
        raise MismatchError(
            f"The iterator was saved over {saved} and is restored over {order.record()}: samples would be lost or "
            "repeated. Build it with the length, seed and epochs that were saved."
        )
