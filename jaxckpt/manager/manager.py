"""The checkpoints of a run: saves steps in the background, keeps those that a policy wants, resumes from the newest.

In a job of several processes all call the same methods in the same order. Process 0 decides and tells the others: what
is due by its clock, how saves ended, what is deleted, where to resume. ``all_steps``, ``latest_step`` and ``best_step``
only look, and may be called by any process alone: they tell what process 0 saw when all were last told.
"""

import time
import warnings
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, final

from jaxckpt.checkpoint.leaves import Compression
from jaxckpt.checkpoint.restore import restore
from jaxckpt.checkpoint.save import TIMEOUT_S, Hold, Request, start
from jaxckpt.coordination.jax_client import current_coordinator
from jaxckpt.core.errors import (
    AlreadyExistsError,
    CheckpointError,
    CoordinationError,
    CorruptionError,
    InvalidArgumentError,
    NotFoundError,
)
from jaxckpt.manager import extras as extra_files
from jaxckpt.manager.agreement import Agreement
from jaxckpt.manager.keeper import Keeper
from jaxckpt.manager.policies import KeepPolicy, SaveContext, SavePolicy, every, ranked
from jaxckpt.manager.steps import ITEM, find_steps
from jaxckpt.manager.triggers import Measure, Triggers
from jaxckpt.storage.url import Location, StorageOptions, open_store
from jaxckpt.transfer.capture import Mode
from jaxckpt.transfer.staging import default_budget_bytes

if TYPE_CHECKING:
    from jaxckpt.checkpoint.pending import PendingSave


