"""Stores that crash, count, wait or fail on demand, around any real store."""

import abc
import threading
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, final

import numpy as np

from jaxckpt.storage.store import AbstractDataWriter, AbstractStore

if TYPE_CHECKING:
    import tensorstore as ts

_T = TypeVar("_T")
_MUTATIONS = frozenset({"write", "create", "open_data", "append", "close", "delete", "delete_prefix"})


class SimulatedCrash(BaseException):  # not an Exception, so that no `except Exception` cleans up after it
    """The process is as good as dead: nothing reaches the store any more."""


class _WrappedStore(AbstractStore):
    """Sends every operation through ``_call``, those of children and writers too.

    Operations have the names of the methods of stores and of writers (``append``, ``close``, ``abort``). Objects are
    named from the root of the outermost wrapper, whichever child is asked. ``write_all`` is a ``write`` of each object.
    """

    def __init__(self, store: AbstractStore, *, prefix: str = "") -> None:
        self.url, self.data_file_bytes, self.parallel_io = store.url, store.data_file_bytes, store.parallel_io
        self.store, self._prefix = store, prefix

    @property
    def background_io(self) -> int:
        return self.store.background_io

    @abc.abstractmethod
    def _call(self, operation: str, name: str, size_bytes: int, action: Callable[[], _T]) -> _T:
        """Do ``action``; ``size_bytes`` is what it moves, 0 for reads whose size nobody knows before."""

    @abc.abstractmethod
    def _like(self, store: AbstractStore, prefix: str) -> "_WrappedStore":
        """The same around another store, with state in common."""

    @final
    def read(self, name: str, *, start: int = 0, stop: int | None = None) -> bytes:
        return self._on("read", name, 0, lambda: self.store.read(name, start=start, stop=stop))

    @final
    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        return self._on("read_into", name, len(out), lambda: self.store.read_into(name, start, out))

    @final
    def exists(self, name: str) -> bool:
        return self._on("exists", name, 0, lambda: self.store.exists(name))

    @final
    def write(self, name: str, data: bytes) -> None:
        return self._on("write", name, len(data), lambda: self.store.write(name, data))

    @final
    def create(self, name: str, data: bytes) -> bool:
        return self._on("create", name, len(data), lambda: self.store.create(name, data))

    @final
    def open_data(self, name: str) -> AbstractDataWriter:
        return _WrappedWriter(self, self._on("open_data", name, 0, lambda: self.store.open_data(name)))

    @final
    def names(self, prefix: str = "") -> list[str]:
        return self._on("names", prefix, 0, lambda: self.store.names(prefix))

    @final
    def folders(self) -> list[str]:
        return self._on("folders", "", 0, self.store.folders)

    @final
    def delete(self, name: str) -> None:
        return self._on("delete", name, 0, lambda: self.store.delete(name))

    @final
    def delete_prefix(self, prefix: str) -> None:
        return self._on("delete_prefix", prefix, 0, lambda: self.store.delete_prefix(prefix))

    @final
    def sync(self) -> None:
        return self._on("sync", "", 0, self.store.sync)

    @final
    def child(self, name: str) -> "_WrappedStore":
        return self._like(self.store.child(name), f"{self._prefix}{name}/")

    @final
    def kvstore_spec(self) -> dict[str, object]:
        """Of the real store: what TensorStore does with it passes the wrapper by."""
        return self.store.kvstore_spec()

    @property
    def context(self) -> "ts.Context | None":
        """Of the real store."""
        return self.store.context

    def _on(self, operation: str, name: str, size_bytes: int, action: Callable[[], _T]) -> _T:
        return self._call(operation, f"{self._prefix}{name}", size_bytes, action)


