"""Weighted combinations of trees in memory: pure functions, under ``jit``, ``vmap`` and ``shard_map`` as well."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt.averaging.kernel import Accumulate, resolve, split_weights, weighted_sums
from jaxckpt.core.errors import InvalidArgumentError, MismatchError
from jaxckpt.core.tree import flatten, path_name

PyTree = Any


def combine(stacked: PyTree, weights: Any, *, accumulate: Accumulate = "auto", dtype: Any = None) -> PyTree:
    """The weighted sum of K trees that are stacked leaf by leaf.

    Point-wise, so it moves nothing between devices: leaves sharded on their trailing axes stay so. Sums are kept in
    float64 (on TPUs in float32 pairs) inside one fused loop and rounded once; weights may be negative and need not sum
    to one. Weights given as numpy or Python numbers count in full float64, traced or JAX weights in their own
    precision. Differentiable in both arguments.

    Args:
        stacked: leaves [K, ...]. Floating and complex leaves are combined; of integer, boolean and PRNG-key leaves the
            last is taken.
        weights: [K] for one tree, or [P, K] for P trees at once.
        accumulate: "auto", "float64", or "float32" (pairs).
        dtype: of the floating results, or of the complex ones if it is complex; that of each leaf by default.

    Returns:
        The tree of the sums, leaves [...]; for weights [P, K], leaves [P, ...].

    Example:
        >>> stacked = {"w": jnp.array([[1.0, 2.0], [3.0, 6.0]])}
        >>> combine(stacked, [0.5, 0.5])["w"].tolist()
        [2.0, 4.0]
        >>> combine(stacked, [[1, 0], [-1, 2]])["w"].tolist()
        [[1.0, 2.0], [5.0, 10.0]]
    """
    weights = weights if isinstance(weights, jax.Array) else np.asarray(weights, np.float64)
    if weights.ndim not in (1, 2):
        raise InvalidArgumentError(f"weights have the shape {weights.shape}; they are [K] or [P, K].")
    parts = split_weights(weights if weights.ndim == 2 else weights[None])
    count, how = weights.shape[-1], resolve(accumulate)

    pairs, structure = jax.tree_util.tree_flatten_with_path(stacked)
    leaves = [leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for _, leaf in pairs]
    for (path, _), leaf in zip(pairs, leaves, strict=True):
        if leaf.ndim < 1 or leaf.shape[0] != count:
            raise MismatchError(
                f'Leaf "{jax.tree_util.keystr(path, simple=True, separator=".")}" is {leaf.dtype}{list(leaf.shape)}; '
                f"there are {count} weights, so its first axis must be {count}. Stack the trees on a new first axis."
            )
    if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise InvalidArgumentError(
            f"dtype is {np.dtype(dtype).name}; it is that of floating results, as float32 or bfloat16. Leave it out, "
            "and round the result yourself."
        )
    floating = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    dtypes = tuple(np.dtype(leaf.dtype if _is_of_another_kind(leaf, dtype) else dtype) for leaf in floating)
    sums = iter(_sums(floating, parts, how, dtypes, weights.ndim == 2))

    def last(leaf: jax.Array) -> jax.Array:
        return leaf[-1] if weights.ndim == 1 else jnp.stack([leaf[-1]] * weights.shape[0])

    return structure.unflatten(
        [next(sums) if jnp.issubdtype(leaf.dtype, jnp.inexact) else last(leaf) for leaf in leaves]
    )


def stack(trees: Sequence[PyTree]) -> PyTree:
    """K trees of one structure as one tree of leaves [K, ...].

    Example:
        >>> stack([{"w": jnp.ones(2)}, {"w": jnp.zeros(2)}])["w"].shape
        (2, 2)
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def interpolate(a: PyTree, b: PyTree, t: Any, *, preserve_variance: bool = False) -> PyTree:
    """``(1 - t) a + t b`` on every floating leaf; other leaves are those of ``a`` for t < 0.5, else those of ``b``.

    Args:
        a: a tree.
        b: a tree of the same structure and shapes.
        t: a number or a scalar array; outside [0, 1] it extrapolates. At 0 and 1 the result is ``a`` and ``b`` exactly,
            where both are finite.
        preserve_variance: divide by ``sqrt((1 - t)^2 + t^2)``, which keeps the variance of independent weights
            ("Random Teachers are Good Teachers", arXiv 2302.12091, whose students start between a teacher
            and a fresh network).

    Example:
        >>> interpolate({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, 0.25)["w"].tolist()
        [0.25, 0.25]
    """
    check_alike(a, b)
    shape, dtype = np.shape(t), t.dtype if isinstance(t, jax.Array) else np.asarray(t).dtype
    if shape or jnp.issubdtype(dtype, jnp.complexfloating):
        raise InvalidArgumentError(f"t is {dtype}{list(shape)}; it is one real number. Call it once for every point.")
    if isinstance(t, jax.Array):
        t = t.astype(jnp.float32)
        weights = jnp.stack([1 - t, t])
        root = jnp.sqrt((weights**2).sum())
    else:
        weights = np.array([1 - float(t), float(t)])
        root = np.sqrt((weights**2).sum())
    weights = weights / root if preserve_variance else weights

    def one(x: Any, y: Any) -> Any:
        if not jnp.issubdtype(jnp.asarray(x).dtype if not hasattr(x, "dtype") else x.dtype, jnp.inexact):
            if isinstance(t, jax.Array):
                return jnp.where(t < 0.5, x, y)
            return x if t < 0.5 else y
        return combine(jnp.stack([x, y]), weights)

    return jax.tree.map(one, a, b)


