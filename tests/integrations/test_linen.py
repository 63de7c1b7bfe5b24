"""Linen: training states come back whole, with their boxes and static fields, where they belong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxckpt as jc
from jaxckpt.integrations import linen as jln

if TYPE_CHECKING:
    from pathlib import Path

    from jax.sharding import Mesh

P = PartitionSpec
RULES = (("embed", "data"), ("mlp", "model"))


class Net(nn.Module):
    """A kernel with names of mesh axes, or of its own, and one without."""

    names: tuple[str, str] = ("data", "model")
    logical: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        box = nn.with_logical_partitioning if self.logical else nn.with_partitioning
        x = nn.Dense(16, kernel_init=box(nn.initializers.lecun_normal(), self.names))(x)
        return nn.Dense(8)(nn.relu(x))


OPTIMIZER = optax.adam(1e-2)


def make(net: Net | None = None, seed: int = 0, *, boxed: bool = True) -> TrainState:
    net = net or Net()
    params = net.init(jax.random.key(seed), jnp.ones((1, 8)))["params"]
    return TrainState.create(apply_fn=net.apply, params=params if boxed else nn.unbox(params), tx=OPTIMIZER)


@pytest.fixture
def turned() -> Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def kernel_of(state: TrainState) -> Any:
    return state.params["Dense_0"]["kernel"]


def values(state: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@jax.jit
def update(state: TrainState) -> TrainState:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        x = jnp.ones((4, 8))
        grads = jax.grad(lambda params: jnp.mean((state.apply_fn({"params": params}, x) - x) ** 2))(state.params)
        return state.apply_gradients(grads=grads)


def test_a_training_state_goes_on_on_another_mesh(tmp_path: Path, mesh_4x2: Mesh, turned: Mesh) -> None:
    net = Net()
    with jax.set_mesh(mesh_4x2):
        state = update(jln.create(lambda: make(net), mesh_4x2))
    jc.save(tmp_path / "x", state)
    again = jln.restore(tmp_path / "x", lambda: make(net, seed=1), turned)
    assert values(again) == values(state)
    assert (again.apply_fn, again.tx) == (net.apply, OPTIMIZER)
    assert kernel_of(again).value.sharding == NamedSharding(turned, P("data", "model"))
    moment = again.opt_state[0].mu["Dense_0"]["kernel"]
    assert isinstance(moment, nn.Partitioned)
    assert moment.value.sharding == kernel_of(again).value.sharding
    with jax.set_mesh(turned):
        assert int(update(again).step) == 2


def test_boxes_and_their_names_stay(tmp_path: Path, mesh_4x2: Mesh) -> None:
    state = make()
    jc.save(tmp_path / "x", state)
    again = jln.restore(tmp_path / "x", make, mesh_4x2)
    assert isinstance(kernel_of(again), nn.Partitioned)
    assert kernel_of(again).names == ("data", "model")
    assert jax.tree.structure(again.params) == jax.tree.structure(state.params)


def test_logical_names_go_by_rules(tmp_path: Path, mesh_4x2: Mesh) -> None:
    net = Net(names=("embed", "mlp"), logical=True)
    state = make(net)
    jc.save(tmp_path / "x", state)
    again = jln.restore(tmp_path / "x", lambda: make(net), mesh_4x2, RULES)
    assert isinstance(kernel_of(again), nn.LogicallyPartitioned)
    assert kernel_of(again).names == ("embed", "mlp")
    assert kernel_of(again).value.sharding.spec == P("data", "model")
    assert values(again.params) == values(state.params)


def test_moments_of_unboxed_parameters_lie_where_the_parameters_are(mesh_4x2: Mesh) -> None:
    like = jln.abstract(lambda: make(boxed=False), mesh_4x2)
    assert like.opt_state[0].mu["Dense_0"]["kernel"].sharding.spec == P()
    assert like.step.sharding == NamedSharding(mesh_4x2, P())


def test_an_abstract_state_allocates_nothing(mesh_4x2: Mesh) -> None:
    before = len(jax.live_arrays())
    jln.abstract(make, mesh_4x2)
    assert len(jax.live_arrays()) <= before


def test_a_state_without_a_mesh_is_on_the_first_device(tmp_path: Path) -> None:
    jc.save(tmp_path / "x", make())
    again = jln.restore(tmp_path / "x", make)
    assert {leaf.device for leaf in jax.tree.leaves(again)} == {jax.devices()[0]}


def test_a_partial_restore_makes_what_is_missing(tmp_path: Path) -> None:
    state = make(seed=3)
    jc.save(tmp_path / "x", {"params": state.params})
    again = jln.restore(tmp_path / "x", make, partial=True)
    assert values(again.params) == values(state.params)
    assert int(again.step) == 0


def test_another_model_is_refused_with_all_its_differences(tmp_path: Path) -> None:
    jc.save(tmp_path / "x", make())

    class Wide(Net):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(8)(nn.Dense(32)(x))

    with pytest.raises(jc.MismatchError, match=r"Dense_0.kernel"):
        jln.restore(tmp_path / "x", lambda: make(Wide()))


def test_resuming_makes_a_fresh_state_or_restores_one(tmp_path: Path, mesh_4x2: Mesh) -> None:
    noise = np.random.default_rng(3)
    with jc.CheckpointManager(tmp_path) as manager:
        step, fresh = jln.resume(manager, make, mesh_4x2, extras={"noise": noise})
        assert step is None
        manager.save(3, fresh, extras={"noise": noise})
        expected, noise = noise.random(), np.random.default_rng(4)
        manager.wait()
        step, again = jln.resume(manager, lambda: make(seed=9), mesh_4x2, extras={"noise": noise})
    assert step == 3
    assert values(again) == values(fresh)
    assert noise.random() == expected
