"""The checkpoints of a run: saves steps in the background, keeps those that a policy wants, resumes from the newest."""

import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, final

from jaxckpt.checkpoint.restore import restore
from jaxckpt.checkpoint.save import Hold, Request, start
from jaxckpt.coordination.jax_client import current_coordinator
from jaxckpt.core.errors import AlreadyExistsError, CheckpointError, InvalidArgumentError, NotFoundError
from jaxckpt.manager import extras as extra_files
from jaxckpt.manager.policies import KeepPolicy, SaveContext, SavePolicy, StepRecord, every, ranked, to_delete
from jaxckpt.manager.steps import ITEM, find_steps, read_record, remove, seal
from jaxckpt.manager.triggers import Measure, Triggers
from jaxckpt.storage.url import Location, StorageOptions, open_store
from jaxckpt.transfer.staging import default_budget_bytes

if TYPE_CHECKING:
    from jaxckpt.checkpoint.pending import PendingSave


@final
class CheckpointManager:
    """Saves, keeps and finds the steps of a run, in folders that Orbax's manager reads. One process.

    Args:
        root: a folder or URL; steps lie in ``root/<step>``.
        save: when to save; ``force=True`` of ``save`` overrules it.
        keep: what to keep; None: everything. The newest step is always kept.
        options: endpoint, region and credentials of object stores.

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
        options: StorageOptions | None = None,
    ) -> None:
        if current_coordinator().size > 1:
            raise InvalidArgumentError(
                "CheckpointManager runs in one process so far, and this job has "
                f"{current_coordinator().size}. Use jaxckpt.save_async with a path per step."
            )
        self._root = open_store(root, options)
        self._save = save or every(steps=1)
        self._keep = keep
        self._running: dict[int, PendingSave] = {}
        self._states: dict[int, str] = {}
        self._latest = self.latest_step()
        self._saved_at = time.monotonic()
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
        """Whether the policy wants this step; every process asks at the same steps."""
        now = time.monotonic()
        self._measure.step(step, now)
        fired = self._triggers.fired(step, self._latest)
        context = SaveContext(
            step=step,
            latest_step=self._latest,
            since_save_s=now - self._saved_at,
            preempting=self._triggers.preempted,
            stall_s=self._measure.stall_s,
            save_s=self._measure.save_s,
            step_s=self._measure.step_s,
            fired=fired,
        )
        return self._save.should_save(context)

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
            AlreadyExistsError: the step exists, or is being saved.
            CheckpointError: an earlier save failed, told once; nothing was begun.
        """
        self._settle()
        wanted = self.should_save(step)  # asked when forced as well: triggers are to see every step
        if not (force or wanted):
            return False
        if step in self._running or step in find_steps(self._root):
            raise AlreadyExistsError(
                f"Step {step} of {self._root.url} exists already. Delete it first: delete({step})."
            )
        here = current_coordinator()
        attach = extra_files.attached(self._root.child(str(step)), extras, here.rank, here.size)
        remove(self._root, str(step))  # what a save that died has left
        numbers = None if metrics is None else {name: float(value) for name, value in metrics.items()}
        sealed = partial(seal, self._root, step, numbers, time.time_ns(), extras=bool(extras))
        what = Request(path=self._root.child(f"{step}/{ITEM}"), tree=tree, step=step, seal=sealed, attach=attach)
        self._running[step] = start(what, Hold(budget_bytes=default_budget_bytes()), time.perf_counter())
        self._states[step] = "captured"
        self._latest, self._saved_at = step, time.monotonic()
        return True

    def poll(self) -> dict[int, str]:
        """The state of each step that this manager saved: "captured", "durable" or "failed". Raises as ``save``."""
        self._settle()
        return dict(self._states)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until all saves have ended. Raises as ``save``; TimeoutError: they go on."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for step, pending in self._running.items():
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not pending.wait(left):
                raise TimeoutError(f"Step {step} of {self._root.url} is not durable after {timeout_s} s; it goes on.")
        self._settle()

    def close(self) -> None:
        """Wait for all saves and put signal handlers back. Raises as ``save``."""
        try:
            self.wait()
        finally:
            self._triggers.close()
            self._measure.close()

    def resume(self, like: Any = None, *, extras: Mapping[str, Any] | None = None) -> tuple[int | None, Any]:
        """The newest step and its tree; ``(None, like)`` where there is none. Errors as of ``jaxckpt.restore``.

        ``extras`` are filled, see ``restore_extras``.
        """
        step = self.latest_step()
        if step is None:
            return None, like
        tree = self.restore(step, like)
        if extras:
            self.restore_extras(step, extras)
        return step, tree

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
        here = current_coordinator()
        folder = self._root.child(self._folder(step))
        return extra_files.restore_extras(folder, extras, here.rank, here.size)

    def restore(self, step: int, like: Any = None) -> Any:
        """The tree of a step; ``like`` and errors as of ``jaxckpt.restore``."""
        return restore(self._root.child(f"{self._folder(step)}/{ITEM}"), like)

    def all_steps(self) -> list[int]:
        """Steps that exist, ascending."""
        return list(find_steps(self._root))

    def latest_step(self) -> int | None:
        """The newest step that exists."""
        return max(find_steps(self._root), default=None)

    def best_step(self, metric: str, mode: Literal["min", "max"] = "min") -> int | None:
        """The step best in a metric, of equals the newer; None where no step has it."""
        return next(iter(ranked(self._records(), metric, mode)), None)

    def delete(self, step: int) -> None:
        """Delete a step, its marker first. NotFoundError where there is none."""
        remove(self._root, self._folder(step))

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _records(self) -> list[StepRecord]:
        return [read_record(self._root, step, folder) for step, folder in find_steps(self._root).items()]

    def _folder(self, step: int) -> str:
        found = find_steps(self._root)
        if step not in found:
            raise NotFoundError(f"{self._root.url} has no step {step}; it has {list(found)}.")
        return found[step]

    def _settle(self) -> None:
        """Take in the saves that have ended: clear up after those that failed, delete what need not be kept."""
        ended = {step: pending for step, pending in self._running.items() if pending.done()}
        failed = []
        for step, pending in ended.items():
            del self._running[step]
            self._states[step] = pending.state
            if pending.error() is not None:
                remove(self._root, str(step))
                failed.append((step, pending.error()))
        if self._keep is not None and len(failed) < len(ended):
            for step in to_delete(self._records(), self._keep, time.time()):
                self.delete(step)
        if failed:
            told = "; ".join(f"step {step}: {error}" for step, error in failed)
            raise CheckpointError(f"Saving failed on process 0 in {self._root.url}: {told}") from failed[0][1]
