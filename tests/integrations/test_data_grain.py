"""Grain pipelines on a changing number of hosts: every sample once, through Grain's own iterators and workers."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import grain
import numpy as np
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxckpt.core.errors import InvalidArgumentError, MismatchError
from jaxckpt.integrations.grain import ElasticDataset, ElasticLoader

BUILDS: dict[str, Any] = {
    "plain": None,
    "batches": lambda d: d.to_iter_dataset().batch(3),
    "mapped": lambda d: d.map(lambda x: x).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)),
    "filtered": lambda d: d.to_iter_dataset().filter(lambda x: x % 5 != 0).batch(2),
}


def _numbers(iterators: list[Any], steps: list[int] | None = None) -> list[int]:
    found: list[int] = []
    for place, iterator in enumerate(iterators):
        if steps is None:
            found += [int(n) for batch in iterator for n in np.atleast_1d(batch)]
        else:
            for _ in range(steps[place % len(steps)]):
                found += [int(n) for n in np.atleast_1d(next(iterator, np.array([], int)))]
    return found


def _change_hosts(make: Any, hosts: list[int], steps: list[int]) -> list[int]:
    """All that is delivered on changing numbers of hosts, which take ``steps`` in turn before each change."""
    iterators = [make(rank, hosts[0]) for rank in range(hosts[0])]
    seen: list[int] = []
    for size in hosts[1:]:
        seen += _numbers(iterators, steps)
        states = json.loads(json.dumps([iterator.get_state() for iterator in iterators]))
        for iterator in iterators:
            iterator.close()
        iterators = [make(rank, size) for rank in range(size)]
        for iterator in iterators:
            iterator.set_states(states)
    seen += _numbers(iterators)
    for iterator in iterators:
        iterator.close()
    return seen


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(sorted(BUILDS)),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 40),
    st.integers(1, 2),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
)
def test_no_sample_of_a_dataset_is_lost_or_repeated(
    build: str, hosts: list[int], length: int, epochs: int, steps: list[int]
) -> None:
    dataset = grain.MapDataset.range(length).shuffle(seed=3).repeat(epochs)

    def make(rank: int, size: int) -> ElasticDataset:
        return ElasticDataset(dataset, BUILDS[build], rank=rank, size=size)

    kept = [n for n in range(length) if build != "filtered" or n % 5 != 0]
    assert Counter(_change_hosts(make, hosts, steps)) == Counter(kept * epochs)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 40),
    st.integers(1, 2),
    st.integers(1, 3),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
)
def test_no_sample_of_a_loader_is_lost_or_repeated(
    hosts: list[int], length: int, epochs: int, batch_size: int, steps: list[int]
) -> None:
    sampler = grain.samplers.IndexSampler(length, shuffle=True, seed=1, num_epochs=epochs)

    def make(rank: int, size: int) -> ElasticLoader:
        operations = [grain.transforms.Batch(batch_size)]
        return ElasticLoader(
            data_source=np.arange(length), sampler=sampler, operations=operations, rank=rank, size=size
        )

    assert Counter(_change_hosts(make, hosts, steps)) == Counter(list(range(length)) * epochs)


def test_worker_processes_lose_nothing_over_4_2_3_hosts() -> None:
    flags.FLAGS.mark_as_parsed()  # Grain asks for it before it starts processes
    sampler = grain.samplers.IndexSampler(50, shuffle=True, seed=1, num_epochs=1)

    def make(rank: int, size: int) -> ElasticLoader:
        # Workers in one host alone: processes are slow to start. Hosts may differ in their workers.
        workers = 2 if rank == 0 else 0
        return ElasticLoader(data_source=np.arange(50), sampler=sampler, worker_count=workers, rank=rank, size=size)

    assert sorted(_change_hosts(make, [4, 2, 3], [3, 1, 2, 5])) == list(range(50))


def test_the_same_hosts_go_on_as_grain_does() -> None:
    """Also where Grain holds samples in a window that could not be shared anew."""

    def make(rank: int, size: int) -> ElasticDataset:
        def build(share: grain.MapDataset) -> grain.IterDataset:
            return grain.experimental.WindowShuffleIterDataset(share.to_iter_dataset(), window_size=4, seed=2)

        return ElasticDataset(grain.MapDataset.range(20), build, rank=rank, size=size)

    whole = [_numbers([make(rank, 2)]) for rank in (0, 1)]
    hosts = [make(rank, 2) for rank in (0, 1)]
    first = [[int(next(host)) for _ in range(3)] for host in hosts]
    states = json.loads(json.dumps([host.get_state() for host in hosts]))
    later = [make(rank, 2) for rank in (0, 1)]
    for host in later:
        host.set_states(states)
    assert [a + _numbers([host]) for a, host in zip(first, later, strict=True)] == whole
    with pytest.raises(MismatchError, match=r"saved on 2 hosts and is restored on 3.*window shuffle"):
        make(0, 3).set_states(states)


def test_batches_before_to_iter_dataset_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"4 elements of 8 samples before to_iter_dataset"):
        next(ElasticDataset(grain.MapDataset.range(8), lambda d: d.batch(2), rank=0, size=1))


def test_a_sampler_that_shares_is_refused() -> None:
    sampler = grain.samplers.IndexSampler(8, shard_options=grain.sharding.ShardOptions(0, 2, True))
    with pytest.raises(InvalidArgumentError, match="among 2 hosts itself"):
        ElasticLoader(data_source=np.arange(8), sampler=sampler)


def test_random_transformations_follow_the_sample_and_not_the_host() -> None:
    class Noise(grain.transforms.RandomMap):
        def random_map(self, element: Any, rng: np.random.Generator) -> Any:
            return int(element) * 1000 + int(rng.integers(1000))

    def make(rank: int, size: int) -> ElasticLoader:
        sampler = grain.samplers.IndexSampler(12, shuffle=True, seed=1, num_epochs=1)
        return ElasticLoader(data_source=np.arange(12), sampler=sampler, operations=[Noise()], rank=rank, size=size)

    assert sorted(_change_hosts(make, [4, 2, 3], [1])) == sorted(_numbers([make(0, 1)]))
