"""Save a tree: the whole flow on one screen.

Source of the design: planning without communication follows from JAX's global shardings; splitting replicated bytes
among their holders and reading back with any sharding are ByteCheckpoint's (NSDI 2025, sections 3.2 and 4.1); the
commit without collectives is torchsnapshot's idea of a store-based barrier that carries errors.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

import numpy as np

from jaxckpt.checkpoint import table
from jaxckpt.checkpoint.codecs import encoder
from jaxckpt.checkpoint.commit import Before, commit, examine
from jaxckpt.checkpoint.leaves import Compression, Described, describe, sharding_record
from jaxckpt.checkpoint.lineage import Lineage, lineage_record
from jaxckpt.checkpoint.pending import PendingSave
from jaxckpt.coordination.jax_client import current_coordinator
from jaxckpt.coordination.session import Session, session_name
from jaxckpt.core.errors import CheckpointError, CoordinationError
from jaxckpt.core.events import Committed, Flushed, emit
from jaxckpt.format.orbax_metadata import COMMIT_MARKER
from jaxckpt.format.sidecar import FILE_NAME
from jaxckpt.plan.save import SavePlan, plan_save
from jaxckpt.storage.store import AbstractDataWriter, AbstractStore
from jaxckpt.storage.url import Location, StorageOptions, location_text, open_store
from jaxckpt.transfer.capture import Piece, capture
from jaxckpt.transfer.write import Written, write_chunks

TIMEOUT_S = 600.0


def save(
    path: Location,
    tree: Any,
    *,
    overwrite: bool = False,
    step: int | None = None,
    metadata: dict[str, Any] | None = None,
    parents: Sequence[Lineage] = (),
    compression: Compression = None,
    options: StorageOptions | None = None,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Save a tree. The checkpoint is durable and committed when this returns.

    All processes of a ``jax.distributed`` job call it together, with the same path and tree.

    Args:
        path: a folder (relative, absolute, ``file://``) or a ``gs://``, ``s3://`` or ``memory://`` URL.
        tree: any pytree of jax and numpy arrays, typed PRNG keys, Python numbers, strings, bytes and None.
        overwrite: replace a checkpoint that is there; the old one stays whole until the new one commits.
        step: recorded, and shown by ``inspect``.
        metadata: JSON values of your own.
        parents: checkpoints that this one was made from (``Lineage(path=..., weight=...)``).
        compression: None, a zstd level (-7..22) for all arrays, a dict of name globs to levels, or a function
            ``(name, ShapeDtypeStruct) -> level or None``.
        options: endpoint, region and credentials of object stores.
        timeout_s: how long to wait for other processes.

    Raises:
        AlreadyExistsError: something is at ``path``; nothing was changed.
        UnsupportedLeafError: lists the leaves that cannot be saved.
        StorageError: the storage failed (disk full, network); what was written is removed.
        CoordinationError: another process failed or did not come in time; names it and its stage.

    Example:
        >>> save("memory://docs/save", {"w": np.ones((2, 3)), "step": 7})
    """
    begin(path, tree, overwrite, step, metadata, parents, compression, options, timeout_s, frozen=False)()


def save_async(
    path: Location,
    tree: Any,
    *,
    overwrite: bool = False,
    step: int | None = None,
    metadata: dict[str, Any] | None = None,
    parents: Sequence[Lineage] = (),
    compression: Compression = None,
    options: StorageOptions | None = None,
    timeout_s: float = TIMEOUT_S,
) -> PendingSave:
    """Save a tree in the background. The tree is captured when this returns: donate or change it freely.

    Arguments and errors are those of ``save``; errors of the background part come from ``PendingSave.result``.

    Example:
        >>> pending = save_async("memory://docs/async", {"w": np.ones(3)})
        >>> pending.result(timeout_s=60)
        >>> pending.state
        'durable'
    """
    work = begin(path, tree, overwrite, step, metadata, parents, compression, options, timeout_s, frozen=True)
    return PendingSave(location_text(path), work)


def begin(
    path: Location,
    tree: Any,
    overwrite: bool,
    step: int | None,
    metadata: dict[str, Any] | None,
    parents: Sequence[Lineage],
    compression: Compression,
    options: StorageOptions | None,
    timeout_s: float,
    *,
    frozen: bool,
) -> Callable[[], None]:
    """Capture a tree, and return the rest of the save as a function to call in any thread."""
    start_ns = time.time_ns()
    coordinator = current_coordinator()
    session = Session(coordinator, session_name(location_text(path))) if coordinator.size > 1 else None
    try:
        if session is not None:
            session.enter("capture")
        store = open_store(path, options)
        before = examine(store, overwrite=overwrite)
        described = describe(tree, compression)
        plan = plan_save(described.specs, rank=coordinator.rank, processes=coordinator.size)
        pieces = capture(described.arrays, plan, frozen=frozen)
        lineage = lineage_record(step, metadata, parents, processes=coordinator.size)
    except BaseException as error:
        if session is not None:
            session.fail(error)
            session.close()
        raise
    described = described._replace(arrays=[])  # the pieces hold the bytes from here on
    opened: list[str] = []

    def flush() -> Written:
        return _flush(store, described, plan, pieces, coordinator.rank, opened)

    def publish(tables: list[Written]) -> None:
        opened[:] = [name for written in tables for name in written.files]  # all that a failure now would leave
        _commit(store, described, plan, tables, before, lineage, start_ns)

    def finish() -> None:
        try:
            if session is None:
                publish([flush()])
            else:
                _agree(session, coordinator.rank, described, flush, publish, opened, timeout_s)
        except Exception as error:
            _clean_up(store, before, opened, error, alone=session is None)
            raise

    return finish


