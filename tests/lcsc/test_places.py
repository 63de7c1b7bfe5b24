"""Claims about where the checkpoints of a search are: on devices, on meshes, in host memory, on storage; and LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxckpt as jc
from jaxckpt import lcsc
from jaxckpt.averaging.average import average
from jaxckpt.core.errors import InvalidArgumentError, MismatchError
from jaxckpt.lcsc.evaluate import chunk_of
from jaxckpt.lcsc.load import _choose
from jaxckpt.lcsc.merge import make_form, merge, product
from jaxckpt.lcsc.space import Space

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

K = 5
HOW: dict[str, Any] = {"budget": 15 + 3 * 8, "population": 8, "strategy": "evolution"}


def tree(seed: int) -> dict[str, Any]:
    """Keys that are not sorted, and leaves of all kinds."""
    rng = np.random.default_rng(seed)
    return {
        "z": {"w": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)},
        "name": "digits",
        "a": jnp.asarray(rng.normal(size=8), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(4, 8)), jnp.bfloat16),
        "count": jnp.asarray(seed),
        "seen": 2**40 + seed,
        "rate": 0.5 * seed,
        "key": jax.random.key(seed),
    }


TREES = [tree(k) for k in range(K)]
MIDDLE = float(average(TREES)["a"][0]) + 0.01


def loss(params: Any, key: jax.Array) -> jax.Array:
    assert params["name"] == "digits"
    assert params["seen"] == 2**40 + K - 1
    noise = jax.random.normal(key, ()) + 0 * jax.random.normal(params["key"], ())
    return (
        ((params["z"]["w"] - 0.3) ** 2).mean()
        + (params["a"] ** 2).mean()
        + (params["half"].astype(jnp.float32) ** 2).mean()
        + 0.01 * (noise + params["rate"] + params["count"].astype(jnp.float32))
    )


@pytest.fixture(scope="module")
def expected() -> lcsc.Result:
    return lcsc.search(TREES, loss, **HOW)


@pytest.mark.parametrize("placement", ["host", "stream"])
@pytest.mark.parametrize("jit", [True, False])
def test_every_place_gives_the_scores_of_device_memory(expected: lcsc.Result, placement: Any, jit: bool) -> None:
    found = lcsc.search(TREES, loss, placement=placement, jit=jit, **HOW)
    assert found.report.placement == placement
    assert expected.report.placement == "device"
    np.testing.assert_allclose(found.report.fitness, expected.report.fitness, rtol=1e-4)
    np.testing.assert_allclose(found.coefficients, expected.coefficients, rtol=1e-4)


def test_leaves_that_are_no_floating_arrays_are_those_of_the_last_checkpoint(expected: lcsc.Result) -> None:
    assert expected.params["count"] == K - 1
    assert expected.params["seen"] == 2**40 + K - 1
    assert expected.params["name"] == "digits"
    assert jax.random.key_data(expected.params["key"]).tolist() == [0, K - 1]


def test_a_run_of_a_manager_is_searched_by_its_folder(tmp_path: Path, expected: lcsc.Result) -> None:
    with jc.CheckpointManager(tmp_path / "run") as manager:
        for k, one in enumerate(TREES):
            manager.save(10 * k, {"params": one, "opt": np.zeros(3)})
    nested = lcsc.search(tmp_path / "run", lambda p, key: loss(p["params"], key), only="params", **HOW)
    np.testing.assert_array_equal(nested.report.fitness, expected.report.fitness)
    assert list(nested.params) == ["params"]
    assert nested.report.steps == (0, 10, 20, 30, 40)

    def parameters(state: Any) -> Any:
        return {name: state["params"][name] for name in ("z", "a")}

    found = lcsc.search(tmp_path / "run", plain_loss, eval_params=parameters, **HOW)
    trees = [{"z": one["z"], "a": one["a"]} for one in TREES]
    np.testing.assert_array_equal(found.report.fitness, lcsc.search(trees, plain_loss, **HOW).report.fitness)


@pytest.mark.parametrize("scheme", ["file://{}/", "memory://lcsc-places/"])
def test_urls_are_paths(tmp_path: Path, scheme: str, expected: lcsc.Result) -> None:
    root = scheme.format(tmp_path)
    for k, one in enumerate(TREES):
        jc.save(f"{root}{k}", one)
    found = lcsc.search([f"{root}{k}" for k in range(K)], loss, state=f"{root}state", **HOW)
    np.testing.assert_array_equal(found.report.fitness, expected.report.fitness)


def test_groups_are_found_by_name_in_dicts_that_are_not_sorted() -> None:
    form = make_form(TREES[0], Space(count=K, groups=("z", "*")), None)
    assert dict(zip(form.names, form.groups, strict=True)) == {
        "z.w": 0, "a": 1, "half": 1, "count": 0, "rate": 1, "key": 0,
    }  # fmt: skip

    def only_z(params: Any, key: jax.Array) -> Any:
        return ((params["z"]["w"] - TREES[1]["z"]["w"]) ** 2).sum() + ((params["a"] - TREES[3]["a"]) ** 2).sum()

    found = lcsc.search(TREES, only_z, groups=("z", "*"), budget=807, scale=0.3, l1_penalty=0.0)
    assert found.coefficients.argmax(1).tolist() == [1, 3]
    assert found.report.row(found.report.chosen).score < 0.05 * found.report.row("profile").score


def test_a_group_without_leaves_is_named() -> None:
    with pytest.raises(MismatchError, match="encoder"):
        lcsc.search(TREES, loss, groups=("encoder", "*"))


# Meshes


def place(one: dict[str, Any], mesh: jax.sharding.Mesh, w: PartitionSpec, a: PartitionSpec) -> dict[str, Any]:
    return {
        "z": {"w": jax.device_put(one["z"]["w"], NamedSharding(mesh, w))},
        "a": jax.device_put(one["a"], NamedSharding(mesh, a)),
    }


def plain_loss(params: Any, key: jax.Array) -> jax.Array:
    noise = 0.01 * jax.random.normal(key, ())
    return ((params["z"]["w"] - 0.3) ** 2).mean() + (params["a"] ** 2).mean() + noise


LAYOUTS = {
    "over model": (PartitionSpec(None, "model"), PartitionSpec("model")),
    "over data too": (PartitionSpec("data", "model"), PartitionSpec(("data", "model"))),
    "whole": (PartitionSpec(), PartitionSpec()),
}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("placement", ["device", "host"])
def test_candidates_are_spread_over_the_data_axis_and_weights_over_the_others(
    kind: str, layout: str, placement: Any
) -> None:
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
    placed = [place(one, mesh, *LAYOUTS[layout]) for one in TREES]
    plain = [{"z": one["z"], "a": one["a"]} for one in TREES]
    spread = lcsc.search(placed, plain_loss, mesh=mesh, placement=placement, memory_bytes=1, **HOW)
    alone = lcsc.search(plain, plain_loss, **HOW)
    np.testing.assert_allclose(spread.report.fitness, alone.report.fitness, rtol=1e-4)
    assert spread.params["a"].sharding == placed[0]["a"].sharding


def test_parameters_on_one_device_are_searched_on_all(mesh_4x2: jax.sharding.Mesh) -> None:
    plain = [{"z": one["z"], "a": one["a"]} for one in TREES]
    spread = lcsc.search(plain, plain_loss, mesh=mesh_4x2, **HOW)
    np.testing.assert_allclose(spread.report.fitness, lcsc.search(plain, plain_loss, **HOW).report.fitness, rtol=1e-4)
    with pytest.raises(InvalidArgumentError, match="population is 6, and the candidates are spread over 4"):
        lcsc.search(plain, plain_loss, mesh=mesh_4x2, population=6)
    with pytest.raises(InvalidArgumentError, match="axis is 'batch'; the mesh has"):
        lcsc.search(plain, plain_loss, mesh=mesh_4x2, axis="batch")


def test_what_fits_half_of_the_free_memory_is_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [jnp.zeros(1000)]
    monkeypatch.setattr("jaxckpt.lcsc.load.host_free_bytes", lambda: 8000 * K)
    assert _choose(leaves, K) == "device"
    assert _choose(leaves, K + 1) == "stream"


def test_chunks_divide_the_population() -> None:
    assert [chunk_of(16, 10, memory) for memory in (1, 40, 79, 1000)] == [1, 4, 4, 16]
    assert chunk_of(16, 10, 1, 4) == 4


# LoRA


def adapters(seed: int, rank: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "layer": {
            "lora_b": jnp.asarray(rng.normal(size=(3, rank, 5)), jnp.float32),
            "lora_a": jnp.asarray(rng.normal(size=(3, 6, rank)), jnp.float32),
        },
        "scale": jnp.ones(4),
    }


ADAPTERS = [adapters(k) for k in range(K)]


def products(params: Any) -> jax.Array:
    return params["layer"]["lora_a"] @ params["layer"]["lora_b"]


GIVEN = np.array([0.5, -0.2, 0.3, 0.1, 0.3])
WANTED = sum(a * np.asarray(products(one), np.float64) for a, one in zip(GIVEN, ADAPTERS, strict=True))


def near(params: Any, key: jax.Array) -> jax.Array:
    return ((products(params) - jnp.asarray(WANTED, jnp.float32)) ** 2).sum()


def test_exact_products_are_the_sum_of_products() -> None:
    form = make_form(ADAPTERS[0], Space(count=K), lcsc.Lora(rank="exact"))
    stacked = [jnp.stack(leaves) for leaves in zip(*map(jax.tree.leaves, ADAPTERS), strict=True)]
    made = form.tree([leaf[0] for leaf in merge(stacked, jnp.asarray(GIVEN, jnp.float32)[None, None], form)])
    assert made["layer"]["lora_a"].shape == (3, 6, 2 * K)
    np.testing.assert_allclose(products(made), WANTED, atol=1e-5)


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("rank", [1, 2, 5, 7])
def test_cut_products_are_the_nearest_of_their_rank(xp: Any, rank: int) -> None:
    left, right = (xp.stack([xp.asarray(one["layer"][name]) for one in ADAPTERS]) for name in ("lora_a", "lora_b"))
    a, b = product(left, right, xp.asarray(GIVEN, xp.float32)[None], rank)
    assert a.shape == (1, 3, 6, rank)
    assert b.shape == (1, 3, rank, 5)
    u, s, v = np.linalg.svd(WANTED, full_matrices=False)
    nearest = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    np.testing.assert_allclose(np.asarray(a @ b)[0], nearest, atol=1e-4)


@pytest.mark.parametrize("placement", ["device", "host"])
def test_products_reach_what_factors_cannot(placement: Any) -> None:
    how: dict[str, Any] = {"budget": 807, "scale": 0.2, "placement": placement, "l1_penalty": 0.0}
    exact = lcsc.search(ADAPTERS, near, lora=lcsc.Lora(rank="exact"), **how)
    factors = lcsc.search(ADAPTERS, near, lora=lcsc.Lora(space="factors"), **how)
    assert exact.report.row(exact.report.chosen).score < 0.05 * factors.report.row(factors.report.chosen).score
    np.testing.assert_allclose(exact.coefficients, GIVEN, atol=0.05)
    again = sum(a * np.asarray(products(one)) for a, one in zip(exact.coefficients, ADAPTERS, strict=True))
    np.testing.assert_allclose(products(exact.params), again, atol=1e-4)
    np.testing.assert_allclose(exact.params["scale"], np.ones(4), rtol=1e-6)


def test_cut_products_keep_the_form_and_are_what_was_scored() -> None:
    found = lcsc.search(ADAPTERS, near, lora=lcsc.Lora(), budget=407, l1_penalty=0.0)
    assert jax.tree.map(jnp.shape, found.params) == jax.tree.map(jnp.shape, ADAPTERS[0])
    chosen = found.report.row(found.report.chosen)
    assert float(near(found.params, jax.random.key(0))) == pytest.approx(chosen.score, rel=1e-4)


def test_groups_and_bfloat16_go_with_products() -> None:
    half = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), one) for one in ADAPTERS]

    def score(params: Any, key: jax.Array) -> Any:
        return near(jax.tree.map(lambda x: x.astype(jnp.float32), params), key)

    found = lcsc.search(half, score, lora=lcsc.Lora(), groups=("layer", "*"), budget=15 + 32)
    assert found.params["layer"]["lora_a"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (lambda: lcsc.Lora(pairs={"*.down": "*.up"}), "no leaf matches"),
        (lambda: lcsc.Lora(pairs={"*lora_a": "*lora_c"}), 'no right factor "layer.lora_c"'),
        (lambda: lcsc.Lora(pairs={"*lora_b": "*lora_a"}), r"they are \[..., d, r\] and \[..., r, n\]"),
        (lambda: lcsc.Lora(pairs={"*a*": "*"}), "one \\* at most"),
        (lambda: lcsc.Lora(rank=0), "lora.rank is 0"),
    ],
)
def test_wrong_pairs_are_named(lora: Callable[[], lcsc.Lora], said: str) -> None:
    with pytest.raises((MismatchError, InvalidArgumentError), match=said):
        lcsc.search(ADAPTERS, near, lora=lora())


def test_products_are_not_streamed() -> None:
    with pytest.raises(InvalidArgumentError, match="LoRA"):
        lcsc.search(ADAPTERS, near, lora=lcsc.Lora(), placement="stream")


# What a caller gets wrong


@pytest.mark.parametrize(
    ("checkpoints", "said"),
    [
        ([], "checkpoints has 0"),
        ([TREES[0]], "checkpoints has 1"),
        (TREES[0], "checkpoints is a dict"),
        ([TREES[0], {"a": TREES[0]["a"]}], "not in tree 1"),
        ([{"a": jnp.ones(3)}, {"a": jnp.ones(4)}], r'"a" is \(3,\) float32 in tree 0'),
        ([{"n": jnp.arange(3)}, {"n": jnp.arange(3)}], "no floating leaf"),
    ],
)
def test_wrong_checkpoints_are_named(checkpoints: Any, said: str) -> None:
    with pytest.raises((InvalidArgumentError, MismatchError), match=said):
        lcsc.search(checkpoints, plain_loss)


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (lambda p, key: p["a"], r"an array of shape \[8\]"),
        (lambda p, key: (p["a"].sum(), {}), "gave a tuple"),
        (lambda p, key: None, "gave a NoneType"),
    ],
)
def test_an_objective_that_gives_no_number_is_named(objective: Any, said: str, jit: bool) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        lcsc.search(TREES, objective, jit=jit)


@pytest.mark.parametrize("strategy", sorted({*lcsc.names()} - {"gradient"}))
def test_candidates_that_are_not_finite_stop_no_strategy(strategy: str) -> None:
    # Half of all candidates fail.
    def sometimes(params: Any, key: jax.Array) -> Any:
        value = plain_loss(params, key)
        return jnp.where(params["a"][0] > MIDDLE, jnp.nan, value)

    found = lcsc.search(TREES, sometimes, strategy=strategy, budget=15 + 5 * 8, population=8, scale=0.1)
    assert np.isfinite(found.report.path).all()
    assert np.isfinite(found.report.row(found.report.chosen).score)
