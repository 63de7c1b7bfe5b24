"""Data iterators on a changing number of hosts: every sample once per epoch, whoever takes it and when."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxckpt.core.errors import InvalidArgumentError, MismatchError
from jaxckpt.integrations.data import ElasticIterator, PackedIterator
from jaxckpt.integrations.elastic import Order, Remaining, Strand, after, deal

HOSTS = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def _resume(make: Any, before: list[Any], size: int) -> list[Any]:
    """Iterators on ``size`` hosts that go on from ``before``, through JSON as a checkpoint would."""
    states = json.loads(json.dumps([iterator.get_state() for iterator in before]))
    after = [make(rank, size) for rank in range(size)]
    for iterator in after:
        iterator.set_states(states)
    return after


def _drain(iterators: list[Any]) -> list[Any]:
    return [item for iterator in iterators for item in iterator]


@given(
    st.data(),
    HOSTS,
    st.integers(0, 60),
    st.integers(6, 17),
    st.integers(0, 3),
    st.sampled_from([None, 0, 7]),
)
def test_no_sample_is_lost_or_repeated_at_any_pace(
    data: st.DataObject, hosts: list[int], length: int, batch_size: int, epochs: int, seed: int | None
) -> None:
    source = [f"sample {i}" for i in range(length)]

    def make(rank: int, size: int) -> ElasticIterator[list[str]]:
        return ElasticIterator(source, batch_size=batch_size, seed=seed, epochs=epochs, rank=rank, size=size)

    iterators = [make(rank, hosts[0]) for rank in range(hosts[0])]
    seen: Counter[str] = Counter()
    for size in hosts[1:]:
        for iterator in iterators:  # not in step: each host is somewhere else
            for _ in range(data.draw(st.integers(0, 4))):
                seen.update(next(iterator, []))
        iterators = _resume(make, iterators, size)
    for batch in _drain(iterators):
        seen.update(batch)
    assert seen == Counter(source * epochs)


@given(HOSTS, st.integers(1, 60), st.integers(6, 17), st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_batches_of_a_run_do_not_depend_on_the_hosts(
    hosts: list[int], length: int, batch_size: int, steps: list[int]
) -> None:
    def make(rank: int, size: int) -> ElasticIterator[np.ndarray]:
        return ElasticIterator(np.arange(length), batch_size=batch_size, seed=3, epochs=2, rank=rank, size=size)

    def step(iterators: list[ElasticIterator[np.ndarray]]) -> list[int]:
        return [int(n) for iterator in iterators for n in next(iterator, [])]

    expected = list(make(0, 1))
    iterators = [make(rank, hosts[0]) for rank in range(hosts[0])]
    found = []
    for size, count in zip(hosts[1:], steps, strict=False):
        found += [step(iterators) for _ in range(count)]
        iterators = _resume(make, iterators, size)
    while batch := step(iterators):
        found.append(batch)
    assert [batch for batch in found if batch] == [batch.tolist() for batch in expected]


@given(st.data(), HOSTS, st.lists(st.integers(0, 9), max_size=40), st.integers(1, 7))
def test_packing_loses_no_token(data: st.DataObject, hosts: list[int], lengths: list[int], row_length: int) -> None:
    starts = np.cumsum([0, *lengths])
    source = [list(range(start, start + n)) for start, n in zip(starts, lengths, strict=False)]

    def make(rank: int, size: int) -> PackedIterator:
        return PackedIterator(source, row_length=row_length, seed=1, rank=rank, size=size)

    iterators = [make(rank, hosts[0]) for rank in range(hosts[0])]
    seen: list[int] = []
    for size in hosts[1:]:
        for iterator in iterators:
            for _ in range(data.draw(st.integers(0, 3))):
                seen += next(iterator, np.array([], np.int64)).tolist()
        iterators = _resume(make, iterators, size)
    seen += [int(token) for row in _drain(iterators) for token in row]
    seen += [token for iterator in iterators for token in iterator.get_state()["tokens"]]  # too few for a row
    assert sorted(seen) == list(range(sum(lengths)))


@given(st.integers(1, 200), st.integers(0, 2**64), st.integers(1, 3))
def test_each_epoch_is_a_permutation(length: int, seed: int, epochs: int) -> None:
    samples = Order(length=length, seed=seed, epochs=epochs).samples(np.arange(length * epochs))
    for epoch in np.split(samples, epochs):
        assert sorted(epoch) == list(range(length))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = {(seed, epoch): _epoch(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    assert abs(np.corrcoef(orders[0, 0], np.arange(1000))[0, 1]) < 0.1


def _epoch(seed: int, epoch: int) -> list[int]:
    return Order(length=1000, seed=seed, epochs=3).samples(np.arange(1000) + 1000 * epoch).tolist()


def test_the_order_of_a_seed_stays_what_it_was() -> None:
    """Runs of an earlier version go on in the same order: this may only change together with the state's version."""
    assert Order(length=7, seed=5, epochs=2).samples(np.arange(14)).tolist() == GOLDEN


