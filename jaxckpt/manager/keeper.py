"""What process 0 does to the folders of a run: makes room for a step, seals or undoes it, deletes old ones."""

import threading
import time
from contextlib import suppress
from typing import final

from jaxckpt.core.errors import AlreadyExistsError, NotFoundError
from jaxckpt.core.events import MetricMissing, StepDeleted, emit
from jaxckpt.manager.policies import KeepPolicy, StepRecord, to_delete
from jaxckpt.manager.steps import exists, find_steps, read_record, remove, seal, writing_folder
from jaxckpt.manager.sweep import Lease, Sweeper
from jaxckpt.storage.store import AbstractStore


@final
class Keeper:
    """The steps under a root. Methods that change anything are for process 0, in any of its threads."""

    def __init__(self, root: AbstractStore, keep: KeepPolicy | None) -> None:
        self.damaged: set[int] = set()  # steps that could not be restored: neither counted nor deleted
        self._root, self._keep = root, keep
        self._lease = Lease(root)
        self._sweeper = Sweeper(root, self._lease.run)
        self._lock = threading.RLock()
        self._known: dict[int, StepRecord] = {}
        self._named_otherwise: set[int] | None = None  # steps of Orbax in folders such as step_000005
        self._trouble: dict[int, Exception] = {}
        self._sealed: set[int] = set()  # by this run
        self._untold = set(getattr(keep, "ranked_by", ()))  # metrics that no step has been told to lack

    def sweep(self) -> None:
        """Remove what dead runs left."""
        self._sweeper.start()

    def folder(self, step: int) -> str:
        """Where a step is; NotFoundError tells which there are."""
        found = find_steps(self._root)
        if step not in found:
            there = ", ".join(map(str, found)) or "none"
            raise NotFoundError(f"{self._root.url} has no step {step}. The steps that are there: {there}.")
        return found[step]

    def records(self) -> list[StepRecord]:
        """The steps that exist, ascending."""
        with self._lock:
            folders = find_steps(self._root)
            for step in set(self._known) - set(folders):
                del self._known[step]
            for step, folder in folders.items():
                if step not in self._known:
                    with suppress(NotFoundError):  # deleted by another process since it was listed
                        self._known[step] = read_record(self._root, step, folder)
            return [self._known[step] for step in folders if step in self._known]

    def make_room(self, step: int) -> None:
        """Make a folder free for a step, and tell other runs who writes there.

        Raises:
            AlreadyExistsError: the step exists, another run is at work on it, or the folder holds other files.
        """
        if step in self.damaged:
            self.delete(step)
        if self._named_otherwise is None:  # once: in an object store this lists all that the run has
            self._named_otherwise = {one for one, name in find_steps(self._root).items() if name != str(one)}
        if step in self._named_otherwise or exists(self._root, str(step)):
            raise AlreadyExistsError(
                f"Step {step} of {self._root.url} exists already. Delete it first: delete({step})."
            )
        self._sweeper.make_room(step)
        self._lease.hold([step])

    def abandon(self, step: int) -> None:
        """The save of a step was not begun."""
        self._lease.release([step])

    def publish(self, step: int, metrics: dict[str, float] | None, start_ns: int, *, extras: bool) -> str:
        """Make a step exist whose tree is committed, and delete what need not be kept any more; where the step is."""
        seal(self._root, step, metrics, start_ns, extras=extras)
        self._sealed.add(step)
        self._tell_lacking(step, metrics or {})
        try:
            try:
                with self._lock:
                    self._known.pop(step, None)
                    self._retain()
            finally:
                self._lease.release([step])
        except Exception as error:  # of a policy too: the step is whole, and is told apart from a save that failed
            self._trouble[step] = error
        return self._root.child(str(step)).url

    def writing(self, step: int) -> AbstractStore:
        """The folder in which a step is written."""
        return self._root.child(writing_folder(self._root, step))

    def undo(self, step: int) -> None:
        """Give back the space of a step whose save failed. One that is whole stays: older ones may be gone for it."""
        try:
            if step not in self._sealed:
                remove(self._root, writing_folder(self._root, step))
        finally:
            self._lease.release([step])

    def trouble(self, step: int) -> Exception | None:
        """What went wrong in the clearing up after a step that is whole."""
        return self._trouble.pop(step, None)

    def delete(self, step: int) -> None:
        """Delete a step."""
        folder = self.folder(step)
        with self._lease.held([step]):
            self._remove(step, folder)

    def close(self) -> None:
        """Watch the leases of other runs no longer."""
        self._sweeper.close()

    def _tell_lacking(self, step: int, metrics: dict[str, float]) -> None:
        with self._lock:
            lacking = sorted(self._untold - set(metrics))
            self._untold -= set(lacking)
        for metric in lacking:
            emit(MetricMissing(path=self._root.url, step=step, metric=metric))

    def _retain(self) -> None:
        if self._keep is None:
            return
        found = [one for one in self.records() if one.step not in self.damaged]
        gone = to_delete(found, self._keep, time.time())
        if gone:
            folders = find_steps(self._root)
            with self._lease.held(gone):
                for step in gone:
                    self._remove(step, folders[step])

    def _remove(self, step: int, folder: str) -> None:
        remove(self._root, folder)
        self._known.pop(step, None)
        self._sealed.discard(step)
        self.damaged.discard(step)
        if self._named_otherwise is not None:
            self._named_otherwise.discard(step)
        emit(StepDeleted(path=self._root.url, step=step))