@final
class _WrappedWriter(AbstractDataWriter):
    def __init__(self, store: _WrappedStore, writer: AbstractDataWriter) -> None:
        self.name, self._store, self._writer = writer.name, store, writer

    def append(self, data: np.ndarray) -> int:
        try:
            return self._store._on("append", self.name, len(data), lambda: self._writer.append(data))
        except _TornAppend as crash:
            self._writer.append(data[: len(data) // 2])
            raise SimulatedCrash(*crash.args) from None

    def close(self) -> int:
        return self._store._on("close", self.name, 0, self._writer.close)

    def abort(self) -> None:
        return self._store._on("abort", self.name, 0, self._writer.abort)


class _TornAppend(SimulatedCrash):
    """A crash in the middle of an append."""


@final
class CrashAfter(_WrappedStore):
    """Lets ``n - 1`` mutations through; the n-th raises SimulatedCrash and does nothing, and so does all that follows.

    Mutations are ``write`` (also each of ``write_all``), ``create``, ``open_data``, ``append``, ``close``, ``delete``
    and ``delete_prefix`` of this store, its children and their writers, in one count. After the crash reads raise too.
    With ``partial=True`` an append that crashes leaves the first half of its bytes. ``n=None`` never crashes, and
    ``operations`` tells afterwards how many points of crash there are.
    """

    def __init__(
        self,
        store: AbstractStore,
        n: int | None = None,
        *,
        partial: bool = False,
        prefix: str = "",
        shared: "_Mutations | None" = None,
    ) -> None:
        super().__init__(store, prefix=prefix)
        self._mutations = shared or _Mutations(n, partial=partial)

    @property
    def operations(self) -> int:
        """Mutations asked for so far, the one that crashed included, later ones not."""
        return self._mutations.count

    @property
    def crashed(self) -> bool:
        """Whether the crash has come."""
        return self._mutations.crashed

    def _call(self, operation: str, name: str, size_bytes: int, action: Callable[[], _T]) -> _T:
        self._mutations.pass_or_crash(operation, name)
        return action()

    def _like(self, store: AbstractStore, prefix: str) -> "CrashAfter":
        return CrashAfter(store, prefix=prefix, shared=self._mutations)


class _Mutations:
    def __init__(self, n: int | None, *, partial: bool) -> None:
        self.count, self.crashed = 0, False
        self._n, self._partial, self._lock = n, partial, threading.Lock()

    def pass_or_crash(self, operation: str, name: str) -> None:
        with self._lock:
            if self.crashed:
                raise SimulatedCrash(f"{operation} of {name!r} after the crash at mutation {self.count}")
            if operation not in _MUTATIONS:
                return
            self.count += 1
            if self.count != self._n:
                return
            self.crashed = True
        torn = self._partial and operation == "append"
        raise (_TornAppend if torn else SimulatedCrash)(f"{operation} of {name!r} is mutation {self.count}")


@final
class CountingStore(_WrappedStore):
    """Counts calls by operation and bytes that were really moved, over all children and threads."""

    def __init__(self, store: AbstractStore, *, prefix: str = "", shared: "_Counts | None" = None) -> None:
        super().__init__(store, prefix=prefix)
        self._counts = shared or _Counts()

    @property
    def calls(self) -> Counter[str]:
        """Calls begun, by operation."""
        with self._counts.lock:
            return Counter(self._counts.calls)

    @property
    def bytes_read(self) -> int:
        """Bytes that reads have returned."""
        return self.bytes_read_by_name.total()

    @property
    def bytes_written(self) -> int:
        """Bytes handed over by ``write``, successful ``create`` and ``append``."""
        return self.bytes_written_by_name.total()

    @property
    def bytes_read_by_name(self) -> Counter[str]:
        """``bytes_read`` of each object; one that was read twice counts twice."""
        with self._counts.lock:
            return Counter(self._counts.bytes_read)

    @property
    def bytes_written_by_name(self) -> Counter[str]:
        """``bytes_written`` to each object."""
        with self._counts.lock:
            return Counter(self._counts.bytes_written)

    def _call(self, operation: str, name: str, size_bytes: int, action: Callable[[], _T]) -> _T:
        with self._counts.lock:
            self._counts.calls[operation] += 1
        result = action()
        moved = len(result) if operation == "read" and isinstance(result, bytes) else size_bytes
        with self._counts.lock:
            if operation in ("read", "read_into"):
                self._counts.bytes_read[name] += moved
            elif moved and (operation != "create" or result):  # not one that came too late
                self._counts.bytes_written[name] += moved
        return result

    def _like(self, store: AbstractStore, prefix: str) -> "CountingStore":
        return CountingStore(store, prefix=prefix, shared=self._counts)


class _Counts:
    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes_read: Counter[str] = Counter()
        self.bytes_written: Counter[str] = Counter()
        self.lock = threading.Lock()


@final
class SlowStore(_WrappedStore):
    """Every operation waits for ``event``; ``reached`` is set as soon as one does, for a test to wait for."""

    def __init__(
        self,
        store: AbstractStore,
        event: threading.Event,
        *,
        timeout_s: float = 60,
        prefix: str = "",
        reached: threading.Event | None = None,
    ) -> None:
        super().__init__(store, prefix=prefix)
        self.reached = reached or threading.Event()
        self._event, self._timeout_s = event, timeout_s

    def _call(self, operation: str, name: str, size_bytes: int, action: Callable[[], _T]) -> _T:
        if not self._event.is_set():
            self.reached.set()
        if not self._event.wait(self._timeout_s):
            raise AssertionError(f"{operation} of {name!r}: nobody set the event in {self._timeout_s:g} s.")
        return action()

    def _like(self, store: AbstractStore, prefix: str) -> "SlowStore":
        return SlowStore(store, self._event, timeout_s=self._timeout_s, prefix=prefix, reached=self.reached)


@final
class FaultyStore(_WrappedStore):
    """Raises what ``fail(operation, name)`` returns, in place of the operation; None lets it through."""

    def __init__(self, store: AbstractStore, fail: Callable[[str, str], Exception | None], *, prefix: str = "") -> None:
        super().__init__(store, prefix=prefix)
        self._fail = fail

    def _call(self, operation: str, name: str, size_bytes: int, action: Callable[[], _T]) -> _T:
        error = self._fail(operation, name)
        if error is not None:
            raise error
        return action()

    def _like(self, store: AbstractStore, prefix: str) -> "FaultyStore":
        return FaultyStore(store, self._fail, prefix=prefix)
