"""Flax NNX: modules, optimizers and random streams, made or restored where they belong, once.

What is saved is ``nnx.state(node)``, a tree like any other, where ``node`` is a module, an ``nnx.Optimizer``,
``nnx.Rngs``, or a tuple or dict of them; a variable that several of them share is stored once. Metadata of variables
(the names of axes, tags) are part of the program and not of the checkpoint: they come from the module that is restored
into, so a renamed axis or another mesh needs no change of files.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding

from jaxckpt.checkpoint import restore as tree_restore
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.text import counted
from jaxckpt.storage.url import Location, StorageOptions

Node = Any  # a module, an optimizer, Rngs, or a tuple, list or dict of them
Where = Mesh | Callable[[nnx.State], Any] | None


class Resumes(Protocol):
    """The part of a ``CheckpointManager`` that is used here."""

    def resume(self, like: Any = None, *, extras: Mapping[str, Any] | None = None) -> tuple[int | None, Any]:
        """The newest step and its tree; (None, ``like``) where there is none."""
        ...


def abstract(node: Node | Callable[[], Node], where: Where = None) -> nnx.State:
    """The state of a node as ``ShapeDtypeStruct`` with shardings: what ``restore`` and ``resume`` take as ``like``.

    Args:
        node: a live node, or a function without arguments that makes one; it is traced and not run, so nothing
            is computed or allocated. It makes its own ``nnx.Rngs``.
        where: a mesh: each variable goes where its metadata say (``out_sharding``; logical names by the rules of
            ``flax.nnx.logical_axis_rules``), variables without metadata are replicated. A function from the state to a
            tree of shardings: that. None: where the arrays of a live node are; for a function the mesh of
            ``jax.set_mesh`` if there is one, else the first device.

    Example:
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        >>> like = abstract(lambda: nnx.Linear(4, 8, rngs=nnx.Rngs(0)), mesh)
        >>> like["kernel"].get_value().shape
        (4, 8)
    """
    return _abstract(node, where)[1]


def create(make: Callable[[], Node], where: Where = None) -> Node:
    """The node that ``make`` gives, made by one jitted program straight into its shardings: no whole copy anywhere.

    Example:
        >>> create(lambda: nnx.Linear(4, 8, rngs=nnx.Rngs(0))).kernel.shape
        (4, 8)
    """
    graph, like = _abstract(make, where)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    with _within(where):
        return nnx.merge(graph, jax.jit(lambda: nnx.state(make()), out_shardings=shardings)())


def restore(
    path: Location,
    make: Callable[[], Node],
    where: Where = None,
    *,
    partial: bool = False,
    cast: bool = False,
    options: StorageOptions | None = None,
) -> Node:
    """The node that ``make`` gives, with the values of a checkpoint of its state. Memory is taken for one node.

    Args:
        path: a checkpoint of ``nnx.state(node)``, saved on any mesh.
        make: makes the node; traced and not run (see ``abstract``).
        where: see ``abstract``.
        partial: make what the checkpoint lacks, or has in another shape, with ``make``, and ignore what it has beside.
        cast: convert to the dtypes that ``make`` gives.
        options: of object stores.

    Raises:
        MismatchError: lists all variables that are missing, unexpected, or of the wrong shape or dtype.

    Example:
        >>> from jaxckpt.checkpoint.save import save
        >>> make = lambda: nnx.Linear(4, 8, rngs=nnx.Rngs(0))
        >>> save("memory://docs/nnx", nnx.state(make()))
        >>> restore("memory://docs/nnx", make).kernel.shape
        (4, 8)
    """
    graph, like = _abstract(make, where)
    if partial:
        like = nnx.state(create(make, where))
    return nnx.merge(graph, tree_restore.restore(path, like, partial=partial, cast=cast, options=options))


def restore_into(
    path: Location,
    node: Node,
    *,
    partial: bool = False,
    cast: bool = False,
    options: StorageOptions | None = None,
) -> None:
    """Give a live node the values of a checkpoint, on the devices where its variables are.

    The old values live until the new ones are there, so that a restore that fails changes nothing: memory for two
    nodes. ``restore`` needs it for one. Other arguments and errors are those of ``restore``.

    Example:
        >>> from jaxckpt.checkpoint.save import save
        >>> model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
        >>> save("memory://docs/nnx_into", nnx.state(model))
        >>> restore_into("memory://docs/nnx_into", model)
    """
    like = nnx.state(node)
    nnx.update(node, tree_restore.restore(path, like, partial=partial, cast=cast, options=options))


def resume(
    manager: Resumes, make: Callable[[], Node], where: Where = None, *, extras: Mapping[str, Any] | None = None
) -> tuple[int | None, Node]:
    """The newest step of a ``CheckpointManager`` as a node, or (None, a fresh node) where there is none.

    Either way memory is taken for one node, on the devices where it belongs. ``extras`` are those of the manager's own
    ``resume``: objects to fill, as data iterators.

    Example::

        step, (model, optimizer) = jaxckpt.integrations.nnx.resume(manager, make, mesh)
    """
    graph, like = _abstract(make, where)
    step, state = manager.resume(like=like, extras=extras)
    return step, create(make, where) if step is None else nnx.merge(graph, state)


def _abstract(node: Node | Callable[[], Node], where: Where) -> tuple[nnx.GraphDef, nnx.State]:
    # Modules can be called, too: what is no node and can be called makes one.
    traced = callable(node) and not isinstance(node, nnx.Module | nnx.Optimizer | nnx.Rngs)
    if traced:
        with _within(where):
            node = nnx.eval_shape(node)
    graph, state = nnx.split(node)
    if isinstance(where, Mesh):
        shardings = nnx.get_named_sharding(state, where)
    elif where is not None:
        shardings = where(state)
    else:
        shardings = jax.tree.map(_present, state)
    leaves, treedef = jax.tree.flatten(state)
    placed = jax.tree.leaves(shardings, is_leaf=lambda leaf: leaf is None or isinstance(leaf, Sharding))
    if len(placed) != len(leaves):
        raise InvalidArgumentError(
            f"`where` gave {counted(len(placed), 'sharding')} for a state of {counted(len(leaves), 'array')}: it must "
            "give one each."
        )
    return graph, treedef.unflatten(
        [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s) for leaf, s in zip(leaves, placed, strict=True)]
    )


def _within(where: Where) -> Any:
    """Flax refuses to make a variable with ``out_sharding`` outside of a mesh."""
    return jax.set_mesh(where) if isinstance(where, Mesh) else nullcontext()


def _present(leaf: Any) -> Sharding:
    found = getattr(leaf, "sharding", None)
    if isinstance(found, NamedSharding) and isinstance(found.mesh, AbstractMesh):
        mesh = jax.sharding.get_mesh()
        found = None if mesh.empty else NamedSharding(mesh, found.spec)
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if found is None else found
