"""What belongs to a step besides its tree comes back exactly, is told when damaged, and is no trouble to Orbax."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxckpt.core.errors import CorruptionError, InvalidArgumentError, MismatchError, NotFoundError
from jaxckpt.integrations.data import ElasticIterator
from jaxckpt.manager import extras
from jaxckpt.manager.manager import CheckpointManager
from jaxckpt.storage.url import open_store

if TYPE_CHECKING:
    from pathlib import Path

TREE = {"w": np.arange(8, dtype=np.float32)}


class Counter:
    """A Stateful in torch's words."""

    def __init__(self) -> None:
        self.n = 0

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


def test_objects_and_values_go_on_as_they_were_when_the_step_was_captured(tmp_path: Path) -> None:
    data, generator, dice, counter = iter(range(9)), np.random.default_rng(3), random.Random(4), Counter()
    elastic = ElasticIterator(np.arange(12), batch_size=2)
    next(elastic)
    counter.n = 5
    del data
    with CheckpointManager(tmp_path) as manager:
        manager.save(
            1,
            TREE,
            extras={"data": elastic, "np": generator, "py": dice, "count": counter, "notes": {"lr": 0.1}, "raw": b"\0"},
        )
        counter.n, expected = 99, (generator.random(), dice.random(), next(elastic).tolist())  # after the capture
    again = {
        "data": ElasticIterator(np.arange(12), batch_size=2),
        "np": np.random.default_rng(0),
        "py": random.Random(),
        "count": Counter(),
    }
    with CheckpointManager(tmp_path) as manager:
        step, _ = manager.resume(like=TREE, extras=again)
        assert step == 1
        assert (again["np"].random(), again["py"].random(), next(again["data"]).tolist()) == expected
        assert again["count"].n == 5
        found = manager.restore_extras(1, {"notes": None, "raw": None})
        assert found == {"notes": {"lr": 0.1}, "raw": b"\0"}
        assert set(manager.restore_extras(1)) == {"data", "np", "py", "count", "notes", "raw"}


def test_grains_own_iterators_go_on(tmp_path: Path) -> None:
    def loader() -> Any:
        sampler = grain.samplers.IndexSampler(20, shuffle=True, seed=1, num_epochs=1)
        return iter(grain.DataLoader(data_source=np.arange(20), sampler=sampler, worker_count=0))

    def dataset() -> Any:
        return iter(grain.MapDataset.range(20).shuffle(seed=2).to_iter_dataset().batch(3))

    one, two = loader(), dataset()
    assert isinstance(one.get_state(), bytes)
    for _ in range(3):
        next(one), next(two)
    with CheckpointManager(tmp_path) as manager:
        manager.save(3, TREE, extras={"loader": one, "dataset": two})
        expected = [int(x) for x in one], np.concatenate(list(two)).tolist()
        again = {"loader": loader(), "dataset": dataset()}
        manager.wait()
        manager.restore_extras(3, again)
    assert ([int(x) for x in again["loader"]], np.concatenate(list(again["dataset"])).tolist()) == expected


def test_keys_of_jax_and_rngs_of_nnx_come_back(tmp_path: Path) -> None:
    rngs = nnx.Rngs(params=1, dropout=2)
    rngs.dropout()
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, TREE, extras={"key": jax.random.key(7), "rngs": nnx.to_pure_dict(nnx.state(rngs))})
        manager.wait()
        found = manager.restore_extras(1)
    assert jax.random.key_data(found["key"]).tolist() == jax.random.key_data(jax.random.key(7)).tolist()
    other = nnx.Rngs(params=0, dropout=0)
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, found["rngs"])
    nnx.update(other, state)
    assert jnp.array_equal(jax.random.key_data(other.dropout()), jax.random.key_data(rngs.dropout()))


def test_orbax_reads_and_deletes_a_step_with_extras(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, TREE, extras={"notes": [step]}, metrics={"loss": 1.0 / step})
    with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(max_to_keep=1)) as theirs:
        assert list(theirs.all_steps()) == [1, 2]
        restored = theirs.restore(2, args=ocp.args.StandardRestore(TREE))
        np.testing.assert_array_equal(restored["w"], TREE["w"])
        theirs.restore(1)
        theirs.save(3, args=ocp.args.StandardSave(TREE))
        theirs.wait_until_finished()
        assert list(theirs.all_steps()) == [3]
    with pytest.raises(NotFoundError, match="saved without extras"):
        CheckpointManager(tmp_path).restore_extras(3)


def test_a_name_that_was_not_saved_is_told_and_nothing_is_filled(tmp_path: Path) -> None:
    counter = Counter()
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, TREE, extras={"count": counter})
        manager.wait()
        counter.n = 3
        with pytest.raises(NotFoundError, match=r"has no extra 'data'; it was saved with 'count'"):
            manager.restore_extras(1, {"count": counter, "data": counter})
    assert counter.n == 3


