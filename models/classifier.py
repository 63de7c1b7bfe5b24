"""A small image classifier; its features feed the Fréchet distance where Inception's would have to be downloaded.

Distances with other features than Inception's are no FID: name the features with every figure.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from models.images import CLASSES

if TYPE_CHECKING:
    from collections.abc import Callable

    from models.images import Part

FEATURES = 32


class Classifier(nnx.Module):
    """Images (b, s, s) to logits (b, classes); ``features`` (b, 32) are those before the last layer."""

    def __init__(self, side: int, *, width: int = 128, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(side * side, width, rngs=rngs)
        self.second = nnx.Linear(width, FEATURES, rngs=rngs)
        self.last = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def features(self, pixels: jax.Array) -> jax.Array:
        hidden = nnx.relu(self.first(pixels.reshape(len(pixels), -1)))
        return nnx.relu(self.second(hidden))

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.last(self.features(pixels))


def train(part: Part, *, seed: int = 0, steps: int = 1_000, batch: int = 128, learning_rate: float = 1e-3) -> nnx.State:
    """Parameters after AdamW on noisy copies of the images; a function of its arguments alone."""
    pixels, labels = jnp.asarray(part.pixels), jnp.asarray(part.labels)
    side = part.pixels.shape[1]
    params = nnx.state(Classifier(side, rngs=nnx.Rngs(params=seed)), nnx.Param)
    optimizer = optax.adamw(learning_rate, weight_decay=1e-2)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        rows, noise = jax.random.split(key)
        chosen = jax.random.randint(rows, (batch,), 0, len(pixels))
        noisy = pixels[chosen] + 0.2 * jax.random.normal(noise, (batch, side, side))
        return optax.softmax_cross_entropy_with_integer_labels(_call(side, params, noisy), labels[chosen]).mean()

    def step(state: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
        slopes = jax.grad(loss)(state[0], key)
        with jax.numpy_dtype_promotion("standard"):
            change, opt_state = optimizer.update(slopes, state[1], state[0])
            return (optax.apply_updates(state[0], change), opt_state), None

    keys = jax.random.split(jax.random.key(seed + 1), steps)
    start = (params, optimizer.init(cast("Any", params)))
    return jax.jit(lambda: jax.lax.scan(step, start, keys)[0][0])()


def features(side: int, params: nnx.State) -> Callable[[jax.Array], jax.Array]:
    """``images (n, s, s) -> (n, 32)``, for ``lcsc.metrics.frechet_distance``."""
    return partial(_features, side, params)


def accuracy(params: nnx.State, part: Part) -> float:
    """The part of the images that it names rightly."""
    logits = _call(part.pixels.shape[1], params, jnp.asarray(part.pixels))
    return float((logits.argmax(-1) == jnp.asarray(part.labels)).mean())


def _features(side: int, params: nnx.State, pixels: jax.Array) -> jax.Array:
    return cast("Classifier", nnx.merge(_graph(side), params)).features(pixels)


def _call(side: int, params: nnx.State, pixels: jax.Array) -> jax.Array:
    return nnx.merge(_graph(side), params)(pixels)


@lru_cache(maxsize=8)
def _graph(side: int) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Classifier(side, rngs=nnx.Rngs(params=0))))
