"""Batch-norm statistics of an averaged model: they are not the average of statistics, so they are estimated anew."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.tree import flatten, rebuild

PyTree = Any


def reestimate(
    statistics: Callable[[Any], PyTree],
    batches: Iterable[Any],
    *,
    mean: str = "mean",
    variance: str = "var",
) -> PyTree:
    """The statistics over all batches, for a model whose weights are averaged (Izmailov et al. 2018, arXiv 1803.05407,
    section 3). Means are averaged; variances get the variance of the batch means added, so that they are those of
    all examples together, if batches are of equal size.

    Args:
        statistics: ``batch -> tree``: the mean and (biased) variance of this batch alone in every layer, as a forward
            pass in training mode with momentum 0 leaves them in ``batch_stats``.
        batches: an iterable; a few thousand examples are enough.
        mean: the last key of leaves that are means.
        variance: the last key of the variance beside a mean.

    Example:
        >>> stats = lambda x: {"norm": {"mean": x.mean(), "var": x.var()}}
        >>> found = reestimate(stats, [jnp.array([0.0, 2.0]), jnp.array([4.0, 6.0])])
        >>> float(found["norm"]["mean"]), float(found["norm"]["var"])
        (3.0, 5.0)
    """
    count, sums, squares, last = 0, {}, {}, None
    for batch in batches:
        last = statistics(batch)
        count += 1
        for leaf in flatten(last)[0]:
            value = jnp.asarray(leaf.value, jnp.float32)
            sums[leaf.path] = sums.get(leaf.path, 0) + value
            if leaf.path[-1] == mean:
                squares[leaf.path] = squares.get(leaf.path, 0) + value**2
    if last is None:
        raise InvalidArgumentError("There are no batches to estimate statistics from.")

    def result(path: tuple, old: Any) -> jax.Array:
        found = sums[path] / count
        beside = (*path[:-1], mean)
        if path[-1] == variance and beside in squares:
            found = found + jnp.maximum(squares[beside] / count - (sums[beside] / count) ** 2, 0)
        return found.astype(jnp.asarray(old).dtype)

    return rebuild(last, result)
