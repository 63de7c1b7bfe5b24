"""Claims about the arguments of a search: what is understood, and what is refused with the next step named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxckpt.core.errors import InvalidArgumentError, MismatchError
from jaxckpt.lcsc.search import search
from jaxckpt.lcsc.space import Space
from jaxckpt.lcsc.strategies import ALIASES, _bare, canonical, names

if TYPE_CHECKING:
    from pathlib import Path

K = 6
TREES = [{"a": {"w": jnp.full((3, 2), float(i))}, "b": jnp.arange(4.0) * i} for i in range(K)]


def loss(params: Any, key: jax.Array) -> jax.Array:
    noise = 1 + 0.01 * jax.random.normal(key, ())
    return noise * (((params["a"]["w"] - 1.5) ** 2).sum() + ((params["b"] - 1.5) ** 2).sum())


ALSO = {  # what strategies are called elsewhere
    "CMA-ES": "cma_es",
    "CMAES": "cma_es",
    "DE": "differentialevolution",
    "Differential Evolution": "differentialevolution",
    "GA": "simplega",
    "SimpleGA": "simplega",
    "Open-ES": "open_es",
    "OpenAI-ES": "open_es",
    "particle_swarm": "pso",
    "PSO": "pso",
    "Sep-CMA-ES": "sep_cma_es",
    "random search": "random",
    "RandomSearch": "random",
    "LCSC": "evolution",
    "Gradient": "gradient",
}


SEEDS = [3, np.int64(3), np.uint8(3), jnp.int32(3)]
KEYS = [jax.random.key(3), jax.random.PRNGKey(3), np.array([0, 3], np.uint32)]


def test_a_key_may_be_a_seed_a_typed_key_or_an_older_one() -> None:
    found = [search(TREES, loss, strategy="random", budget=31, key=key) for key in (*SEEDS, *KEYS)]
    for one in found[1:]:
        assert one.report.fitness.tobytes() == found[0].report.fitness.tobytes()
        assert one.coefficients.tobytes() == found[0].coefficients.tobytes()
        assert one.report.settings["key"] == [0, 3]
    assert [one.report.settings["seed"] for one in found] == [3, 3, 3, 3, None, None, None]


def test_a_key_may_be_split_folded_or_of_another_generator() -> None:
    first, second = jax.random.split(jax.random.key(0))
    keys = [first, second, jax.random.fold_in(first, 1), jax.random.key(0, impl="rbg")]
    seen = {search(TREES, loss, strategy="random", budget=31, key=key).report.fitness.tobytes() for key in keys}
    assert len(seen) == len(keys)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("a", "key is 'a'"),
        (1.5, "key is 1.5"),
        (None, "key is None"),
        (True, "key is True"),
        (2**70, "an integer seed of at most 64 bits"),
        (jnp.float32(1), r"key is float32\[\]"),
        (jax.random.split(jax.random.key(0)), r"key is key<fry>\[2\]; give one key"),
        (jax.random.split(jax.random.PRNGKey(0), 3), r"key is uint32\[3, 2\]; give one key"),
        (np.zeros(3, np.uint32), r"key is uint32\[3\]"),
        (np.zeros(2, np.int32), r"key is int32\[2\]"),
    ],
)
def test_what_is_no_key_is_an_error(key: Any, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        search(TREES, loss, key=key)


@pytest.mark.parametrize("name", ALSO)
def test_strategies_are_known_by_their_usual_names(name: str) -> None:
    assert canonical(name) == ALSO[name]


def test_no_two_strategies_share_a_name() -> None:
    assert [canonical(name) for name in names()] == names()
    assert {_bare(name) for name in names()}.isdisjoint(ALIASES)
    assert set(ALIASES.values()) <= set(names())
    assert [_bare(alias) for alias in ALIASES] == list(ALIASES)


def test_a_strategy_is_recorded_by_its_own_name(tmp_path: Path) -> None:
    how: dict[str, Any] = {"budget": 31, "state": str(tmp_path / "s")}
    assert search(TREES, loss, strategy="random search", **how).report.settings["strategy"] == "random"
    search(TREES, loss, strategy="random", **how)  # the same search


NEAR = [("CMAS-ES", "cma_es"), ("evolutoin", "evolution"), ("simple ge", "simplega")]


@pytest.mark.parametrize(("name", "near"), NEAR)
def test_an_unknown_strategy_is_told_the_nearest(name: str, near: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"is '{name}'; the nearest is '{near}', and there are: ars"):
        canonical(name)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InvalidArgumentError, match="cma_es"):
        search(TREES, loss, strategy="nope")
    with pytest.raises(InvalidArgumentError, match="strategy is None; there are: ars"):
        search(TREES, loss, strategy=None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidArgumentError, match='options are .*"random" has none; leave them out'):
        search(TREES, loss, strategy="random", options={"sigma": 1})
    with pytest.raises(InvalidArgumentError, match=r"options is \[1\]; give a dict"):
        search(TREES, loss, options=[1])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidArgumentError, match="budget is 10"):
        search(TREES, loss, budget=10)
    with pytest.raises(MismatchError, match="No group"):
        search(TREES, loss, groups=("a.*",))
    with pytest.raises(InvalidArgumentError, match="std_init"):
        search(TREES, loss, options={"sigma": 1})


@pytest.mark.parametrize(
    ("name", "value", "least"), [("population", 2.5, 1), ("budget", "x", 1), ("finalists", -1, 0), ("draws", 0, 1)]
)
def test_counts_are_whole_numbers(name: str, value: Any, least: int) -> None:
    how: dict[str, Any] = {name: value}
    with pytest.raises(InvalidArgumentError, match=f"{name} is {value!r}; give a whole number, {least} or more"):
        search(TREES, loss, **how)


def test_a_population_that_a_strategy_does_not_take_is_told_first() -> None:
    def never(params: Any, key: Any) -> Any:
        raise AssertionError("evaluated")

    with pytest.raises(InvalidArgumentError, match="DifferentialEvolution does not take a population of 2 .* >= 4"):
        search(TREES, never, strategy="DE", population=2)


@pytest.mark.parametrize("name", ["l1_penalty", "negative_penalty"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_penalty_is_finite_and_no_reward(name: str, value: float) -> None:
    how: dict[str, Any] = {name: value}
    with pytest.raises(InvalidArgumentError, match=f"{name} is {value}; give a finite number, 0 for none"):
        search(TREES, loss, **how)


def test_a_string_is_one_group(tmp_path: Path) -> None:
    how: dict[str, Any] = {"strategy": "random", "budget": 31, "state": str(tmp_path / "s")}
    one = search(TREES, loss, groups="*", **how)
    listed = search(TREES, loss, groups=["*"], **how)  # the same search
    assert one.coefficients.shape == (K,)
    assert one.report.groups == listed.report.groups == ("*",)
    with pytest.raises(MismatchError, match=r"No group of \['a'\] matches \['b'\]"):
        search(TREES, loss, groups="a")


def test_one_bound_may_be_infinite(tmp_path: Path) -> None:
    for space in ("sum_to_one", "simplex", "free"):
        how: dict[str, Any] = {"strategy": "evolution", "budget": 31, "state": str(tmp_path / space)}
        found = search(TREES, loss, bounds=(0, np.inf), space=space, **how)
        assert found.coefficients.min() >= 0
        found.save(tmp_path / f"{space}-merged")
        again = search(TREES, loss, bounds=(0, np.inf), space=space, **how)  # the same search
        assert again.coefficients.tobytes() == found.coefficients.tobytes()


@pytest.mark.parametrize(
    ("bounds", "as_finite"), [((0, np.inf), (0, 1)), ((-np.inf, 0.5), (-1, 0.5)), ((-np.inf, np.inf), None)]
)
def test_an_infinite_bound_is_as_one_that_is_never_met(bounds: Any, as_finite: Any) -> None:
    count = 4
    y = np.random.default_rng(0).normal(size=(50, count)) * 3
    centre = np.full((1, count), 1 / count)
    one, other = (Space(count=count, bounds=b).coefficients(y, centre) for b in (bounds, as_finite))
    np.testing.assert_allclose(one, other, atol=1e-12)
    np.testing.assert_allclose(one.sum(-1), 1, atol=1e-12)


WRONG = [
    ({"bounds": 0.5}, "bounds is 0.5; give the lowest and the highest"),
    ({"bounds": (1,)}, r"bounds is \(1,\); give the lowest"),
    ({"bounds": ("a", "b")}, r"bounds is \('a', 'b'\)"),
    ({"bounds": (float("nan"), 1)}, r"bounds is \(nan, 1\)"),
    ({"bounds": (0, 0.1)}, r"bounds are \(0.0, 0.1\); no 6 coefficients between them sum to one"),
    ({"scale": "a"}, "scale is 'a'; give a finite number above 0"),
    ({"scale": float("inf")}, "scale is inf; give a finite number"),
    ({"scale": float("nan")}, "scale is nan; give a finite number"),
    ({"lora": "product"}, r"lora is 'product'; give lcsc.Lora\(\)"),
    ({"mesh": "x"}, "mesh is 'x'; give a jax.sharding.Mesh"),
    ({"record": {"v": float("nan")}}, "record is {'v': nan}; give JSON values, and finite numbers"),
    ({"record": {"v": print}}, "record is .*; give JSON values"),
    ({"record": [1]}, r"record is \[1\]; give a dict"),
    ({"objective": None}, r"objective is None; give a function \(params, key\) -> number"),
    ({"guard": "energy"}, "guard is 'energy'; give a function"),
    ({"held_out": 3}, "held_out is 3; give a function"),
    ({"validation": "x"}, "validation is 'x'; give a function"),
    *(
        ({"strategy": "gradient", "options": options}, said)
        for options, said in (
            ({"learning_rate": -1}, "learning_rate=-1.*learning_rate and radius are finite and above 0"),
            ({"learning_rate": float("nan")}, "options is {'learning_rate': nan}; give JSON values, and finite"),
            ({"radius": 0}, "radius=0.*finite and above 0"),
            ({"decay": 0.9}, "decay=0.9.*decay is a pair"),
            ({"decay": (0.9, 1)}, "two numbers from 0 to below 1"),
        )
    ),
]


@pytest.mark.parametrize(("how", "said"), WRONG)
def test_what_is_wrong_is_named_before_anything_is_evaluated(how: dict[str, Any], said: str) -> None:
    def never(params: Any, key: Any) -> Any:
        raise AssertionError("evaluated")

    with pytest.raises(InvalidArgumentError, match=said):
        search(TREES, **{"objective": never, **how})


@pytest.mark.parametrize("name", ["validation", "guard", "held_out"])
@pytest.mark.parametrize("how", [{}, {"jit": False}, {"placement": "host"}, {"placement": "stream"}])
def test_a_metric_that_fails_is_told_before_the_search(name: str, how: dict[str, Any]) -> None:
    def never(params: Any, key: Any) -> Any:
        raise AssertionError("evaluated")

    def fails(params: Any, key: Any) -> Any:
        return params["nope"]

    with pytest.raises(KeyError, match="nope") as caught:
        search(TREES, never, **{name: fails}, **how)
    assert caught.value.__notes__[-1].startswith(f"This is {name} of the search, tried on one average before")


def test_a_metric_is_traced_once_for_the_check_and_the_scores() -> None:
    traced: list[int] = []

    def guard(params: Any, key: jax.Array) -> Any:
        traced.append(1)
        return loss(params, key)

    search(TREES, loss, strategy="random", budget=31, guard=guard)
    assert len(traced) == 1


@pytest.mark.parametrize("how", [{}, {"placement": "host"}, {"placement": "stream"}, {"strategy": "gradient"}])
@pytest.mark.parametrize(
    "objective",
    [
        lambda p, key: float(p["b"][0]),
        lambda p, key: np.mean(np.asarray(p["b"])),
        lambda p, key: 1.0 if p["b"][0] > 0 else 0.0,
        lambda p, key: range(4)[p["b"][0].astype(jnp.int32)],
    ],
)
def test_an_objective_in_python_is_told_of_jit(objective: Any, how: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be compiled.*Give jit=False") as caught:
        search(TREES, objective, **{"strategy": "random", **how})
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize("is_jitted", [True, False])
def test_a_complex_score_is_an_error(is_jitted: bool) -> None:
    with pytest.raises(InvalidArgumentError, match="gave a complex number; it gives a real one"):
        search(TREES, lambda p, key: jax.lax.complex(p["b"].sum(), 1.0), jit=is_jitted, strategy="random")


def test_checkpoints_that_differ_are_told_what_a_search_can_do() -> None:
    others = [TREES[0] | {"c": jnp.ones(1)}, *TREES[1:]]
    with pytest.raises(MismatchError, match=r'"c".*(?s:.*)Nothing was searched. Give only=') as caught:
        search(others, loss)
    assert "missing=" not in str(caught.value)