def _agree(
    session: Session,
    rank: int,
    described: Described,
    flush: Callable[[], Written],
    publish: Callable[[list[Written]], None],
    opened: list[str],
    timeout_s: float,
) -> None:
    """Write on all processes, commit on process 0 once all have written, end when it has."""
    committing = False
    try:
        session.enter("write")
        session.arrive("write", table.pack(flush(), table.marks(described)))
        session.enter("commit")
        if rank == 0:
            told = session.collect("write", timeout_s=timeout_s)
            table.check_alike([table.unpack_marks(data) for data in told], described)
            committing = session.claim()
            if not committing:
                raise CoordinationError("Another process gave this save up before it was committed.")
            publish([table.unpack(data) for data in told])
            session.arrive("commit")
        else:
            _wait_for_commit(session, timeout_s)
    except Exception as error:
        if not committing and not session.abandon():
            # Process 0 may be committing these files right now: they stay, and the next save there sweeps them.
            opened.clear()
        session.fail(error)
        raise
    finally:
        session.close()


def _wait_for_commit(session: Session, timeout_s: float) -> None:
    try:
        session.wait("commit", rank=0, timeout_s=timeout_s)
    except CoordinationError:
        # If some process has not written, it is to blame, and not process 0, which waits for it as well.
        session.collect("write", timeout_s=0)
        raise


def _flush(
    store: AbstractStore, described: Described, plan: SavePlan, pieces: list[list[Piece]], rank: int, opened: list[str]
) -> Written:
    start = time.perf_counter()

    def open_file() -> AbstractDataWriter:
        opened.append(f"ocdbt.process_{rank}/d/{uuid4().hex}")
        return store.open_data(opened[-1])

    written = write_chunks(
        open_file,
        plan,
        pieces,
        encoders=[None if e.zstd_level is None else encoder(e.zstd_level) for e in described.entries],
        threads=store.parallel_io if int(plan.load_bytes[rank]) > 8 * 1024 * 1024 else 1,
        file_bytes=store.data_file_bytes,
    )
    store.sync()
    emit(
        Flushed(path=store.url, process=rank, size_bytes=int(written.length.sum()), seconds=time.perf_counter() - start)
    )
    return written


def _commit(
    store: AbstractStore,
    described: Described,
    plan: SavePlan,
    tables: list[Written],
    before: Before,
    lineage: dict[str, Any],
    start_ns: int,
) -> None:
    shardings: list[dict[str, Any]] = []
    known: dict[Any, int] = {}
    entries = []
    for entry, spec, chunk in zip(described.entries, described.specs, plan.chunks, strict=True):
        place = -1
        if spec.sharding is not None:
            place = known.setdefault(spec.sharding, len(shardings))
            if place == len(shardings):
                shardings.append(sharding_record(spec.sharding))
        entries.append(replace(entry, chunk=chunk, sharding=place) if entry.stored else entry)
    files, chunks = table.join(tables, entries)
    commit(
        store,
        described,
        entries,
        files,
        chunks,
        before=before,
        shardings=tuple(shardings),
        start_ns=start_ns,
        now_ns=time.time_ns(),
        lineage=lineage,
    )
    size = int(np.sum(chunks.length, dtype=np.int64))
    emit(
        Committed(path=store.url, size_bytes=size, seconds=(time.time_ns() - start_ns) / 1e9, step=lineage.get("step"))
    )


def _clean_up(store: AbstractStore, before: Before, opened: list[str], error: Exception, *, alone: bool) -> None:
    """Give back the space of a failed save, unless it turns out to have committed."""
    try:
        if before.committed:
            sidecar = store.read(FILE_NAME) if store.exists(FILE_NAME) else b""
            committed = any(name.encode() in sidecar for name in opened)
        else:
            committed = store.exists(COMMIT_MARKER)
        if committed:
            error.add_note(f"The checkpoint at {store.url} was committed before this error and is whole.")
        elif alone and not before.names:
            store.delete_prefix("")
        else:
            for name in opened:
                store.delete(name)
    except CheckpointError as second:
        error.add_note(f"What the failed save left at {store.url} could not be removed: {second}")
