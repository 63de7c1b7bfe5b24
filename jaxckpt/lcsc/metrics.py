"""Metrics to search by: jittable and differentiable; smaller is better. Samples are [n, ...], flattened to [n, d]."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxckpt.core.errors import InvalidArgumentError

PyTree = Any
Features = Callable[[Any], jax.Array]  # samples [n, ...] -> [n, d]
_LEAST = 1e-12


class Moments(NamedTuple):
    """Of the reference: ``mean`` [d], ``root`` [d, d] of the covariance, ``trace`` of it. Made once."""

    mean: jax.Array
    root: jax.Array
    trace: jax.Array


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy of logits [n, c] and integer labels [n].

    Example:
        >>> round(float(cross_entropy(jnp.zeros((3, 4)), jnp.array([0, 1, 2]))), 4)
        1.3863
    """
    logits = logits.astype(jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def error_rate(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """One minus the accuracy. It has ties and no gradient: search by ``cross_entropy`` and guard with this."""
    return (logits.argmax(-1) != labels).mean(dtype=jnp.float32)


def held_out_loss(loss_fn: Callable[[PyTree, Any], Any], data: PyTree, size: int) -> Callable[[PyTree, Any], Any]:
    """An objective: ``loss_fn(params, batch)`` on ``size`` rows of ``data``, drawn by the key without replacement.

    Args:
        loss_fn: a mean over the batch.
        data: a tree of arrays [n, ...].
        size: rows of a batch, n at most.

    Raises:
        InvalidArgumentError: ``data`` has fewer rows than ``size``.
    """
    data = jax.tree.map(jnp.asarray, data)
    rows = len(jax.tree.leaves(data)[0])
    if not 1 <= size <= rows:
        raise InvalidArgumentError(f"size is {size}, and data has {rows} rows; give a number from 1 to {rows}.")

    def objective(params: PyTree, key: jax.Array) -> jax.Array:
        chosen = jax.random.choice(key, rows, (size,), replace=False)
        return jnp.asarray(loss_fn(params, jax.tree.map(lambda leaf: leaf[chosen], data)))

    return objective


def moments(reference: Any, features: Features | None = None) -> Moments:
    """Those of reference samples [n, ...], n above 1; one singular value decomposition.

    Raises:
        InvalidArgumentError: there are fewer than two.
    """
    mean, spread = _moments(_features(reference, features, "reference"), "reference")
    # Of the samples, not of their covariance, whose small eigenvalues have lost half the digits.
    root = jnp.matmul(_rotation(spread).T, spread, precision="highest")
    return Moments(mean, root, (spread**2).sum())


def frechet_distance(samples: Any, reference: Any, features: Features | None = None) -> jax.Array:
    """The squared Fréchet (2-Wasserstein) distance of Gaussians fitted to two sets of features.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S2^1/2 S1 S2^1/2)^1/2)``: Dowson and Landau 1982; Heusel et al., NeurIPS 2017,
    arXiv 1706.08500, who take Inception features and call it FID. With other features it is not FID: name them. It is
    biased upward by an amount that depends on n: compare values of equal n only. Its gradient is exact; its second
    derivatives are not.

    Args:
        samples: [n, ...], n above 1.
        reference: [m, ...], m above 1, or ``moments(...)`` of it, which saves a decomposition of it.
        features: ``samples -> [n, d]``; None: the samples, flattened.

    Raises:
        InvalidArgumentError: there are fewer than two of either, or they have other numbers of features.

    Example:
        >>> x = jnp.array([[0.0], [1.0], [2.0]])
        >>> round(float(frechet_distance(x + 3, x)), 3)
        9.0
    """
    other = reference if isinstance(reference, Moments) else moments(reference, features)
    mean, spread = _moments(_features(samples, features, "samples"), "samples")
    _check_width(mean.size, other.mean.size)
    # tr((S2^1/2 S1 S2^1/2)^1/2) is the largest <spread, Q root> of all rotations Q, so the distance is the least
    # |spread - Q root|^2: a sum of squares, in which nothing cancels, and whose gradient is that with Q held constant.
    rotation = _rotation(jnp.matmul(spread, other.root, precision="highest"))
    turned = jnp.matmul(rotation, other.root, precision="highest")
    left = other.root - jnp.matmul(rotation.T, turned, precision="highest")  # what has no counterpart in few samples
    return ((mean - other.mean) ** 2).sum() + ((spread - turned) ** 2).sum() + (left**2).sum()


def energy_distance(samples: Any, reference: Any, features: Features | None = None) -> jax.Array:
    """``2 E|x - y| - E|x - x'| - E|y - y'|`` (Szekely and Rizzo 2013), pairs of one point with itself included."""
    x, y = _both(samples, reference, features)
    return 2 * _distances(x, y).mean() - _distances(x, x).mean() - _distances(y, y).mean()


def mmd(samples: Any, reference: Any, features: Features | None = None, *, bandwidth: Any = None) -> jax.Array:
    """The squared maximum mean discrepancy with a Gaussian kernel (Gretton et al., JMLR 2012), not below zero.

    Args:
        samples: [n, ...].
        reference: [m, ...].
        features: as of ``frechet_distance``.
        bandwidth: of the kernel ``exp(-|x - y|^2 / (2 bandwidth^2))``; None: the median distance in the reference.
    """
    x, y = _both(samples, reference, features)
    width = jax.lax.stop_gradient(jnp.median(_distances(y, y))) if bandwidth is None else jnp.asarray(bandwidth)

    def kernel(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.exp(-_squares(a, b) / (2 * jnp.maximum(width, _LEAST) ** 2)).mean()

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def sliced_wasserstein(
    samples: Any, reference: Any, key: jax.Array, features: Features | None = None, *, slices: int = 64
) -> jax.Array:
    """The mean 1-Wasserstein distance along random directions (Rabin et al. 2012), of as many samples on each side.

    Raises:
        InvalidArgumentError: there are more on one side, or they have other numbers of features.
    """
    x, y = _both(samples, reference, features)
    if len(x) != len(y):
        raise InvalidArgumentError(
            f"samples has {len(x)} rows and reference {len(y)}; sliced_wasserstein pairs as many of each: take "
            f"{min(len(x), len(y))} of both, or energy_distance, which takes any numbers."
        )
    directions = jax.random.normal(key, (x.shape[1], slices))
    directions = directions / jnp.linalg.norm(directions, axis=0, keepdims=True)
    along = [jnp.sort(jnp.matmul(one, directions, precision="highest"), axis=0) for one in (x, y)]
    return jnp.abs(along[0] - along[1]).mean()


def _features(samples: Any, features: Features | None, name: str) -> jax.Array:
    found = jnp.asarray(samples if features is None else features(samples))
    if not found.size:
        raise InvalidArgumentError(
            f"{name} has shape {list(found.shape)}; a metric needs one sample [n, ...] at least."
        )
    return found.reshape(len(found), -1).astype(jnp.float32)


def _both(samples: Any, reference: Any, features: Features | None) -> tuple[jax.Array, jax.Array]:
    x, y = _features(samples, features, "samples"), _features(reference, features, "reference")
    _check_width(x.shape[1], y.shape[1])
    return x, y


def _check_width(one: int, other: int) -> None:
    if one != other:
        raise InvalidArgumentError(
            f"samples has {one} features and reference {other}; give both the same, but for the number of samples n."
        )


def _moments(x: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
    """The mean [d], and the differences from it [n, d], scaled so that ``spread.T @ spread`` is the covariance."""
    if len(x) < 2:
        raise InvalidArgumentError(f"{name} has {len(x)} row; a covariance needs two at least, and many to mean much.")
    mean = x.mean(0)
    return mean, (x - mean[None]) / math.sqrt(len(x) - 1)


def _rotation(a: jax.Array) -> jax.Array:
    """The nearest rotation ``U V^T`` of ``a = U S V^T`` [n, d], zero where ``a`` is; a constant for gradients."""
    left, values, right = jnp.linalg.svd(jax.lax.stop_gradient(a), full_matrices=False)
    kept = values > jnp.finfo(a.dtype).eps * values.max()
    return jnp.matmul(jnp.where(kept[None], left, 0.0), right, precision="highest")


def _squares(a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared distances [n, m]; by differences of rows, as products lose what is small."""
    return jax.lax.map(lambda row: ((b - row[None]) ** 2).sum(-1), a)


def _distances(a: jax.Array, b: jax.Array) -> jax.Array:
    squares = _squares(a, b)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
