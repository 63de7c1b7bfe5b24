"""Trees for the tests of processes: every kind of leaf, with values that its name gives to anyone."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

# Leaves on the mesh ("a", "b") of all devices: shape, dtype, spec.
LEAVES: dict[str, tuple[tuple[int, ...], Any, P]] = {
    "both": ((64, 48), np.float32, P("a", "b")),
    "large": ((1024, 512), np.float32, P("a", "b")),
    "rows": ((64, 6), ml_dtypes.bfloat16, P("a")),
    "columns": ((6, 64), np.int8, P(None, "b")),
    "joint": ((64, 3), np.float32, P(("a", "b"))),
    "joint_swapped": ((64, 3), np.float32, P(("b", "a"))),
    "three_d": ((24, 40, 7), np.float16, P("a", "b")),
    "replicated": ((43, 31), np.float32, P()),
    "replicated_large": ((1000, 130), np.float32, P()),
    "replicated_over_a": ((12, 64), np.complex64, P(None, "b")),
    "replicated_over_b": ((64, 5), np.bool_, P("a", None)),
    "tiny": ((3,), np.uint8, P()),
    "fp8": ((16, 8), ml_dtypes.float8_e4m3fn, P("b", "a")),
    "int4": ((16, 8), ml_dtypes.int4, P("a")),
    "empty": ((0, 8), np.float32, P(None, "b")),
    "zero_d": ((), np.int32, P()),
}
KEYS = {"keys": ((8,), P("a")), "key": ((), P())}
COMPRESSION = {"large": 3, "joint*": 1, "replicated_over_a": 19}
PLAIN = {
    "numpy": np.arange(1000, dtype=np.float64).reshape(20, 50),
    "numpy_scalar": np.float32(0.1),
    "int": 2**70,
    "float": 0.1,
    "text": "für alle",
    "bytes": b"\0\xff",
    "list": [1, (2.5, None), {}],
}


def mesh_of(rows: int, *, reverse: bool = False) -> Mesh:
    """All devices as ``rows`` by the rest, in order of their ids or against it."""
    devices = sorted(jax.devices(), key=lambda d: d.id, reverse=reverse)
    return Mesh(np.array(devices).reshape(rows, -1), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def make_tree(mesh: Mesh) -> dict[str, Any]:
    """All leaves, some on processes of their own: "last" on the last process, "half" on the first half of all."""
    tree = {name: place(name, shape, dtype, NamedSharding(mesh, spec)) for name, (shape, dtype, spec) in LEAVES.items()}
    for name, (shape, spec) in KEYS.items():
        data = place(name, (*shape, 2), np.uint32, NamedSharding(mesh, spec))
        tree[name] = jax.random.wrap_key_data(data, impl="threefry2x32")
    tree |= {name: place(name, (16, 16), np.float32, sharding) for name, sharding in own_shardings().items()}
    return {**tree, **PLAIN, "tied": {"first": tree["both"], "again": tree["both"]}}


def own_shardings() -> dict[str, Sharding]:
    """Shardings that not all processes have a part in, in a job of several processes."""
    last = [d for d in jax.devices() if d.process_index == jax.process_count() - 1]
    half = [d for d in jax.devices() if d.process_index < max(jax.process_count() // 2, 1)]
    return {
        "last": NamedSharding(Mesh(np.array(last), ("x",)), P("x")),
        "last_device": SingleDeviceSharding(last[-1]),
        "half": NamedSharding(Mesh(np.array(half), ("x",)), P(None, "x")),
    }


def place(name: str, shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> jax.Array:
    values = values_of(name, shape, dtype)
    return jax.make_array_from_callback(shape, sharding, lambda index: values[index], dtype=jnp.dtype(dtype))


def values_of(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if np.dtype(dtype).kind in "iuf" and np.dtype(dtype).isbuiltin:
        raw = rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
        raw[..., -1] &= 0x3F  # no NaN: some conversions change their bits
        return raw.view(dtype).reshape(shape)
    return rng.integers(-7, 8, shape).astype(np.float32).astype(dtype)


def like_tree(tree: dict[str, Any], choose: Callable[[str, tuple[int, ...]], Sharding]) -> dict[str, Any]:
    """Abstract arrays for all jax arrays; all other leaves as they are."""

    def abstract(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        name = path[0].key
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=choose(name, leaf.shape))

    return jax.tree_util.tree_map_with_path(abstract, tree)


def everywhere(sharding_rows: int, *, turn: bool, reverse: bool = False) -> Callable[[str, tuple[int, ...]], Sharding]:
    """For ``like_tree``: their own specs, or turned around, on a mesh of this many rows; the others replicated."""
    mesh = mesh_of(sharding_rows, reverse=reverse)

    def choose(name: str, shape: tuple[int, ...]) -> Sharding:
        _, _, spec = LEAVES.get(name, (None, None, P()))
        parts = [*spec, *[None] * (len(shape) - len(spec))]
        spec = P(*(reversed(parts) if turn else parts))
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(shape)
        except ValueError:  # does not divide
            return NamedSharding(mesh, P())
        return sharding

    return choose


def wrong_leaves(restored: dict[str, Any], wanted: dict[str, Any] | None = None) -> list[str]:
    """Leaves whose bits on this process, or whose shardings, are not those they should be."""
    wrong = []
    for name, (shape, dtype, _) in LEAVES.items():
        wrong += _wrong_array(name, restored[name], values_of(name, shape, dtype))
    for name, (shape, _) in KEYS.items():
        if str(jax.random.key_impl(restored[name])) != "threefry2x32":
            wrong.append(f"{name}: impl")
        wrong += _wrong_array(name, jax.random.key_data(restored[name]), values_of(name, (*shape, 2), np.uint32))
    for name in own_shardings():
        wrong += _wrong_array(name, restored[name], values_of(name, (16, 16), np.float32))
    for name, value in PLAIN.items():
        found = restored[name]
        same = type(found) is type(value) and bool(np.all(found == value) if name != "list" else found == value)
        wrong += [] if same else [f"{name}: {found!r}"]
    if restored["tied"]["first"] is not restored["tied"]["again"]:
        wrong.append("tied: two arrays")
    wrong += _wrong_array("tied", restored["tied"]["first"], values_of("both", (64, 48), np.float32))
    for name, leaf in (wanted or {}).items():
        if isinstance(leaf, jax.ShapeDtypeStruct) and restored[name].sharding != leaf.sharding:
            wrong.append(f"{name}: sharding {restored[name].sharding}, not {leaf.sharding}")
    return wrong


def _wrong_array(name: str, found: Any, expected: np.ndarray) -> list[str]:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return [f"{name}: {found.shape} {found.dtype}, not {expected.shape} {expected.dtype}"]
    if isinstance(found, np.ndarray):
        return [] if found.tobytes() == expected.tobytes() else [f"{name}: values"]
    for shard in found.addressable_shards:
        if np.asarray(shard.data).tobytes() != expected[shard.index].tobytes():
            return [f"{name}: values of {shard.index} on {shard.device}"]
    return []
