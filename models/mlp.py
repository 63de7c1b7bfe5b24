"""A small classifier in Flax Linen, with its parameters boxed for a mesh with the axes "data" and "model"."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState


class Classifier(nn.Module):
    """Images (b, pixels) to logits (b, classes), float32. The hidden layer is split over "model"."""

    hidden: int = 64
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.lecun_normal()
        x = nn.relu(nn.Dense(self.hidden, kernel_init=nn.with_partitioning(init, (None, "model")))(x))
        return nn.Dense(self.classes, kernel_init=nn.with_partitioning(init, ("model", None)))(x)


def new_state(model: Classifier, pixels: int, *, seed: int = 0) -> TrainState:
    params = model.init(jax.random.key(seed), jnp.ones((1, pixels)))["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(3e-3))


@jax.jit
def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
    def loss_of(params: dict) -> jax.Array:
        logits = state.apply_fn({"params": params}, images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        loss, grads = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads), loss


@jax.jit
def accuracy(state: TrainState, images: jax.Array, labels: jax.Array) -> jax.Array:
    with jax.numpy_rank_promotion("allow"):
        return jnp.mean(state.apply_fn({"params": state.params}, images).argmax(-1) == labels)