class Barrier(NamedTuple):
    """The loss along the straight line between two trees: ``t`` and ``losses`` float [n], ``height`` a number."""

    t: jax.Array
    losses: jax.Array
    height: jax.Array


def barrier(a: PyTree, b: PyTree, loss_fn: Callable[[PyTree], Any], *, n: int = 21) -> Barrier:
    """How far the loss between two trees rises above the line between their losses.

    ``height = max_t [L((1 - t) a + t b) - ((1 - t) L(a) + t L(b))]``, 0 or less for two points of one basin. Linear
    mode connectivity: Frankle et al., ICML 2020, arXiv 1912.05671, section 2; used between students of one teacher in
    "Random Teachers are Good Teachers", arXiv 2302.12091.

    Args:
        a: a tree.
        b: a tree of the same structure and shapes.
        loss_fn: ``params -> scalar``, to be traced. One point is evaluated at a time.
        n: points, the ends included.

    Example:
        >>> found = barrier({"w": jnp.array(-1.0)}, {"w": jnp.array(1.0)}, lambda p: 1 - p["w"] ** 2, n=3)
        >>> float(found.height)
        1.0
    """
    check_alike(a, b)
    if n < 3:
        raise InvalidArgumentError(f"n is {n}; a barrier needs points between the ends: 3 at least.")
    t = jnp.linspace(0, 1, n, dtype=jnp.float32)
    losses = jax.lax.map(lambda x: jnp.asarray(loss_fn(interpolate(a, b, x)), jnp.float32), t)
    return Barrier(t, losses, (losses - ((1 - t) * losses[0] + t * losses[-1])).max())


def check_alike(a: PyTree, b: PyTree) -> None:
    """Raise a MismatchError that names the first leaf in which two trees differ in place or shape."""
    ours, theirs = ({leaf.path: np.shape(leaf.value) for leaf in flatten(tree)[0]} for tree in (a, b))
    for path in {**ours, **theirs}:
        if ours.get(path) != theirs.get(path):
            raise MismatchError(
                f'Leaf "{path_name(path)}": the first tree has {ours.get(path, "none")}, the second '
                f"{theirs.get(path, 'none')}. Both must have the same leaves and shapes."
            )


def _is_of_another_kind(leaf: jax.Array, dtype: Any) -> bool:
    """Whether one is complex and the other real, or there is no dtype."""
    kind = jnp.complexfloating
    return dtype is None or jnp.issubdtype(leaf.dtype, kind) != jnp.issubdtype(dtype, kind)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _sums(leaves: list[jax.Array], parts: Any, how: str, dtypes: tuple[Any, ...], many: bool) -> list[jax.Array]:
    return _program(leaves, parts, how=how, dtypes=dtypes, many=many)


@_sums.defjvp
def _sums_jvp(how: str, dtypes: tuple[Any, ...], many: bool, primals: Any, tangents: Any) -> Any:
    """The sum is linear in leaves and weights; derivatives need no more than float32."""
    (leaves, parts), (leaf_tangents, part_tangents) = primals, tangents
    weights, weight_tangents = parts.sum(0), part_tangents.sum(0)

    def plain(factors: jax.Array, leaf: jax.Array, dtype: Any) -> jax.Array:
        wide = leaf if leaf.dtype in (jnp.float64, jnp.complex64, jnp.complex128) else leaf.astype(jnp.float32)
        found = jnp.tensordot(factors.astype(wide.dtype), wide, 1, precision="highest")
        return (found if many else found[0]).astype(dtype)

    changes = [
        plain(weights, leaf_tangent, dtype) + plain(weight_tangents, leaf, dtype)
        for leaf, leaf_tangent, dtype in zip(leaves, leaf_tangents, dtypes, strict=True)
    ]
    return _sums(leaves, parts, how, dtypes, many), changes


@partial(jax.jit, static_argnames=("how", "dtypes", "many"))
def _program(leaves: list[jax.Array], parts: Any, *, how: str, dtypes: tuple[Any, ...], many: bool) -> list[jax.Array]:
    """All leaves in one program: XLA runs small ones side by side."""
    found = []
    for leaf, dtype in zip(leaves, dtypes, strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            half = jnp.finfo(dtype).dtype
            halves = [weighted_sums(part(leaf), parts, how=how, dtype=half) for part in (jnp.real, jnp.imag)]
            sums = jax.lax.complex(*halves)
        else:
            sums = weighted_sums(leaf, parts, how=how, dtype=dtype)
        found.append(sums if many else sums[0])
    return found
