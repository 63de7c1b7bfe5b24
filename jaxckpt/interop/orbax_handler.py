"""An Orbax handler that saves and restores with this library: one changed line in a program that uses Orbax.

    ocp.CheckpointManager(folder, handler_registry=orbax_handler.registry())
    ocp.AsyncCheckpointer(orbax_handler.Handler())

Steps, retention, metrics, barriers and the rename that makes a step appear stay Orbax's; the bytes and their checksums
are ours. Orbax writes into a temporary folder and renames it: nothing in our files depends on the folder's name.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, Sharding
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals, Future

from jaxckpt.checkpoint.exchange import spans_processes
from jaxckpt.checkpoint.place import default_sharding, saved_sharding
from jaxckpt.checkpoint.restore import made_together, restore
from jaxckpt.checkpoint.save import TIMEOUT_S, Hold, Request, begin
from jaxckpt.checkpoint.source import Source, open_source
from jaxckpt.core.dtypes import dtype_of
from jaxckpt.core.errors import InvalidArgumentError, MismatchError
from jaxckpt.core.events import Captured, emit
from jaxckpt.core.text import counted
from jaxckpt.core.tree import build, flatten, path_name, rebuild
from jaxckpt.storage.url import open_store
from jaxckpt.transfer.capture import Mode
from jaxckpt.transfer.staging import default_budget_bytes

PyTree = Any


class Handler(ocp.AsyncCheckpointHandler):
    """Saves and restores trees with this library, on behalf of Orbax.

    Takes ``ocp.args.StandardSave``, ``StandardRestore``, ``PyTreeSave`` and ``PyTreeRestore``, and ``Save`` and
    ``Restore`` of this module. Errors of the background part surface where Orbax surfaces them: at the next ``save``,
    ``check_for_errors``, ``wait_until_finished`` and ``close``.

    Args:
        capture: as of ``jaxckpt.save_async``.
        host_budget_bytes: as of ``jaxckpt.save_async``.
        timeout_s: how long to wait for other processes.
    """

    def __init__(
        self, *, capture: Mode = "auto", host_budget_bytes: int | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._hold = Hold(
            mode=capture,
            budget_bytes=default_budget_bytes() if host_budget_bytes is None else host_budget_bytes,
        )
        self._timeout_s = timeout_s
        # Recorded in a step's metadata. What was written is a standard checkpoint, so programs that know nothing of
        # this library find Orbax's handler for it. The class keeps a name of its own in Orbax's registry.
        self.typestr = ocp.StandardCheckpointHandler.typestr

    def save(self, directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save; durable when it returns."""
        begin(self._request(directory, _only_args(Save, args, kwargs)), None).finish()

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[Future]:
        """Capture; the future writes, once Orbax has made the folder."""
        started = time.perf_counter()
        what = self._request(directory, _only_args(Save, args, kwargs))
        begun = begin(what, self._hold)
        if begun.capture is not None:
            begun.capture()
        seconds = time.perf_counter() - started
        emit(Captured(path=str(directory), process=begun.rank, size_bytes=begun.size_bytes, seconds=seconds))

        async def write() -> None:
            await asyncio.to_thread(begun.finish)

        return [CommitFutureAwaitingContractedSignals(write(), name="jaxckpt-orbax")]

    def restore(self, directory: Any, *args: Any, **kwargs: Any) -> PyTree:
        """Restore what this handler or one of Orbax's wrote."""
        wanted = _only_args(Restore, args, kwargs)
        path = str(directory)
        if getattr(wanted, "legacy_transform_fn", None) or getattr(wanted, "transforms", None):
            raise InvalidArgumentError(
                f"transforms were asked for while restoring {path}: restore what is stored, with item=None, and change "
                "that tree; or restore with ocp.PyTreeCheckpointHandler, which reads the same files."
            )
        item, restore_args = wanted.item, getattr(wanted, "restore_args", None)

        def look() -> Source:
            return open_source(open_store(path))

        # Where all take part, one that cannot open it must not be waited for.
        together = _spans_processes(item, restore_args)
        source = made_together(path, look, timeout_s=self._timeout_s) if together else look()
        fallback = getattr(wanted, "fallback_sharding", None)
        places = _Places(source, restore_args, fallback, by_values=isinstance(wanted, _BY_VALUES))
        if item is None and restore_args is None:
            choose = None if fallback is None else lambda _, spec: spec.sharding or fallback
            return restore(path, choose, timeout_s=self._timeout_s)
        if item is None:
            like: PyTree = build(source.structure, lambda leaf: leaf)
            like = rebuild(like, lambda tree_path, _: places.leaf(tree_path, None))
            return restore(path, like, cast=True, pad=places.pad, timeout_s=self._timeout_s)
        skipped = {leaf.path for leaf in flatten(item)[0] if leaf.value is ...}
        like = rebuild(item, lambda tree_path, value: ... if value is ... else places.leaf(tree_path, value))
        part = getattr(wanted, "transforms", None) is not None  # {}: leaves that are not stored keep their values
        fewer = getattr(wanted, "partial_restore", False) or bool(skipped)
        names = {path_name(leaf.path) for leaf in flatten(like)[0] if leaf.path not in skipped}
        found = restore(
            path,
            _without(like, skipped),
            only=(lambda name: name in names) if fewer else None,
            partial=part,
            cast=True,
            pad=places.pad or not getattr(wanted, "strict", True),
            timeout_s=self._timeout_s,
        )
        if not skipped:
            return found
        values = {leaf.path: leaf.value for leaf in flatten(found)[0]}
        return rebuild(like, lambda tree_path, value: values.get(tree_path, value))

    def metadata(self, directory: Any) -> Any:
        """What Orbax tells of a checkpoint: its files are Orbax's own."""
        return ocp.StandardCheckpointHandler().metadata(directory)

    def finalize(self, directory: Any) -> None:
        """Nothing is left to do: a save of ours commits one database, whatever the number of processes."""

    def close(self) -> None:
        """Nothing is held open."""

    def _request(self, directory: Any, args: Any) -> Request:
        item = args.item
        if item is None:
            raise InvalidArgumentError(f"There is no item to save to {directory}: item=None.")
        return Request(
            path=str(directory),
            tree=item if args.save_args is None else _cast(item, args.save_args),
            metadata=dict(args.custom_metadata or {}),
            timeout_s=self._timeout_s,
        )


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclass
class Save(ocp.args.PyTreeSave):
    """What to save: ``item``, with ``save_args`` (their dtypes) and ``custom_metadata``."""


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclass
class Restore(ocp.args.PyTreeRestore):
    """How to restore: all that ``PyTreeRestore`` and ``StandardRestore`` know, but for transforms."""

    strict: bool = True
    fallback_sharding: Sharding | None = None


