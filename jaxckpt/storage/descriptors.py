"""File descriptors kept open between reads: opening a file for each of thousands of small chunks would cost most."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable

OPEN_FILES = 64


class OpenFiles:
    """File descriptors kept open for reading: the most recently used ones."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, _Shared] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, path: str, name: str, failed: Callable[[str, str, OSError], Exception]) -> "_Shared":
        """A descriptor of a file, as a context; ``failed`` makes the error where there is none."""
        with self._lock:
            found = self._open.get(path)
            if found is not None:
                self._open.move_to_end(path)
                found.users += 1
                return found
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise failed("read", name, error) from error
            # Data files are never rewritten; others may be replaced under us, so their descriptors are not kept.
            found = _Shared(fd, self._lock, kept=os.path.basename(os.path.dirname(name)) == "d")
            if found.kept:
                self._open[path] = found
                while len(self._open) > OPEN_FILES:
                    self._open.popitem(last=False)[1].drop()
            return found

    def forget(self, path: str) -> None:
        """What is at this path from now on is another file, or none."""
        with self._lock:
            found = self._open.pop(path, None)
            if found is not None:
                found.drop()

    def close(self) -> None:
        """Close all that nobody is using, and the others when they are done with."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].drop()

    def __del__(self) -> None:
        self.close()


class _Shared:
    """A descriptor that closes when it is dropped and its last user has left."""

    def __init__(self, fd: int, lock: threading.Lock, *, kept: bool) -> None:
        self.fd, self.users, self.kept, self._lock = fd, 1, kept, lock

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.users -= 1
            self._close_if_unused()

    def drop(self) -> None:
        self.kept = False
        self._close_if_unused()

    def _close_if_unused(self, close: Callable[[int], None] = os.close) -> None:
        # Bound when it is defined: at the interpreter's end, modules are emptied before the last objects go.
        if not self.kept and self.users == 0 and self.fd >= 0:
            close(self.fd)
            self.fd = -1
