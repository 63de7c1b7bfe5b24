"""Flax Linen: training states and boxed parameters, made or restored where they belong, once.

A ``TrainState`` is a tree like any other: ``jaxckpt.save(path, state)``. Its static fields (``apply_fn``, ``tx``) and
the boxes around parameters (``nn.Partitioned``, ``nn.LogicallyPartitioned``) are part of the program and not of the
checkpoint: they come from the state that is restored into, and stay as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from flax import linen as nn
from flax.linen import spmd
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxckpt.checkpoint import restore as tree_restore
from jaxckpt.integrations.optax import place_opt_state
from jaxckpt.storage.url import Location, StorageOptions

PyTree = Any
Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]


class Resumes(Protocol):
    """The part of a ``CheckpointManager`` that is used here."""

    def resume(self, like: Any = None, *, extras: Mapping[str, Any] | None = None) -> tuple[int | None, Any]:
        """The newest step and its tree; (None, ``like``) where there is none."""
        ...


def abstract(make: Callable[[], PyTree], mesh: Mesh | None = None, rules: Rules = ()) -> PyTree:
    """What ``make`` gives as ``ShapeDtypeStruct`` with shardings: what ``restore`` and ``resume`` take as ``like``.

    Args:
        make: makes a ``TrainState``, variables, or any tree with them; traced and not run, so nothing is computed or
            allocated.
        mesh: boxed parameters are split as their boxes say, and so are the moments that an optimizer keeps for them;
            everything else is replicated. None: all on the first device.
        rules: for logical names of axes: (name, axis of the mesh), as of ``nn.logical_to_mesh_sharding``.

    Example:
        >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> kernel = nn.with_partitioning(nn.initializers.ones, (None, "model"))
        >>> dense = nn.Dense(4, kernel_init=kernel)
        >>> like = abstract(lambda: dense.init(jax.random.key(0), jax.numpy.ones((1, 2))), mesh)
        >>> like["params"]["kernel"].value.sharding.spec[1]
        'model'
    """
    shapes = jax.eval_shape(make)
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), shapes)
    specs = nn.get_partition_spec(shapes)
    if rules:
        specs = spmd.logical_to_mesh(specs, rules)
    leaves, treedef = jax.tree.flatten(shapes)
    parts = jax.tree.leaves(specs, is_leaf=lambda leaf: leaf is None or isinstance(leaf, PartitionSpec))
    placed = treedef.unflatten(
        [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, part or PartitionSpec()))
            for leaf, part in zip(leaves, parts, strict=True)
        ]
    )
    if hasattr(placed, "params") and hasattr(placed, "opt_state") and hasattr(placed, "replace"):
        # Of no consequence for boxed moments, which are placed as their parameters are.
        placed = placed.replace(opt_state=place_opt_state(placed.opt_state, placed.params))
    return placed


def create(make: Callable[[], PyTree], mesh: Mesh | None = None, rules: Rules = ()) -> PyTree:
    """What ``make`` gives, made by one jitted program straight into its shardings: no whole copy anywhere.

    Example:
        >>> create(lambda: nn.Dense(4).init(jax.random.key(0), jax.numpy.ones((1, 2))))["params"]["kernel"].shape
        (2, 4)
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract(make, mesh, rules))
    return jax.jit(make, out_shardings=shardings)()


def restore(
    path: Location,
    make: Callable[[], PyTree],
    mesh: Mesh | None = None,
    rules: Rules = (),
    *,
    partial: bool = False,
    cast: bool = False,
    options: StorageOptions | None = None,
) -> PyTree:
    """What ``make`` gives, with the values of a checkpoint: boxes and static fields are those of ``make``.

    Args:
        path: a checkpoint of what ``make`` gives, saved on any mesh.
        make: see ``abstract``.
        mesh: see ``abstract``.
        rules: see ``abstract``.
        partial: make what the checkpoint lacks, or has in another shape, with ``make``, and ignore what it has beside.
        cast: convert to the dtypes that ``make`` gives.
        options: of object stores.

    Raises:
        MismatchError: lists all leaves that are missing, unexpected, or of the wrong shape or dtype.

    Example:
        >>> from jaxckpt.checkpoint.save import save
        >>> make = lambda: nn.Dense(4).init(jax.random.key(0), jax.numpy.ones((1, 2)))
        >>> save("memory://docs/linen", make())
        >>> restore("memory://docs/linen", make)["params"]["kernel"].shape
        (2, 4)
    """
    like = create(make, mesh, rules) if partial else abstract(make, mesh, rules)
    return tree_restore.restore(path, like, partial=partial, cast=cast, options=options)


def resume(
    manager: Resumes,
    make: Callable[[], PyTree],
    mesh: Mesh | None = None,
    rules: Rules = (),
    *,
    extras: Mapping[str, Any] | None = None,
) -> tuple[int | None, PyTree]:
    """The newest step of a ``CheckpointManager``, or (None, what ``make`` gives) where there is none.

    Either way memory is taken for one state, on the devices where it belongs. ``extras`` are those of the manager's own
    ``resume``: objects to fill, as data iterators.

    Example::

        step, state = jaxckpt.integrations.linen.resume(manager, make, mesh)
    """
    step, state = manager.resume(like=abstract(make, mesh, rules), extras=extras)
    return step, create(make, mesh, rules) if step is None else state