def test_what_cannot_be_stored_is_named_and_nothing_is_saved(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(InvalidArgumentError, match=r"notes\.a\[1\] is a set"):
            manager.save(1, TREE, extras={"notes": {"a": [1, {2}]}})
        assert manager.all_steps() == []


def test_any_flipped_bit_is_told() -> None:
    data = extras.take({"notes": {"lr": 3, "bytes": b"abc"}, "t": (1, 2)}, 0, 1)
    good = extras.untake(data, "here")
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(CorruptionError, match="here"):
            extras.untake(bytes(damaged), "here")
    with pytest.raises(CorruptionError):
        extras.untake(data[:-3], "here")
    assert good["extras"] == {"notes": {"lr": 3, "bytes": b"abc"}, "t": (1, 2)}


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.just("jaxckpt") | st.integers(), inner)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_every_value_comes_back_equal_and_of_its_type(value: Any) -> None:
    found = extras.untake(extras.take({"x": value}, 0, 1), "here")["extras"]["x"]
    assert found == value
    assert repr(found) == repr(value)


@given(st.sampled_from(["int8", "float16", "bfloat16", "float32", "uint64", "bool", "complex64"]), st.integers(0, 3))
def test_arrays_come_back_to_the_bit(dtype: str, size: int) -> None:
    for value in (np.ones((2, size), jnp.dtype(dtype)), jnp.dtype(dtype).type(1)):
        found = extras.untake(extras.take({"x": value}, 0, 1), "here")["extras"]["x"]
        assert type(found) is type(value)
        assert (found.dtype, found.shape, found.tobytes()) == (value.dtype, value.shape, value.tobytes())


def saved_by(url: str, states: list[dict[str, Any]]) -> Any:
    store = open_store(url)
    for rank, state in enumerate(states):
        made = extras.attached(store, state, rank, len(states))
        assert made is not None
        made()
    return store


def test_a_mistyped_name_is_told_with_the_nearest_and_nothing_is_filled(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, TREE, extras={"loader": Counter(), "rng": np.random.default_rng(0)})
        manager.wait()
        counter = Counter()
        counter.n = 5
        told = r"has no extra 'lodaer' \(the step has 'loader'\); it was saved with 'loader', 'rng'"
        with pytest.raises(NotFoundError, match=told):
            manager.restore_extras(1, {"lodaer": counter, "rng": None})
        with pytest.raises(NotFoundError, match=told):
            manager.resume(TREE, extras={"lodaer": counter})
        with pytest.raises(NotFoundError, match=r"no extras 'a', 'rngs' \(the step has 'rng'\); it"):
            manager.restore_extras(1, {"a": None, "rngs": None})
        assert counter.n == 5


def test_another_number_of_processes_takes_the_states_of_all() -> None:
    ranks = [ElasticIterator(np.arange(24), batch_size=4, seed=1, rank=r, size=4) for r in range(4)]
    seen = [int(x) for one in ranks for x in next(one)]
    store = saved_by("memory://tests/extras/elastic", [{"data": one} for one in ranks])
    for rank in range(2):
        two = ElasticIterator(np.arange(24), batch_size=4, seed=1, rank=rank, size=2)
        extras.restore_extras(store, {"data": two}, rank, 2)
        seen += [int(x) for batch in two for x in batch]
    assert sorted(seen) == list(range(24))


def test_the_same_number_and_another_batch_size_takes_the_states_of_all_too() -> None:
    ranks = [ElasticIterator(np.arange(24), batch_size=4, seed=1, rank=r, size=2) for r in range(2)]
    seen = [int(x) for one in ranks for x in next(one)]
    store = saved_by("memory://tests/extras/batch", [{"data": one} for one in ranks])
    for rank in range(2):
        wider = ElasticIterator(np.arange(24), batch_size=10, seed=1, rank=rank, size=2)
        extras.restore_extras(store, {"data": wider}, rank, 2)
        seen += [int(x) for batch in wider for x in batch]
    assert sorted(seen) == list(range(24))


def test_states_that_differ_are_refused_on_another_number_of_processes_and_equal_ones_are_not() -> None:
    store = saved_by("memory://tests/extras/counts", [{"count": n, "same": {"a": 1}} for n in (1, 2)])
    assert extras.restore_extras(store, {"same": None}, 2, 3) == {"same": {"a": 1}}
    with pytest.raises(MismatchError, match=r"'count'.* by 2 processes and is restored by 3.*value of each"):
        extras.restore_extras(store, {"count": None}, 0, 3)
    with pytest.raises(MismatchError, match="a Counter has no set_states"):
        extras.restore_extras(store, {"count": Counter()}, 0, 3)
    assert extras.restore_extras(store, None, 1, 2) == {"count": 2, "same": {"a": 1}}


def test_a_file_that_is_missing_is_damage() -> None:
    store = saved_by("memory://tests/extras/lost", [{"count": n} for n in (1, 2)])
    store.delete("extras/process_1.json")
    with pytest.raises(CorruptionError, match=r"process_1\.json is not there, and 2 processes saved"):
        extras.restore_extras(store, None, 1, 2)
