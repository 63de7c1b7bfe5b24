"""Checkpoints that the real Orbax wrote, in every layout it has, are read back bit for bit."""

from __future__ import annotations

import shutil
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt
from jaxckpt.checkpoint.foreign import ForeignCheckpoint, open_foreign
from jaxckpt.core.box import Box, whole
from jaxckpt.core.errors import (
    AlreadyExistsError,
    CorruptionError,
    InvalidArgumentError,
    NotCommittedError,
    NotFoundError,
    UnsupportedFormatError,
)
from jaxckpt.core.tree import build, flatten
from jaxckpt.format import orbax_metadata as om
from jaxckpt.format.zarr3 import array_metadata
from jaxckpt.storage.url import open_store
from jaxckpt.testing.stores import CrashAfter, SimulatedCrash

v1 = ocp.v1

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

Pair = namedtuple("Pair", "first second")


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def place(x: jax.Array, *spec: Any) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    return {
        "sharded": place(jnp.arange(32, dtype=jnp.bfloat16).reshape(8, 4), "data", "model"),
        "zeros": place(jnp.zeros((16, 4)), ("data", "model")),
        "replicated": place(jnp.arange(5.0)),
        "int4": place(jnp.arange(-4, 4).astype(jnp.int4), "data"),
        "fp8": [jnp.ones(4, jnp.float8_e4m3fn), jnp.ones(4, jnp.float8_e5m2)],
        "bool": jnp.array([True, False]),
        "complex": jnp.full(2, 1 + 2j, jnp.complex64),
        "zero_d": jnp.float32(3),
        "numpy": np.arange(6).reshape(2, 3),
        "int": 3,
        "float": 0.1,
        "flag": True,
        "list": [jnp.ones(3), 2, None, {}, *(jnp.full(1, i) for i in range(10))],
        "tuple": (jnp.zeros(()), (jnp.ones(1),), ()),
        "pair": Pair(jnp.ones(2), np.ones(1)),
        "int_keys": {1: jnp.ones(1), 12: np.ones(1)},
        "nothing": {"none": None, "dict": {}, "list": [], "tuple": ()},
        "key": jax.random.key(1),
        "keys": place(jax.random.split(jax.random.key(2, impl="rbg"), 8), "data"),
        "dots.in.name": jnp.ones(1),
    }


TEXT = {"name": "hello", "nested": {"with/slash": "é", "text": ["a", ""]}}


def save_v0(path: Path, tree: Any, **options: Any) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, tree)


def save_async(path: Path, tree: Any) -> None:
    with ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, tree)


