"""What a search shows while it runs: one line, redrawn, where there is a terminal."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

import jax

from jaxckpt.core.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """A generation ended: ``best`` and ``mean`` of its noisy fitness, ``evaluations`` so far, of ``budget``.

    ``objective_seconds`` of its ``seconds`` were spent in evaluation.
    """

    generation: int
    evaluations: int
    budget: int
    best: float
    mean: float
    seconds: float
    objective_seconds: float


Watch = Callable[[Advance], None]


def watcher(progress: Watch | bool | None, *, stream: TextIO | None = None) -> Watch | None:
    """Whom to tell of generations: the caller's function, a line on standard error, or nobody.

    True draws everywhere, None where standard error is a terminal; of several processes only the first draws.
    """
    if callable(progress):
        return progress
    if not (progress is None or isinstance(progress, bool)):
        raise InvalidArgumentError(f"progress is {progress!r}; it is a function, True, False or None.")
    stream = sys.stderr if stream is None else stream
    if stream is None or progress is False or jax.process_index() != 0:
        return None
    return Line(stream) if progress or stream.isatty() else None


class Line:
    """Draws the state of a search over itself; one line for each tenth of it where that cannot be done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._tenth = stream, 0

    def __call__(self, seen: Advance) -> None:
        """Draw."""
        left = seen.seconds / seen.evaluations * max(seen.budget - seen.evaluations, 0)
        text = (
            f"search: {seen.evaluations}/{seen.budget} evaluations, best {seen.best:.6g}, mean {seen.mean:.6g}, "
            f"{seen.seconds:.0f} s, about {left:.0f} s left"
        )
        if self._stream.isatty():
            self._stream.write(f"\r\x1b[K{text}")
        elif 10 * seen.evaluations // seen.budget > self._tenth:
            self._tenth = 10 * seen.evaluations // seen.budget
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line."""
        if self._stream.isatty():
            self._stream.write("\r\x1b[K")
            self._stream.flush()
