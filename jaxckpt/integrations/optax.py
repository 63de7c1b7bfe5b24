"""Optax: the state of an optimizer, abstract and placed like the parameters that it belongs to, to restore into.

``jaxckpt.save`` and ``jaxckpt.restore`` need nothing of this: every optax state is a tree, empty parts, masks and all.
What is missing elsewhere is an answer to "where does each moment lie", without making a state to look at.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxckpt.core.tree import Path, flatten, rebuild

PyTree = Any


def abstract_opt_state(optimizer: optax.GradientTransformation, params: PyTree) -> PyTree:
    """What ``optimizer.init(params)`` would give, as ``ShapeDtypeStruct``: nothing is computed or allocated.

    Args:
        optimizer: any gradient transformation, also wrapped (``MultiSteps`` by its ``gradient_transformation()``,
            ``masked``, ``partition``, ``inject_hyperparams``, ``contrib.schedule_free``...).
        params: arrays or ``ShapeDtypeStruct``, with shardings.

    Returns:
        The state, placed by ``place_opt_state``: restore into it.

    Example:
        >>> params = {"w": jax.numpy.ones((4, 2))}
        >>> abstract_opt_state(optax.adam(1e-3), params)[0].mu["w"].shape
        (4, 2)
    """
    return place_opt_state(jax.eval_shape(optimizer.init, params), params)


def place_opt_state(opt_state: PyTree, params: PyTree) -> PyTree:
    """The state as ``ShapeDtypeStruct`` with the shardings of the parameters that its leaves belong to.

    A leaf belongs to the parameter whose path its own path ends with (the longest, if there are several), so that no
    transformation needs to be known: ``[1].inner_state[0].mu.layers[0].kernel`` belongs to ``layers[0].kernel``. A leaf
    of another shape keeps what still fits: dimensions of equal size their split, and where one dimension was reduced
    away (factored second moments) the others theirs. Everything else, as a step count, is replicated over the mesh of
    the parameters.

    Args:
        opt_state: arrays or ``ShapeDtypeStruct``.
        params: arrays or ``ShapeDtypeStruct``, with shardings.

    Example:
        >>> params = {"w": jax.numpy.ones((4, 2))}
        >>> state = place_opt_state(optax.sgd(0.1, momentum=0.9).init(params), params)
        >>> state[0].trace["w"].sharding == params["w"].sharding
        True
    """
    owners = {leaf.path: leaf.value for leaf in flatten(params)[0]}
    elsewhere = next((replicated(s) for p in owners.values() if (s := getattr(p, "sharding", None)) is not None), None)

    def one(path: Path, leaf: Any) -> Any:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            return leaf
        owner = _owner(path, owners)
        sharding = getattr(owner, "sharding", None)
        found = elsewhere if sharding is None else _fitting(sharding, tuple(owner.shape), tuple(leaf.shape))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=found)

    return rebuild(opt_state, one)


def replicated(sharding: Sharding) -> Sharding:
    """The sharding of a whole copy on each device that ``sharding`` uses."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(), memory_kind=sharding.memory_kind)
    return sharding


def _owner(path: Path, owners: Mapping[Path, Any]) -> Any:
    return next((owners[path[i:]] for i in range(len(path) + 1) if path[i:] in owners), None)


def _fitting(sharding: Sharding, shape: tuple[int, ...], wanted: tuple[int, ...]) -> Sharding:
    if shape == wanted or not isinstance(sharding, NamedSharding):
        return sharding
    spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    if len(wanted) == len(shape):
        kept = [axes if a == b else None for axes, a, b in zip(spec, shape, wanted, strict=True)]
        return NamedSharding(sharding.mesh, PartitionSpec(*kept), memory_kind=sharding.memory_kind)
    reduced = [d for d in range(len(shape)) if shape[:d] + shape[d + 1 :] == wanted]
    if len(reduced) == 1:  # of a square matrix nobody can tell which dimension is left
        (d,) = reduced
        return NamedSharding(sharding.mesh, PartitionSpec(*spec[:d], *spec[d + 1 :]), memory_kind=sharding.memory_kind)
    return replicated(sharding)