def save_standard(path: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def save_v1(path: Path, tree: Any, **options: bool) -> None:
    saving = ocp.v1.options.ArrayOptions.Saving(**options)
    with v1.Context(array_options=v1.options.ArrayOptions(saving=saving)):
        v1.save(path, tree)


def _writers() -> dict[str, Callable[[Path, Any], None]]:
    writers: dict[str, Callable[[Path, Any], None]] = {"v0 async": save_async, "v0 standard": save_standard}
    for use_zarr3 in (False, True):
        for use_ocdbt in (True, False):
            for use_compression in (True, False):
                options = {"use_zarr3": use_zarr3, "use_ocdbt": use_ocdbt, "use_compression": use_compression}
                text = " ".join(name.removeprefix("use_") for name, value in options.items() if value) or "plain zarr2"
                writers[f"v0 {text}"] = lambda path, tree, options=options: save_v0(path, tree, **options)
                writers[f"v1 {text}"] = lambda path, tree, options=options: save_v1(path, tree, **options)
    return writers


WRITERS = _writers()


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_is_read_back_bit_for_bit(tmp_path: Path, tree: Any, layout: str) -> None:
    # Orbax's standard handlers refuse strings.
    wanted = tree if layout == "v0 standard" else {**tree, "text": TEXT}
    WRITERS[layout](tmp_path / "c", wanted)
    assert_same(open_foreign(open_store(tmp_path / "c")), wanted)


@pytest.mark.parametrize("kind", ["v0 ocdbt compression", "v0 plain zarr2", "v1 zarr3 ocdbt compression", "v1 zarr3"])
def test_boxes_are_read_from_many_threads(tmp_path: Path, tree: Any, kind: str) -> None:
    WRITERS[kind](tmp_path / "c", tree)
    found = open_foreign(open_store(tmp_path / "c"))
    wanted = {leaf.name: host(leaf.value) for leaf in flatten(tree)[0]}
    jobs = []
    for leaf in found.leaves:
        full = wanted[leaf.name]
        boxes = [whole(leaf.shape), Box((0,) * full.ndim, tuple(n // 2 for n in full.shape))]
        boxes.append(Box(tuple(n - n // 2 for n in full.shape), tuple(n // 2 for n in full.shape)))
        boxes.append(Box(tuple(n // 3 for n in full.shape), tuple(min(1, n) for n in full.shape)))
        jobs += [(leaf, box, full[box.slices()]) for box in boxes] * 3
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(lambda job: found.read(job[0], job[1]), jobs)
        for (leaf, box, piece), other in zip(jobs, read, strict=True):
            assert other.dtype == piece.dtype, leaf.name
            assert other.shape == box.shape, leaf.name
            assert other.tobytes() == piece.tobytes(), (leaf.name, box)


def test_leaves_tell_their_kind_and_how_they_were_placed(tmp_path: Path, tree: Any) -> None:
    save_v0(tmp_path / "c", {**tree, "text": "t"})
    leaves = {leaf.name: leaf for leaf in open_foreign(open_store(tmp_path / "c")).leaves}
    kinds = ("sharded", "numpy", "int", "float", "flag", "text", "key")
    assert [leaves[name].kind for name in kinds] == [
        "array", "numpy", "scalar", "scalar", "scalar", "string", "prng_key"
    ]  # fmt: skip
    assert leaves["keys"].prng_impl == "rbg"
    assert (leaves["keys"].shape, leaves["keys"].dtype) == ((8, 4), "uint32")
    assert leaves["list.12"].path == ("list", 12)
    assert leaves["int_keys.12"].path == ("int_keys", "12")
    assert leaves["sharded"].dtype == "bfloat16"
    assert leaves["sharded"].sharding is not None
    assert leaves["sharded"].sharding["partition_spec"] == ["data", "model"]
    assert leaves["numpy"].sharding is None


def test_only_the_chunks_of_a_box_are_read(tmp_path: Path) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    values = np.random.default_rng(0).random((8, 32768), np.float32)  # 128 KiB per chunk
    state = {"w": jax.device_put(values, NamedSharding(mesh, P("x"))), "other": jnp.ones(32768)}
    for name in ("v0 ocdbt compression", "v0 plain zarr2", "v1 zarr3 ocdbt"):
        path = tmp_path / name.replace(" ", "_")
        WRITERS[name](path, state)
        before = bytes_read()
        found = open_foreign(open_store(path))
        leaf = next(leaf for leaf in found.leaves if leaf.name == "w")
        assert found.chunk_shape(leaf) == (1, 32768), name
        assert bytes_read() - before < 50_000, name
        piece = found.read(leaf, Box((3, 100), (2, 5)))
        assert piece.tobytes() == values[3:5, 100:105].tobytes(), name
        assert bytes_read() - before < 2 * 131072 + 60_000, name


def test_step_folders_and_items_are_found(tmp_path: Path) -> None:
    state = {"a": jnp.arange(3.0)}
    with ocp.CheckpointManager(tmp_path / "single") as manager:
        manager.save(5, args=ocp.args.StandardSave(state))
    with ocp.CheckpointManager(tmp_path / "items", item_names=("state", "meta")) as manager:
        composite = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state, custom_metadata={"of": "tree"}),
            meta=ocp.args.JsonSave({"x": [1, 2.5], "s": "t", "n": None}),
        )
        manager.save(5, args=composite, custom_metadata={"of": "step"}, metrics=None)
    for path in ("single/5", "single/5/default", "items/5", "items/5/state"):
        assert_same(open_foreign(open_store(tmp_path / path)), state, path)
    assert open_foreign(open_store(tmp_path / "items/5")).custom_metadata == {"of": "tree"}
    assert open_foreign(open_store(tmp_path / "items/5")).step_metadata["custom_metadata"] == {"of": "step"}
    meta = open_foreign(open_store(tmp_path / "items/5/meta"))
    assert build(meta.structure, lambda i: meta.leaves[i].value) == {"x": [1, 2.5], "s": "t", "n": None}
    assert meta.read(meta.leaves[0], whole(())).dtype == np.int64
    with pytest.raises(NotFoundError, match="Open one of 5"):
        open_foreign(open_store(tmp_path / "items"))


def test_several_trees_in_one_step_are_listed(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path / "run", item_names=("params", "ema")) as manager:
        save = ocp.args.StandardSave
        manager.save(1, args=ocp.args.Composite(params=save({"a": jnp.ones(1)}), ema=save({"a": jnp.zeros(1)})))
    with pytest.raises(InvalidArgumentError, match=r'2 trees, the items "ema", "params": open one .*/1/ema'):
        open_foreign(open_store(tmp_path / "run/1"))
    found = open_foreign(open_store(tmp_path / "run/1/ema"))
    assert found.read(found.leaves[0], whole((1,))) == [0]


def test_a_single_array_is_a_tree(tmp_path: Path) -> None:
    for name in ("v0 ocdbt compression", "v0 zarr3 ocdbt", "v1 zarr3 ocdbt compression"):
        path = tmp_path / name.replace(" ", "_")
        WRITERS[name](path, jnp.arange(3.0))
        assert_same(open_foreign(open_store(path)), jnp.arange(3.0), name)


@pytest.mark.parametrize("kind", ["v0 ocdbt compression", "v0 zarr3 compression", "v0 plain zarr2"])
def test_arrays_are_found_when_the_metadata_is_lost(tmp_path: Path, kind: str) -> None:
    state = {"a": {"b": jnp.arange(3.0), "c": np.ones(2)}, "key": jax.random.key(1)}
    WRITERS[kind](tmp_path / "c", state)
    (tmp_path / "c/_METADATA").unlink()
    (tmp_path / "c/_CHECKPOINT_METADATA").unlink()
    assert_same(open_foreign(open_store(tmp_path / "c")), state, kind)


def test_the_commit_marker_is_not_needed_but_a_temporary_folder_is_refused(tmp_path: Path) -> None:
    save_v0(tmp_path / "c", {"a": jnp.ones(1)})
    (tmp_path / "c/commit_success.txt").unlink()
    assert len(open_foreign(open_store(tmp_path / "c")).leaves) == 1
    (tmp_path / "c").rename(tmp_path / "c.orbax-checkpoint-tmp")
    with pytest.raises(NotCommittedError, match="temporary folder of Orbax"):
        open_foreign(open_store(tmp_path / "c.orbax-checkpoint-tmp"))
    (tmp_path / "step").mkdir()
    (tmp_path / "c.orbax-checkpoint-tmp").rename(tmp_path / "step/default.orbax-checkpoint-tmp")
    with pytest.raises(NotCommittedError, match=r"default\.orbax-checkpoint-tmp"):
        open_foreign(open_store(tmp_path / "step"))


def test_databases_that_were_never_joined_are_not_committed(tmp_path: Path) -> None:
    save_v0(tmp_path / "c", {"a": jnp.ones(1)})
    (tmp_path / "c/manifest.ocdbt").unlink()
    with pytest.raises(NotCommittedError, match=r"no manifest\.ocdbt joins"):
        open_foreign(open_store(tmp_path / "c"))
    (tmp_path / "c/_METADATA").unlink()
    with pytest.raises(NotCommittedError, match=r"ocdbt\.process_0"):
        open_foreign(open_store(tmp_path / "c"))


def test_folders_that_are_no_checkpoint_say_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="looked for jaxckpt.json, _METADATA and manifest.ocdbt .* found nothing"):
        open_foreign(open_store(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(NotFoundError, match="found notes.txt"):
        open_foreign(open_store(tmp_path))
    (tmp_path / "checkpoint").write_bytes(b"\x80")
    with pytest.raises(UnsupportedFormatError, match="msgpack"):
        open_foreign(open_store(tmp_path))


def test_damage_is_named(tmp_path: Path) -> None:
    state = {"layer": {"w": jnp.ones((8, 8)), "b": jnp.ones(8)}}
    save_v0(tmp_path / "c", state, use_ocdbt=False)
    shutil.copytree(tmp_path / "c", tmp_path / "missing_chunk")
    (tmp_path / "missing_chunk/layer.w/0.0").unlink()
    found = open_foreign(open_store(tmp_path / "missing_chunk"))
    leaf = next(leaf for leaf in found.leaves if leaf.name == "layer.w")
    with pytest.raises(CorruptionError, match=r'"layer\.w" of .*missing_chunk'):
        found.read(leaf, whole(leaf.shape))
    shutil.copytree(tmp_path / "c", tmp_path / "missing_array")
    shutil.rmtree(tmp_path / "missing_array/layer.w")
    with pytest.raises(CorruptionError, match=r"names 2 arrays, and 1 of these cannot be found: layer\.w"):
        open_foreign(open_store(tmp_path / "missing_array"))
    (tmp_path / "c/_METADATA").write_text('{"tree_metadata": [')
    with pytest.raises(CorruptionError, match="_METADATA: not JSON"):
        open_foreign(open_store(tmp_path / "c"))


def test_boxes_outside_and_reads_of_strings_are_refused(tmp_path: Path) -> None:
    save_v0(tmp_path / "c", {"a": jnp.ones((2, 3)), "s": "text"})
    found = open_foreign(open_store(tmp_path / "c"))
    array, text = found.leaves
    for box in (Box((0, 0), (2, 4)), Box((0,), (2,))):
        with pytest.raises(InvalidArgumentError, match=r"has shape \(2, 3\)"):
            found.read(array, box)
    with pytest.raises(InvalidArgumentError, match="is a string"):
        found.read(text, whole(()))
    assert found.read(array, Box((1, 1), (0, 2))).shape == (0, 2)


def test_thousands_of_leaves_are_opened_at_once(tmp_path: Path) -> None:
    names = [f"layer_{i // 10}.kernel_{i % 10}" for i in range(4000)]
    kvstore = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/"}).result()
    with ts.Transaction() as transaction:
        for name in names:
            kvstore.with_transaction(transaction)[f"{name}/zarr.json"] = array_metadata((4,), "float32", (4,), None)
    entries = [
        om.OrbaxLeaf(name=name, path=tuple(name.split(".")), sequence=(False, False), value_type="jax.Array")
        for name in names
    ]
    (tmp_path / "_METADATA").write_bytes(om.encode_tree_metadata(entries))
    start = time.perf_counter()
    found = open_foreign(open_store(tmp_path))
    elapsed_s = time.perf_counter() - start
    assert [leaf.name for leaf in found.leaves] == names
    # Measured: 0.2 s. One open per array would need some 4 s.
    assert elapsed_s < 2


def assert_same(found: ForeignCheckpoint, wanted: Any, note: str = "") -> None:
    """Names, kinds, dtypes and bytes of all leaves; structure as Orbax records it."""
    leaves = {leaf.name: leaf for leaf in found.leaves}
    expected = {leaf.name: leaf.value for leaf in flatten(wanted)[0]}
    assert leaves.keys() == expected.keys(), note
    for name, value in expected.items():
        leaf = leaves[name]
        if isinstance(value, str):
            assert leaf.value == value, (note, name)
            continue
        other = found.read(leaf, whole(leaf.shape))
        assert other.dtype == host(value).dtype, (note, name)
        assert leaf.dtype == other.dtype.name, (note, name)
        assert other.shape == leaf.shape == host(value).shape, (note, name)
        assert other.tobytes() == host(value).tobytes(), (note, name)
    rebuilt = build(found.structure, lambda i: found.leaves[i].name)
    names = iter(leaf.name for leaf in flatten(wanted)[0])
    assert rebuilt == plain(wanted, names), note


def plain(tree: Any, names: Any) -> Any:
    """The tree of leaf names as Orbax keeps it: lists for tuples, dicts with string keys for the rest."""
    if isinstance(tree, Pair):
        return {"first": plain(tree.first, names), "second": plain(tree.second, names)}
    if isinstance(tree, list) or (isinstance(tree, tuple) and tree):
        return [plain(child, names) for child in tree]
    if isinstance(tree, dict):
        return {str(key): plain(child, names) for key, child in tree.items()}
    return tree if tree is None or isinstance(tree, tuple) else next(names)


def host(value: Any) -> np.ndarray:
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.asarray(value)


def bytes_read() -> int:
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def test_an_older_checkpoint_without_a_marker_is_replaced_only_when_asked(tmp_path: Path, tree: Any) -> None:
    """Versions of Orbax before `commit_success.txt` left none on file systems that rename folders."""
    save_v0(tmp_path / "c", tree)
    (tmp_path / "c" / om.COMMIT_MARKER).unlink(missing_ok=True)
    new = {"w": np.arange(6.0), "step": 7}
    before = {file: file.read_bytes() for file in (tmp_path / "c").rglob("*") if file.is_file()}
    with pytest.raises(AlreadyExistsError, match="overwrite=True"):
        jaxckpt.save(tmp_path / "c", new)
    assert {file: file.read_bytes() for file in (tmp_path / "c").rglob("*") if file.is_file()} == before
    jaxckpt.save(tmp_path / "c", new, overwrite=True)
    assert (tmp_path / "c" / om.COMMIT_MARKER).exists()
    found = jaxckpt.restore(tmp_path / "c")
    assert found["step"] == 7
    assert found["w"].tobytes() == new["w"].tobytes()
    assert jaxckpt.verify(tmp_path / "c").ok
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert np.asarray(checkpointer.restore(tmp_path / "c")["w"]).tobytes() == new["w"].tobytes()
    assert not any("ocdbt.process_0/d" in str(file) and file.exists() for file in before)  # the old data are gone


@pytest.mark.parametrize("layout", ["v0 ocdbt compression", "v0 plain zarr2"])
def test_a_crash_while_replacing_one_without_a_marker_leaves_the_old_or_the_new(tmp_path: Path, layout: str) -> None:
    old, new = {"w": jnp.arange(4.0)}, {"w": jnp.arange(5.0)}
    seen = set()
    for n in range(1, 60):
        path = tmp_path / str(n)
        WRITERS[layout](path, old)
        (path / om.COMMIT_MARKER).unlink(missing_ok=True)
        store = CrashAfter(open_store(path), n)
        try:
            jaxckpt.save(store, new, overwrite=True)
            done = True
        except SimulatedCrash:
            done = False
        found = np.asarray(jaxckpt.restore(path)["w"])
        assert found.tolist() in ([0.0, 1, 2, 3], [0.0, 1, 2, 3, 4]), n
        seen.add(len(found))
        if done:
            break
    assert done
    assert seen == {4, 5}
