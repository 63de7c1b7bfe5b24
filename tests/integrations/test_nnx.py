"""NNX: what is restored is the node, where it belongs, with its metadata, in the memory of one node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxckpt as jc
from jaxckpt.integrations import nnx as jnx
from models.llama import PRESETS, Llama
from models.sharding import make_mesh, shardings_of

if TYPE_CHECKING:
    from pathlib import Path

    from jax.sharding import Mesh


class Net(nnx.Module):
    """One of everything: annotated and plain kernels, batch statistics, a random stream."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
        self.first = nnx.Linear(8, 16, kernel_init=kernel_init, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.dropout(self.norm(self.first(x))))


def make(seed: int = 0) -> tuple[Net, nnx.Optimizer, nnx.Rngs]:
    net = Net(nnx.Rngs(seed))
    return net, nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param), nnx.Rngs(noise=seed, params=seed + 1)


@pytest.fixture
def turned() -> Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def trained(mesh: Mesh, steps: int = 2) -> tuple[Net, nnx.Optimizer, nnx.Rngs]:
    with jax.set_mesh(mesh):
        node = jnx.create(make, mesh)
        for _ in range(steps):
            update(node)
    return node


def update(node: tuple[Net, nnx.Optimizer, nnx.Rngs]) -> float:
    net, optimizer, rngs = node
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        x = jax.random.normal(rngs.noise(), (4, 8))
        loss, grads = nnx.value_and_grad(lambda net: jnp.mean((net(x) - x) ** 2))(net)
        optimizer.update(net, grads)
    return float(loss)


def values(node: Any) -> list[bytes]:
    def one(leaf: Any) -> bytes:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    return [one(leaf) for leaf in jax.tree.leaves(nnx.state(node))]


def buffers(arrays: list[jax.Array]) -> set[int]:
    plain = [a for a in arrays if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)]
    return {shard.data.unsafe_buffer_pointer() for array in plain for shard in array.addressable_shards}


def test_modules_optimizer_and_random_streams_come_back_on_another_mesh(
    tmp_path: Path, mesh_4x2: Mesh, turned: Mesh
) -> None:
    node = trained(mesh_4x2)
    jc.save(tmp_path / "x", nnx.state(node))
    again = jnx.restore(tmp_path / "x", lambda: make(5), turned)
    assert values(again) == values(node)
    net, optimizer, rngs = again
    assert net.first.kernel.sharding == NamedSharding(turned, PartitionSpec("data", "model"))
    assert optimizer.opt_state[0].mu["first"]["kernel"].sharding == net.first.kernel.sharding
    assert net.second.kernel.sharding.is_fully_replicated
    with jax.set_mesh(turned):
        assert jax.random.key_data(rngs.noise()).tolist() == jax.random.key_data(node[2].noise()).tolist()


def test_training_goes_on_as_if_it_had_never_stopped(tmp_path: Path, mesh_4x2: Mesh) -> None:
    node = trained(mesh_4x2)
    jc.save(tmp_path / "x", nnx.state(node))
    with jax.set_mesh(mesh_4x2):
        again = jnx.restore(tmp_path / "x", make, mesh_4x2)
        # Not to the bit: eager updates let XLA choose where new arrays lie, and so in which order it sums.
        assert [update(again) for _ in range(3)] == pytest.approx([update(node) for _ in range(3)], rel=1e-5)


def test_metadata_of_variables_stay(tmp_path: Path, mesh_4x2: Mesh) -> None:
    node = trained(mesh_4x2)
    jc.save(tmp_path / "x", nnx.state(node))
    net, optimizer, rngs = jnx.restore(tmp_path / "x", make, mesh_4x2)
    assert net.first.kernel.get_metadata() == node[0].first.kernel.get_metadata()
    moment = optimizer.opt_state[0].mu["first"]["kernel"]
    assert moment.get_metadata()["out_sharding"] == ("data", "model")
    assert type(net.norm.mean) is nnx.BatchStat
    assert rngs.noise.tag == "noise"


def test_restoring_takes_the_memory_of_one_node(tmp_path: Path, mesh_4x2: Mesh) -> None:
    def big() -> nnx.Linear:
        return nnx.Linear(512, 512, rngs=nnx.Rngs(0))

    jc.save(tmp_path / "x", nnx.state(big()))
    before = buffers(jax.live_arrays())
    made: list[int] = []
    node = jnx.restore(tmp_path / "x", lambda: made.append(1) or big(), mesh_4x2)
    assert buffers(jax.live_arrays()) - before <= buffers(jax.tree.leaves(nnx.state(node)))
    assert made == [1]  # traced once


