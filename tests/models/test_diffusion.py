"""The diffusion model: it learns digits, and its samplers solve the equation they name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import diffusion, images
from models.diffusion import DenoiserConfig, Solver

SMALL = DenoiserConfig(side=8, width=32, blocks=2)


def test_loss_falls_on_digits() -> None:
    pixels = jnp.asarray(images.load("digits").train.pixels)
    advance = diffusion.train(SMALL, batch=32, steps=50)
    state, first = advance(diffusion.new_state(SMALL), pixels)
    for _ in range(5):
        state, last = advance(state, pixels)
    assert int(state.step) == 300
    assert float(last) < 0.9 * float(first)


@pytest.mark.parametrize("solver", diffusion.SOLVERS)
@pytest.mark.parametrize("nfe", [1, 2, 9])
def test_samples_are_finite_images(solver: Solver, nfe: int) -> None:
    params = diffusion.new_state(SMALL).params
    found = diffusion.sample(SMALL, params, jax.random.key(0), count=3, nfe=nfe, solver=solver)
    assert found.shape == (3, 8, 8)
    assert found.dtype == jnp.float32
    assert bool(jnp.isfinite(found).all())


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(ValueError, match="euler"):
        diffusion.sample(SMALL, diffusion.new_state(SMALL).params, jax.random.key(0), count=1, nfe=4, solver="euler")  # pyright: ignore


def test_ddim_is_the_product_of_its_steps() -> None:
    """A fresh network answers zero: the denoiser is that of Gaussian data, x * skip, and each step a factor."""
    sigmas = [*diffusion.levels(SMALL, 7), 0.0]
    factor = 1.0
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        skip = SMALL.data_std**2 / (now**2 + SMALL.data_std**2)
        factor *= then / now + (1 - then / now) * skip
    np.testing.assert_allclose(sampled(7, "ddim"), factor * noise(), rtol=1e-3)


def test_the_second_order_solver_is_nearer_to_the_exact_solution() -> None:
    exact = noise() * SMALL.data_std / np.sqrt(SMALL.highest**2 + SMALL.data_std**2)
    error = {solver: np.abs(sampled(24, solver) / exact - 1).max() for solver in diffusion.SOLVERS}
    assert error["dpm++"] < 0.03
    assert error["dpm++"] < error["ddim"] / 3


def test_levels_go_from_the_highest_to_the_lowest() -> None:
    found = diffusion.levels(SMALL, 9)
    assert found[[0, -1]] == pytest.approx([SMALL.highest, SMALL.lowest])
    assert (np.diff(found) < 0).all()


def sampled(nfe: int, solver: Solver) -> np.ndarray:
    params = diffusion.new_state(SMALL).params
    return np.asarray(diffusion.sample(SMALL, params, jax.random.key(3), count=2, nfe=nfe, solver=solver))


def noise() -> np.ndarray:
    return SMALL.highest * np.asarray(jax.random.normal(jax.random.key(3), (2, 8, 8)))
