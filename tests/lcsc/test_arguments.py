"""Claims about the arguments of a search: what is understood, and what is refused with the next step named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxckpt.core.errors import InvalidArgumentError, MismatchError
from jaxckpt.lcsc.search import search
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
