"""Batch-norm statistics of an averaged model: they are not the average of statistics, so they are estimated anew."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.tree import Node, Path, flatten, path_name, rebuild, walk

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
            pass in training mode with momentum 0 leaves them in ``batch_stats``, or in ``nnx.state(model,
            nnx.BatchStat)``.
        batches: an iterable; a few thousand examples are enough.
        mean: the last key of leaves that are means.
        variance: the last key of the variance beside a mean.

    Raises:
        InvalidArgumentError: there are no batches, or no variance has a mean beside it.

    Example:
        >>> stats = lambda x: {"norm": {"mean": x.mean(), "var": x.var()}}
        >>> found = reestimate(stats, [jnp.array([0.0, 2.0]), jnp.array([4.0, 6.0])])
        >>> float(found["norm"]["mean"]), float(found["norm"]["var"])
        (3.0, 5.0)
    """
    count, last, means, spreads = 0, None, {}, {}
    names = (mean, variance)
    for batch in batches:
        last = statistics(batch)
        count += 1
        for leaf in flatten(last)[0]:
            new = jnp.asarray(leaf.value, jnp.float32)
            old = means.get(leaf.path, jnp.zeros_like(new))
            means[leaf.path] = old + (new - old) / count
            spreads[leaf.path] = spreads.get(leaf.path, 0) + (new - old) * (new - means[leaf.path])
    if last is None:
        raise InvalidArgumentError("There are no batches to estimate statistics from.")
    places = _places(flatten(last)[1], names)
    at = {place: path for path, place in places.items()}
    beside = {  # the mean beside each variance
        path: at[*place[:-1], mean]
        for path, place in places.items()
        if place[-1:] == (variance,) and (*place[:-1], mean) in at
    }
    if not beside:
        raise InvalidArgumentError(
            f"The statistics have no {mean!r} with a {variance!r} beside it; they have "
            f"{', '.join(map(path_name, list(at)[:8])) or 'no leaves'}. Name theirs by mean= and variance=."
        )

    def result(path: tuple, old: Any) -> jax.Array:
        found = means[path] + (spreads[beside[path]] / count if path in beside else 0)
        return found.astype(jnp.asarray(old).dtype)

    return rebuild(last, result)


def _places(structure: Node, names: tuple[str, str]) -> dict[Path, Path]:
    """The path of every leaf, and the same without the box around it (an ``nnx.Variable``, an ``nn.Partitioned``)."""
    nodes = dict(walk(structure))

    def is_boxed(path: Path) -> bool:
        box = nodes[path[:-1]]
        return path[-1] not in names and box.kind == "node" and len(box.keys) == 1

    paths = [path for path, node in nodes.items() if node.kind == "leaf"]
    return {path: path[:-1] if path and is_boxed(path) else path for path in paths}
