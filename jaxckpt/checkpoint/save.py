"""Save a tree: what happens before the caller may go on. The rest is in ``finish``.

Source of the design: planning without communication follows from JAX's global shardings; splitting replicated bytes
among their holders and reading back with any sharding are ByteCheckpoint's (NSDI 2025, sections 3.2 and 4.1).
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

from jaxckpt.checkpoint import table
from jaxckpt.checkpoint.commit import examine
from jaxckpt.checkpoint.finish import Work, finish
from jaxckpt.checkpoint.leaves import Compression, Described, describe
from jaxckpt.checkpoint.lineage import Lineage, lineage_record
from jaxckpt.checkpoint.pending import PendingSave
from jaxckpt.coordination.jax_client import current_coordinator
from jaxckpt.coordination.session import TIMEOUT_S, Session, session_name
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.events import Captured, SaveSkipped, StageEnded, emit, is_heard
from jaxckpt.plan.save import SavePlan, plan_save
from jaxckpt.storage.url import Location, StorageOptions, location_text, open_store
from jaxckpt.transfer.capture import MODES, Landing, Mode, capture_tree, capture_waiting
from jaxckpt.transfer.in_step import Snapshot
from jaxckpt.transfer.staging import STAGING, default_budget_bytes


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
        >>> import numpy as np
        >>> save("memory://docs/save", {"w": np.ones((2, 3)), "step": 7})
    """
    what = Request(
        path=path,
        tree=tree,
        overwrite=overwrite,
        step=step,
        metadata=metadata,
        parents=parents,
        compression=compression,
        options=options,
        timeout_s=timeout_s,
    )
    begin(what, None).finish()


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
    capture: Mode = "auto",
    when_busy: Literal["wait", "skip"] = "wait",
    host_budget_bytes: int | None = None,
    device_budget_bytes: int | None = None,
) -> PendingSave:
    """Save a tree in the background. The tree is captured when this returns: donate or change it freely.

    Other arguments and errors are those of ``save``; errors of the background part come from ``PendingSave.result``.

    Args:
        path: see ``save``.
        tree: see ``save``; also the ``Snapshot`` that a step wrapped by ``with_capture`` returns.
        overwrite: see ``save``.
        step: see ``save``.
        metadata: see ``save``.
        parents: see ``save``.
        compression: see ``save``.
        options: see ``save``.
        timeout_s: see ``save``.
        capture: how the tree is made safe; all give the same bytes. "auto": no copy on CPU, "pinned" elsewhere.
            "pinned": to host memory, and the call waits for it. "clone": copied on the devices, moved while training
            goes on. "split": transfers are queued and training goes on at once, until a step that donates the tree,
            which XLA holds back until they are done: call it before the gradient step of a loop whose update is a
            step of its own. "in_step": for a snapshot of ``with_capture``.
        when_busy: what to do where earlier saves hold so much host memory that this one would have to wait: wait, or
            skip it (``state`` is "skipped", and a ``SaveSkipped`` event tells). Process 0 decides for all.
        host_budget_bytes: host memory for the captured bytes of all saves of this process; give each process of a
            host its share. None: half of the machine's memory. A larger tree passes through it piece by piece, while
            this call waits.
        device_budget_bytes: device memory for "clone", per device. None: half of what is free. What does not fit is
            moved before the call returns.

    Example:
        >>> import numpy as np
        >>> pending = save_async("memory://docs/async", {"w": np.ones(3)})
        >>> pending.result(timeout_s=60)
        >>> pending.state
        'durable'
    """
    started = time.perf_counter()
    what = Request(
        path=path,
        tree=tree,
        overwrite=overwrite,
        step=step,
        metadata=metadata,
        parents=parents,
        compression=compression,
        options=options,
        timeout_s=timeout_s,
    )
    budget = default_budget_bytes() if host_budget_bytes is None else host_budget_bytes
    hold = Hold(mode=capture, when_busy=when_busy, budget_bytes=budget, device_budget_bytes=device_budget_bytes)
    return start(what, hold, started)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to save, where to, and what else belongs to it.

    ``attach`` is called on every process, in the background part, before it reports that it has written; ``seal`` on
    process 0 after the commit, before the others are told, and returns where the checkpoint is then. What they raise
    fails the save. ``undo`` is called there when the save has failed, and removes all of it.
    """

    path: Location
    tree: Any
    overwrite: bool = False
    step: int | None = None
    metadata: dict[str, Any] | None = None
    parents: Sequence[Lineage] = ()
    compression: Compression = None
    options: StorageOptions | None = None
    timeout_s: float = TIMEOUT_S
    attach: Callable[[], None] | None = None
    seal: Callable[[], str] | None = None
    undo: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """How the tree of a save in the background is held: the arguments of ``save_async``."""

    mode: Mode = "auto"
    when_busy: Literal["wait", "skip"] = "wait"
    budget_bytes: int
    device_budget_bytes: int | None = None


class Begun(NamedTuple):
    """A save that has begun: ``capture`` runs before the caller may go on, ``finish`` in any thread."""

    finish: Callable[[], None]
    capture: Callable[[], None] | None = None
    rank: int = 0
    size_bytes: int = 0
    skipped: bool = False


def start(what: Request, hold: Hold, started: float) -> PendingSave:
    """Begin a save and leave the rest of it to a thread. ``started`` is when the caller began to be blocked."""
    where = location_text(what.path)
    begun = begin(what, hold)
    pending = PendingSave(where, None if begun.skipped else begun.finish)
    if begun.skipped:
        emit(SaveSkipped(path=where, step=what.step, reason="earlier saves hold the host memory that it needs"))
        return pending
    if begun.capture is not None:
        begun.capture()  # what goes wrong here fails the save, and comes from result()
    emit(
        Captured(
            path=where,
            process=begun.rank,
            step=what.step,
            size_bytes=begun.size_bytes,
            seconds=time.perf_counter() - started,
        )
    )
    return pending


def begin(what: Request, hold: Hold | None) -> Begun:
    """Plan and capture a save; ``hold`` is None where the caller waits until it has finished."""
    start_ns = time.time_ns()
    snapshot = what.tree if isinstance(what.tree, Snapshot) else None
    if hold is not None:
        _check(hold, snapshot)
    coordinator = current_coordinator()
    rank = coordinator.rank
    session = Session(coordinator, session_name(location_text(what.path))) if coordinator.size > 1 else None
    try:
        if session is not None:
            session.enter("capture")
        store = open_store(what.path, what.options)
        before = examine(store, overwrite=what.overwrite)
        with _collector_paused():
            described = describe(what.tree if snapshot is None else snapshot.tree, what.compression)
            if snapshot is not None:
                described = _as_before(described, snapshot)
            plan = _planned(tuple(described.specs), rank=rank, processes=coordinator.size)
        marks = None if session is None else table.marks(described)
        lineage = lineage_record(what.step, what.metadata, what.parents, processes=coordinator.size)
        size = int(plan.load_bytes[rank])
        if is_heard():
            seconds = (time.time_ns() - start_ns) / 1e9
            emit(StageEnded(stage="plan", path=store.url, process=rank, step=what.step, seconds=seconds))
        if hold is None:
            with _collector_paused():
                landing = capture_waiting(described.arrays, plan)
        else:
            room = _admit(session, rank, size, hold, what.timeout_s)
            if room is None:
                return Begun(lambda: None, skipped=True)
            landing = _captured(described.arrays, plan, hold, room)
    except BaseException as error:
        if session is not None:
            session.fail(error)
            session.close()
        raise
    work = Work(
        store=store,
        session=session,
        rank=rank,
        before=before,
        described=described._replace(arrays=[]),  # the pieces hold the bytes from here on
        marks=marks,
        plan=plan,
        pieces=landing.pieces,
        later=landing.later,
        lineage=lineage,
        start_ns=start_ns,
        timeout_s=what.timeout_s,
        is_waited_for=hold is None,
        attach=what.attach,
        seal=what.seal,
        undo=what.undo,
    )
    return Begun(partial(finish, work), landing.now, rank, size)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Thousands of new records would wake Python's collector, which walks through all that the program holds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_planned = lru_cache(maxsize=8)(plan_save)


def _check(hold: Hold, snapshot: Snapshot | None) -> None:
    if hold.mode not in MODES:
        raise InvalidArgumentError(f"capture={hold.mode!r} is none of {', '.join(MODES)}.")
    if hold.when_busy not in ("wait", "skip"):
        raise InvalidArgumentError(f'when_busy={hold.when_busy!r} is neither "wait" nor "skip".')
    if hold.budget_bytes <= 0:
        raise InvalidArgumentError(f"host_budget_bytes={hold.budget_bytes} leaves no memory to capture into.")
    if hold.mode == "in_step" and snapshot is None:
        raise InvalidArgumentError(
            'capture="in_step" saves what a step captured: wrap the step, step = jaxckpt.with_capture(step), and pass '
            "the second value of step.capture(state, ...) in place of the tree."
        )
    if hold.mode not in ("auto", "in_step") and snapshot is not None:
        raise InvalidArgumentError(
            f'capture={hold.mode!r} was asked for a snapshot of with_capture, which is captured: leave it "auto".'
        )


def _as_before(described: Described, snapshot: Snapshot) -> Described:
    """Entries and specs that tell where the arrays of a snapshot lay before the step took them to the host."""
    entries, specs = list(described.entries), list(described.specs)
    for i, array in enumerate(described.arrays):
        home = snapshot.shardings.get(id(array))
        if home is not None:
            entries[i] = replace(entries[i], memory_kind=home.memory_kind or "")
            specs[i] = replace(specs[i], sharding=home)
    return described._replace(entries=entries, specs=specs)


def _admit(session: Session | None, rank: int, size: int, hold: Hold, timeout_s: float) -> int | None:
    """Room for the bytes of this process; None where the save is skipped, on all processes or on none."""
    wait = hold.when_busy == "wait"
    if session is None or wait:
        return STAGING.admit(size, hold.budget_bytes, wait=wait)
    if rank == 0:
        room = STAGING.admit(size, hold.budget_bytes, wait=False)
        session.arrive("admit", b"skip" if room is None else b"go")
    elif session.wait("admit", rank=0, timeout_s=timeout_s) == b"go":
        room = STAGING.admit(size, hold.budget_bytes, wait=True)
    else:
        room = None
    if room is None:
        session.close()
    return room


def _captured(arrays: list[Any], plan: SavePlan, hold: Hold, room_bytes: int) -> Landing:
    try:
        with _collector_paused():
            return capture_tree(
                arrays,
                plan,
                mode=hold.mode,
                room_bytes=room_bytes,
                budget_bytes=hold.budget_bytes,
                device_budget_bytes=hold.device_budget_bytes,
            )
    except BaseException:
        STAGING.give_back(room_bytes)
        raise
