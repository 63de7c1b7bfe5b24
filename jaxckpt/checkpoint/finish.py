"""The rest of a save, in any thread: write on all processes, agree, commit on process 0, or clean up.

Source of the design: the commit without collectives is torchsnapshot's idea of a store-based barrier that carries
errors.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any
from uuid import uuid4

import numpy as np

from jaxckpt.checkpoint import table
from jaxckpt.checkpoint.codecs import encoder
from jaxckpt.checkpoint.commit import Before, commit
from jaxckpt.checkpoint.leaves import Described, sharding_record
from jaxckpt.coordination.session import Session
from jaxckpt.core.errors import CheckpointError, CoordinationError
from jaxckpt.core.events import Committed, Flushed, Progress, SaveFailed, StageEnded, emit, is_heard
from jaxckpt.format.orbax_metadata import COMMIT_MARKER
from jaxckpt.format.sidecar import FILE_NAME
from jaxckpt.plan.save import SavePlan
from jaxckpt.storage.store import AbstractDataWriter, AbstractStore
from jaxckpt.transfer.feed import Feed, Piece
from jaxckpt.transfer.write import Written, write_chunks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """A save that has been planned and captured.

    ``later`` lands the pieces that are still on their way. ``attach`` is called on every process before it reports that
    it has written; ``seal`` on process 0 after the commit, before the others are told; ``undo`` there after a failure.
    """

    store: AbstractStore
    session: Session | None  # None: one process
    rank: int
    before: Before
    described: Described
    marks: table.Marks | None
    plan: SavePlan
    pieces: Feed | list[list[Piece]]
    later: Callable[[], None] | None
    lineage: dict[str, Any]
    start_ns: int
    timeout_s: float
    is_waited_for: bool  # by the caller
    attach: Callable[[], None] | None
    seal: Callable[[], str] | None  # returns where the checkpoint is now
    undo: Callable[[], None] | None


@dataclass(slots=True)
class _Sofar:
    """How far a save has come, for those who clean up after it."""

    opened: list[str]  # files that a failure now would leave
    stage: str = "write"


def finish(work: Work) -> None:
    """Make a save durable and commit it. When it fails, its space is given back and nothing else has changed."""
    sofar = _Sofar([])
    try:
        if work.session is None or work.marks is None:
            _publish(work, [_flush(work, sofar)], set(), sofar)
        else:
            _agree(work, work.session, work.marks, sofar)
    except Exception as error:
        _clean_up(work, sofar.opened, error)
        step = work.lineage.get("step")
        emit(SaveFailed(path=work.store.url, process=work.rank, step=step, stage=sofar.stage, error=error))
        raise
    finally:
        if isinstance(work.pieces, Feed):
            work.pieces.close()


def _agree(work: Work, session: Session, marks: table.Marks, sofar: _Sofar) -> None:
    """Write on all processes, commit on process 0 once all have written, end when it has."""
    committing = False
    try:
        session.enter("write")
        session.arrive("write", table.pack(_flush(work, sofar), marks))
        session.enter("commit")
        if work.rank == 0:
            start = time.perf_counter()
            told = session.collect("write", timeout_s=work.timeout_s)
            if is_heard():
                _tell(work, "wait for all", start)
            repeated = table.check_alike(told, work.described)
            committing = session.claim()
            if not committing:
                raise CoordinationError("Another process gave this save up before it was committed.")
            _publish(work, [table.unpack(data) for data in told], repeated, sofar)
            session.arrive("commit")
        else:
            _wait_for_commit(session, work.timeout_s)
    except Exception as error:
        if not committing and not session.abandon():
            # Process 0 may be committing these files right now: they stay, and the next save there sweeps them.
            sofar.opened.clear()
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


def _progress(work: Work, size: int) -> Callable[[int], None]:
    return lambda moved: emit(
        Progress(
            operation="save",
            path=work.store.url,
            process=work.rank,
            step=work.lineage.get("step"),
            moved_bytes=moved,
            total_bytes=size,
        )
    )


def _flush(work: Work, sofar: _Sofar) -> Written:
    """Write this process's chunks, beside whatever still lands, and what is attached to them."""
    start = time.perf_counter()
    store, plan = work.store, work.plan
    size = int(plan.load_bytes[work.rank])

    def open_file() -> AbstractDataWriter:
        sofar.opened.append(f"ocdbt.process_{work.rank}/d/{uuid4().hex}")
        return store.open_data(sofar.opened[-1])

    encoders = [None if e.zstd_level is None else encoder(e.zstd_level) for e in work.described.entries]
    parallel = store.parallel_io if work.is_waited_for or any(encoders) else store.background_io
    lander = None if work.later is None else Thread(target=work.later, name=f"jaxckpt-land {store.url}")
    if lander is not None:
        lander.start()
    try:
        written = write_chunks(
            open_file,
            plan,
            work.pieces,
            encoders=encoders,
            threads=parallel if size > 8 * 1024 * 1024 else 1,
            file_bytes=store.data_file_bytes,
            tell=_progress(work, size) if is_heard() else None,
        )
    except BaseException as error:
        if isinstance(work.pieces, Feed):
            work.pieces.fail(error)  # nobody waits for the rest
        raise
    finally:
        if lander is not None:
            lander.join()
    synced = time.perf_counter()
    store.sync()
    if is_heard():
        _tell(work, "sync", synced)
    if work.attach is not None:
        attached = time.perf_counter()
        work.attach()
        if is_heard():
            _tell(work, "extras", attached)
    emit(
        Flushed(
            path=store.url,
            process=work.rank,
            step=work.lineage.get("step"),
            size_bytes=int(written.length.sum()),
            seconds=time.perf_counter() - start,
        )
    )
    return written


