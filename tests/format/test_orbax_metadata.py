"""The real Orbax restores, bit for bit, arrays of ours that stand beside the metadata files written here."""

from __future__ import annotations

import json
import math
import time
from collections import namedtuple
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxckpt.core.tree import flatten
from jaxckpt.format import orbax_metadata as om
from jaxckpt.format.zarr3 import array_metadata

v1 = ocp.v1

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

Pair = namedtuple("Pair", "first second")

# Every reader, without and with a target. Standard handlers refuse strings, in Orbax's own checkpoints too.
READERS: dict[str, tuple[Callable[[str], Any], Callable[[str, Any], Any]]] = {
    "v0 pytree": (
        lambda path: ocp.PyTreeCheckpointer().restore(path),
        lambda path, like: ocp.PyTreeCheckpointer().restore(
            path, item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like)
        ),
    ),
    "v0 standard": (
        lambda path: ocp.StandardCheckpointer().restore(path),
        lambda path, like: ocp.StandardCheckpointer().restore(path, like),
    ),
    "v1": (lambda path: v1.load(path), lambda path, like: v1.load(path, like)),
}


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def place(x: jax.Array, *spec: Any) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    return {
        "sharded": place(jnp.arange(32, dtype=jnp.bfloat16).reshape(8, 4), "data", "model"),
        "two_axes": place(jnp.arange(64.0).reshape(16, 4), ("data", "model")),
        "replicated": place(jnp.arange(5.0)),
        "one_device": jax.device_put(jnp.ones(4), jax.devices()[3]),
        "int4": place(jnp.arange(-4, 4).astype(jnp.int4), "data"),
        "fp8": [jnp.ones(4, jnp.float8_e4m3fn), jnp.ones(4, jnp.float8_e5m2)],
        "bool": jnp.array([True, False]),
        "complex": jnp.full(2, 1 + 2j, jnp.complex64),
        "zero_d": jnp.float32(3),
        "empty": {"jax": jnp.zeros((0, 4)), "numpy": np.zeros((3, 0))},
        "numpy": np.arange(6).reshape(2, 3),
        "int": 3,
        "float": 0.1,
        "flag": True,
        "list": [jnp.ones(3), 2, None, {}, *(jnp.full(1, i) for i in range(10))],
        "tuple": (jnp.zeros(()), (jnp.ones(1),), ()),
        "pair": Pair(jnp.ones(2), np.ones(1)),
        "int_keys": {1: jnp.ones(1), 12: np.ones(1), 2: np.ones(2)},
        "nothing": {"none": None, "dict": {}, "list": [], "tuple": ()},
        "key": jax.random.key(1),
        "keys": place(jax.random.split(jax.random.key(2, impl="rbg"), 8), "data"),
        "dots.in.name": jnp.ones(1),
        "a space": jnp.ones(2),
    }


def write_checkpoint(folder: Path, tree: Any, *, item: str | None = None, zstd_level: int | None = None) -> Path:
    """A checkpoint made of zarr3 arrays by TensorStore and of the files under test. Returns its root."""
    inner = folder / item if item else folder
    (inner / "array_metadatas").mkdir(parents=True)
    leaves, structure = flatten(tree)
    records = []
    for place in om.places(structure):
        if place.leaf < 0:
            fields: dict[str, Any] = {"name": place.name, "value_type": place.value_type}
        else:
            fields, array = describe(leaves[place.leaf].value)
            fields["name"] = leaves[place.leaf].name
            if array is not None:
                chunk = fields.get("chunk_shape") or tuple(max(1, n) for n in array.shape)
                write_array(inner, fields["name"], array, chunk, zstd_level)
        records.append(om.OrbaxLeaf(path=place.path, sequence=place.sequence, **fields))
    (inner / om.TREE_METADATA).write_bytes(om.encode_tree_metadata(records))
    (inner / om.SHARDING).write_bytes(om.encode_sharding(records))
    (inner / om.ARRAY_METADATAS).write_bytes(om.encode_array_metadatas(records))
    strings = om.encode_strings(records)
    if strings is not None:
        (inner / om.STRINGS).write_bytes(strings)
    handlers = {item: om.PYTREE_HANDLER} if item else om.PYTREE_HANDLER
    step = om.encode_checkpoint_metadata(
        init_timestamp_ns=1, commit_timestamp_ns=2, item_handlers=handlers, custom_metadata={"note": "ours"}
    )
    (folder / om.CHECKPOINT_METADATA).write_bytes(step)
    (folder / om.COMMIT_MARKER).write_bytes(om.commit_text(str(folder)))
    return folder


def describe(value: Any) -> tuple[dict[str, Any], np.ndarray | None]:
    if isinstance(value, str):
        return {"value_type": "string", "text": value}, None
    if not isinstance(value, jax.Array):
        return {"value_type": "np.ndarray" if isinstance(value, np.ndarray) else "scalar"}, np.asarray(value)
    fields: dict[str, Any] = {"value_type": "jax.Array"}
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        fields["prng_impl"] = str(jax.random.key_impl(value))
        value = jax.random.key_data(value)
    shard = value.sharding.shard_shape(value.shape)
    fields |= {"sharding": value.sharding, "write_shape": shard, "chunk_shape": tuple(max(1, n) for n in shard)}
    return fields, np.asarray(value)


