"""Totals of what the stages did: bytes and seconds by stage, for reports and metrics."""

import threading
from dataclasses import dataclass
from typing import final

from jaxckpt.core.events import (
    Captured,
    Committed,
    Event,
    Flushed,
    Restored,
    SaveFailed,
    SaveSkipped,
    StageEnded,
    subscribe,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """Of one stage on this process: how often it ended, the bytes of all, the seconds of all and of the longest."""

    count: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    longest_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """Over all; 0.0 before anything took time."""
        return self.size_bytes / self.seconds if self.seconds else 0.0


@final
class Recorder:
    """Adds up what happens from its making to ``close``, also as a context manager.

    Stages are ``capture`` (what the caller waits for), ``write``, ``save`` (from the call to the commit; on process 0),
    ``restore``, ``skipped``, ``failed``, and whatever ``StageEnded`` names.

    Example:
        >>> import jaxckpt as jc, numpy as np
        >>> with Recorder() as recorder:
        ...     jc.save("memory://docs/recorder", {"w": np.ones(1024, np.float32)})
        >>> recorder.total("save").count, recorder.total("write").size_bytes >= 4096
        (1, True)
    """

    def __init__(self) -> None:
        self._totals: dict[str, Total] = {}
        self._lock = threading.Lock()
        self._stop = subscribe(self._listen)

    def total(self, stage: str) -> Total:
        """Of one stage; zeros where it has not ended yet."""
        with self._lock:
            return self._totals.get(stage, Total())

    def totals(self) -> dict[str, Total]:
        """Of all stages seen so far."""
        with self._lock:
            return dict(self._totals)

    def close(self) -> None:
        """Stop counting; the totals stay."""
        self._stop()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self, event: Event) -> None:
        match event:
            case Captured():
                self._add("capture", event.size_bytes, event.seconds)
            case Flushed():
                self._add("write", event.size_bytes, event.seconds)
            case Committed():
                self._add("save", event.size_bytes, event.seconds)
            case Restored():
                self._add("restore", event.read_bytes, event.seconds)
            case StageEnded():
                self._add(event.stage, event.size_bytes, event.seconds)
            case SaveSkipped():
                self._add("skipped", 0, 0.0)
            case SaveFailed():
                self._add("failed", 0, 0.0)
            case _:
                pass

    def _add(self, stage: str, size_bytes: int, time_s: float) -> None:
        with self._lock:
            before = self._totals.get(stage, Total())
            self._totals[stage] = Total(
                count=before.count + 1,
                size_bytes=before.size_bytes + size_bytes,
                seconds=before.seconds + time_s,
                longest_s=max(before.longest_s, time_s),
            )
