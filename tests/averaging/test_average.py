"""Averages of stored checkpoints and live trees: every value against a float64 oracle, every policy, every mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.averaging import cells, stream
from jaxckpt.averaging.average import average, average_to
from jaxckpt.core.events import Restored, subscribe
from tests.averaging.oracle import ulps, weighted

K = 5
SIGNED = np.array([1.7, -0.9, 0.35, 2.25, -2.4])
DTYPES = {
    "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "f8": ml_dtypes.float8_e5m2,
    "f64": np.float64,
    "c64": np.complex64,
}


def values_of(k: int) -> dict[str, Any]:
    rng = np.random.default_rng(k)
    tree: dict[str, Any] = {
        name: rng.standard_normal((48, 33)).astype(dtype) for name, dtype in DTYPES.items() if name != "c64"
    }
    tree["c64"] = (rng.standard_normal((5, 7)) + 1j * rng.standard_normal((5, 7))).astype(np.complex64)
    tree["large"] = rng.standard_normal((1024, 640), np.float32)
    tree["layers"] = [{"w": rng.standard_normal((16, 8), np.float32)} for _ in range(3)]
    tree["empty"] = np.zeros((0, 4), np.float32)
    tree["scalar"] = np.float32(rng.standard_normal())
    return tree | {"lr": 0.1 * k, "step": 10 * k, "mask": np.arange(4) > k, "ids": np.arange(3) + k}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("averaging")
    paths = [str(folder / f"{k}") for k in range(K)]
    for k, path in enumerate(paths):
        jc.save(path, values_of(k), step=10 * k)
    return paths


def check(found: Any, weights: np.ndarray = SIGNED) -> None:
    trees = [values_of(k) for k in range(K)]
    for name in [*DTYPES, "large", "empty", "scalar"]:
        stack = np.stack([np.asarray(tree[name]) for tree in trees])
        assert np.asarray(found[name]).dtype == stack.dtype, name
        if name == "f64":  # sums in float64 have no more bits than the oracle
            np.testing.assert_allclose(found[name], weighted(stack, weights), rtol=1e-12, atol=1e-14)
            continue
        for part in (np.real, np.imag) if name == "c64" else (np.asarray,):
            assert ulps(part(np.asarray(found[name])), weighted(part(stack), weights)) <= 1, name
    for i in range(3):
        stack = np.stack([tree["layers"][i]["w"] for tree in trees])
        assert ulps(found["layers"][i]["w"], weighted(stack, weights)) <= 1
    assert found["lr"] == pytest.approx(weights @ [tree["lr"] for tree in trees], rel=1e-12)
    assert found["step"] == 40
    assert found["mask"].tolist() == trees[-1]["mask"].tolist()
    assert found["ids"].tolist() == [4, 5, 6]


@pytest.mark.parametrize("accumulate", ["float64", "float32"])
def test_stored_checkpoints_are_averaged_within_one_ulp(stored: list[str], accumulate: Any) -> None:
    found = average(stored, SIGNED, only=lambda name: name != "f64", accumulate=accumulate) | {
        "f64": weighted(np.stack([values_of(k)["f64"] for k in range(K)]), SIGNED)
    }
    check(found)


def test_float64_is_kept_on_the_host(stored: list[str]) -> None:
    check(average(stored, SIGNED))


def test_live_trees_and_checkpoints_mix(stored: list[str]) -> None:
    check(average([stored[0], values_of(1), stored[2], values_of(3), stored[4]], SIGNED))
    check(average([values_of(k) for k in range(K)], SIGNED))


@pytest.mark.parametrize("alone", [0, 4 * 1024, 1024 * 1024])
def test_small_slots_and_buckets_change_nothing(stored: list[str], monkeypatch: pytest.MonkeyPatch, alone: int) -> None:
    expected = average(stored, SIGNED)
    monkeypatch.setattr(stream, "SLOT_BYTES", 64 * 1024)
    monkeypatch.setattr(stream, "BUCKET_BYTES", 16 * 1024)
    monkeypatch.setattr(cells, "LARGEST_CELL_BYTES", 32 * 1024)
    monkeypatch.setattr(stream, "ALONE_BYTES", alone)
    found = average(stored, SIGNED)
    check(found)
    for name in DTYPES:
        assert found[name].tobytes() == expected[name].tobytes()


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("accumulate", ["float64", "float32"])
def test_an_average_lands_on_another_mesh(
    tmp_path: Path, mesh_4x2: jax.sharding.Mesh, where: Any, accumulate: Any
) -> None:
    specs = {"a": P("data", "model"), "b": P("model"), "c": P(), "d": P(None, ("data", "model"))}
    rng = np.random.default_rng(0)
    stacks = {n: rng.standard_normal((K, 256, 128), np.float32) for n in specs}
    stacks["b"] = stacks["b"].astype(ml_dtypes.bfloat16)
    stacks["large"] = rng.standard_normal((K, 2048, 640), np.float32)
    specs["large"] = P("data", "model")
    for k in range(K):
        tree = {n: jax.device_put(stacks[n][k], NamedSharding(mesh_4x2, spec)) for n, spec in specs.items()}
        jc.save(tmp_path / f"{k}", tree)
    turned = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    like = {
        n: jax.ShapeDtypeStruct(stacks[n].shape[1:], stacks[n].dtype, sharding=NamedSharding(turned, spec))
        for n, spec in specs.items()
    }
    paths = [tmp_path / f"{k}" for k in range(K)]
    found = average(paths, SIGNED, like=like, where=where, accumulate=accumulate)
    for name in specs:
        assert found[name].sharding == like[name].sharding
        assert ulps(found[name], weighted(stacks[name], SIGNED)) <= 1
        for shard in found[name].addressable_shards:
            assert ulps(shard.data, weighted(stacks[name], SIGNED)[shard.index]) <= 1
    donated = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(found)
    assert donated["a"].shape == (256, 128)


def test_every_stored_byte_is_read_once_and_sources_of_weight_zero_not_at_all(stored: list[str]) -> None:
    events: list[Any] = []
    stop = subscribe(events.append)
    average(stored, [0, 1.5, 0, 0.5, 0], policy="average")
    stop()
    read = {event.path: event.read_bytes for event in events if isinstance(event, Restored)}
    size = [sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file()) for path in stored]
    assert 0 < read[f"file://{stored[1]}/"] <= 1.02 * size[1]
    assert 0 < read[f"file://{stored[3]}/"] <= 1.02 * size[3]
    assert sum(read.values()) <= 1.02 * (size[1] + size[3]) + 2000


@pytest.mark.parametrize("accumulate", ["float64", "float32"])
@pytest.mark.parametrize("where", ["host", "device"])
def test_p_models_are_those_of_p_calls(stored: list[str], where: Any, accumulate: Any) -> None:
    weights = np.random.default_rng(0).standard_normal((3, K))
    only = ["f32", "bf16", "large", "layers", "step", "ids"]
    like = (lambda name, spec: jax.sharding.SingleDeviceSharding(jax.devices()[1])) if where == "device" else None
    together = average(stored, weights, only=only, like=like, where=where, accumulate=accumulate)
    assert len(together) == 3
    for p in range(3):
        alone = average(stored, weights[p], only=only, like=like, where=where, accumulate=accumulate)
        for a, b in zip(jax.tree.leaves(together[p]), jax.tree.leaves(alone), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert together[0]["ids"] is not together[1]["ids"]


def test_weights_by_path(stored: list[str]) -> None:
    one = np.eye(K)
    found = average(stored, {"layers.0": one[0], "layers.*.w": one[1], "large": SIGNED, "*": one[2]})
    trees = [values_of(k) for k in range(K)]
    assert (found["layers"][0]["w"] == trees[0]["layers"][0]["w"]).all()
    assert (found["layers"][2]["w"] == trees[1]["layers"][2]["w"]).all()
    assert (found["f32"] == trees[2]["f32"]).all()
    assert ulps(found["large"], weighted(np.stack([t["large"] for t in trees]), SIGNED)) <= 1
    with pytest.raises(jc.MismatchError, match='"f32" matches none of the globs'):
        average(stored, {"layers": one[0]})


def test_the_result_has_the_dtype_of_like(stored: list[str]) -> None:
    like = {"f32": jnp.zeros((48, 33), jnp.bfloat16), "bf16": np.zeros((48, 33), np.float32), "lr": 0.0, "step": 0}
    found = average(stored, SIGNED, like=like, only=["f32", "bf16", "lr", "step"])
    assert isinstance(found["f32"], jax.Array)
    assert (found["f32"].dtype, found["bf16"].dtype) == (jnp.bfloat16, np.float32)
    for name in ("f32", "bf16"):
        assert ulps(found[name], weighted(np.stack([values_of(k)[name] for k in range(K)]), SIGNED)) <= 1
    assert average(stored, only="bf16", dtype=np.float32)["bf16"].dtype == np.float32


POLICIES = {
    "first": [0, 1, 2],
    "last": [4, 5, 6],
    "average": [1, 2, 3],
}


@pytest.mark.parametrize("policy", POLICIES)
def test_integers_follow_their_policy(stored: list[str], policy: str) -> None:
    found = average(stored, np.array([0.6, 0.1, 0.1, 0.1, 0.1]), policy={"ids": policy, "step": policy})
    assert found["ids"].tolist() == POLICIES[policy]
    assert found["step"] == {"first": 0, "last": 40, "average": 10}[policy]


def test_a_leaf_that_must_be_equal_is_told_with_both_values(stored: list[str]) -> None:
    with pytest.raises(jc.MismatchError, match=r'"step" must be equal .* it is 0 in .*/0/ and 40 in .*/4/'):
        average(stored, policy={"step": "equal_or_error"})
    trees = [{"w": np.full(2, k, np.float32), "vocabulary": np.arange(4), "key": jax.random.key(7)} for k in range(3)]
    found = average(trees, policy={"vocabulary": "equal_or_error", "key": "equal_or_error"})
    assert found["vocabulary"].tolist() == [0, 1, 2, 3]
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(jax.random.key(7))).all()


def test_keys_and_text_have_no_average(stored: list[str]) -> None:
    with pytest.raises(jc.CheckpointError, match='"key" .* has no average'):
        average([{"key": jax.random.key(0)}] * 2, policy={"key": "average"})
    assert average([{"name": "a"}, {"name": "b"}]) == {"name": "b"}


def test_paths_on_one_side_only() -> None:
    old = {"body": np.array([1.0, 2.0], np.float32), "head": {"old": np.array([1.0], np.float32)}}
    new = {"body": np.array([3.0, 6.0], np.float32), "head": {"old": np.array([3.0], np.float32), "new": np.ones(1)}}
    with pytest.raises(jc.MismatchError, match=r'"head\.new" of tree 1 of sources is not in the result'):
        average([old, new])
    kept = average([old, new], [0.75, 0.25], missing="keep")
    assert kept["body"].tolist() == [1.5, 3.0]
    assert kept["head"]["old"].tolist() == [1.5]
    assert kept["head"]["new"].tolist() == [1.0]
    assert list(average([new, old], missing="skip")["head"]) == ["old"]
    like = {"body": np.zeros(2, np.float32), "head": {"old": np.zeros(1, np.float32), "new": np.full(1, 9.0)}}
    assert average([old, new], like=like, missing="skip")["head"]["new"].tolist() == [9.0]
    third = {"body": np.zeros(2, np.float32)}
    scaled = average([old, new, third], [0.5, 0.3, 0.2], missing="keep")["head"]["old"]
    assert scaled[0] == np.float32((0.5 * 1 + 0.3 * 3) / 0.8)
    with pytest.raises(jc.MismatchError, match='"x" is not in tree 0'):
        average([old, new], like={"x": np.zeros(1)}, missing="keep")


def test_tied_leaves_are_summed_once_and_stay_tied() -> None:
    def tree(k: int) -> dict:
        w = jnp.full((2, 2), float(k))
        return {"embed": w, "head": w, "other": jnp.full((2, 2), float(k))}

    found = average([tree(0), tree(1)])
    assert found["embed"] is found["head"]
    assert found["embed"] is not found["other"]
    untied = {**tree(1), "head": jnp.full((2, 2), 5.0)}
    found = average([tree(0), untied])
    assert (found["embed"][0, 0], found["head"][0, 0]) == (0.5, 2.5)


def test_shapes_that_differ_are_told(stored: list[str]) -> None:
    with pytest.raises(jc.MismatchError, match=r'"w" is \(2,\) float32 in tree 0 of sources, and \(3,\) float32'):
        average([{"w": np.zeros(2, np.float32)}, {"w": np.zeros(3, np.float32)}])
    with pytest.raises(jc.MismatchError, match="`like` wants"):
        average(stored, like={"f32": np.zeros((48, 34), np.float32)}, only="f32")


@pytest.mark.parametrize(
    ("weights", "words"),
    [([1.0], "shape"), ([[1.0] * 5] * 2 + [[1.0]], "numbers"), ([1, 2, 3, 4, np.nan], "finite"), ("x", "numbers")],
)
def test_wrong_weights_are_told(stored: list[str], weights: Any, words: str) -> None:
    with pytest.raises(jc.CheckpointError, match=words):
        average(stored, weights)


def test_sources_must_be_a_list(stored: list[str]) -> None:
    with pytest.raises(jc.CheckpointError, match="list of checkpoints"):
        average(stored[0])


def test_packed_integers_are_rounded() -> None:
    trees = [{"x": np.array([k, -k, 7], ml_dtypes.int4)} for k in (1, 2, 2)]
    found = average(trees, policy={"x": "average"})["x"]
    assert found.astype(int).tolist() == [2, -2, 7]
    assert average(trees, [2, 2, 2], policy={"x": "average"})["x"].astype(int).tolist() == [7, -8, 7]


def test_many_sources_warn_of_nothing(stored: list[str], recwarn: pytest.WarningsRecorder) -> None:
    trees = [{"w": np.full(100, k, ml_dtypes.bfloat16), "v": np.full(100, k, np.float32)} for k in range(70)]
    for accumulate in ("float64", "float32"):
        found = average(trees, accumulate=accumulate)
        assert (found["v"][0], found["w"][0]) == (34.5, 34.5)
    with jax.debug_nans(True):
        average(stored, SIGNED)
    assert [str(warning.message) for warning in recwarn] == []


def test_an_average_is_saved_with_its_lineage(stored: list[str], tmp_path: Path) -> None:
    average_to(tmp_path / "soup", stored, SIGNED, method="by hand", metric={"name": "loss", "value": 0.5})
    check(jc.restore(tmp_path / "soup"))
    text = str(jc.inspect(tmp_path / "soup"))
    assert "by hand" in text
    sidecar = jc.inspect(tmp_path / "soup")
    assert [parent["weight"] for parent in sidecar.parents] == SIGNED.tolist()
    assert sidecar.metadata["averaging"]["metric"] == {"name": "loss", "value": 0.5}
    average_to(tmp_path / "{p}", stored, np.eye(K)[:2])
    assert jc.restore(tmp_path / "1")["lr"] == 0.1
    with pytest.raises(jc.CheckpointError, match="{p}"):
        average_to(tmp_path / "one", stored, np.eye(K))


COMPLEX = [{"c": np.array([1 + 2j, 3 + 4j], np.complex64), "w": np.ones(2, np.float32), "n": 1.6}] * 2


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("weights", [None, [1, 0]])
def test_a_real_dtype_leaves_complex_and_integer_leaves_as_they_are(where: Any, weights: Any) -> None:
    trees = [{**tree, "i": np.arange(3)} for tree in COMPLEX]
    found = average(trees, weights, dtype=ml_dtypes.bfloat16, where=where, policy={"i": "average"})
    assert found["c"].dtype == np.complex64
    assert found["c"].tolist() == [1 + 2j, 3 + 4j]
    assert (found["w"].dtype, found["i"].dtype) == (ml_dtypes.bfloat16, np.int64)
    assert average(trees, weights, dtype=np.complex128, where=where)["w"].dtype == np.float32
    with pytest.raises(jc.CheckpointError, match="dtype is int32; it is that of floating results"):
        average(trees, weights, dtype=np.int32, where=where)


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("weights", [None, [1, 0], np.eye(2)])
@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("c", np.float32, r'"c": the sources have \(2,\) complex64, `like` wants float32, and its imaginary parts'),
        ("w", np.int32, r'"w": the sources have \(2,\) float32, `like` wants int32, and its fractions'),
        ("n", np.int32, r'"n": the sources have a Python float, `like` wants int32, and its fractions'),
    ],
)
def test_what_like_cannot_hold_is_refused(where: Any, weights: Any, name: str, dtype: Any, words: str) -> None:
    shape = np.shape(COMPLEX[0][name])
    for leaf in (np.zeros(shape, dtype), jax.ShapeDtypeStruct(shape, dtype)):
        with pytest.raises(jc.MismatchError, match=words):
            average(COMPLEX, weights, like={name: leaf}, only=name, where=where)


@pytest.mark.parametrize("where", ["host", "device"])
def test_like_may_hold_more(where: Any) -> None:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    like: dict[str, Any] = {"w": np.zeros(2, np.complex64), "i": jax.ShapeDtypeStruct((3,), np.float32)}
    if where == "device":
        like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for name, leaf in like.items()}
    trees = [{"w": np.full(2, k, np.float32), "i": np.arange(3) + k} for k in range(2)]
    found = average(trees, like=like, policy={"i": "average"}, where=where)
    assert found["w"].tolist() == [0.5 + 0j, 0.5 + 0j]
    assert found["i"].tolist() == [0.5, 1.5, 2.5]


def test_average_to_keeps_complex_leaves(tmp_path: Path) -> None:
    average_to(tmp_path / "soup", COMPLEX, dtype=np.float16)
    assert jc.restore(tmp_path / "soup")["c"].tolist() == [1 + 2j, 3 + 4j]


@pytest.mark.parametrize("how", [{"where": "host"}, {"where": "device"}, {"where": "device", "accumulate": "float32"}])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_source_of_weight_zero_is_in_none_of_the_results(how: dict[str, Any], dtype: Any) -> None:
    bad = [1.0, np.inf, np.nan, 2.0]
    trees = [{"w": jnp.asarray(values, dtype), "n": values[1]} for values in ([1.0, 2.0, 3.0, 4.0], bad)]
    both = average(trees, [[1, 0], [0, 1]], **how)
    for found, row in zip(both, ([1, 0], [0, 1]), strict=True):
        alone = average(trees, row, **how)
        np.testing.assert_array_equal(np.asarray(found["w"], np.float32), np.asarray(alone["w"], np.float32))
        assert found["n"] == alone["n"]
    assert both[0]["n"] == 2.0