def write_array(folder: Path, name: str, array: np.ndarray, chunk: tuple[int, ...], zstd_level: int | None) -> None:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"},
        "metadata": json.loads(array_metadata(array.shape, array.dtype.name, chunk, zstd_level)),
        "store_data_equal_to_fill_value": True,
    }
    ts.open(spec, create=True).result().write(array).result()


def assert_same(found: Any, wanted: Any) -> None:
    """Same keys, dtypes and bytes. Orbax makes lists of tuples and dicts of namedtuples, so containers may differ."""
    found_leaves, wanted_leaves = as_named(found), as_named(wanted)
    assert found_leaves.keys() == wanted_leaves.keys()
    for name, value in wanted_leaves.items():
        other = found_leaves[name]
        assert type(other) is type(value), name
        if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(other) == jax.random.key_impl(value), name
            other, value = jax.random.key_data(other), jax.random.key_data(value)
        if not isinstance(value, str):
            assert np.asarray(other).dtype == np.asarray(value).dtype, name
            assert np.shape(other) == np.shape(value), name
            assert np.asarray(other).tobytes() == np.asarray(value).tobytes(), name
        else:
            assert other == value, name


def as_named(tree: Any) -> dict[str, Any]:
    leaves, _ = flatten(tree)
    return {leaf.name: leaf.value for leaf in leaves}


