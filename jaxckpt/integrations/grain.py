"""Grain pipelines whose state fits any number of hosts: Grain reads and transforms, we say which sample comes where.

Grain's own iterators know how far *this* host has come in *its* slice of the data, so their states fit that slice
alone. ``ElasticDataset`` and ``ElasticLoader`` give Grain the slice, and can therefore cut another one from what all
hosts left. (Grain's iterators themselves are saved and restored as extras on the same number of hosts.)
"""

import abc
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import grain
import numpy as np

from jaxckpt.core.errors import InvalidArgumentError, MismatchError
from jaxckpt.core.text import counted
from jaxckpt.integrations.data import merged, place_of
from jaxckpt.integrations.elastic import Order, Remaining, by_rank, check_order, common, remaining_of

Build = Callable[[grain.MapDataset], grain.MapDataset | grain.IterDataset]


class AbstractElasticGrain(abc.ABC):
    """What both kinds of pipeline share: state, merge and split."""

    def __init__(self, length: int, rank: int | None, size: int | None) -> None:
        self.rank, self.size = place_of(rank, size)
        self._order = Order(length=length)
        self._remaining = Remaining()
        self._iterator: Any = None

    @abc.abstractmethod
    def _open(self, share: "Share") -> Any:
        """Grain's iterator over this share."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._opened())

    def get_state(self) -> dict[str, Any]:
        """JSON: what was still to come when these hosts began, what this one took of it, and Grain's own state."""
        inner = self._opened().get_state()
        inner = json.loads(inner) if isinstance(inner, bytes) else inner
        counts = _counts(inner)
        return {
            "elastic": 1,
            "rank": self.rank,
            "size": self.size,
            "order": self._order.record(),
            "remaining": self._remaining.record(),
            "grain": inner,
            "taken": None
            if counts is None
            else [
                [self.rank + worker * self.size, len(counts) * self.size, count, 1]
                for worker, count in enumerate(counts)
            ],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from this host's own state, exactly as Grain does; for other numbers of hosts see ``set_states``.

        Raises:
            MismatchError: the state is another host's, or of another source.
        """
        check_order(state["order"], self._order)
        if (state["rank"], state["size"]) != (self.rank, self.size):
            self.set_states([state])  # right where one host was all there was, else an error that says what to do
            return
        self._restart(remaining_of(state["remaining"]))
        iterator = self._opened()
        as_bytes = isinstance(iterator.get_state(), bytes)
        iterator.set_state(json.dumps(state["grain"], indent=4).encode() if as_bytes else state["grain"])

    def set_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states of all hosts of the run that saved them, however many; every host calls it alike.

        Raises:
            MismatchError: the states are not those of all hosts of one run, or of another source; or the pipeline
                holds samples that cannot be shared anew (a window shuffle, packing), and the hosts have changed.
        """
        found = by_rank(states)
        check_order(common(found, "order"), self._order)
        if len(found) == self.size:
            self.set_state(found[self.rank])
            return
        for state in found:
            if state["taken"] is None:
                raise MismatchError(
                    f"The Grain pipeline was saved on {counted(len(found), 'host')} and is restored on {self.size}, "
                    "but its state holds more than how many samples were taken: it has the members "
                    f"{sorted(state['grain'])}. Such samples in hand (a window shuffle, packing, a mixture) cannot be "
                    "shared anew. Restore on "
                    f"{counted(len(found), 'host')}, or move that stage in front of ElasticDataset, where it is one "
                    "for all hosts."
                )
        self._restart(merged(found))

    def close(self) -> None:
        """End Grain's threads and processes."""
        self._restart(self._remaining)

    def _opened(self) -> Any:
        if self._iterator is None:
            self._iterator = self._open(Share(self._remaining, self._order.total, self.rank, self.size))
        return self._iterator

    def _restart(self, remaining: Remaining) -> None:
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()
        self._iterator, self._remaining = None, remaining


@final
class ElasticDataset(AbstractElasticGrain):
    """A ``grain.MapDataset``, shared among hosts, iterated through any Grain pipeline.

    Args:
        dataset: all samples in the order of the run, not sliced by host: source, ``shuffle``, ``repeat``, ``map`` ...
        build: from this host's share to the pipeline: ``to_iter_dataset``, then ``filter``, ``batch`` (of this host),
            ``mp_prefetch``. Stages before ``to_iter_dataset`` must keep one element for each.
        rank, size: of this host among those that share the data, by default JAX's processes.

    Example:
        >>> import grain
        >>> numbers = grain.MapDataset.range(8)
        >>> hosts = [ElasticDataset(numbers, lambda d: d.to_iter_dataset().batch(2), rank=r, size=2) for r in (0, 1)]
        >>> [next(host).tolist() for host in hosts]
        [[0, 2], [1, 3]]
        >>> alone = ElasticDataset(numbers, rank=0, size=1)
        >>> alone.set_states([host.get_state() for host in hosts])
        >>> [int(n) for n in alone]
        [4, 5, 6, 7]
    """

    def __init__(
        self, dataset: grain.MapDataset, build: Build | None = None, *, rank: int | None = None, size: int | None = None
    ) -> None:
        super().__init__(len(dataset), rank, size)
        self._dataset = dataset
        self._build = build

    def _open(self, share: "Share") -> Any:
        source = _ShareDataset(self._dataset, share)
        built: Any = source if self._build is None else self._build(source)
        if isinstance(built, grain.MapDataset):
            built = built.to_iter_dataset()
        _check_one_to_one(built, source)
        return iter(built)


@final
class ElasticLoader(AbstractElasticGrain):
    """A ``grain.DataLoader`` that goes on with another number of hosts.

    Args:
        data_source: as of ``grain.DataLoader``.
        sampler: of the whole run, without shard options: ``IndexSampler(n, shuffle=True, seed=0, num_epochs=3)``.
        operations: as of ``grain.DataLoader``; batches are those of this host.
        worker_count: processes that transform samples.
        rank, size: of this host among those that share the data, by default JAX's processes.
        options: further ones of ``grain.DataLoader``.

    Unlike Grain's sharding by host, which leaves out what does not divide evenly, every sample goes to some host: hosts
    may end one batch apart.

    Example:
        >>> import grain, numpy
        >>> sampler = grain.samplers.IndexSampler(4, shuffle=True, seed=1, num_epochs=1)
        >>> loader = ElasticLoader(data_source=numpy.arange(4), sampler=sampler, rank=0, size=1)
        >>> sorted(int(n) for n in loader)
        [0, 1, 2, 3]
    """

    def __init__(
        self,
        *,
        data_source: Any,
        sampler: Any,
        operations: Sequence[Any] = (),
        worker_count: int = 0,
        rank: int | None = None,
        size: int | None = None,
        **options: Any,
    ) -> None:
        shards = getattr(getattr(sampler, "_shard_options", None), "shard_count", 1)
        if shards != 1 or "shard_options" in options:
            raise InvalidArgumentError(
                f"{sampler!r} shares the data among {shards} hosts itself. Give a sampler of the whole run and no "
                "shard_options: rank and size say which samples are this host's."
            )
        super().__init__(len(sampler), rank, size)
        self._sampler = sampler
        self._options = {
            **options,
            "data_source": data_source,
            "operations": operations,
            "worker_count": worker_count,
        }

    def _open(self, share: "Share") -> Any:
        sampler = _ShareSampler(self._sampler, share)
        return iter(grain.DataLoader(sampler=sampler, shard_options=grain.sharding.NoSharding(), **self._options))


@final
class Share:
    """This host's part of what is still to come: every ``size``-th place, from ``rank`` on."""

    def __init__(self, remaining: Remaining, total: int, rank: int, size: int) -> None:
        self.remaining, self.rank, self.size = remaining, rank, size
        self._length = max(-(-(remaining.size(total) - rank) // size), 0)

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"Share({self.remaining}, rank={self.rank}, size={self.size})"

    def positions(self, indices: Sequence[int]) -> list[int]:
        """Positions in the run of these elements of the share."""
        return self.remaining.positions(self.rank + np.asarray(indices, np.int64) * self.size).tolist()


class _ShareDataset(grain.MapDataset):
    """The elements of a dataset at the positions of a share."""

    def __init__(self, dataset: grain.MapDataset, share: Share) -> None:
        super().__init__(dataset)
        self._share = share

    def __len__(self) -> int:
        return len(self._share)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        if index >= len(self):
            raise IndexError(f"Element {index} of a share of {len(self)}: repeat the dataset before it is shared.")
        return self.parents[0][self._share.positions([index])[0]]


class _ShareSampler:
    """The records of a sampler at the positions of a share; what is random in a record follows its position."""

    def __init__(self, sampler: Any, share: Share) -> None:
        self._sampler, self._share = sampler, share

    def __len__(self) -> int:
        return len(self._share)

    def __repr__(self) -> str:
        return f"_ShareSampler({self._sampler!r}, {self._share!r})"

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"Record {index} of a share of {len(self)}.")
        return self._sampler[self._share.positions([index])[0]]


def _counts(state: dict[str, Any]) -> list[int] | None:
    """How many elements of the share each of Grain's workers has taken; None where the state holds more than that."""
    if set(state) == {"next_index"}:
        return [state["next_index"]]
    if "last_seen_indices" in state:  # of DataLoader: the last index of each worker, which takes every n-th
        last = state["last_seen_indices"]
        return [(last[str(worker)] - worker) // len(last) + 1 for worker in range(len(last))]
    workers = state.get("iterators_in_use_states")
    if workers is None or state.get("iterators_in_use_indices") != list(range(len(workers))):
        return None
    if any(worker is None or set(worker) != {"next_index"} for worker in workers):
        return None
    return [worker["next_index"] for worker in workers]


def _check_one_to_one(built: Any, source: grain.MapDataset) -> None:
    """Raise where a stage of the random access part joins or drops elements: Grain would count those, not samples."""
    waiting = [built]
    while waiting:
        stage = waiting.pop()
        if stage is source:
            continue
        if isinstance(stage, grain.MapDataset) and len(stage) != len(source):
            raise InvalidArgumentError(
                f"{stage} makes {counted(len(stage), 'element')} of {counted(len(source), 'sample')} before "
                "to_iter_dataset(): how many "
                "samples a host took could not be told then. Move it after to_iter_dataset(), or (repeat, mix) to the "
                "dataset that ElasticDataset is given."
            )
        waiting.extend(stage.parents)
