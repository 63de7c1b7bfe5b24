"""Restore a checkpoint: onto any mesh and number of processes, into numpy, whole or in part."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import Sharding

from jaxckpt.checkpoint.exchange import fill_together, is_shared, spans_processes
from jaxckpt.checkpoint.leaves import plain_value
from jaxckpt.checkpoint.match import Differences, Only, Places, prune, raise_on
from jaxckpt.checkpoint.place import Want, default_sharding, saved_sharding, want_like
from jaxckpt.checkpoint.source import OwnSource, Source, open_source
from jaxckpt.checkpoint.together import Together
from jaxckpt.coordination.session import TIMEOUT_S
from jaxckpt.core.dtypes import dtype_of
from jaxckpt.core.errors import InvalidArgumentError, MismatchError
from jaxckpt.core.events import Restored, StageEnded, emit, is_heard
from jaxckpt.core.text import counted
from jaxckpt.core.tree import NONE, build, children_of, flatten, path_name, rebuild
from jaxckpt.storage.url import Location, StorageOptions, location_text, open_store
from jaxckpt.transfer.upload import Allocation, Destination, Target, device_destination, host_destination

STAGING_BYTES = 32 * 1024 * 1024  # of a batch: two of them are the host memory beyond the restored arrays
Made = TypeVar("Made")
Chooser = Callable[[str, jax.ShapeDtypeStruct], Sharding | None]


def restore(
    path: Location,
    like: Any = None,
    *,
    only: Only = None,
    partial: bool = False,
    cast: bool = False,
    pad: bool = False,
    options: StorageOptions | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Any:
    """Restore a checkpoint of ours, or one that Orbax wrote.

    In a ``jax.distributed`` job all processes call it together, with the same arguments.

    Args:
        path: a folder or URL, as of ``save``.
        like: what to restore into.
            A tree of arrays or ``jax.ShapeDtypeStruct`` with shardings: leaves come back so placed, on any mesh; where
            it has numpy arrays or Python numbers, those come back. A function ``(name, spec) -> Sharding or None``
            places each array (None: numpy; ``spec.sharding`` is the one saved, where its devices exist here).
            None: the tree as it was saved, on the saved mesh where that exists here, else on this host's devices.
        only: restore these leaves alone, reading only their bytes: a name, a subtree (``"params"``), a glob, several of
            them, or a function of the name.
        partial: keep the values of ``like`` for leaves that the checkpoint lacks or has in another shape, and ignore
            leaves that ``like`` lacks.
        cast: convert to the dtypes of ``like``.
        pad: cut or zero-fill to the shapes of ``like`` (same number of dimensions).
        options: endpoint, region and credentials of object stores.
        timeout_s: how long to wait for another process, where they restore together.

    Returns:
        The tree. Its arrays own their memory and may be donated.

    Raises:
        NotFoundError, NotCommittedError: there is no (finished) checkpoint.
        MismatchError: lists all leaves that are missing, unexpected, or of the wrong shape, dtype or kind.
        CorruptionError: stored bytes are not those that were saved; names leaf, chunk and file.
        CoordinationError: a process died, or was not there in time; names it. What one process cannot read raises the
            same kind of error on all.

    Example:
        >>> from jaxckpt.checkpoint.save import save
        >>> save("memory://docs/restore", {"w": jax.numpy.ones((2, 3)), "step": 7})
        >>> restore("memory://docs/restore")["step"]
        7
    """
    start = time.perf_counter()

    def plan() -> _Plan:
        source = open_source(open_store(path, options))
        if is_tree(like):
            return _plan_like(source, like, only, partial=partial, cast=cast, pad=pad)
        return _plan_as_saved(source, like, only)

    if is_tree(like) and is_global(like):
        found = made_together(location_text(path), plan, timeout_s=timeout_s)
    else:
        found = plan()
    source = found.source
    step = source.sidecar.step if isinstance(source, OwnSource) else None
    if is_heard():
        seconds = time.perf_counter() - start
        emit(StageEnded(stage="plan", path=source.url, process=jax.process_index(), step=step, seconds=seconds))
    values, read_bytes = fetch(source, found.wants, timeout_s=timeout_s)
    result = found.assemble(values)
    seconds = time.perf_counter() - start
    emit(Restored(path=source.url, process=jax.process_index(), step=step, read_bytes=read_bytes, seconds=seconds))
    return result


def on_host(name: str, spec: jax.ShapeDtypeStruct) -> None:
    """For ``restore(path, on_host)``: every array as numpy (PRNG keys as their uint32 data).

    Example:
        >>> from jaxckpt.checkpoint.save import save
        >>> save("memory://docs/on_host", {"w": jax.numpy.ones((2, 3))})
        >>> type(restore("memory://docs/on_host", on_host)["w"]).__name__
        'ndarray'
    """
    return


class _Plan(NamedTuple):
    source: Source
    wants: list[Want]
    assemble: Callable[[list[Any]], Any]  # from the values of the wants to the tree


def is_tree(like: Any) -> bool:
    """Whether this is a tree to restore into, and not None or a function that places leaves."""
    # Modules of equinox and jax.tree_util.Partial are trees that can be called.
    function = callable(like) and not isinstance(like, jax.Array | jax.ShapeDtypeStruct) and children_of(like) is None
    return like is not None and not function


def is_global(like: Any) -> bool:
    """Whether leaves of ``like`` live on several processes: then all of them take part in the restore."""
    if jax.process_count() == 1:
        return False
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(like)]
    return any(sharding is not None and spans_processes(sharding) for sharding in shardings)


def made_together(url: str, make: Callable[[], Made], *, timeout_s: float = TIMEOUT_S) -> Made:
    """What ``make`` gives on this process, or an error on all if one of them has none: say, it cannot see the files."""
    with Together(url, timeout_s) as together:
        try:
            found = make()
        except Exception as error:
            together.agree(error)
            raise
        together.agree(None)
        return found


def _plan_as_saved(source: Source, choose: Chooser | None, only: Only) -> _Plan:
    places = Places(source.structure, only)
    if only is not None and not places.leaves:
        raise MismatchError(f"{source.url} has no leaf that matches only={only!r}. jaxckpt inspect shows its leaves.")
    wants = {leaf: want_saved(source, leaf, choose) for leaf in sorted(set(places.leaves.values()))}
    refuse_narrowing(source, wants.values())
    structure = source.structure
    if only is not None:
        structure = prune(structure, lambda leaf, path: path in places.leaves) or NONE

    def assemble(found: list[Any]) -> Any:
        return build(structure, dict(zip(wants, found, strict=True)).__getitem__)

    return _Plan(source, list(wants.values()), assemble)


def want_saved(source: Source, leaf: int, choose: Chooser | None) -> Want:
    """A leaf as it was saved, or as ``choose(name, spec)`` places it."""
    entry = source.leaves[leaf]
    if entry.kind not in ("array", "prng_key"):
        return Want(leaf=leaf)
    saved = saved_sharding(source.shardings[entry.sharding] if entry.sharding >= 0 else {}, entry)
    if choose is None:
        return Want(leaf=leaf, sharding=saved or default_sharding(entry))
    spec = jax.ShapeDtypeStruct(entry.shape, dtype_of(entry.dtype), sharding=saved)
    chosen = choose(entry.name, spec)
    if chosen is not None and not isinstance(chosen, Sharding):
        raise InvalidArgumentError(
            f'like("{entry.name}", spec) gave {chosen!r}; it must give a jax.sharding.Sharding or None.'
        )
    return Want(leaf=leaf, sharding=chosen)


def refuse_narrowing(source: Source, wants: Iterable[Want]) -> None:
    """Raise where a 64-bit leaf would be cut to 32 bits unsaid."""
    entries = [source.leaves[want.leaf] for want in wants if want.sharding is not None]
    wide = [e for e in entries if jax.dtypes.canonicalize_dtype(dtype_of(e.dtype)) != dtype_of(e.dtype)]
    if wide:
        shown = ", ".join(f'"{e.name}" ({e.dtype})' for e in wide[:5])
        raise MismatchError(
            f"{counted(len(wide), 'leaf', 'leaves')} of {source.url} would be cut from 64 to 32 bits as JAX arrays of "
            f"this process: {shown}. Nothing was restored: set jax_enable_x64, restore to numpy (jaxckpt.on_host), or "
            "give `like` and cast=True."
        )


def _plan_like(source: Source, like: Any, only: Only, *, partial: bool, cast: bool, pad: bool) -> _Plan:
    places = Places(source.structure, only)
    leaves, _ = flatten(like)
    differences, wants, used = Differences(), {}, set()
    for leaf in leaves:
        place = places.find(leaf.path)
        if place is None:
            differences.missing.append(path_name(leaf.path))
            continue
        used.add(place)
        want, wrong = want_like(source, places.leaves[place], leaf, cast=cast, pad=pad)
        if wrong:
            differences.wrong.append(wrong)
        else:
            wants[leaf.path] = want
    differences.unexpected = [path_name(path) for path in places.leaves if path not in used]
    if partial:
        _check_kept(source.url, leaves, wants)
    else:
        raise_on(differences, source.url, places, leaves)
    distinct = list(dict.fromkeys(wants.values()))  # tied leaves with one placement are one array again

    def assemble(found: list[Any]) -> Any:
        values = dict(zip(distinct, found, strict=True))
        return rebuild(like, lambda path, old: values[wants[path]] if path in wants else old)

    return _Plan(source, distinct, assemble)


def _check_kept(url: str, leaves: list, wants: dict) -> None:
    abstract = [leaf.name for leaf in leaves if leaf.path not in wants and isinstance(leaf.value, jax.ShapeDtypeStruct)]
    if abstract:
        raise MismatchError(
            f"{counted(len(abstract), 'leaf is', 'leaves are')} to keep the value of `like`, which is abstract there, "
            f"as {', '.join(abstract[:5])}: the checkpoint at {url} has none that fits. Give arrays there in `like`."
        )


class _Job(NamedTuple):
    want: Want
    place: int  # in the results
    destination: Destination


def fetch(source: Source, wants: list[Want], *, timeout_s: float = TIMEOUT_S) -> tuple[list[Any], int]:
    """The values of all wants, in batches that bound the host memory beyond them.

    While one batch is read, the destinations of the next one are made. Over several processes each batch is an exchange
    between all of them, so there one follows the other.
    """
    results: list[Any] = [None] * len(wants)
    stored: list[tuple[int, Want]] = []
    read_bytes = 0
    for place, want in enumerate(wants):
        if source.leaves[want.leaf].stored:
            stored.append((place, want))
        else:
            results[place] = want.convert(plain_value(source.leaves[want.leaf]))
    if jax.process_count() > 1 and any(map(is_shared, wants)):  # alike on all processes
        with Together(source.url, timeout_s) as together:
            for batch, _ in _batches(source, stored):
                read_bytes += _finish(source, batch, _fill(source, batch, together), results)
        return results, read_bytes
    with ThreadPoolExecutor(1, thread_name_prefix="jaxckpt-fill") as reader:
        before: tuple[list[_Job], Future[int]] | None = None
        for batch, is_last in _batches(source, stored):
            if is_last and before is None:  # nothing to make meanwhile, so no thread
                return results, _finish(source, batch, _fill(source, batch, None), results)
            if before is not None:
                done = before[1].result()
            reading = reader.submit(_fill, source, batch, None)
            if before is not None:
                read_bytes += _finish(source, before[0], done, results)
            before = (batch, reading)
        if before is not None:
            read_bytes += _finish(source, before[0], before[1].result(), results)
    return results, read_bytes


def _batches(source: Source, wants: list[tuple[int, Want]]) -> Iterator[tuple[list[_Job], bool]]:
    """The batches, and whether each is known to be the last."""
    batch: list[_Job] = []
    size, allocation = 0, Allocation()
    for place, want in wants:
        job = _Job(want, place, _destination(source, want, allocation))
        batch.append(job)
        size += _batch_bytes(source, job)
        if size >= STAGING_BYTES:
            allocation.make()
            yield batch, False
            batch, size, allocation = [], 0, Allocation()
    if batch:
        allocation.make()
        yield batch, True


def _batch_bytes(source: Source, job: _Job) -> int:
    """What a value adds to its batch. All processes must cut their batches alike, so there the whole leaf counts."""
    if jax.process_count() == 1:
        return job.destination.staged_bytes
    entry = source.leaves[job.want.leaf]
    return math.prod(entry.shape) * dtype_of(entry.dtype).itemsize // 4


def _destination(source: Source, want: Want, allocation: Allocation) -> Destination:
    entry = source.leaves[want.leaf]
    shape, dtype = want.shape or entry.shape, dtype_of(entry.dtype)
    zero = shape != entry.shape
    if want.sharding is None:
        return host_destination(shape, dtype, zero=zero)
    return device_destination(shape, dtype, want.sharding, allocation=allocation, cast=want.cast, zero=zero)


def _fill(source: Source, batch: list[_Job], together: Together | None) -> int:
    targets: dict[int, tuple[Target, ...]] = {}
    for job in batch:
        targets[job.want.leaf] = targets.get(job.want.leaf, ()) + job.destination.targets()
    if together is None:
        return source.fill(targets)
    if isinstance(source, OwnSource):
        return fill_together(source, targets, [job.want for job in batch], together)
    try:
        read_bytes = source.fill(targets)
    except Exception as error:
        together.agree(error)
        raise
    together.agree(None)
    return read_bytes


def _finish(source: Source, batch: list[_Job], read_bytes: int, results: list[Any]) -> int:
    for job in batch:
        entry = source.leaves[job.want.leaf]
        results[job.place] = job.want.convert(finished(entry, job.destination.finish(), job.want))
    return read_bytes


def finished(entry: Any, array: Any, want: Want) -> Any:
    """The leaf's own kind of value from the array that was read: a key, a scalar, or the array."""
    if want.sharding is not None:
        return jax.random.wrap_key_data(array, impl=entry.prng_impl) if entry.kind == "prng_key" else array
    if want.cast is not None:
        array = array.astype(want.cast)
    if entry.kind == "bytes":
        return array.tobytes()
    return array[()] if want.scalar or (entry.kind == "numpy_scalar" and not want.keep_array) else array


def read_leaf(source: Source, leaf: int) -> Any:
    """One leaf on the host (a PRNG key as its uint32 data)."""
    return fetch(source, [Want(leaf=leaf)])[0][0]