def on_other_mesh(tree: Any) -> Any:
    """Abstract leaves on a mesh of another shape."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def abstract(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        spec = ["y" if n and n % 4 == 0 else None for n in x.shape[:1]]
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec)))

    return jax.tree.map(abstract, tree)


@pytest.mark.parametrize("zstd_level", [None, 3])
@pytest.mark.parametrize("reader", READERS)
def test_orbax_restores_every_kind_of_leaf_without_a_target(
    tmp_path: Path, tree: Any, reader: str, zstd_level: int | None
) -> None:
    root = write_checkpoint(tmp_path / "c", tree, zstd_level=zstd_level)
    restored = READERS[reader][0](str(root))
    assert_same(restored, tree)
    for name in ("sharded", "two_axes", "replicated", "one_device", "keys"):
        assert restored[name].sharding.is_equivalent_to(tree[name].sharding, tree[name].ndim), name
    assert restored["nothing"] == {"none": None, "dict": {}, "list": [], "tuple": ()}
    assert restored["list"][2:4] == [None, {}]


@pytest.mark.parametrize("reader", READERS)
def test_orbax_restores_onto_another_mesh(tmp_path: Path, tree: Any, reader: str) -> None:
    root = write_checkpoint(tmp_path / "c", tree)
    like = on_other_mesh(tree)
    restored = READERS[reader][1](str(root), like)
    assert_same(restored, tree)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    assert restored["sharded"].sharding == like["sharded"].sharding


def test_strings_come_back_from_the_readers_that_have_strings(tmp_path: Path) -> None:
    tree = {"x": jnp.ones(1), "name": "hello", "nested": {"with/slash": "é", "tilde~1": "t"}, "list": ["a", "b"]}
    root = str(write_checkpoint(tmp_path / "c", tree))
    for reader in ("v0 pytree", "v1"):
        assert_same(READERS[reader][0](root), tree)
        assert_same(READERS[reader][1](root, tree), tree)


def test_checkpoint_manager_and_v1_restore_a_step_folder(tmp_path: Path, tree: Any) -> None:
    write_checkpoint(tmp_path / "run" / "5", tree, item="default")
    like = on_other_mesh(tree)
    for args in (None, ocp.args.StandardRestore(), ocp.args.PyTreeRestore(), ocp.args.StandardRestore(like)):
        with ocp.CheckpointManager(tmp_path / "run") as manager:
            assert manager.all_steps() == [5]
            assert_same(manager.restore(5, args=args), tree)
    assert_same(v1.load(tmp_path / "run" / "5", like), tree)


def test_metadata_calls_tell_shapes_dtypes_and_custom_metadata(tmp_path: Path, tree: Any) -> None:
    # v1's metadata cannot read bool scalars, Orbax's own neither.
    without_bool = {key: value for key, value in tree.items() if key != "flag"}
    root = write_checkpoint(tmp_path / "c", without_bool)
    found = ocp.PyTreeCheckpointer().metadata(root)
    assert found.item_metadata.tree["sharded"].shape == (8, 4)
    assert found.item_metadata.tree["sharded"].dtype == jnp.bfloat16
    assert found.custom_metadata == {"note": "ours"}
    assert v1.metadata(root).metadata["sharded"].shape == (8, 4)
    assert v1.metadata(root).custom_metadata == {"note": "ours"}


def test_nnx_and_optax_states_are_restored_into_their_own_classes(tmp_path: Path) -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 4, rngs=rngs)])
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

    params = nnx.state(Model(nnx.Rngs(0)))
    state = {"params": params, "opt": optax.adamw(1e-3).init({"w": jnp.ones(3)})}
    root = str(write_checkpoint(tmp_path / "c", state))
    replicated = NamedSharding(Mesh(np.array(jax.devices()), "x"), P())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), state)
    for _, restore in READERS.values():
        restored = restore(root, like)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert_same(restored, state)


def test_paths_that_share_a_name_get_keys_of_their_own(tmp_path: Path) -> None:
    tree = {1: jnp.ones(1), "1": jnp.ones(2), "a.b": jnp.ones(3), "a": {"b": jnp.ones(4)}}
    root = str(write_checkpoint(tmp_path / "c", tree))
    shapes = {name: x.shape for name, x in as_named(ocp.PyTreeCheckpointer().restore(root)).items()}
    assert shapes == {"1": (1,), "1~2": (2,), "a.b": (3,), "a.b~2": (4,)}


@pytest.mark.parametrize("tree", [{}, [], None, [None], {"a": {}, "b": ()}])
def test_trees_without_data_are_restored(tmp_path: Path, tree: Any) -> None:
    root = str(write_checkpoint(tmp_path / "c", tree))
    assert v1.load(root) == tree
    assert ocp.PyTreeCheckpointer().restore(root) == tree


def test_a_single_array_is_a_tree(tmp_path: Path) -> None:
    root = str(write_checkpoint(tmp_path / "c", jnp.arange(3.0)))
    for restore, _ in READERS.values():
        assert_same(restore(root), jnp.arange(3.0))


def test_places_name_empty_containers_and_every_place_of_a_tied_leaf() -> None:
    _, structure = flatten({"a": [1, None, {}], "b": Pair((), 2)})
    found = {place.path: (place.sequence, place.leaf, place.value_type) for place in om.places(structure)}
    assert found == {
        ("a", 0): ((False, True), 0, ""),
        ("a", 1): ((False, True), -1, "None"),
        ("a", 2): ((False, True), -1, "Dict"),
        ("b", "first"): ((False, False), -1, "Tuple"),
        ("b", "second"): ((False, False), 1, ""),
    }


def test_shardings_of_a_large_mesh_do_not_repeat_its_devices() -> None:
    mesh = jax.sharding.Mesh(FakeDevices.grid(128, 128), ("data", "model"))
    record = decoded_sharding(NamedSharding(mesh, P("data", None, ("model",))))
    assert record["shape"] == [128, 128]
    assert record["partition_spec"] == ["data", None, "model"]
    assert "device_mesh" not in record
    part = jax.sharding.Mesh(FakeDevices.grid(128, 128)[64:], ("data", "model"))
    assert len(decoded_sharding(NamedSharding(part, P("data")))["device_mesh"]["mesh"]) == 64


def test_shardings_that_orbax_does_not_know_become_replicated(mesh_4x2: Mesh) -> None:
    odd = jax.sharding.NamedSharding(mesh_4x2, P("data"))
    assert decoded_sharding(odd)["sharding_type"] == "NamedSharding"
    assert decoded_sharding(SingleDeviceSharding(jax.devices()[2]))["device_str"] == str(jax.devices()[2])
    gspmd = jax.sharding.GSPMDSharding.get_replicated(jax.devices()) if hasattr(jax.sharding, "GSPMDSharding") else None
    if gspmd is not None:
        assert decoded_sharding(gspmd)["partition_spec"] == []


def test_thousands_of_leaves_are_encoded_in_no_time(mesh_4x2: Mesh) -> None:
    sharding = NamedSharding(mesh_4x2, P("data", "model"))
    leaves = [
        om.OrbaxLeaf(
            name=f"params.layer_{i // 10}.attention.kernel_{i % 10}",
            path=("params", f"layer_{i // 10}", "attention", f"kernel_{i % 10}"),
            sequence=(False,) * 4,
            value_type="jax.Array",
            write_shape=(8, 8),
            chunk_shape=(8, 8),
            sharding=sharding,
        )
        for i in range(4000)
    ]
    # Measured: 20 ms, 2 ms and 5 ms. The limits leave room for a busy machine.
    limits_s = {om.encode_tree_metadata: 0.24, om.encode_sharding: 0.16, om.encode_array_metadatas: 0.16}
    for encode, limit_s in limits_s.items():
        assert best_of(3, lambda encode=encode: encode(leaves)) < limit_s, encode.__name__


def decoded_sharding(sharding: Any) -> dict[str, Any]:
    leaf = om.OrbaxLeaf(name="w", path=("w",), sequence=(False,), value_type="jax.Array", sharding=sharding)
    return json.loads(json.loads(om.encode_sharding([leaf]))["dw=="])


def best_of(times: int, run: Callable[[], Any]) -> float:
    best = math.inf
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


class FakeDevices:
    """Devices of a machine that is not here: what a mesh asks of one."""

    def __init__(self, index: int) -> None:
        self.id = index
        self.process_index = 0
        self.platform = "cpu"
        self.device_kind = "cpu"

    @classmethod
    def grid(cls, *shape: int) -> np.ndarray:
        return np.array([cls(i) for i in range(math.prod(shape))], dtype=object).reshape(shape)
