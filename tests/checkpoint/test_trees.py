"""Every kind of tree comes back as it was: containers, keys and their types, tied leaves, states of flax and optax."""

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.core.errors import UnsupportedLeafError
from tests.checkpoint.bits import assert_same_tree, raw


@pytest.fixture(autouse=True)
def _promotion() -> Iterator[None]:
    """Optax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Point:
    x: Any
    y: Any
    label: str = dataclasses.field(default="origin", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Plain:
    x: Any
    y: Any


@flax.struct.dataclass
class Struct:
    w: Any
    name: str = flax.struct.field(pytree_node=False, default="n")


@jax.tree_util.register_pytree_node_class
class Bag:
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def tree_flatten(self) -> tuple[list[Any], int]:
        return self.items, len(self.items)

    @classmethod
    def tree_unflatten(cls, size: int, items: list[Any]) -> "Bag":
        return cls(list(items))


def x(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32)


BUILT_IN = {
    "str_keys": {"b": x(0), "a": x(1)},
    "int_keys": {3: x(0), 1: x(1), -2: x(2)},
    "mixed_keys": {1: x(0), "1": x(1), "a": x(2), 2.5: x(3), (1, "b"): x(4), None: x(5), b"k": x(6), True + 1: x(7)},
    "bool_keys": {True: x(0), False: x(1)},
    "dots_and_slashes": {"a.b": x(0), "a": {"b": x(1)}, "a/b": x(2), "": x(3), "/": x(4), "..": x(5), ".": x(6)},
    "clashing_suffixes": {1: x(0), "1": x(1), "1~2": x(2), "a.b": 1, "a": {"b": 2, "b~2": 3}, "a.b~2": 4},
    "odd_names": {"c": x(0), "zarr.json": x(1), "c/0/0": x(2), "%2F": x(3), "ü ☃": x(4), "a b": x(5), "~": x(6)},
    "long_names": {"k" * 2000: x(0), "k" * 2001: x(1)},
    "list": [x(0), [x(1), [x(2)]]],
    "tuple": (x(0), (x(1),), [x(2), (3, "four", None)]),
    "namedtuple": Pair(x(0), Pair(1, {"a": x(1)})),
    "ordered": OrderedDict(b=x(0), a=x(1)),
    "deep": {"a": [({"b": [(Pair(1, [x(0)]),)]},)]},
    "empty": {"a": {}, "b": [], "c": (), "d": None, "e": {"f": {}}, "g": [None, {}, []], "w": x()},
    "empty_dict": {},
    "empty_list": [],
    "empty_tuple": (),
    "none": None,
    "bare_numpy": x(),
    "bare_number": 3,
    "bare_text": "text",
    "list_of_none": [None, None],
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_containers_come_back_with_and_without_like(tmp_path: Path, name: str) -> None:
    tree = BUILT_IN[name]
    jc.save(tmp_path / "c", tree)
    for found in (jc.restore(tmp_path / "c"), jc.restore(tmp_path / "c", tree), jc.restore(tmp_path / "c", jc.on_host)):
        assert_equal(found, tree)


def assert_equal(found: Any, tree: Any) -> None:
    """Container by container: jax cannot flatten dictionaries whose keys do not sort."""
    assert type(found) is type(tree)
    if isinstance(tree, dict):
        assert [(type(k), k) for k in found] == [(type(k), k) for k in tree]
        for key, value in tree.items():
            assert_equal(found[key], value)
    elif isinstance(tree, list | tuple):
        assert len(found) == len(tree)
        for one, other in zip(found, tree, strict=True):
            assert_equal(one, other)
    else:
        assert_same_tree(found, tree)


def test_bare_jax_arrays_and_keys_come_back(tmp_path: Path) -> None:
    for name, tree in {"array": jnp.ones((2, 3)), "key": jax.random.key(3), "scalar": jnp.float32(2)}.items():
        jc.save(tmp_path / name, tree)
        assert_same_tree(jc.restore(tmp_path / name), tree)
        assert_same_tree(jc.restore(tmp_path / name, tree), tree)


NODES = {
    "dataclass": Plain(x(0), {"a": x(1)}),
    "dataclass_with_static": Point(x(0), x(1), label="here"),
    "flax_struct": Struct(w=x(), name="mine"),
    "own_node": Bag([x(0), {"a": 1}]),
    "defaultdict": defaultdict(list, {"a": x(0), "b": [1]}),
    "nested": {"a": [Plain(1, Pair(Struct(w=x()), 2))]},
    "partial": jax.tree_util.Partial(max, x()),
}


@pytest.mark.parametrize("name", NODES)
def test_registered_nodes_come_back_with_like(tmp_path: Path, name: str) -> None:
    tree = NODES[name]
    jc.save(tmp_path / "c", tree)
    found = jc.restore(
        tmp_path / "c", jax.tree.map(lambda leaf: np.zeros_like(leaf) if hasattr(leaf, "shape") else leaf, tree)
    )
    assert_same_tree(found, tree)
    assert jc.diff(tmp_path / "c", tmp_path / "c").differing == ()


def test_types_whose_modules_are_loaded_come_back_without_like(tmp_path: Path) -> None:
    tree = {"p": Pair(1, 2), "d": Plain(x(0), x(1)), "o": OrderedDict(z=1, a=2)}
    jc.save(tmp_path / "c", tree)
    found = jc.restore(tmp_path / "c")
    assert type(found["p"]) is Pair
    assert type(found["d"]) is Plain
    assert type(found["o"]) is OrderedDict
    assert_same_tree(found, tree)


def test_types_that_cannot_be_rebuilt_without_like_come_back_as_dicts_with_all_leaves(tmp_path: Path) -> None:
    class Gone(NamedTuple):
        a: Any
        b: Any

    jc.save(tmp_path / "c", {"gone": Gone(1, x()), "bag": Bag([1, 2]), "point": Point(1, 2, label="l")})
    found = jc.restore(tmp_path / "c")
    assert found["gone"]["a"] == 1
    assert raw(found["gone"]["b"]) == raw(x())
    assert sorted(found["bag"].values()) == [1, 2]
    assert {k: found["point"][k] for k in ("x", "y")} == {"x": 1, "y": 2}


def test_a_saved_type_never_makes_the_reader_import_or_call_anything_odd(tmp_path: Path) -> None:
    """A type name is looked up among loaded modules only, and only pytree-like classes are called."""
    from jaxckpt.core.tree import Node, build

    for name in ("subprocess:Popen", "os:system", "builtins:eval", "no.such.module:X", "antigravity:X"):
        for kind in ("node", "namedtuple"):
            leaf = Node(kind="leaf", leaf=0)
            assert build(Node(kind=kind, type=name, keys=("args",), children=(leaf,)), lambda i: "true") == {
                "args": "true"
            }


# Flax


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(4, 2, rngs=rngs, dtype=jnp.bfloat16)


def test_nnx_modules_go_on_where_they_were_with_their_rng_streams(tmp_path: Path) -> None:
    def run(model: Model, data: jax.Array) -> jax.Array:
        for block in model.blocks:
            data = block.norm(block.drop(block.linear(data)))
        return data

    data = jnp.ones((3, 4))
    model = Model(nnx.Rngs(0, dropout=1))
    run(model, data)
    state = nnx.state(model)
    jc.save(tmp_path / "c", state)
    expected = [raw(run(model, data)) for _ in range(2)]

    other = Model(nnx.Rngs(5, dropout=6))
    graph, like = nnx.split(other)
    found = jc.restore(tmp_path / "c", like)
    again = nnx.merge(graph, found)
    assert [raw(run(again, data)) for _ in range(2)] == expected


def test_nnx_states_come_back_into_abstract_states_on_a_mesh(tmp_path: Path, mesh_4x2: Any) -> None:
    model = Model(nnx.Rngs(0))
    jc.save(tmp_path / "c", nnx.state(model))
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(1))))
    sharding = NamedSharding(mesh_4x2, P())
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), abstract)
    found = jc.restore(tmp_path / "c", like)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(found))
    assert_same_tree(found, nnx.state(model), placed=False)
    nnx.merge(graph, found)


@pytest.mark.parametrize("pure", [False, True])
def test_nnx_states_come_back_without_like(tmp_path: Path, pure: bool) -> None:
    state = nnx.state(Model(nnx.Rngs(0)))
    tree = nnx.to_pure_dict(state) if pure else state
    jc.save(tmp_path / "c", tree)
    found = jc.restore(tmp_path / "c")
    leaves = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
    assert len(leaves) == len(jax.tree.leaves(tree))
    if pure:
        assert_same_tree(found, tree)


def name_of(path: Any) -> str:
    return jax.tree_util.keystr(path)


def test_linen_variables_keep_their_boxes(tmp_path: Path) -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, data: jax.Array) -> jax.Array:
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            data = nn.Dense(4, kernel_init=init)(data)
            return nn.BatchNorm(use_running_average=False)(data)

    variables = Net().init(jax.random.key(0), jnp.ones((2, 3)))
    assert isinstance(variables["params"]["Dense_0"]["kernel"], nn.Partitioned)
    jc.save(tmp_path / "c", variables)
    like = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((2, 3)))
    found = jc.restore(tmp_path / "c", like)
    kernel = found["params"]["Dense_0"]["kernel"]
    assert isinstance(kernel, nn.Partitioned)
    assert kernel.names == ("in", "out")
    assert_same_tree(found, variables)
    unboxed = jc.restore(tmp_path / "c")["params"]["Dense_0"]["bias"]
    assert raw(unboxed) == raw(variables["params"]["Dense_0"]["bias"])


def test_train_states_come_back_and_train_on(tmp_path: Path) -> None:
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(1e-2))

    @jax.jit
    def step(state: TrainState) -> TrainState:
        loss = lambda p: (state.apply_fn({"params": p}, jnp.ones((2, 4))) ** 2).sum()  # noqa: E731
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    state = step(state)
    jc.save(tmp_path / "c", state)
    fresh = TrainState.create(apply_fn=model.apply, params=jax.tree.map(jnp.zeros_like, params), tx=state.tx)
    found = jc.restore(tmp_path / "c", fresh.replace(step=jnp.int32(0)))
    assert_same_tree(found, state)
    assert_same_tree(step(found), step(state))


# Optax

PARAMS = {"dense": {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)}, "scale": jnp.ones(())}


def labels(params: Any) -> Any:
    return {"dense": "adam", "scale": "sgd"}


def optimizers() -> dict[str, Any]:
    mask = {"dense": {"kernel": True, "bias": False}, "scale": False}
    found = {
        "adam": lambda: optax.adam(1e-3),
        "adamw_chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask=mask)),
        "sgd_without_state": lambda: optax.sgd(0.1),
        "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=4),
        "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-3), every_k_schedule=3),
        "masked": lambda: optax.masked(optax.adam(1e-3), mask),
        "partition": lambda: optax.partition({"adam": optax.adam(1e-3), "sgd": optax.sgd(1e-2, momentum=0.9)}, labels),
        "inject": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=optax.cosine_decay_schedule(0.1, 10)),
        "inject_constant": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
        "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-3),
        "lookahead_free": lambda: optax.chain(
            optax.trace(0.9), optax.ema(0.99), optax.apply_if_finite(optax.adam(1e-3), 3)
        ),
        "lbfgs": lambda: optax.lbfgs(),
        "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
    }
    if hasattr(optax.contrib, "muon"):
        found["muon"] = lambda: optax.contrib.muon(1e-3)
    if hasattr(optax.contrib, "galore"):
        found["galore"] = lambda: optax.contrib.galore(1e-3, rank=2)
    return found


OPTIMIZERS = optimizers()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states_come_back(tmp_path: Path, name: str) -> None:
    optimizer = OPTIMIZERS[name]()
    state = optimizer.init(PARAMS)
    if name != "lbfgs":
        grads = jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS)
        _, state = optimizer.update(grads, state, PARAMS)
    jc.save(tmp_path / "c", {"params": PARAMS, "opt": state})
    blank = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if isinstance(leaf, jax.Array) else leaf, state)
    found = jc.restore(tmp_path / "c", {"params": PARAMS, "opt": blank})
    assert_same_tree(found, {"params": PARAMS, "opt": state})
    abstract = jax.eval_shape(lambda: state)
    assert_same_tree(jc.restore(tmp_path / "c", {"params": PARAMS, "opt": abstract})["opt"], state)
    assert len(jax.tree.leaves(jc.restore(tmp_path / "c")["opt"])) == len(jax.tree.leaves(state))


def test_galore_is_covered_where_optax_has_it() -> None:
    assert hasattr(optax.contrib, "galore") == ("galore" in OPTIMIZERS)


def test_nnx_optimizers_come_back(tmp_path: Path) -> None:
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    tree = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
    jc.save(tmp_path / "c", tree)
    other = Model(nnx.Rngs(3))
    like = {"model": nnx.state(other), "optimizer": nnx.state(nnx.Optimizer(other, optax.adamw(1e-3), wrt=nnx.Param))}
    assert_same_tree(jc.restore(tmp_path / "c", like), tree)


# Tied leaves


def files_size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def test_tied_leaves_are_stored_once_and_tied_again(tmp_path: Path, mesh_4x2: Any) -> None:
    big = jax.device_put(
        np.random.default_rng(0).normal(size=(512, 1024)).astype(np.float32), NamedSharding(mesh_4x2, P("data"))
    )
    host = np.random.default_rng(1).normal(size=(256, 1024))
    tree = {"embed": big, "head": {"w": big}, "more": [host, host], "copy": big + 0}
    jc.save(tmp_path / "c", tree)
    assert files_size(tmp_path / "c") < 2 * big.nbytes + host.nbytes + 200_000
    for found in (jc.restore(tmp_path / "c"), jc.restore(tmp_path / "c", tree)):
        assert found["embed"] is found["head"]["w"]
        assert found["more"][0] is found["more"][1]
        assert found["copy"] is not found["embed"]
        assert_same_tree(found, tree)
    info = {leaf.name: leaf for leaf in jc.inspect(tmp_path / "c").leaves}
    assert info["head.w"].tied_to == "embed"
    assert jc.inspect(tmp_path / "c").size_bytes == 2 * big.nbytes + host.nbytes


def test_tied_leaves_may_be_wanted_in_two_forms(tmp_path: Path, mesh_4x2: Any) -> None:
    both = jnp.arange(32.0).reshape(8, 4)
    jc.save(tmp_path / "c", {"a": both, "b": both})
    like = {
        "a": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh_4x2, P("data"))),
        "b": np.zeros((8, 4), np.float32),
    }
    found = jc.restore(tmp_path / "c", like)
    assert found["a"].sharding == like["a"].sharding
    assert type(found["b"]) is np.ndarray
    assert raw(found["a"]) == raw(found["b"]) == raw(both)


def test_tied_leaves_restored_alone(tmp_path: Path) -> None:
    both = jnp.arange(6.0)
    jc.save(tmp_path / "c", {"a": both, "b": {"w": both}})
    found = jc.restore(tmp_path / "c", only="b")
    assert list(found) == ["b"]
    assert raw(found["b"]["w"]) == raw(both)


def test_equal_numbers_are_not_tied(tmp_path: Path) -> None:
    key = jax.random.key(0)
    tree = {"a": 1, "b": 1, "c": "x", "d": "x", "e": key, "f": key}
    jc.save(tmp_path / "c", tree)
    assert_same_tree(jc.restore(tmp_path / "c"), tree)


# Trees that cannot be saved


def test_a_tree_that_contains_itself_is_an_error_not_a_crash(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    with pytest.raises((RecursionError, jc.CheckpointError)):
        jc.save(tmp_path / "c", loop)
    assert not any(tmp_path.iterdir())


def test_modules_are_refused_with_their_type(tmp_path: Path) -> None:
    class NotATree:
        pass

    with pytest.raises(UnsupportedLeafError, match="NotATree"):
        jc.save(tmp_path / "c", {"m": NotATree()})


def test_a_thousand_levels_and_a_thousand_leaves(tmp_path: Path) -> None:
    tree: Any = 7
    for _ in range(100):
        tree = [tree]
    wide = {f"leaf{i}": np.int32(i) for i in range(1000)}
    jc.save(tmp_path / "c", {"deep": tree, "wide": wide})
    assert_same_tree(jc.restore(tmp_path / "c"), {"deep": tree, "wide": wide})
