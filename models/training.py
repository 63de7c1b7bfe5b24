"""Training as pure functions over one tree: parameters, optimizer state, step and random key."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from models.llama import Llama, LlamaConfig
from models.sharding import shardings_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax.sharding import Mesh

    TrainStep = Callable[["TrainState", jax.Array], tuple["TrainState", jax.Array]]

PyTree = Any


class TrainState(NamedTuple):
    """All that training needs to go on as if it had never stopped."""

    params: nnx.State
    opt_state: PyTree
    step: jax.Array  # int32, the number of updates done
    key: jax.Array  # typed PRNG key of the next step


def init_state(config: LlamaConfig, mesh: Mesh, *, seed: int = 0, fsdp: bool = False) -> TrainState:
    """A fresh state, made on the devices where it belongs."""
    return _init(config, mesh, fsdp)(jax.random.key(seed))


def abstract_state(config: LlamaConfig, mesh: Mesh, *, fsdp: bool = False) -> TrainState:
    """The same tree of ShapeDtypeStructs with shardings on ``mesh``; computes and allocates nothing."""
    shapes = _shapes(config)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings_of(shapes, mesh, fsdp=fsdp),
    )


def train_step(config: LlamaConfig, mesh: Mesh, *, fsdp: bool = False) -> TrainStep:
    """The jitted update ``(state, tokens) -> (state, loss)`` of a model. The given state is donated.

    ``tokens`` is (batch, length + 1) int32: each token is predicted from those before it.
    """
    return _train_step(config, mesh, fsdp)


def eval_loss(config: LlamaConfig) -> Callable[[nnx.State, jax.Array], jax.Array]:
    """The jitted ``(params, tokens) -> loss`` without dropout."""
    return _eval_loss(config)


def param_count(config: LlamaConfig) -> int:
    """Number of parameters; allocates nothing."""
    return sum(leaf.size for leaf in jax.tree.leaves(_shapes(config).params))


def make_optimizer() -> optax.GradientTransformation:
    """AdamW with clipping and a short linear warm-up."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.linear_schedule(1e-4, 1e-3, 20), b2=0.95, weight_decay=0.01),
    )


@lru_cache(maxsize=8)
def _init(config: LlamaConfig, mesh: Mesh, fsdp: bool) -> Callable[[jax.Array], TrainState]:
    shardings = shardings_of(_shapes(config), mesh, fsdp=fsdp)
    return jax.jit(lambda key: _new_state(config, key), out_shardings=shardings)


@lru_cache(maxsize=8)
def _train_step(config: LlamaConfig, mesh: Mesh, fsdp: bool) -> TrainStep:
    optimizer = make_optimizer()
    graph = _graph(config)

    def step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
        key, dropout_key = jax.random.split(state.key)
        loss, grads = jax.value_and_grad(lambda params: _loss(graph, params, tokens, dropout_key))(state.params)
        # Optax counts on standard promotion (int32 steps times weak floats); the model above does not.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = cast("nnx.State", optax.apply_updates(state.params, updates))
        return TrainState(params=params, opt_state=opt_state, step=state.step + 1, key=key), loss

    # The new state lies as the old one did: left to itself XLA may choose otherwise, and compile again for the result.
    shardings = shardings_of(_shapes(config), mesh, fsdp=fsdp)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))


@lru_cache(maxsize=8)
def _eval_loss(config: LlamaConfig) -> Callable[[nnx.State, jax.Array], jax.Array]:
    graph = _graph(config)
    return jax.jit(lambda params, tokens: _loss(graph, params, tokens, None))


def _loss(graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
    logits = nnx.merge(graph, params)(tokens[:, :-1], dropout_key=dropout_key)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


def _new_state(config: LlamaConfig, key: jax.Array) -> TrainState:
    params_key, train_key = jax.random.split(key)
    params = nnx.state(Llama(config, rngs=nnx.Rngs(params=params_key)), nnx.Param)
    return TrainState(
        params=params, opt_state=make_optimizer().init(params), step=jnp.zeros((), jnp.int32), key=train_key
    )


@lru_cache(maxsize=8)
def _shapes(config: LlamaConfig) -> TrainState:
    return jax.eval_shape(lambda: _new_state(config, jax.random.key(0)))


def _graph(config: LlamaConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(params=0))))
