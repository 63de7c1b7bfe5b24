"""inspect, diff, lineage, compression, and what a save refuses to write over."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from tests.checkpoint.bits import assert_same_tree

KEY = jax.random.key(0)


def tree_of_zeros() -> dict[str, Any]:
    return {
        "a": {"w": np.zeros(100_000, np.float32), "b": jnp.zeros(50_000)},
        "n": np.zeros((10, 3), np.int8),
        "t": "x",
    }


def stored(path: Path) -> dict[str, int]:
    return {leaf.name: leaf.stored_bytes for leaf in jc.inspect(path).leaves}


COMPRESSION = {
    "none": (None, set()),
    "level": (3, {"a.w", "a.b", "n"}),
    "negative": (-5, {"a.w", "a.b", "n"}),
    "highest": (22, {"a.w", "a.b", "n"}),
    "dict": ({"a.w": 1}, {"a.w"}),
    "glob": ({"a.w": None, "a.*": 3}, {"a.b"}),
    "function": (lambda name, spec: 5 if spec.dtype == np.float32 else None, {"a.w", "a.b"}),
}


@pytest.mark.parametrize("case", COMPRESSION)
def test_compression_is_chosen_leaf_by_leaf(tmp_path: Path, case: str) -> None:
    compression, small = COMPRESSION[case]
    tree = tree_of_zeros()
    jc.save(tmp_path / "c", tree, compression=compression)
    plain = {"a.w": 400_000, "a.b": 200_000}
    for name, size in plain.items():
        assert (stored(tmp_path / "c")[name] < size // 10) == (name in small)
    assert_same_tree(jc.restore(tmp_path / "c"), tree)
    assert_same_tree(jc.restore(tmp_path / "c", tree), tree)


@pytest.mark.parametrize("level", [True, 23, -8, 1.5, "fast"])
def test_levels_that_zstd_lacks_are_refused(tmp_path: Path, level: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        jc.save(tmp_path / "c", {"w": np.ones(3)}, compression={"w": level})
    assert not (tmp_path / "c").exists()


def test_compressed_arrays_go_to_another_mesh(tmp_path: Path, mesh_4x2: Mesh) -> None:
    data = np.arange(8 * 4096, dtype=np.int32).reshape(8, 4096)
    jc.save(tmp_path / "c", {"w": jax.device_put(data, NamedSharding(mesh_4x2, P("data", "model")))}, compression=1)
    found = jc.restore(tmp_path / "c", lambda name, spec: NamedSharding(mesh_4x2, P("model")))
    assert np.array_equal(found["w"], data)


def test_lineage_is_recorded_and_shown(tmp_path: Path) -> None:
    parents = [jc.Lineage(path="runs/a", step=3, weight=0.25, method="ema"), jc.Lineage(path="runs/b")]
    jc.save(tmp_path / "c", {"w": np.ones(3)}, step=7, metadata={"run": "x", "loss": 0.5}, parents=parents)
    info = jc.inspect(tmp_path / "c")
    assert info.step == 7
    assert info.metadata == {"run": "x", "loss": 0.5}
    assert info.parents[0] == {"path": "runs/a", "step": 3, "weight": 0.25, "method": "ema"}
    assert info.parents[1]["path"] == "runs/b"
    assert info.processes == 1
    assert {"jax", "jaxckpt", "numpy"} <= set(info.versions)
    assert info.time_ns > 0
    assert "step        7" in str(info)


def test_what_inspect_prints_has_a_line_per_value_and_no_dicts(tmp_path: Path, mesh_4x2: Mesh) -> None:
    spec = P(("data", "model"), None)
    metadata = {
        "run": "x",
        "average": {"weights": [0.25, 0.75], "metric": {"name": "loss", "value": None}, "rows": [{"a": 1}, {"a": 2}]},
        "none": {},
        "long": list(range(1000)),
        "many": {str(i): i for i in range(30)},
    }
    parents = [jc.Lineage(path="runs/a", step=3, weight=0.25, method="ema"), jc.Lineage(path="runs/b")]
    tree = {"w": jax.device_put(np.zeros((8, 4), np.float32), NamedSharding(mesh_4x2, spec))}
    jc.save(tmp_path / "c", tree, metadata=metadata, parents=parents)
    text = str(jc.inspect(tmp_path / "c"))
    lines = text.splitlines()
    for line in (
        'metadata    run = "x"',
        "metadata    average.weights = 0.25, 0.75",
        'metadata    average.metric.name = "loss"',
        "metadata    average.metric.value = null",
        "metadata    average.rows[1].a = 2",
        "metadata    none = (empty)",
        "metadata    many: 10 more values",
        "parent      runs/a, step 3, weight 0.25, by ema",
        "parent      runs/b",
        "leaves      1, of which 1 array",
    ):
        assert line in lines, text
    assert lines[-1].endswith("mesh data=4 x model=2, P(('data', 'model'), None)")
    assert "{" not in text
    assert max(map(len, lines[1:])) < 200


def test_one_leaf_is_not_told_as_leaves(tmp_path: Path) -> None:
    jc.save(tmp_path / "c", {"w": np.zeros(3)})
    assert ": 1 leaf, 28 bytes: " in str(jc.verify(tmp_path / "c"))


@pytest.mark.parametrize(
    "bad", [{"step": 1.5}, {"step": True}, {"metadata": {"a": np.ones(2)}}, {"metadata": {"a": float("nan")}}]
)
def test_lineage_that_is_no_json_is_refused_before_anything_is_written(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="step|metadata"):
        jc.save(tmp_path / "c", {"w": np.ones(3)}, **bad)
    assert not (tmp_path / "c").exists()


def test_inspect_tells_kind_shape_size_sharding_and_values(tmp_path: Path, mesh_4x2: Mesh) -> None:
    sharded = jax.device_put(np.zeros((8, 4), np.float32), NamedSharding(mesh_4x2, P("data", "model")))
    jc.save(
        tmp_path / "c", {"w": sharded, "n": 3, "t": "text", "f": 0.5, "e": np.zeros((0, 2)), "k": jax.random.key(0)}
    )
    info = {leaf.name: leaf for leaf in jc.inspect(tmp_path / "c").leaves}
    assert (info["w"].kind, info["w"].shape, info["w"].dtype, info["w"].size_bytes) == ("array", (8, 4), "float32", 128)
    assert info["w"].sharding == "mesh data=4 x model=2, P('data', 'model')"
    assert (info["n"].value, info["t"].value, info["f"].value) == (3, "text", 0.5)
    assert (info["e"].size_bytes, info["e"].stored_bytes) == (0, 0)
    assert info["k"].kind == "prng_key"


DIFFS = {
    "value": ({"w": np.zeros(3)}, {"w": np.array([0.0, 2, 0])}, "w: 1 of 3 elements differ, by at most 2"),
    "shape": ({"w": np.zeros(3)}, {"w": np.zeros(4)}, r"w: \(3,\) float64 and \(4,\) float64"),
    "dtype": ({"w": np.zeros(3)}, {"w": np.zeros(3, np.float32)}, "w: .*float64 and .*float32"),
    "number": ({"w": 1}, {"w": 2}, "w: 1 and 2"),
    "text": ({"w": "a"}, {"w": "b"}, "w: 'a' and 'b'"),
    "nan": ({"w": np.array([np.nan, 1])}, {"w": np.array([np.nan, 2])}, "w: .* elements differ"),
    "all_nan": ({"w": np.array([np.nan])}, {"w": np.array([1.0])}, "w: 1 of 1 element differs"),
    "sign_of_zero": ({"w": np.array([0.0])}, {"w": np.array([-0.0])}, "w: "),
    "key": ({"w": jax.random.key(0)}, {"w": jax.random.key(1)}, "w: "),
    "complex": ({"w": np.array([1j])}, {"w": np.array([2j])}, "w: 1 of 1 element differs, by at most 1"),
    "bool": ({"w": np.array([True])}, {"w": np.array([False])}, "w: 1 of 1"),
}


@pytest.mark.parametrize("case", DIFFS)
def test_diff_tells_what_differs(tmp_path: Path, case: str) -> None:
    a, b, message = DIFFS[case]
    jc.save(tmp_path / "a", a)
    jc.save(tmp_path / "b", b)
    found = jc.diff(tmp_path / "a", tmp_path / "b")
    assert found
    assert len(found.differing) == 1
    import re

    assert re.match(message, found.differing[0]), found.differing[0]
    assert not jc.diff(tmp_path / "a", tmp_path / "a")


def test_a_save_refuses_what_is_there_unless_told_to_overwrite(tmp_path: Path) -> None:
    jc.save(tmp_path / "c", {"w": np.zeros(3)})
    with pytest.raises(jc.AlreadyExistsError, match="overwrite=True"):
        jc.save(tmp_path / "c", {"w": np.ones(3)})
    assert not jc.restore(tmp_path / "c")["w"].any()
    jc.save(tmp_path / "c", {"other": np.ones(3)}, overwrite=True)
    assert_same_tree(jc.restore(tmp_path / "c"), {"other": np.ones(3)})
    assert jc.verify(tmp_path / "c")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_things_is_refused_and_its_entries_listed(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(jc.AlreadyExistsError, match=r"thesis\.tex"):
        jc.save(tmp_path, {"w": np.zeros(3)}, overwrite=overwrite)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_orbax_checkpoint_can_be_overwritten(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save(tmp_path / "c", {"old": np.arange(5.0)})
    with pytest.raises(jc.AlreadyExistsError):
        jc.save(tmp_path / "c", {"w": np.ones(3)})
    jc.save(tmp_path / "c", {"w": np.ones(3)}, overwrite=True)
    assert_same_tree(jc.restore(tmp_path / "c"), {"w": np.ones(3)})
    assert set(ocp.PyTreeCheckpointer().restore(tmp_path / "c")) == {"w"}
