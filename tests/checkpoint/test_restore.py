"""Restore onto other meshes, into numpy, in part; what comes back is free memory that a jitted step can take over."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.core.events import Event, Restored, subscribe
from tests.checkpoint.bits import assert_same_tree, random_bits, raw


def mesh_of(*shape: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("data", "model")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


SMALL, LARGE = (8, 16), (16, 128, 512)  # LARGE: shards of more than 1 MiB in places, 4 MiB in all


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, jax.Array]]:
    """A checkpoint from a 4 x 2 mesh."""
    mesh, path = mesh_of(4, 2), tmp_path_factory.mktemp("saved") / "c"
    tree = {
        "both": jax.device_put(random_bits(np.float32, SMALL, 0), NamedSharding(mesh, P("data", "model"))),
        "joint": jax.device_put(random_bits(jnp.bfloat16, SMALL, 1), NamedSharding(mesh, P(None, ("data", "model")))),
        "replicated": jax.device_put(random_bits(np.int8, SMALL, 2), NamedSharding(mesh, P())),
        "large": jax.device_put(random_bits(np.float32, LARGE, 3), NamedSharding(mesh, P("data", None, "model"))),
        "large_replicated": jax.device_put(random_bits(np.int32, LARGE, 4), NamedSharding(mesh, P())),
    }
    jc.save(path, tree)
    return path, tree


TARGETS: dict[str, Callable[[], Sharding]] = {
    "2x4": lambda: NamedSharding(mesh_of(2, 4), P("data", "model")),
    "8x1": lambda: NamedSharding(mesh_of(8, 1), P("data", "model")),
    "1x8": lambda: NamedSharding(mesh_of(1, 8), P("data", "model")),
    "transposed": lambda: NamedSharding(mesh_of(4, 2), P("model", "data")),
    "swapped_joint": lambda: NamedSharding(mesh_of(4, 2), P(None, ("model", "data"))),
    "replicated": lambda: NamedSharding(mesh_of(4, 2), P()),
    "over_data": lambda: NamedSharding(mesh_of(4, 2), P(None, "model")),
    "four_devices": lambda: NamedSharding(mesh_of(4), P("data")),
    "one_of_a_mesh": lambda: NamedSharding(mesh_of(1), P("data")),
    "one_device": lambda: SingleDeviceSharding(jax.devices()[6]),
    "backwards": lambda: NamedSharding(Mesh(np.array(jax.devices())[::-1].reshape(2, 4), ("a", "b")), P("b", "a")),
    "pinned": lambda: NamedSharding(mesh_of(2, 4), P("model"), memory_kind="pinned_host"),
}


@pytest.mark.parametrize("target", TARGETS)
def test_any_mesh_gets_the_same_bits(saved: Any, target: str) -> None:
    path, tree = saved
    sharding = TARGETS[target]()
    like = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for name, a in tree.items()}
    found = jc.restore(path, like)
    chosen = jc.restore(path, lambda name, spec: sharding)
    for name, array in tree.items():
        assert found[name].sharding == chosen[name].sharding == sharding
        assert found[name].sharding.memory_kind == sharding.memory_kind
        assert raw(found[name]) == raw(chosen[name]) == raw(array)
        for shard in found[name].addressable_shards:
            assert raw(shard.data) == raw(np.asarray(array)[shard.index])


def test_like_may_be_concrete_arrays_and_they_stay_untouched(saved: Any) -> None:
    path, tree = saved
    sharding = NamedSharding(mesh_of(2, 4), P("model"))
    like = {name: jax.device_put(np.ones(a.shape, a.dtype), sharding) for name, a in tree.items()}
    before = {name: raw(a) for name, a in like.items()}
    found = jc.restore(path, like)
    assert_same_tree(found, {name: jax.device_put(a, sharding) for name, a in tree.items()})
    assert {name: raw(a) for name, a in like.items()} == before


def test_an_abstract_leaf_without_sharding_goes_to_the_first_device(saved: Any) -> None:
    path, tree = saved
    found = jc.restore(path, {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in tree.items()})
    assert all(a.devices() == {jax.devices()[0]} for a in found.values())
    assert_same_tree(found, tree, placed=False)


@pytest.mark.parametrize("how", ["on_host", "numpy_like", "function"])
def test_into_numpy(saved: Any, how: str) -> None:
    path, tree = saved
    like = {
        "on_host": jc.on_host,
        "numpy_like": {name: np.zeros(a.shape, a.dtype) for name, a in tree.items()},
        "function": lambda name, spec: None,
    }[how]
    found = jc.restore(path, like)
    for name, array in tree.items():
        assert type(found[name]) is np.ndarray
        assert found[name].dtype == array.dtype
        assert found[name].flags.writeable
        assert found[name].flags.c_contiguous
        assert raw(found[name]) == raw(array)
    if how == "numpy_like":
        assert not any(a.any() for a in like.values())


def test_a_function_of_name_and_spec_sees_where_each_leaf_was(saved: Any) -> None:
    path, tree = saved
    seen = {}

    def choose(name: str, spec: jax.ShapeDtypeStruct) -> Sharding | None:
        seen[name] = spec
        return None if name == "both" else spec.sharding

    found = jc.restore(path, choose)
    assert {n: (s.shape, s.dtype, s.sharding) for n, s in seen.items()} == {
        n: (a.shape, a.dtype, a.sharding) for n, a in tree.items()
    }
    assert type(found["both"]) is np.ndarray
    assert found["large"].sharding == tree["large"].sharding


def test_a_function_that_gives_something_else_is_told_so(saved: Any) -> None:
    with pytest.raises(ValueError, match='"both".*must give a jax.sharding.Sharding or None'):
        jc.restore(saved[0], lambda name, spec: P("data"))


@pytest.mark.parametrize("devices", [1, 3])
def test_without_like_where_the_saved_mesh_does_not_exist(saved: Any, devices: int, tmp_path: Path) -> None:
    path, tree = saved
    program = (
        "import sys, jax, jaxckpt, hashlib, numpy as np\n"
        f"assert len(jax.devices()) == {devices}\n"
        "for name, a in sorted(jaxckpt.restore(sys.argv[1]).items()):\n"
        "    assert isinstance(a, jax.Array) and a.is_fully_addressable\n"
        "    print(name, hashlib.sha256(np.asarray(a).tobytes()).hexdigest())\n"
    )
    import hashlib

    env = {
        "JAX_PLATFORMS": "cpu",
        "HOME": str(tmp_path),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(path)],
        env=env, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert out.stdout.split("\n")[:-1] == [f"{n} {hashlib.sha256(raw(a)).hexdigest()}" for n, a in sorted(tree.items())]


# Only some leaves


@pytest.fixture
def read_bytes() -> Iterator[list[int]]:
    """Bytes that each restore from now on has read."""
    found: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, Restored):
            found.append(event.read_bytes)

    stop = subscribe(listen)
    yield found
    stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "c"

    def layer() -> dict[str, np.ndarray]:
        return {"kernel": np.ones((64, 1024), np.float32), "bias": np.ones(8, np.float32)}

    jc.save(path, {"params": {"layers": [layer(), layer()], "head": np.ones(3)}, "params2": 1, "opt": layer()})
    return path


KERNEL = 64 * 1024 * 4
ONLY = {
    "name": ("params.head", {"params": {"head"}}, 0),
    "subtree": ("opt", {"opt": {"kernel", "bias"}}, 1),
    "index": ("params.layers.1", {"params": {"layers"}}, 1),
    "glob": ("*.kernel", {"params": {"layers"}, "opt": {"kernel"}}, 3),
    "list": (["opt.bias", "params.head"], {"params": {"head"}, "opt": {"bias"}}, 0),
    "function": (lambda name: name.endswith("bias"), {"params": {"layers"}, "opt": {"bias"}}, 0),
    "all": ("*", {"params": {"layers", "head"}, "params2": None, "opt": {"kernel", "bias"}}, 3),
}


@pytest.mark.parametrize("case", ONLY)
def test_only_chosen_leaves_are_restored_and_read(model: Path, read_bytes: list[int], case: str) -> None:
    only, expected, kernels = ONLY[case]
    found = jc.restore(model, only=only)
    assert {k: set(v) if isinstance(v, dict) else None for k, v in found.items()} == expected
    assert kernels * KERNEL <= read_bytes[0] <= kernels * KERNEL + 8192


def test_only_with_like_wants_exactly_the_chosen_leaves(model: Path, read_bytes: list[int]) -> None:
    like = {"opt": {"kernel": np.zeros((64, 1024), np.float32), "bias": np.zeros(8, np.float32)}}
    found = jc.restore(model, like, only="opt")
    assert found["opt"]["kernel"].all()
    assert read_bytes[0] <= KERNEL + 8192
    with pytest.raises(jc.MismatchError, match=r"opt\.bias"):
        jc.restore(model, {"opt": {"kernel": like["opt"]["kernel"]}}, only="opt")


def test_only_that_matches_nothing_is_an_error(model: Path) -> None:
    for only in ("nothing", [], "param", lambda name: False):
        with pytest.raises(jc.CheckpointError, match="no leaf that matches"):
            jc.restore(model, only=only)


def test_a_replicated_leaf_is_read_once(saved: Any, read_bytes: list[int]) -> None:
    path, tree = saved
    jc.restore(path, only="large_replicated")
    assert read_bytes[0] <= tree["large_replicated"].nbytes * 1.01


def test_a_part_of_an_array_reads_only_what_it_needs(saved: Any, read_bytes: list[int]) -> None:
    path, tree = saved
    jc.restore(path, lambda name, spec: SingleDeviceSharding(jax.devices()[0]), only="large")
    assert read_bytes[0] <= tree["large"].nbytes * 1.01


# Cast and pad


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("to", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32"])
def test_cast_converts_as_numpy_does(tmp_path: Path, host: bool, to: str) -> None:
    data = np.linspace(-3, 3, 64, dtype=np.float32).reshape(8, 8)
    jc.save(tmp_path / "c", {"w": jnp.asarray(data)})
    dtype = jnp.dtype(to)
    like = (
        np.zeros((8, 8), dtype)
        if host
        else jax.ShapeDtypeStruct((8, 8), dtype, sharding=NamedSharding(mesh_of(8), P("data")))
    )
    if to != "float32":
        with pytest.raises(jc.MismatchError, match=r"cast=True"):
            jc.restore(tmp_path / "c", {"w": like})
    found = jc.restore(tmp_path / "c", {"w": like}, cast=True)["w"]
    assert found.dtype == dtype
    assert raw(found) == raw(data.astype(dtype))


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("shape", [(4, 16), (16, 4), (16, 16), (2, 2), (8, 8), (8, 1024 * 64)])
def test_pad_cuts_and_zero_fills(tmp_path: Path, host: bool, shape: tuple[int, int]) -> None:
    data = np.arange(1, 65, dtype=np.float32).reshape(8, 8)
    jc.save(tmp_path / "c", {"w": jax.device_put(data, NamedSharding(mesh_of(4, 2), P("data", "model")))})
    sharding = NamedSharding(mesh_of(2), P("data"))
    like = np.ones(shape, np.float32) if host else jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
    expected = np.zeros(shape, np.float32)
    expected[:8, :8] = data[: shape[0], : shape[1]]
    for _ in range(2):  # memory that was used before must be cleared, too
        found = jc.restore(tmp_path / "c", {"w": like}, pad=True)["w"]
        assert raw(found) == raw(expected)


def test_pad_wants_the_same_number_of_dimensions(tmp_path: Path) -> None:
    jc.save(tmp_path / "c", {"w": np.ones((2, 3))})
    with pytest.raises(jc.MismatchError, match=r"\(2, 3\) float64.*wants \(2, 3, 1\)"):
        jc.restore(tmp_path / "c", {"w": np.ones((2, 3, 1))}, pad=True)


def test_cast_and_pad_together(tmp_path: Path) -> None:
    jc.save(tmp_path / "c", {"w": np.ones((2, 3))})
    found = jc.restore(tmp_path / "c", {"w": np.zeros((3, 2), np.int8)}, pad=True, cast=True)["w"]
    assert found.tolist() == [[1, 1], [1, 1], [0, 0]]
    assert found.dtype == np.int8


# Memory

DONATED = {
    "small": (SMALL, P("data", "model"), 4, 2),
    "small_replicated": (SMALL, P(), 4, 2),
    "small_one_device": (SMALL, P(), 1, 1),
    "scalar": ((), P(), 1, 1),
    "large": ((16, 1024, 512), P("data"), 4, 2),
    "large_replicated": ((8, 128, 512), P(), 4, 2),
    "large_one_device": ((8, 128, 512), P(), 1, 1),
}


@pytest.mark.parametrize("case", DONATED)
@pytest.mark.parametrize("with_like", [True, False])
def test_restored_arrays_can_be_donated_and_their_memory_is_reused(tmp_path: Path, case: str, with_like: bool) -> None:
    shape, spec, rows, columns = DONATED[case]
    sharding = NamedSharding(mesh_of(rows, columns), spec)
    data = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    tree = {"w": jax.device_put(data, sharding)}
    jc.save(tmp_path / "c", tree)
    found = jc.restore(tmp_path / "c", tree if with_like else None)["w"]
    before = {shard.data.unsafe_buffer_pointer() for shard in found.addressable_shards}
    assert len(before) == rows * columns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = jax.jit(lambda a: a * 2, donate_argnums=0, out_shardings=sharding)
        out = jax.block_until_ready(step(found))
    assert found.is_deleted()
    assert {shard.data.unsafe_buffer_pointer() for shard in out.addressable_shards} == before
    assert raw(out) == raw(data * 2)


def test_restored_arrays_outlive_their_files(tmp_path: Path, saved: Any) -> None:
    import shutil

    path, tree = saved
    shutil.copytree(path, tmp_path / "c")
    placed, host = jc.restore(tmp_path / "c"), jc.restore(tmp_path / "c", jc.on_host)
    for file in (tmp_path / "c").rglob("*"):
        if file.is_file():
            file.write_bytes(b"\xff" * file.stat().st_size)
    shutil.rmtree(tmp_path / "c")
    assert_same_tree(placed, tree)
    assert all(raw(host[name]) == raw(tree[name]) for name in tree)


def test_two_restores_share_no_memory(saved: Any) -> None:
    path, tree = saved
    one, two = jc.restore(path), jc.restore(path)
    for name in tree:
        pointers = [{s.data.unsafe_buffer_pointer() for s in found[name].addressable_shards} for found in (one, two)]
        assert not pointers[0] & pointers[1]
    for name in tree:
        jax.jit(lambda a: a + a.dtype.type(1), donate_argnums=0)(one[name]).block_until_ready()
    assert_same_tree(two, tree)
    left, right = jc.restore(path, jc.on_host), jc.restore(path, jc.on_host)
    left["both"][...] = 0
    assert raw(right["both"]) == raw(tree["both"])


def test_saving_what_was_restored_gives_the_same_checkpoint(tmp_path: Path, saved: Any) -> None:
    path, _ = saved
    jc.save(tmp_path / "again", jc.restore(path))
    assert not jc.diff(path, tmp_path / "again")


# Paths


def test_paths_may_be_relative_urls_or_pathlike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, path in enumerate(
        ["rel/c", f"file://{tmp_path}/url", tmp_path / "path", "memory://test-restore/paths", "sp ace%20#?"]
    ):
        jc.save(path, {"n": number})
        assert jc.restore(path) == {"n": number}
    assert (tmp_path / "rel" / "c" / "jaxckpt.json").exists()


def test_nothing_there_and_unfinished_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(jc.NotFoundError, match="nowhere"):
        jc.restore(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    jc.save(tmp_path / "c", {"w": np.ones(3)})
    (tmp_path / "c" / "commit_success.txt").unlink()
    with pytest.raises(jc.NotCommittedError, match="never finished"):
        jc.restore(tmp_path / "c")
    jc.save(tmp_path / "c", {"w": np.zeros(3)})  # an unfinished save is nobody's checkpoint
    assert not jc.restore(tmp_path / "c")["w"].any()
