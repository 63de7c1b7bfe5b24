"""Learned soup: descend a differentiable loss in the mixing coefficients, with the checkpoints left on storage.

Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482, appendix on learned soup, whose authors held all models in
memory. Here ``dL/da_k = <dL/dtheta, theta_k>`` is summed leaf by leaf while checkpoint k streams by: a step reads each
of them twice and holds one model, its gradient and a bucket.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt.averaging.average import average_opened
from jaxckpt.averaging.globs import check_globs, matches
from jaxckpt.averaging.reading import Want
from jaxckpt.averaging.sources import EvalParams, arrays_of, open_sources
from jaxckpt.checkpoint.match import Only, Places, selector
from jaxckpt.checkpoint.source import Source
from jaxckpt.core.errors import InvalidArgumentError, MismatchError
from jaxckpt.core.text import counted
from jaxckpt.core.tree import Path, flatten, path_name, rebuild
from jaxckpt.storage.url import StorageOptions

PyTree = Any
BUCKET_BYTES = 32 * 1024 * 1024
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


class LearnedSoup(NamedTuple):
    """``weights`` float64 [groups, K]; ``groups``: the glob of each; ``losses`` of every step."""

    params: PyTree
    weights: np.ndarray
    groups: tuple[str, ...]
    losses: list[float]

    def by_path(self) -> dict[str, np.ndarray]:
        """The weights as ``average`` takes them."""
        return dict(zip(self.groups, self.weights, strict=True))


def learned_soup(
    sources: Sequence[Any],
    loss_fn: Callable[..., Any],
    *,
    like: PyTree,
    steps: int = 50,
    learning_rate: float = 0.05,
    groups: Sequence[str] = ("*",),
    normalize: str = "softmax",
    batches: Callable[[int], Any] | None = None,
    only: Only = None,
    eval_params: EvalParams = None,
    options: StorageOptions | None = None,
) -> LearnedSoup:
    """Coefficients by Adam on a differentiable loss; the best step's are returned.

    Args:
        sources: checkpoints (paths) or trees.
        loss_fn: ``params -> scalar``, or ``(params, batch) -> scalar`` with ``batches``; differentiable.
        like: what the loss gets, as of ``average``. Coefficients are learned for its floating leaves.
        steps: of descent.
        learning_rate: of Adam.
        groups: globs of leaf names, each with coefficients of its own ("by layer"); the first that matches counts.
        normalize: ``"softmax"`` (the paper's: positive, sum one), ``"sum"`` (signed, sum one: steps along the plane) or
            ``"none"``.
        batches: the batch of each step; None: ``loss_fn`` has its data.
        only: as of ``average``: what is learned and averaged, as ``"params"`` of whole training states; other leaves
            of ``like`` are as they are there.
        eval_params: as of ``average``.
        options: endpoint, region and credentials of object stores.

    Example:
        >>> trees = [{"w": jnp.array([0.0])}, {"w": jnp.array([1.0])}]
        >>> soup = learned_soup(trees, lambda p: (p["w"][0] - 0.8) ** 2, like=trees[0], steps=100)
        >>> bool(abs(soup.params["w"][0] - 0.8) < 0.02)
        True
    """
    if normalize not in ("softmax", "sum", "none"):
        raise InvalidArgumentError(f'normalize is {normalize!r}; it is "softmax", "sum" or "none".')
    opened = open_sources(sources, eval_params, options)
    group_of = _groups(like, groups, only)
    count = len(sources)
    logits = np.zeros((len(groups), count)) if normalize == "softmax" else np.full((len(groups), count), 1 / count)

    def loss_of(learned: list[jax.Array], params: PyTree, *batch: Any) -> Any:
        values = dict(zip(group_of, learned, strict=True))
        return loss_fn(rebuild(params, lambda path, old: values.get(path, old)), *batch)

    value_and_grad = jax.jit(jax.value_and_grad(loss_of))
    mix = partial(average_opened, opened, like=like, only=only)
    first, second = np.zeros_like(logits), np.zeros_like(logits)
    losses: list[float] = []
    best: tuple[float, np.ndarray] = (np.inf, _weights(logits, normalize))
    for step in range(steps + 1):
        weights = _weights(logits, normalize)
        params = mix(dict(zip(groups, weights, strict=True)))
        learned = {leaf.path: leaf.value for leaf in flatten(params)[0] if leaf.path in group_of}
        batch = () if batches is None else (batches(step),)
        loss, slopes = value_and_grad([learned[path] for path in group_of], params, *batch)
        losses.append(float(loss))
        if losses[-1] < best[0]:
            best = (losses[-1], weights)
        if step == steps:
            break
        del params, learned
        gradient = [Gradient(path, slope, group_of[path]) for path, slope in zip(group_of, slopes, strict=True)]
        slope = inner_products(opened, gradient, len(groups))
        if normalize == "softmax":
            slope = weights * (slope - (weights * slope).sum(axis=1, keepdims=True))
        elif normalize == "sum":
            slope = slope - slope.mean(axis=1, keepdims=True)
        # Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1), in float64.
        first = _BETAS[0] * first + (1 - _BETAS[0]) * slope
        second = _BETAS[1] * second + (1 - _BETAS[1]) * slope**2
        scale = np.sqrt(second / (1 - _BETAS[1] ** (step + 1))) + _EPSILON
        change = first / (1 - _BETAS[0] ** (step + 1)) / scale
        if normalize == "sum":  # Adam's scaling leaves the plane of equal sums: step back onto it
            change -= change.mean(axis=1, keepdims=True)
        logits = logits - learning_rate * change
    params = mix(dict(zip(groups, best[1], strict=True)))
    return LearnedSoup(params, best[1], tuple(groups), losses)


class Gradient(NamedTuple):
    """The loss' gradient in one leaf, and the group whose coefficients it counts for."""

    path: Path
    value: jax.Array
    group: int


def inner_products(sources: Sequence[Source], leaves: Sequence[Gradient], groups: int) -> np.ndarray:
    """float64 [groups, K]: the inner product of each source with the gradient, over each group's leaves; streamed."""
    found = np.zeros((groups, len(sources)))
    for k, source in enumerate(sources):
        places = Places(source.structure)
        batch: list[Any] = []
        size = 0
        for place, leaf in enumerate(leaves):
            path = places.find(leaf.path)
            if path is None:
                raise MismatchError(f'"{path_name(leaf.path)}" is not in {source.url}.')
            batch.append((leaf, places.leaves[path]))
            size += leaf.value.nbytes
            if size >= BUCKET_BYTES or place == len(leaves) - 1:
                wants = [Want(leaf=index, sharding=leaf.value.sharding) for leaf, index in batch]
                values, _ = arrays_of(source, wants)
                products = [_dot(leaf.value, value) for (leaf, _), value in zip(batch, values, strict=True)]
                for (leaf, _), product in zip(batch, products, strict=True):
                    found[leaf.group, k] += float(product)
                batch, size = [], 0
    return found


def _groups(like: PyTree, globs: Sequence[str], only: Only) -> dict[Path, int]:
    found, unmatched, names = {}, [], []
    for leaf in flatten(like)[0]:
        if not hasattr(leaf.value, "dtype") or not jnp.issubdtype(leaf.value.dtype, jnp.inexact):
            continue
        if only is not None and not selector(only)(leaf.name):
            continue
        names.append(leaf.name)
        group = next((i for i, glob in enumerate(globs) if matches(leaf.name, glob)), None)
        if group is None:
            unmatched.append(leaf.name)
        else:
            found[leaf.path] = group
    if unmatched:
        some = counted(len(unmatched), "leaf matches", "leaves match")
        raise InvalidArgumentError(f'{some} none of groups, as "{unmatched[0]}": add "*".')
    check_globs(globs, names, "groups")
    return found


def _weights(logits: np.ndarray, normalize: str) -> np.ndarray:
    if normalize != "softmax":
        return logits
    found = np.exp(logits - logits.max(axis=1, keepdims=True))
    return found / found.sum(axis=1, keepdims=True)


@jax.jit
def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a.astype(jnp.float32) * b.astype(jnp.float32)).sum()
