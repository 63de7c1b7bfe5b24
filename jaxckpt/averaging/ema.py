"""Exponential moving average of weights while training: float32 shadow, warm-up, debiasing; alone or in an optax chain.

The average is kept in float32 whatever the weights are: in bfloat16, ``(1 - decay) * difference`` rounds to nothing and
the average never moves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt.core.errors import InvalidArgumentError

PyTree = Any


class EmaState(NamedTuple):
    """``average``: float32 where the weights are floating; ``weight``: the part of it that is from updates, float32."""

    count: jax.Array
    weight: jax.Array
    average: PyTree


class Transformation(NamedTuple):
    """``init(params)`` and ``update(updates, state, params)``: what ``optax.chain`` takes."""

    init: Callable[[PyTree], EmaState]
    update: Callable[..., tuple[PyTree, EmaState]]


def init(params: PyTree, *, debias: bool = False) -> EmaState:
    """The state before the first update: the weights themselves, or, with ``debias``, zeros.

    Example:
        >>> state = init({"w": jnp.ones(2)})
        >>> state = update(state, {"w": jnp.zeros(2)}, decay=0.75)
        >>> value(state)["w"].tolist()
        [0.75, 0.75]
    """
    start = jnp.zeros((), jnp.float32) if debias else jnp.ones((), jnp.float32)
    shadow = jax.tree.map(lambda x: _wide(x) * start.astype(_wide(x).dtype) if _is_floating(x) else x, params)
    return EmaState(jnp.zeros((), jnp.int32), start, shadow)


def update(state: EmaState, params: PyTree, *, decay: Any, warm_up: bool = False) -> EmaState:
    """``average <- d * average + (1 - d) * params`` (Polyak and Juditsky 1992 for the idea; Tarvainen and Valpola 2017,
    arXiv 1703.01780, for weights of networks). Integers and other leaves are those of ``params``.

    Args:
        state: of ``init`` or ``update``; may be donated.
        params: the weights after this step, with the structure of the state's.
        decay: d in [0, 1), a number or a traced scalar.
        warm_up: use ``min(d, (1 + n) / (10 + n))`` after n updates, so that early weights are forgotten soon.
    """
    if isinstance(decay, int | float) and not 0 <= decay < 1:
        raise InvalidArgumentError(f"decay is {decay}; it is at least 0 and less than 1.")
    rate = jnp.asarray(decay, jnp.float32)
    if warm_up:
        count = state.count.astype(jnp.float32)
        rate = jnp.minimum(rate, (1 + count) / (10 + count))
    average = jax.tree.map(
        lambda a, x: a + (1 - rate).astype(a.dtype) * (_wide(x) - a) if _is_floating(x) else x, state.average, params
    )
    return EmaState(state.count + 1, state.weight + (1 - rate) * (1 - state.weight), average)


def value(state: EmaState, like: PyTree = None) -> PyTree:
    """The average, divided by the weight that the updates have in it (Kingma and Ba 2015, arXiv 1412.6980, section 3).

    Args:
        state: of ``init`` or ``update``.
        like: a tree whose dtypes the result gets; float32 without.
    """
    scale = jnp.where(state.weight > 0, 1 / jnp.maximum(state.weight, jnp.finfo(jnp.float32).tiny), 1)
    found = jax.tree.map(lambda a: a * scale.astype(a.dtype) if _is_floating(a) else a, state.average)
    return found if like is None else jax.tree.map(lambda a, x: a.astype(x.dtype), found, like)


def transformation(decay: float, *, warm_up: bool = False, debias: bool = False) -> Transformation:
    """The same as the last link of an ``optax.chain``: it passes updates on, and averages ``params + updates``.

    Example:
        >>> chain_link = transformation(0.5)
        >>> params, updates = {"w": jnp.ones(2)}, {"w": -jnp.ones(2)}
        >>> _, state = chain_link.update(updates, chain_link.init(params), params)
        >>> value(state)["w"].tolist()
        [0.5, 0.5]
    """

    def begin(params: PyTree) -> EmaState:
        return init(params, debias=debias)

    def step(updates: PyTree, state: EmaState, params: PyTree = None, **_: Any) -> tuple[PyTree, EmaState]:
        if params is None:
            raise InvalidArgumentError("The average of weights needs them: call update(updates, state, params).")
        # In float32: in bfloat16 the small step of one update would be lost.
        after = jax.tree.map(lambda p, u: _wide(p) + _wide(u) if _is_floating(p) else p, params, updates)
        return updates, update(state, after, decay=decay, warm_up=warm_up)

    return Transformation(begin, step)


def ema_weights(count: int, decay: float) -> np.ndarray:
    """float64 [K]: what an EMA over K stored checkpoints, oldest first, gives each of them. They sum to one.

    Example:
        >>> ema_weights(3, 0.5).tolist()
        [0.25, 0.25, 0.5]
    """
    if count < 1 or not 0 <= decay < 1:
        raise InvalidArgumentError(f"count is {count} and decay {decay}; at least 1, and in [0, 1).")
    weights = (1 - decay) * decay ** np.arange(count - 1, -1, -1, dtype=np.float64)
    weights[0] = decay ** (count - 1)
    return weights


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x) if not hasattr(x, "dtype") else x.dtype, jnp.inexact)


def _wide(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x if x.dtype in (jnp.float64, jnp.complex128, jnp.complex64) else x.astype(jnp.float32)
