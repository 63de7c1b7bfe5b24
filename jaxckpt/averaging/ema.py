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
    average = shadow(params)
    if debias:
        average = jax.tree.map(lambda x: jnp.zeros_like(x) if _is_floating(x) else x, average)
    return EmaState(jnp.zeros((), jnp.int32), start, average)


def update(state: EmaState, params: PyTree, *, decay: Any, warm_up: bool = False) -> EmaState:
    """``average <- d * average + (1 - d) * params`` (Polyak and Juditsky 1992 for the idea; Tarvainen and Valpola 2017,
    arXiv 1703.01780, for weights of networks). Integers and other leaves are those of ``params``.

    Args:
        state: of ``init`` or ``update``; may be donated.
        params: the weights after this step, with the structure of the state's.
        decay: d in [0, 1), a number or a traced scalar. Of a number ``1 - d`` is exact; a float32 scalar near one is
            not the d that it was made from (0.999999 is off by 1 % of ``1 - d``).
        warm_up: use ``min(d, (1 + n) / (10 + n))`` after n updates, so that early weights are forgotten soon.
    """
    is_number = isinstance(decay, int | float | np.number)
    if is_number and not 0 <= decay < 1:
        raise InvalidArgumentError(f"decay is {decay}; it is at least 0 and less than 1.")
    # In float32 the difference of one and a decay near one would have few digits.
    rate = jnp.asarray(1 - float(decay)) if is_number else 1 - jnp.asarray(decay, jnp.float32)
    if warm_up:
        rate = jnp.maximum(rate, (9 / (10 + state.count.astype(jnp.float32))).astype(rate.dtype))  # 1 - (1+n) / (10+n)
    weight = state.weight + rate.astype(jnp.float32) * (1 - state.weight)
    return EmaState(state.count + 1, weight, moved(state.average, params, rate))


def value(state: EmaState, like: PyTree = None) -> PyTree:
    """The average, divided by the weight that the updates have in it (Kingma and Ba 2015, arXiv 1412.6980, section 3).

    Args:
        state: of ``init`` or ``update``.
        like: a tree whose dtypes the result gets; float32 without.
    """
    scale = jnp.where(state.weight > 0, 1 / jnp.maximum(state.weight, jnp.finfo(jnp.float32).tiny), 1)
    found = jax.tree.map(lambda a: a * scale.astype(a.dtype) if _is_floating(a) else a, state.average)
    return found if like is None else cast(found, like)


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


def shadow(params: PyTree) -> PyTree:
    """A copy, float32 where ``params`` is narrower: it shares no memory with them, so either may be donated."""
    return jax.tree.map(_own, params)


def moved(average: PyTree, params: PyTree, rate: jax.Array) -> PyTree:
    """``average + rate * (params - average)``; leaves that are not floating are copies of those of ``params``."""
    return jax.tree.map(
        lambda a, x: a + rate.astype(a.dtype) * (_wide(x) - a) if _is_floating(x) else _own(x), average, params
    )


def cast(tree: PyTree, like: PyTree) -> PyTree:
    """``tree`` in the dtypes of ``like``; PRNG keys as they are."""
    return jax.tree.map(lambda a, x: a if _is_key(a) else jnp.asarray(a).astype(jnp.result_type(x)), tree, like)


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _wide(x: Any, *, copy: bool | None = None) -> jax.Array:
    dtype = jnp.result_type(x)
    is_narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.asarray(x, jnp.float32 if is_narrow else dtype, copy=copy)


def _own(x: Any) -> jax.Array:
    return _wide(x, copy=True)
