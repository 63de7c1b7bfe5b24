"""Post-hoc EMA while training: rates at late steps, and states that know their profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt.averaging import posthoc

if TYPE_CHECKING:
    from pathlib import Path

SIGMAS = (0.1, 0.2, 0.28)


@pytest.mark.parametrize("t", [1, 2, 10, 1000, 300_000, 1_000_000, 5_000_000, 2**24])
def test_rates_are_those_of_float64(t: int) -> None:
    state = posthoc.init({"w": jnp.float32(0)}, SIGMAS)._replace(count=jnp.int32(t - 1))
    for update in (posthoc.update, jax.jit(posthoc.update)):
        found = [float(one["w"]) for one in update(state, {"w": jnp.float32(1)}).averages]
        expected = [1.0] * 3
        if t > 1:
            expected = [-np.expm1((posthoc.gamma_of(sigma) + 1) * np.log1p(-1 / t)) for sigma in SIGMAS]
        assert found == pytest.approx(expected, rel=1e-6)


def track(state: posthoc.PowerEmaState, values: np.ndarray) -> posthoc.PowerEmaState:
    update = jax.jit(posthoc.update, donate_argnums=0)
    for x in values:
        state = update(state, {"w": jnp.float32(x)})
    return state


@pytest.mark.parametrize("sigmas", [(0.07,), (0.1, 0.2), SIGMAS])
def test_a_state_tracks_the_profiles_that_it_was_made_for(sigmas: tuple[float, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(60)
    state = track(posthoc.init({"w": jnp.float32(0)}, sigmas), values)
    for sigma, gamma, found in zip(sigmas, state.gammas, state.averages, strict=True):
        assert posthoc.sigma_of(float(gamma)) == pytest.approx(sigma, rel=1e-5)
        # One checkpoint a step: the profile over them is the average that the recursion keeps.
        expected = posthoc.power_weights(range(1, 61), sigma) @ values
        assert float(found["w"]) == pytest.approx(expected, abs=1e-5)


def test_a_saved_state_goes_on_with_its_profiles(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(20)
    whole = track(posthoc.init({"w": jnp.float32(0)}, SIGMAS[:2]), values)
    jc.save(tmp_path / "state", track(posthoc.init({"w": jnp.float32(0)}, SIGMAS[:2]), values[:10]))
    for like in (posthoc.init({"w": jnp.float32(0)}), None):  # made for other profiles: those saved count
        found = track(jc.restore(tmp_path / "state", like), values[10:])
        assert jax.tree.map(float, found.averages) == jax.tree.map(float, whole.averages)


class PowerEmaState(NamedTuple):
    """As it was before it had ``gammas``."""

    count: jax.Array
    averages: tuple[Any, ...]


def test_a_state_saved_before_states_had_profiles_is_restored_with_those_given(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(20)
    start = lambda: posthoc.init({"w": jnp.float32(0)}, SIGMAS[:2])  # noqa: E731
    half = track(start(), values[:10])
    jc.save(tmp_path / "old", PowerEmaState(half.count, half.averages))
    with pytest.raises(jc.MismatchError, match="gammas"):
        jc.restore(tmp_path / "old", start())
    found = track(jc.restore(tmp_path / "old", start(), partial=True), values[10:])
    whole = track(start(), values)
    assert jax.tree.map(float, found.averages) == jax.tree.map(float, whole.averages)