@final
class CheckpointManager:
    """Saves, keeps and finds the steps of a run, in folders that Orbax's manager reads.

    Args:
        root: a folder or URL that all processes see; steps lie in ``root/<step>``.
        save: when to save; ``force=True`` of ``save`` overrules it.
        keep: what to keep; None: everything. The newest step is always kept.
        compression: of every step, as of ``jaxckpt.save``.
        capture: how trees are captured, as of ``jaxckpt.save_async``.
        when_busy: "wait", or "skip" a save for which earlier ones leave no host memory; ``save`` returns False then.
        host_budget_bytes: host memory for captured bytes, as of ``jaxckpt.save_async``.
        options: endpoint, region and credentials of object stores.
        timeout_s: how long to wait for other processes.

    Example:
        >>> import numpy as np
        >>> from jaxckpt.manager.policies import latest
        >>> with CheckpointManager("memory://docs/run", keep=latest(2)) as manager:
        ...     saved = [manager.save(step, {"w": np.full(3, step)}) for step in range(4)]
        >>> manager.all_steps()
        [2, 3]
    """

    def __init__(
        self,
        root: Location,
        *,
        save: SavePolicy | None = None,
        keep: KeepPolicy | None = None,
        compression: Compression = None,
        capture: Mode = "auto",
        when_busy: Literal["wait", "skip"] = "wait",
        host_budget_bytes: int | None = None,
        options: StorageOptions | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._root = open_store(root, options)
        self._save = save or every(steps=1)
        self._compression, self._timeout_s = compression, timeout_s
        budget = default_budget_bytes() if host_budget_bytes is None else host_budget_bytes
        self._hold = Hold(mode=capture, when_busy=when_busy, budget_bytes=budget)
        self._agreement = Agreement(current_coordinator(), f"manager of {self._root.url}", timeout_s)
        self._keeper = Keeper(self._root, keep)
        self._running: dict[int, PendingSave] = {}
        self._states: dict[int, str] = {}
        self._due: int | None = None  # the step that the policy was last found to want
        self._closed = False
        if self._agreement.leads:
            self._keeper.sweep()
        self._told: list[int] = self._agreement.told("the steps that exist", self._exist)
        newest = max(self._told, default=None)
        self._history: list[tuple[int | None, float]] = [(newest, time.monotonic())]  # of saves that did not fail
        self._triggers = Triggers(getattr(self._save, "triggers", ()))
        self._measure = Measure()

    @property
    def preempted(self) -> bool:
        """Whether the job is to end: the step that all processes save has been reached. Leave the loop then."""
        return self._triggers.preempted

    def explain(self) -> str:
        """Why ``optimal`` saves as often as it does; empty without it."""
        return self._triggers.explain()

    def should_save(self, step: int) -> bool:
        """Whether the policy wants this step; every process asks at the same steps. Once wanted, it stays wanted."""
        now = time.monotonic()
        self._measure.step(step, now)
        latest_step, saved_at = self._history[-1]
        fired = self._triggers.fired(step, latest_step)
        context = SaveContext(
            step=step,
            latest_step=latest_step,
            since_save_s=now - saved_at,
            preempting=self._triggers.preempted,
            stall_s=self._measure.stall_s,
            save_s=self._measure.save_s,
            step_s=self._measure.step_s,
            fired=fired,
        )
        wants = partial(self._save.should_save, context)
        alike = not getattr(self._save, "needs_agreement", True)
        if wants() if alike else self._agreement.told(f"whether to save step {step}", wants):
            self._due = step
        return self._due == step

    def save(
        self,
        step: int,
        tree: Any,
        *,
        metrics: Mapping[str, float] | None = None,
        extras: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> bool:
        """Save in the background if the policy wants this step; whether it does. The tree is captured on return.

        Args:
            step: its number.
            tree: what to save.
            metrics: numbers by name, for ``best``.
            extras: what each process keeps for itself, by name: data iterators, generators of random numbers and other
                objects with ``get_state`` and ``set_state``, JSON values, bytes. Their states are taken now.
            force: whatever the policy says.

        Raises:
            AlreadyExistsError: the step exists, is being saved, or another live run is writing it.
            CheckpointError: an earlier save failed, told once, on all processes; nothing was begun.
        """
        started = time.perf_counter()
        wanted = self.should_save(step) or force  # asked when forced as well: triggers are to see every step
        if wanted or self._agreement.alone:
            self._settle()
        if not wanted:
            return False
        request = self._request(step, tree, metrics, extras)
        self._agreement.told(f"room for step {step}", partial(self._make_room, step))
        try:
            pending = start(request, self._hold, started)
        except BaseException:
            self._abandon(step)
            raise
        if pending.state == "skipped":
            self._abandon(step)
            return False
        self._running[step], self._states[step] = pending, "captured"
        self._history.append((step, time.monotonic()))
        return True

    def poll(self) -> dict[int, str]:
        """The state of each step that this manager saved: "captured", "durable" or "failed". Raises as ``save``."""
        self._settle()
        return dict(self._states)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until all saves have ended. Raises as ``save``; TimeoutError: they go on."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        late = []
        for step, pending in self._running.items():
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not pending.wait(left):
                late.append(step)
        late = self._agreement.told("which saves go on", lambda: late)
        self._settle(look=True)
        if late:
            raise TimeoutError(f"Step {late[0]} of {self._root.url} is not durable after {timeout_s} s; it goes on.")

    def close(self) -> None:
        """Wait for all saves and put signal handlers back. Raises as ``save``."""
        if self._closed:
            return
        try:
            self.wait()
        finally:
            self._release()

    def resume(
        self, like: Any = None, *, extras: Mapping[str, Any] | None = None, fallback: bool = False
    ) -> tuple[int | None, Any]:
        """The newest step and its tree; ``(None, like)`` where there is none. Errors as of ``jaxckpt.restore``.

        Args:
            like: as of ``jaxckpt.restore``.
            extras: objects to fill, see ``restore_extras``.
            fallback: pass over steps that are damaged, with a RuntimeWarning each. Such a step is replaced when
                training comes to save it again.

        Raises:
            CorruptionError: the newest step (with ``fallback`` every step) is damaged; names leaf and file.
        """
        self._told = self._agreement.told("the steps to resume from", self._exist)
        steps = self._told[::-1]
        for step, before in zip(steps, [*steps, None][1:], strict=True):
            try:
                return step, self._restore_together(step, like, extras)
            except CorruptionError as error:
                other = "there is no step before it" if before is None else f"the step before it is {before}"
                text = f"Step {step} of {self._root.url} is damaged, and {other}: {error}"
                if not fallback or before is None:
                    hint = "" if before is None else f" Next step: resume(like, fallback=True) takes step {before}."
                    raise CorruptionError(text + hint) from error
                warnings.warn(f"{text} Resuming from step {before}.", RuntimeWarning, stacklevel=2)
                self._keeper.damaged.add(step)
        return None, like

    def restore_extras(self, step: int, extras: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Give objects the states they had at a step, on this process; returns the states by name.

        Args:
            step: one that exists.
            extras: name -> object to fill, or any other value to only have what was saved. None: all that were saved.

        Raises:
            NotFoundError: no such step, or no extras of that name in it.
            MismatchError: another number of processes saved them, their states differ, and the object has no
                ``set_states``, which would get the states of all.
            CorruptionError: what is stored is damaged.
        """
        folder = self._root.child(self._keeper.folder(step))
        return extra_files.restore_extras(folder, extras, self._agreement.rank, self._agreement.size)

    def restore(self, step: int, like: Any = None) -> Any:
        """The tree of a step; ``like`` and errors as of ``jaxckpt.restore``. NotFoundError tells which there are."""
        return restore(self._root.child(f"{self._keeper.folder(step)}/{ITEM}"), like)

    def all_steps(self) -> list[int]:
        """Steps that exist, ascending."""
        return self._exist() if self._agreement.alone else list(self._told)

    def latest_step(self) -> int | None:
        """The newest step that exists."""
        return max(self.all_steps(), default=None)

    def best_step(self, metric: str, mode: Literal["min", "max"] = "min") -> int | None:
        """The step best in a metric, of equals the newer; None where no step has metrics.

        Raises:
            InvalidArgumentError: steps have metrics, and none has this one; names those there are.
        """
        steps = set(self.all_steps())
        found = [one for one in self._keeper.records() if one.step in steps]
        known = sorted({name for one in found for name in one.metrics or {}})
        if known and metric not in known:
            raise InvalidArgumentError(f"No step of {self._root.url} has a metric {metric!r}: there are {known}.")
        return next(iter(ranked(found, metric, mode)), None)

    def delete(self, step: int) -> None:
        """Delete a step, its marker first. NotFoundError where there is none."""

        def decide() -> list[int]:
            self._keeper.delete(step)
            return self._exist()

        self._told = self._agreement.told(f"delete step {step}", decide)
        self._states.pop(step, None)

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # Alone: the other processes may be anywhere. What is told must not replace the error of the block.
        self._agreement.fail(error)
        for step, pending in self._running.items():
            pending.wait()
            if pending.error() is not None:
                error.add_note(f"Step {step} of {self._root.url} was not saved: {pending.error()}")
        self._release()

    def _request(
        self, step: int, tree: Any, metrics: Mapping[str, float] | None, extras: Mapping[str, Any] | None
    ) -> Request:
        rank, size = self._agreement.rank, self._agreement.size
        numbers = None if metrics is None else {name: float(value) for name, value in metrics.items()}
        folder = self._keeper.writing(step)
        publish = partial(self._keeper.publish, step, numbers, time.time_ns(), extras=bool(extras))
        return Request(
            path=folder.child(ITEM),
            tree=tree,
            step=step,
            compression=self._compression,
            timeout_s=self._timeout_s,
            attach=extra_files.attached(folder, extras, rank, size),
            seal=lambda: f"{publish()}{ITEM}/",
            undo=partial(self._keeper.undo, step),
        )

    def _make_room(self, step: int) -> None:
        if step in self._running:
            raise AlreadyExistsError(f"Step {step} of {self._root.url} is being saved already.")
        self._keeper.make_room(step)

    def _abandon(self, step: int) -> None:
        if self._agreement.leads:
            self._keeper.abandon(step)

    def _exist(self) -> list[int]:
        return [step for step in find_steps(self._root) if self._states.get(step) != "failed"]

    def _settle(self, *, look: bool = False) -> None:
        """Take in the saves that have ended on process 0; raise for those that failed, and what clearing up met."""
        own = {step: pending.error() for step, pending in self._running.items() if pending.done()}
        failed, troubles = [], []
        ended, exist = self._agreement.told("how saves ended", partial(self._ended, look))
        if exist is not None:
            self._told = exist
        for step, error, trouble in ended:
            pending = self._running.pop(step, None)
            if pending is not None:
                pending.wait(self._timeout_s)  # on other processes it may take a moment more
            self._states[step] = "durable" if error is None else "failed"
            if error is not None:
                self._history = [one for one in self._history if one[0] != step]
                failed.append((step, error))
            if trouble is not None:
                troubles.append(f"step {step} is saved, and clearing up after it failed: {trouble}")
        self._history = self._history[-max(len(self._running) + 1, 1) :]
        if failed:
            raised = CheckpointError(f"Saving to {self._root.url} failed: {'; '.join(error for _, error in failed)}")
            for text in troubles:
                raised.add_note(text)
            raise raised from own.get(failed[0][0])
        if troubles:
            raise CheckpointError(f"In {self._root.url}, process 0: {'; '.join(troubles)}")

    def _ended(self, look: bool) -> tuple[list[tuple[int, str | None, str | None]], list[int] | None]:
        """On process 0: step, what went wrong, and what went wrong in the clearing up, of each save that has ended.

        And the steps that exist, where others are to be told and these may have changed.
        """
        found = []
        for step, pending in self._running.items():
            if pending.done():
                error, trouble = pending.error(), self._keeper.trouble(step)
                found.append((step, error and _text(step, error), trouble and f"{type(trouble).__name__}: {trouble}"))
        if self._agreement.alone or not (found or look):
            return found, None
        failed = {step for step, error, _ in found if error is not None}
        return found, [step for step in self._exist() if step not in failed]

    def _restore_together(self, step: int, like: Any, extras: Mapping[str, Any] | None) -> Any:
        """A step and its extras on all processes, or an error on all of them."""
        tree, error = None, None
        try:
            try:
                tree = self.restore(step, like)
            except NotFoundError as missing:
                raise CorruptionError(str(missing)) from missing
            if extras:
                self.restore_extras(step, extras)
        except Exception as found:  # of any kind: the others must hear of it before they go on
            error = found
        mine = None if error is None else [isinstance(error, CorruptionError), f"{type(error).__name__}: {error}"]
        told = self._agreement.gathered(f"restored step {step}", mine)
        damage = [(k, text) for k, (is_damage, text) in ((k, one) for k, one in enumerate(told) if one) if is_damage]
        if error is not None and (isinstance(error, CorruptionError) or not damage):
            raise error
        for k, text in damage or [(k, one[1]) for k, one in enumerate(told) if one]:
            kind = CorruptionError if damage else CheckpointError
            raise kind(f"Process {k} could not restore step {step} of {self._root.url}: {text}")
        return tree

    def _release(self) -> None:
        self._closed = True
        self._agreement.close()
        self._keeper.close()
        self._triggers.close()
        self._measure.close()


def _text(step: int, error: BaseException) -> str:
    kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
    where = "" if isinstance(error, CoordinationError) else "on process 0, "  # the other kind names processes itself
    return "; ".join([f"{where}step {step}: {kind}{error}", *getattr(error, "__notes__", ())])
