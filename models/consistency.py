"""Consistency models: images from noise in one evaluation of the network; distilled from diffusion, or trained alone.

Song et al., "Consistency Models", arXiv 2303.01469 (algorithms 1 to 3), with the loss and the weighting of Song and
Dhariwal, "Improved Techniques for Training Consistency Models", arXiv 2310.14189. The network is that of
``models.diffusion``: its output at the lowest noise level is its input, so a diffusion model's parameters may start it.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from models.diffusion import denoise, levels, updates

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flax import nnx

    from models.diffusion import DenoiserConfig, TrainState

LEVELS = 40  # noise levels between which consistency is asked for
MIDDLE = (0.8,)  # levels to which the images of one evaluation are noised again for the next


def train(
    config: DenoiserConfig,
    *,
    batch: int = 128,
    learning_rate: float = 1e-3,
    steps: int = 1,
    count: int = LEVELS,
) -> Callable[[TrainState, jax.Array, nnx.State | None], tuple[TrainState, jax.Array]]:
    """A jitted ``(state, images, teacher) -> (state, loss)`` that does ``steps`` updates; donates the state.

    ``teacher`` is a diffusion model's parameters to distill; None: consistency training, which needs no teacher.

    Args:
        config: of the network.
        batch: images of an update.
        learning_rate: of Adam; constant.
        steps: updates of one call.
        count: noise levels.
    """
    return _train(config, batch, learning_rate, steps, count)


def loss(
    config: DenoiserConfig,
    count: int,
    params: nnx.State,
    images: jax.Array,
    key: jax.Array,
    teacher: nnx.State | None = None,
) -> jax.Array:
    """How far the outputs at two neighbouring noise levels of one path are apart (pseudo-Huber, 2310.14189 3.3).

    The path is the teacher's ODE, by one step of Heun's method; without a teacher, the straight line to the image.
    """
    sigmas = jnp.asarray(levels(config, count)[::-1], jnp.float32)
    level_key, noise_key = jax.random.split(key)
    place = jax.random.categorical(level_key, _log_chances(sigmas), shape=(len(images),))
    low, high = (sigmas[place + k][:, None, None] for k in (0, 1))
    noise = jax.random.normal(noise_key, images.shape)
    far = images + high * noise
    near = images + low * noise if teacher is None else heun(config, teacher, far, high, low)
    found = consistency(config, params, far, high[:, 0, 0])
    wanted = jax.lax.stop_gradient(consistency(config, params, near, low[:, 0, 0]))
    width = 0.00054 * config.pixels**0.5
    apart = jnp.sqrt(((found - wanted) ** 2).sum((1, 2)) + width**2) - width
    return (apart / (high - low)[:, 0, 0]).mean()


def consistency(config: DenoiserConfig, params: nnx.State, noisy: jax.Array, sigma: jax.Array) -> jax.Array:
    """The clean images (b, s, s) that noisy ones lead to; at the lowest level, they themselves."""
    return denoise(config, params, noisy, sigma, boundary=config.lowest)


def heun(config: DenoiserConfig, teacher: nnx.State, noisy: jax.Array, high: jax.Array, low: jax.Array) -> jax.Array:
    """One step along the teacher's ODE, from levels ``high`` to ``low``, both (b, 1, 1)."""
    slope = (noisy - denoise(config, teacher, noisy, high[:, 0, 0])) / high
    guess = noisy + (low - high) * slope
    other = (guess - denoise(config, teacher, guess, low[:, 0, 0])) / low
    return noisy + (low - high) * (slope + other) / 2


def sample(
    config: DenoiserConfig, params: nnx.State, key: jax.Array, *, count: int, middle: Sequence[float] = ()
) -> jax.Array:
    """Images (count, s, s) from noise: one evaluation, and one more for each level of ``middle`` (algorithm 1)."""
    keys = jax.random.split(key, 1 + len(middle))
    shape = (count, config.side, config.side)
    x = consistency(config, params, config.highest * jax.random.normal(keys[0], shape), jnp.float32(config.highest))
    for again, sigma in zip(keys[1:], middle, strict=True):
        extra = (sigma**2 - config.lowest**2) ** 0.5
        x = consistency(config, params, x + extra * jax.random.normal(again, shape), jnp.float32(sigma))
    return x


def _log_chances(sigmas: jax.Array) -> jax.Array:
    """Of each pair of neighbouring levels: a normal distribution of their logarithm (2310.14189 section 3.4)."""
    mean, std = -1.1, 2.0
    below = jax.scipy.special.erf((jnp.log(sigmas) - mean) / (std * 2**0.5))
    return jnp.log(below[1:] - below[:-1])


@lru_cache(maxsize=8)
def _train(config: DenoiserConfig, batch: int, learning_rate: float, steps: int, count: int) -> Any:
    return updates(partial(loss, config, count), batch=batch, learning_rate=learning_rate, steps=steps)