GOLDEN = [0, 5, 4, 6, 3, 2, 1, 0, 2, 5, 4, 1, 6, 3]


@given(st.data(), st.integers(1, 5), st.integers(1, 4))
def test_what_nobody_took_remains(data: st.DataObject, n: int, width: int) -> None:
    holes = ((2, 5), (9, 10))
    before = Remaining(holes=holes, frontier=12)
    strands = [Strand(r * width, n * width, data.draw(st.integers(0, 5)), width) for r in range(n)]
    taken = {int(p) for strand in strands for p in before.positions(strand.places(0))}
    left = after(before, strands)
    size = left.size(200)
    assert {int(p) for p in left.positions(np.arange(size))} == {2, 3, 4, 9, *range(12, 200)} - taken
    assert size == before.size(200) - len(taken)


def test_merging_costs_what_hosts_are_apart_and_not_what_they_have_done() -> None:
    far = 10**12
    assert after(Remaining(), [Strand(0, 2, far), Strand(1, 2, far + 2)]) == Remaining(
        holes=((2 * far, 2 * far + 1), (2 * far + 2, 2 * far + 3)), frontier=2 * far + 4
    )


@given(st.lists(st.integers()), st.integers(1, 9))
def test_dealing_gives_every_item_to_one_host(items: list[int], size: int) -> None:
    assert [item for rank in range(size) for item in deal(items, rank, size)] == items


def test_a_missing_host_is_named() -> None:
    states = [_started(rank, 4).get_state() for rank in range(4)]
    with pytest.raises(MismatchError, match=r"ranks \[0, 1, 3\] were given, of 4 hosts"):
        _started(0, 2).set_states([states[0], states[1], states[3]])
    with pytest.raises(MismatchError, match=r"ranks \[2\] were given, of 4 hosts"):
        _started(0, 2).set_state(states[2])


def test_hosts_that_share_a_rank_count_once() -> None:
    states = [_started(rank, 2).get_state() for rank in (0, 0, 1, 1)]
    alone = _started(0, 1)
    alone.set_states(states)
    assert next(alone).tolist() == list(range(6, 12))
    with pytest.raises(MismatchError, match="of rank 0, and differ"):
        alone.set_states([states[0], {**states[0], "steps": 5}, states[2]])


def test_samples_taken_twice_are_noticed() -> None:
    states = [_started(rank, 2).get_state() for rank in (0, 1)]
    states[1]["taken"] = states[0]["taken"]
    with pytest.raises(MismatchError, match=r"positions \[0, 1, 2\] of the run"):
        _started(0, 1).set_states(states)


def test_another_source_is_refused() -> None:
    state = _started(0, 1).get_state()
    other = ElasticIterator(np.arange(31), batch_size=6, rank=0, size=1)
    with pytest.raises(MismatchError, match="'length': 30.*'length': 31"):
        other.set_states([state])


def test_a_batch_smaller_than_the_hosts_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="batch_size=3 .* for each: 4 hosts"):
        ElasticIterator(np.arange(9), batch_size=3, rank=0, size=4)


def test_the_remainder_is_dropped_on_all_hosts_alike() -> None:
    batches = [
        list(ElasticIterator(np.arange(11), batch_size=4, drop_remainder=True, rank=rank, size=2)) for rank in (0, 1)
    ]
    assert [len(host) for host in batches] == [2, 2]


def test_the_batch_size_may_change_with_the_hosts() -> None:
    states = [_started(rank, 2).get_state() for rank in (0, 1)]
    bigger = ElasticIterator(np.arange(30), batch_size=24, rank=0, size=1)
    bigger.set_states(states)
    assert next(bigger).tolist() == list(range(6, 30))


def _started(rank: int, size: int) -> ElasticIterator[np.ndarray]:
    iterator = ElasticIterator(np.arange(30), batch_size=6, rank=rank, size=size)
    next(iterator)
    return iterator