def test_an_abstract_state_allocates_nothing_and_says_where_all_goes(mesh_4x2: Mesh) -> None:
    before = len(jax.live_arrays())
    like = jnx.abstract(make, mesh_4x2)
    assert len(jax.live_arrays()) <= before
    leaves = jax.tree.leaves(like)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding.mesh == mesh_4x2 for leaf in leaves)


def test_without_a_mesh_the_context_or_the_first_device_is_meant(mesh_4x2: Mesh) -> None:
    with jax.set_mesh(mesh_4x2):
        like = jnx.abstract(make)
    assert like[0]["first"]["kernel"].get_value().sharding == NamedSharding(mesh_4x2, PartitionSpec("data", "model"))
    plain = jnx.abstract(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    assert all(isinstance(leaf.sharding, SingleDeviceSharding) for leaf in jax.tree.leaves(plain))


def test_logical_names_go_by_flax_own_rules(mesh_4x2: Mesh) -> None:
    def annotated() -> nnx.Linear:
        kernel_init = nnx.with_partitioning(nnx.initializers.ones, ("embed", "mlp"))
        return nnx.Linear(8, 8, kernel_init=kernel_init, rngs=nnx.Rngs(0))

    with nnx.logical_axis_rules((("embed", "data"), ("mlp", "model"))):
        like = jnx.abstract(annotated, mesh_4x2)
    assert like["kernel"].get_value().sharding.spec == PartitionSpec("data", "model")


def test_a_function_places_variables_that_have_names_of_their_own(tmp_path: Path) -> None:
    mesh = make_mesh(4, 2)

    def llama() -> Llama:
        return Llama(PRESETS["tiny"], rngs=nnx.Rngs(0))

    model = jnx.create(llama, lambda state: shardings_of(state, mesh, fsdp=True))
    assert model.embedding.sharding.spec == PartitionSpec("model", "data")
    jc.save(tmp_path / "x", nnx.state(model))
    other = make_mesh(2, 4)
    again = jnx.restore(tmp_path / "x", llama, lambda state: shardings_of(state, other, fsdp=True))
    assert values(again) == values(model)
    assert again.embedding.sharding == NamedSharding(other, PartitionSpec("model", "data"))
    with pytest.raises(ValueError, match="it must give one each"):
        jnx.abstract(llama, lambda state: [])


def test_a_live_node_is_filled_in_place(tmp_path: Path, mesh_4x2: Mesh, turned: Mesh) -> None:
    node = trained(mesh_4x2)
    jc.save(tmp_path / "x", nnx.state(node))
    other = trained(turned, steps=0)
    kernel = other[0].first.kernel
    jnx.restore_into(tmp_path / "x", other)
    assert other[0].first.kernel is kernel
    assert kernel.sharding.mesh == turned
    assert values(other) == values(node)


def test_a_restore_that_fails_changes_nothing(tmp_path: Path) -> None:
    jc.save(tmp_path / "x", nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0))))
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(1))
    before = values(model)
    with pytest.raises(jc.MismatchError, match=r"kernel"):
        jnx.restore_into(tmp_path / "x", model)
    assert values(model) == before


def test_a_partial_restore_makes_what_is_missing(tmp_path: Path) -> None:
    jc.save(tmp_path / "x", {"kernel": {"value": jnp.ones((2, 2))}, "other": 1})
    model = jnx.restore(tmp_path / "x", lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)), partial=True)
    assert model.kernel.get_value().tolist() == [[1, 1], [1, 1]]
    assert model.bias.get_value().tolist() == [0, 0]


def test_a_shared_variable_is_stored_once_and_shared_again(tmp_path: Path) -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.a = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.b = self.a

    jc.save(tmp_path / "x", nnx.state(Tied()))
    again = jnx.restore(tmp_path / "x", Tied)
    assert again.a is again.b


def test_resuming_makes_a_fresh_node_or_restores_one(tmp_path: Path, mesh_4x2: Mesh) -> None:
    noise = np.random.default_rng(3)
    with jc.CheckpointManager(tmp_path) as manager:
        step, fresh = jnx.resume(manager, make, mesh_4x2, extras={"noise": noise})
        assert step is None
        assert fresh[0].first.kernel.sharding.spec == PartitionSpec("data", "model")
        manager.save(3, nnx.state(fresh), extras={"noise": noise})
        expected, noise = noise.random(), np.random.default_rng(4)
        manager.wait()
        step, again = jnx.resume(manager, lambda: make(9), mesh_4x2, extras={"noise": noise})
    assert step == 3
    assert values(again) == values(fresh)
    assert noise.random() == expected