_BY_VALUES = (ocp.args.StandardRestore, Restore)  # others take only the structure from the scalars of an item


def registry(*items: str, handler: Handler | None = None) -> ocp.handlers.CheckpointHandlerRegistry:
    """For ``ocp.CheckpointManager(..., handler_registry=registry())``: trees go to this library, under any item name.

    Args:
        items: names of items whose metadata a new manager should tell before it has saved or restored any. Without
            names: the one item of a manager that has no names.
        handler: one with options of its own.

    Example:
        >>> registry("params", "opt_state").has("params", ocp.args.StandardSave)
        True
    """
    found = ocp.handlers.DefaultCheckpointHandlerRegistry()
    ours = handler or Handler()
    for item in (None, *(items or ("default",))):
        for args in (
            ocp.args.StandardSave,
            ocp.args.StandardRestore,
            ocp.args.PyTreeSave,
            ocp.args.PyTreeRestore,
            Save,
            Restore,
        ):
            found.add(item, args, ours)
    return found


class _Places:
    """Leaves of ``like`` from leaves of an item, restore arguments, and what is stored."""

    def __init__(self, source: Source, restore_args: PyTree, fallback: Sharding | None, *, by_values: bool) -> None:
        self.pad = False
        self._source, self._fallback, self._by_values = source, fallback, by_values
        stored = flatten(build(source.structure, lambda leaf: leaf))[0]
        self._stored = {path_name(leaf.path): source.leaves[leaf.value] for leaf in stored}
        asked = [] if restore_args is None else flatten(restore_args)[0]
        self._asked = {path_name(leaf.path): leaf.value for leaf in asked}

    def leaf(self, path: tuple[Any, ...], value: Any) -> Any:
        """What ``jaxckpt.restore`` takes for one leaf."""
        asked, entry = self._asked.get(path_name(path)), self._stored.get(path_name(path))
        if entry is None:
            return _described(value)
        dtype = getattr(asked, "dtype", None)
        kind: Any = getattr(asked, "restore_type", None)
        shape = entry.shape[:-1] if entry.kind == "prng_key" else entry.shape
        if isinstance(asked, ocp.ArrayRestoreArgs):
            wanted = asked.global_shape or asked.shape
            if wanted is not None:
                shape, self.pad = tuple(wanted), self.pad or not asked.strict
            sharding = _asked_sharding(asked)
            if sharding is not None or kind is None or issubclass(kind, jax.Array):
                return self._array(entry, shape, dtype, sharding)
        if kind is np.ndarray:
            return np.broadcast_to(np.zeros((), dtype or dtype_of(entry.dtype)), shape)
        if isinstance(kind, type) and kind in (int, float, bool, complex, str, bytes):
            return kind()
        if isinstance(value, ocp.metadata.value.Metadata):  # what ``metadata`` told
            found = _described(value)
            placed = isinstance(found, jax.ShapeDtypeStruct) and found.sharding is not None
            return found if placed and entry.kind == "array" else self._as_saved(entry, shape, dtype)
        if value is not None and (self._by_values or hasattr(value, "shape")):
            if isinstance(value, jax.ShapeDtypeStruct) and value.sharding is None:
                return self._array(entry, tuple(value.shape), value.dtype, None)
            return value
        return self._as_saved(entry, shape, dtype)

    def _as_saved(self, entry: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        if entry.kind in ("array", "prng_key"):
            return self._array(entry, shape, dtype, None)
        if entry.kind == "numpy" or entry.kind == "numpy_scalar":
            return np.broadcast_to(np.zeros((), dtype or dtype_of(entry.dtype)), shape)
        return {"bool": bool, "int": int, "float": float, "complex": complex, "str": str, "bytes": bytes}[entry.kind]()

    def _array(self, entry: Any, shape: tuple[int, ...], dtype: Any, sharding: Sharding | None) -> Any:
        if sharding is None and entry.stored:
            record = self._source.shardings[entry.sharding] if entry.sharding >= 0 else {}
            sharding = saved_sharding(record, entry) or self._fallback or default_sharding(entry)
        if entry.kind == "prng_key":
            key = jax.eval_shape(lambda: jax.random.key(0, impl=entry.prng_impl))
            return jax.ShapeDtypeStruct(shape, key.dtype, sharding=sharding)
        return jax.ShapeDtypeStruct(shape, dtype or dtype_of(entry.dtype), sharding=sharding)


def _only_args(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The argument object of a call, or one made from a call in the older style."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, ocp.args.CheckpointArgs)]
    if not given:
        return kind(*args, **{name: value for name, value in kwargs.items() if name != "args"})
    return given[0]


def _described(value: Any) -> Any:
    """Orbax's own descriptions of arrays (from ``metadata``) as JAX's."""
    if isinstance(value, ocp.metadata.ArrayMetadata):
        sharding: Any = value.sharding
        found = None if sharding is None else sharding.to_jax_sharding()
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=found)
    return value


def _asked_sharding(asked: Any) -> Sharding | None:
    if asked.sharding is not None:
        found: Any = asked.sharding
        return found if isinstance(found, Sharding) else found.to_jax_sharding()
    if asked.mesh is not None and asked.mesh_axes is not None:
        return NamedSharding(asked.mesh, asked.mesh_axes)
    return None


def _spans_processes(item: PyTree, restore_args: PyTree) -> bool:
    """Whether arrays over several processes are asked for."""
    if jax.process_count() == 1:
        return False
    leaves = [_described(leaf) for leaf in jax.tree.leaves(item)]
    asked = [one for one in jax.tree.leaves(restore_args) if isinstance(one, ocp.ArrayRestoreArgs)]
    found = [getattr(leaf, "sharding", None) for leaf in leaves] + [_asked_sharding(one) for one in asked]
    return any(isinstance(one, Sharding) and spans_processes(one) for one in found)


def _without(tree: PyTree, skipped: set[tuple[Any, ...]]) -> PyTree:
    """The tree with None, which is no leaf, in the place of what the caller does not want."""
    return rebuild(tree, lambda path, value: None if path in skipped else value) if skipped else tree


def _cast(item: PyTree, save_args: PyTree) -> PyTree:
    """The item in the dtypes that ``save_args`` ask for; leaves they say nothing of as they are."""
    leaves, treedef = jax.tree.flatten(item)
    asked = jax.tree.leaves(save_args, is_leaf=lambda leaf: leaf is None or isinstance(leaf, ocp.SaveArgs))
    if len(asked) != len(leaves):
        some = counted(len(asked), "leaf", "leaves")
        raise MismatchError(f"save_args has {some} and item has {len(leaves)}: they must be of one form.")

    def one(leaf: Any, args: Any) -> Any:
        wanted = getattr(args, "dtype", None)
        return leaf if wanted is None else leaf.astype(wanted) if hasattr(leaf, "astype") else np.asarray(leaf, wanted)

    return treedef.unflatten([one(leaf, args) for leaf, args in zip(leaves, asked, strict=True)])
