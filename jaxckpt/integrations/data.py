"""Data iterators whose state fits any number of hosts: no sample is lost or repeated when that changes.

``ElasticIterator`` goes through an indexable source in batches of all hosts together; the batches of a run are the same
however many hosts share them. ``PackedIterator`` shows what else a loader may hold: tokens left over from the last row.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar, final

import jax
import numpy as np

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.text import counted
from jaxckpt.integrations.elastic import (
    Order,
    Remaining,
    Strand,
    after,
    by_rank,
    check_order,
    common,
    deal,
    remaining_of,
    share,
)

Batch = TypeVar("Batch")


class Source(Protocol):
    """Samples by number: a list, a numpy array, a ``grain.MapDataset``, a Hugging Face dataset."""

    def __len__(self) -> int:
        """How many samples."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """One sample."""
        ...


@final
class ElasticIterator(Generic[Batch]):
    """Batches of a source, shuffled anew each epoch, shared among hosts, restorable on another number of hosts.

    Step s of the run takes the same ``batch_size`` samples whatever the number of hosts; host ``rank`` of ``size`` gets
    its even part of them (sizes differ by one at most). Batches go on over the end of an epoch; only the last one of
    the run may be smaller.

    Args:
        source: samples by number.
        batch_size: samples of one step, over all hosts.
        seed: of the shuffling; None: in the order of the source.
        epochs: passes over the source; None: without end.
        drop_remainder: leave out the last batch of the run where it is not full. Without it hosts may end one step
            apart, when it has fewer samples than there are hosts.
        load: what makes a batch of the sample numbers (int64, one dimension). By default ``source[numbers]`` for a
            numpy array, else a list of samples.
        rank: of this host among those that share the data, by default ``jax.process_index()``. Processes that need
            the same samples (tensor parallel ones) share a rank.
        size: how many hosts share the data, by default ``jax.process_count()``.

    Example:
        >>> data = ElasticIterator(np.arange(12), batch_size=4, rank=0, size=2)
        >>> next(data).tolist(), next(data).tolist()
        ([0, 1], [4, 5])
        >>> other = ElasticIterator(np.arange(12), batch_size=4, rank=1, size=2)
        >>> _ = next(other), next(other)
        >>> alone = ElasticIterator(np.arange(12), batch_size=4, rank=0, size=1)
        >>> alone.set_states([data.get_state(), other.get_state()])
        >>> next(alone).tolist()
        [8, 9, 10, 11]
    """

    def __init__(
        self,
        source: Source | np.ndarray,
        *,
        batch_size: int,
        seed: int | None = None,
        epochs: int | None = 1,
        drop_remainder: bool = False,
        load: Callable[[np.ndarray], Batch] | None = None,
        rank: int | None = None,
        size: int | None = None,
    ) -> None:
        self.rank, self.size = place_of(rank, size)
        if batch_size < self.size:
            raise InvalidArgumentError(
                f"batch_size={batch_size} is the batch of all hosts together and must have a sample for each: "
                f"{counted(self.size, 'host')}."
            )
        self.batch_size = batch_size
        self._order = Order(length=len(source), seed=seed, epochs=epochs)
        self._remaining = Remaining()
        self._steps = 0
        self._drop_remainder = drop_remainder
        self._load = load if load is not None else _loader(source)

    def __iter__(self) -> "Iterator[Batch]":
        return self

    def __next__(self) -> Batch:
        low, high = self._places(self._steps)
        if low == high:
            raise StopIteration
        positions = self._remaining.positions(np.arange(low, high))
        batch = self._load(self._order.samples(positions))
        self._steps += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """JSON: what is replicated (order, what was still to come) and this host's part (what it took of that)."""
        whole, _ = self._batches()
        taken = [Strand(*self._first(), min(self._steps, whole), self._width())]
        if self._steps > whole:
            low, high = self._places(whole)
            taken.append(Strand(low, 0, 1, high - low))
        return {
            "elastic": 1,
            "rank": self.rank,
            "size": self.size,
            "order": self._order.record(),
            "remaining": self._remaining.record(),
            "batch_size": self.batch_size,
            "steps": self._steps,
            "taken": [list(strand) for strand in taken],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from this host's own state; for another number of hosts see ``set_states``.

        Raises:
            MismatchError: the state is another host's, or of another source.
        """
        check_order(state["order"], self._order)
        if (state["rank"], state["size"], state["batch_size"]) != (self.rank, self.size, self.batch_size):
            self.set_states([state])  # right where one host was all there was, else an error that says what to do
            return
        self._remaining, self._steps = remaining_of(state["remaining"]), state["steps"]

    def set_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states of all hosts of the run that saved them, however many; every host calls it alike.

        Raises:
            MismatchError: the states are not those of all hosts of one run, or of another source.
        """
        found = by_rank(states)
        check_order(common(found, "order"), self._order)
        if len(found) == self.size and common(found, "batch_size") == self.batch_size:
            self.set_state(found[self.rank])
            return
        self._remaining, self._steps = merged(found), 0

    def _batches(self) -> tuple[int, int]:
        """How many full batches there are from ``_remaining`` on, and how many samples after them."""
        return divmod(self._remaining.size(self._order.total), self.batch_size)

    def _places(self, step: int) -> tuple[int, int]:
        """What this host takes of ``_remaining`` at a step; empty at the end."""
        whole, left = self._batches()
        start = step * self.batch_size
        if step < whole:
            n = self.batch_size
        else:
            n = left if step == whole and not self._drop_remainder else 0
        low, high = share(n, self.rank, self.size)
        return start + low, start + high

    def _first(self) -> tuple[int, int]:
        return share(self.batch_size, self.rank, self.size)[0], self.batch_size

    def _width(self) -> int:
        low, high = share(self.batch_size, self.rank, self.size)
        return high - low


@final
class PackedIterator:
    """Rows of ``row_length`` tokens, packed without padding from samples of any length.

    Hosts draw samples at their own pace, and hold the tokens that did not fit into the last row. Both are part of the
    state: on another number of hosts the samples that nobody drew and the tokens that nobody delivered are shared anew.

    Args:
        source: samples, each a sequence of token numbers.
        row_length: tokens of a row.
        seed, epochs, rank, size: as of ``ElasticIterator``.

    Returns rows: int64 arrays of shape ``(row_length,)``. The tokens left at the end of the run make no row.

    Example:
        >>> rows = PackedIterator([[1, 2, 3], [4], [5, 6]], row_length=2, rank=0, size=1)
        >>> [row.tolist() for row in rows]
        [[1, 2], [3, 4], [5, 6]]
    """

    def __init__(
        self,
        source: Source | np.ndarray,
        *,
        row_length: int,
        seed: int | None = None,
        epochs: int | None = 1,
        rank: int | None = None,
        size: int | None = None,
    ) -> None:
        if row_length < 1:
            raise InvalidArgumentError(f"row_length={row_length} must be 1 or more.")
        rank, size = place_of(rank, size)
        self._row_length = row_length
        # One sample of each host per step, at its own pace.
        self._samples = ElasticIterator(
            source, batch_size=size, seed=seed, epochs=epochs, load=_loader(source, stack=False), rank=rank, size=size
        )
        self._tokens: list[int] = []

    def __iter__(self) -> "Iterator[np.ndarray]":
        return self

    def __next__(self) -> np.ndarray:
        while len(self._tokens) < self._row_length:
            (sample,) = next(self._samples)
            self._tokens += [int(token) for token in sample]
        row, self._tokens = self._tokens[: self._row_length], self._tokens[self._row_length :]
        return np.array(row, np.int64)

    def get_state(self) -> dict[str, Any]:
        """JSON: that of the samples, and the tokens in hand."""
        return {**self._samples.get_state(), "tokens": self._tokens}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from this host's own state."""
        self._samples.set_state(state)
        self._tokens = list(state["tokens"])

    def set_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states of all hosts of the run that saved them, however many; every host calls it alike."""
        found = by_rank(states)
        self._samples.set_states(states)
        tokens = [state["tokens"] for state in found]
        mine = [tokens[self._samples.rank]] if len(found) == self._samples.size else deal(tokens, *self._place())
        self._tokens = [token for part in mine for token in part]

    def _place(self) -> tuple[int, int]:
        return self._samples.rank, self._samples.size


def merged(states: Sequence[dict[str, Any]]) -> Remaining:
    """What is still to come after the hosts of these states (one of each rank) took what they say."""
    strands = [Strand(*strand) for state in states for strand in state["taken"]]
    return after(remaining_of(common(states, "remaining")), strands)


def place_of(rank: int | None, size: int | None) -> tuple[int, int]:
    """Rank and number of the hosts that share the data; those of this job by default."""
    rank = jax.process_index() if rank is None else rank
    size = jax.process_count() if size is None else size
    if not 0 <= rank < size:
        raise InvalidArgumentError(f"rank={rank} is not one of {counted(size, 'host')}: it must be 0 to {size - 1}.")
    return rank, size


def _loader(source: Source | np.ndarray, *, stack: bool = True) -> Callable[[np.ndarray], Any]:
    if stack and isinstance(source, np.ndarray):
        return lambda numbers: source[numbers]
    return lambda numbers: [source[number] for number in numbers.tolist()]
