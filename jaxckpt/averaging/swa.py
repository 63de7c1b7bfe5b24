"""Stochastic weight averaging: the equal average of the weights that training passes, in float32."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxckpt.averaging.ema import cast, moved, shadow

PyTree = Any


class SwaState(NamedTuple):
    """``mean``: of the ``count`` trees so far; float32 where they are floating."""

    count: jax.Array
    mean: PyTree


def init(params: PyTree) -> SwaState:
    """The state before the first update, with the structure of ``params`` and none of its memory."""
    return SwaState(jnp.zeros((), jnp.int32), shadow(params))


def update(state: SwaState, params: PyTree) -> SwaState:
    """``mean <- (n * mean + params) / (n + 1)`` (Izmailov et al. 2018, arXiv 1803.05407, algorithm 1).

    Call it at the end of each cycle, or every so many steps at a constant rate. Averages of *saved* checkpoints need no
    state: ``averaging.average(paths)``. Batch-norm statistics are to be re-estimated afterwards (section 3):
    ``averaging.batch_norm``.

    Example:
        >>> state = init({"w": jnp.zeros(2)})
        >>> for x in (1.0, 2.0, 6.0):
        ...     state = update(state, {"w": jnp.full(2, x)})
        >>> value(state)["w"].tolist()
        [3.0, 3.0]
    """
    rate = 1 / (state.count.astype(jnp.float32) + 1)
    return SwaState(state.count + 1, moved(state.mean, params, rate))


def value(state: SwaState, like: PyTree = None) -> PyTree:
    """The mean, in the dtypes of ``like`` (float32 without)."""
    return state.mean if like is None else cast(state.mean, like)
