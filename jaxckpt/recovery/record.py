"""What recoveries leave behind: records for the next checkpoint's lineage, and the guard that may undo one."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.recovery.plan import RecoveryPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryRecord:
    """One recovery. From ``step`` on the run cannot be reproduced from data and seed alone."""

    step: int
    stages: tuple[int, ...]
    sources: tuple[str, ...]
    method: str
    power: int
    optimizer: str
    lr_scale: float
    norms: tuple[float, ...] | None
    why: str
    undone: bool = False  # a later rollback went to before it


@dataclass(frozen=True, slots=True)
class RecoveryLog:
    """All recoveries of a run. Pass ``metadata()`` to every save, and read it back on resume.

    Example:
        >>> from jaxckpt.recovery.layout import StageLayout
        >>> from jaxckpt.recovery.plan import plan_recovery
        >>> log = RecoveryLog().add(plan_recovery(1, StageLayout(stages=4)), step=7)
        >>> RecoveryLog.from_metadata(log.metadata()) == log
        True
    """

    records: tuple[RecoveryRecord, ...] = ()

    def add(self, plan: RecoveryPlan, *, step: int, norms: Any = None) -> "RecoveryLog":
        """With one more. ``norms`` are read from the device."""
        record = RecoveryRecord(
            step=step,
            stages=plan.lost,
            sources=tuple(s.source for s in plan.steps) or ("rollback",),
            method=plan.policy.method,
            power=plan.policy.power,
            optimizer=plan.policy.optimizer,
            lr_scale=plan.policy.lr_scale,
            # JSON knows no NaN; a norm that is not finite weighed nothing.
            norms=None if norms is None else tuple(float(x) if np.isfinite(x) else -1.0 for x in np.ravel(norms)),
            why=plan.why,
        )
        return RecoveryLog((*self.records, record))

    def rolled_back(self, to_step: int) -> "RecoveryLog":
        """Those after ``to_step`` are undone."""
        return RecoveryLog(tuple(replace(r, undone=r.undone or r.step > to_step) for r in self.records))

    def metadata(self) -> dict[str, Any]:
        """``save(..., metadata=log.metadata())``."""
        return {
            "recoveries": [asdict(r) | {"stages": list(r.stages), "sources": list(r.sources)} for r in self.records]
        }

    @staticmethod
    def from_metadata(metadata: dict[str, Any]) -> "RecoveryLog":
        """From ``inspect(path).metadata``."""
        records = []
        for record in metadata.get("recoveries", ()):
            tuples = {n: tuple(record[n]) for n in ("stages", "sources", "norms") if record[n] is not None}
            records.append(RecoveryRecord(**(record | tuples)))
        return RecoveryLog(tuple(records))


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationGuard:
    """Judge a recovery: a loss above ``before + delta`` after ``steps`` steps asks for a rollback."""

    step: int
    before: float
    delta: float = 0.5
    steps: int = 50

    def __post_init__(self) -> None:
        if self.steps < 0 or not np.isfinite(self.before):
            raise InvalidArgumentError(f"steps={self.steps}, before={self.before}: steps >= 0 and a finite loss.")

    def check(self, step: int, loss: float) -> str:
        """Tell "wait", "accept" or "rollback". A loss that is not finite asks for a rollback at once.

        Example:
            >>> ValidationGuard(step=100, before=1.5, steps=10).check(110, 2.5)
            'rollback'
        """
        if not np.isfinite(loss):
            return "rollback"
        if step < self.step + self.steps:
            return "wait"
        return "rollback" if loss > self.before + self.delta else "accept"
