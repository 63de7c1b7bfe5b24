"""The weighted average is the rounded one of exact arithmetic, also where neighbours cancel, overflow, or are tiny."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxckpt.recovery.combine import neighbour_weights, weighted_average

NORMS = ((0.3, 1.7), (1e-3, 7.0), (1.0, 1.0), (123.4, 122.9))
average = jax.jit(lambda x, y, a, b, power: weighted_average(x, y, *neighbour_weights(a, b, power)), static_argnums=4)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e30, 1e38])
@pytest.mark.parametrize("norms", NORMS)
def test_average_is_within_one_ulp(norms: tuple[float, float], size: float, power: int) -> None:
    left, right = np.random.default_rng(0).normal(size=(2, 20_000)).clip(-3, 3).astype(np.float32) * np.float32(size)
    a, b = np.float32(norms).astype(np.longdouble) ** power
    cancelled = (-left * np.float64(a / b) * (1 + 1e-3 * right / size)).astype(np.float32)
    for other in (right, cancelled[np.isfinite(cancelled)]):
        mine = left[: other.size] if other is right else left[np.isfinite(cancelled)]
        want = ((a * mine.astype(np.longdouble) + b * other.astype(np.longdouble)) / (a + b)).astype(np.float32)
        have = np.asarray(average(mine, other, *np.float32(norms), power))
        assert np.isfinite(have).all()
        terms = (a * np.abs(mine) + b * np.abs(other)) / (a + b) * 2.0**-46  # matters where they cancel
        assert np.all(np.abs(have.astype(np.longdouble) - want) <= np.spacing(np.abs(want)) + terms)


def test_a_neighbour_without_weight_is_not_used() -> None:
    left, right = np.float32([1.0, -2.0]), np.float32([np.inf, np.nan])
    np.testing.assert_array_equal(average(left, right, np.float32(0.5), np.float32(0.0), 1), left)
    np.testing.assert_array_equal(average(right, left, np.float32(0.0), np.float32(0.5), 2), left)