def _tell(work: Work, stage: str, start: float) -> None:
    """Of a stage that has ended; called where somebody listens."""
    seconds = time.perf_counter() - start
    step = work.lineage.get("step")
    emit(StageEnded(stage=stage, path=work.store.url, process=work.rank, step=step, seconds=seconds))


def _publish(work: Work, tables: list[Written], repeated: set[int], sofar: _Sofar) -> None:
    """Commit what all processes have written; of the leaves ``repeated``, what process 0 has."""
    sofar.stage = "commit"
    sofar.opened = [name for written in tables for name in written.files]
    shardings: list[dict[str, Any]] = []
    known: dict[Any, int] = {}
    entries = []
    for entry, spec, chunk in zip(work.described.entries, work.described.specs, work.plan.chunks, strict=True):
        place = -1
        if spec.sharding is not None:
            place = known.setdefault(spec.sharding, len(shardings))
            if place == len(shardings):
                shardings.append(sharding_record(spec.sharding))
        entries.append(replace(entry, chunk=chunk, sharding=place) if entry.stored else entry)
    start = time.perf_counter()
    files, chunks = table.join(tables, entries, repeated)
    commit(
        work.store,
        work.described,
        entries,
        files,
        chunks,
        before=work.before,
        shardings=tuple(shardings),
        start_ns=work.start_ns,
        now_ns=time.time_ns(),
        lineage=work.lineage,
    )
    if is_heard():
        _tell(work, "commit", start)
    url = work.store.url
    if work.seal is not None:
        start = time.perf_counter()
        url = work.seal()
        if is_heard():
            _tell(work, "seal", start)
    emit(
        Committed(
            path=url,
            step=work.lineage.get("step"),
            size_bytes=int(np.sum(chunks.length, dtype=np.int64)),
            seconds=(time.time_ns() - work.start_ns) / 1e9,
        )
    )


def _clean_up(work: Work, opened: list[str], error: Exception) -> None:
    """Give back the space of a failed save, unless it turns out to have committed."""
    store, before = work.store, work.before
    try:
        if work.undo is not None and work.rank == 0:  # who alone commits, and has not
            work.undo()
            return
        if before.committed:
            sidecar = store.read(FILE_NAME) if store.exists(FILE_NAME) else b""
            committed = any(name.encode() in sidecar for name in opened)
        else:
            committed = store.exists(COMMIT_MARKER)
        if committed:
            error.add_note(f"The checkpoint at {store.url} was committed before this error and is whole.")
        elif work.session is None and not before.names:
            store.delete_prefix("")
        else:
            for name in opened:
                store.delete(name)
    except CheckpointError as second:
        error.add_note(f"What the failed save left at {store.url} could not be removed: {second}")
