"""The consistency model: the input is the output at the lowest level, it learns with and without a teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import consistency, diffusion, images
from models.diffusion import DenoiserConfig

SMALL = DenoiserConfig(side=8, width=32, blocks=2)


@pytest.mark.parametrize("is_distilled", [True, False])
def test_loss_falls(is_distilled: bool) -> None:
    pixels = jnp.asarray(images.load("digits").train.pixels)
    teacher = diffusion.new_state(SMALL).params if is_distilled else None
    advance = consistency.train(SMALL, batch=32, steps=40)
    state, first = advance(diffusion.new_state(SMALL, seed=1), pixels, teacher)
    for _ in range(5):
        state, last = advance(state, pixels, teacher)
    assert int(state.step) == 240
    assert float(last) < float(first)


def test_the_output_at_the_lowest_level_is_the_input() -> None:
    pixels = jax.random.normal(jax.random.key(0), (4, 8, 8))
    params = perturbed()
    same = consistency.consistency(SMALL, params, pixels, jnp.float32(SMALL.lowest))
    np.testing.assert_allclose(same, pixels, rtol=1e-5)
    other = consistency.consistency(SMALL, params, pixels, jnp.float32(1.0))
    assert float(jnp.abs(other - pixels).max()) > 0.1


def test_one_evaluation_is_the_function_of_noise_and_each_level_adds_one() -> None:
    key, params = jax.random.key(5), perturbed()
    once = consistency.sample(SMALL, params, key, count=3)
    noise = SMALL.highest * jax.random.normal(jax.random.split(key, 1)[0], (3, 8, 8))
    np.testing.assert_allclose(
        once, consistency.consistency(SMALL, params, noise, jnp.float32(SMALL.highest)), rtol=1e-5, atol=1e-6
    )
    twice = consistency.sample(SMALL, params, key, count=3, middle=(0.8,))
    assert twice.shape == once.shape
    assert float(jnp.abs(twice - once).max()) > 1e-3


def test_heun_follows_the_exact_path_of_gaussian_data() -> None:
    """A fresh network answers zero, which is the denoiser of Gaussian data; its path is known."""
    x, high, low = jnp.ones((1, 8, 8)), jnp.full((1, 1, 1), 1.0), jnp.full((1, 1, 1), 0.8)
    found = consistency.heun(SMALL, diffusion.new_state(SMALL).params, x, high, low)
    exact = np.sqrt((0.8**2 + SMALL.data_std**2) / (1 + SMALL.data_std**2))
    np.testing.assert_allclose(found, np.full((1, 8, 8), exact), rtol=1e-3)


def perturbed() -> diffusion.nnx.State:
    params = diffusion.new_state(SMALL).params
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
