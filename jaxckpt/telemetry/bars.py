"""Bars for saves and restores that take long, where somebody can see them."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from jaxckpt.core.events import Committed, Event, Flushed, Progress, Restored, SaveFailed, subscribe


@contextmanager
def progress(*, stream: TextIO | None = None) -> Iterator[bool]:
    """Show a bar for each save and restore of this process while the block runs; quiet where there is no terminal.

    Args:
        stream: where to draw, by default standard error. Nothing is drawn, and ``rich`` is not asked for, unless it is
            a terminal.

    Yields whether anything is drawn.

    Raises:
        ModuleNotFoundError: there is a terminal and rich is not installed: ``pip install 'jaxckpt[cli]'``.

    Example:
        >>> import io
        >>> with progress(stream=io.StringIO()) as drawn:
        ...     drawn
        False
    """
    stream = sys.stderr if stream is None else stream
    if stream is None or not stream.isatty():
        yield False
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(file=stream), transient=True) as display:
        stop = subscribe(_Bars(display))
        try:
            yield True
        finally:
            stop()


class _Bars:
    """A bar for each operation that moves bytes, removed when it ends."""

    def __init__(self, display: Any) -> None:
        self._display = display
        self._tasks: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:
            match event:
                case Progress():
                    self._display.advance(self._task(event), event.moved_bytes)
                case Flushed() | Committed() | SaveFailed():
                    self._end("save", event.path)
                case Restored():
                    self._end("read", event.path)
                case _:
                    pass

    def _task(self, event: Progress) -> Any:
        key = (event.operation, event.path)
        if key not in self._tasks:
            what = f"{event.operation} {event.path.rstrip('/').rpartition('/')[2]}"
            self._tasks[key] = self._display.add_task(what, total=event.total_bytes)
        return self._tasks[key]

    def _end(self, operation: str, path: str) -> None:
        task = self._tasks.pop((operation, path), None)
        if task is not None:
            self._display.remove_task(task)
