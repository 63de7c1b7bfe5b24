"""Any TensorStore key-value store as a store: s3://, gs://, memory://. Puts are atomic, nothing is renamed."""

# ruff: noqa: D102 - the interface says what the methods do

import contextlib
import re
from typing import Any, final

import numpy as np
import tensorstore as ts

from jaxckpt.core.errors import AlreadyExistsError, CorruptionError, NotFoundError, StorageError
from jaxckpt.storage.store import AbstractDataWriter, AbstractStore, check_name

DATA_FILE_BYTES = 64 * 1024 * 1024
# One for the process, so that all see the same memory://. By default a dead endpoint is retried for a quarter hour.
_RETRIES = {"max_retries": 6, "initial_delay": "200ms", "max_delay": "5s"}
_CONTEXT = ts.Context({"s3_request_retries": _RETRIES, "gcs_request_retries": _RETRIES})


@final
class KvStore(AbstractStore):
    """A prefix of a TensorStore key-value store. ``spec``'s path must end with '/'."""

    data_file_bytes: int | None = DATA_FILE_BYTES

    def __init__(self, url: str, spec: dict[str, Any], *, parallel_io: int = 16) -> None:
        self.url, self._spec, self.parallel_io = url, spec, parallel_io
        try:
            self._kv = ts.KvStore.open(spec, context=_CONTEXT).result()
        except (ValueError, OSError) as error:
            raise StorageError(f"Could not open {url}: {error}") from error

    def read(self, name: str, *, start: int = 0, stop: int | None = None) -> bytes:
        if start or stop is not None:
            return self._range(name, start, stop)
        data = self._get(name)
        if data is None:
            raise NotFoundError(f"{self.url}{name} does not exist.")
        return data

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        out[:] = np.frombuffer(self._range(name, start, start + len(out)), np.uint8)

    def exists(self, name: str) -> bool:
        return bool(self._call("look at", name, lambda: self._kv.list(_exactly(name))))

    def write(self, name: str, data: bytes | bytearray) -> None:
        value: Any = data  # TensorStore takes any buffer, its stubs say bytes
        self._call("write", name, lambda: self._kv.write(name, value))

    def create(self, name: str, data: bytes) -> bool:
        absent = self._call("read", name, lambda: self._kv.read(name))
        if absent.state != "missing":
            return False
        stamp = self._call("create", name, lambda: self._kv.write(name, data, if_equal=absent.stamp.generation))
        # The loser of a race gets an empty generation and no exception. A retried request can lose against its own
        # first attempt, so the bytes decide, where they tell the two apart.
        return bool(stamp.generation) or (len(data) > 0 and self._get(name) == data and _is_unique(data))

    def open_data(self, name: str) -> AbstractDataWriter:
        if self.exists(name):
            raise AlreadyExistsError(f"{self.url}{name} exists already; data files are never overwritten.")
        return _KvWriter(self, name)

    def names(self, prefix: str = "") -> list[str]:
        return sorted(key.decode() for key in self._call("list", prefix, lambda: self._kv.list(_starting(prefix))))

    def folders(self) -> list[str]:
        return sorted({name.split("/", 1)[0] for name in self.names() if "/" in name})

    def delete(self, name: str) -> None:
        self._call("delete", name, lambda: self._kv.delete_range(_exactly(name)))

    def delete_prefix(self, prefix: str) -> None:
        self._call("delete", prefix, lambda: self._kv.delete_range(_starting(prefix)))

    def sync(self) -> None:
        return

    def child(self, name: str) -> "KvStore":
        check_name(self.url, name)
        spec = {**self._spec, "path": f"{self._spec.get('path', '')}{name}/"}
        return KvStore(f"{self.url}{name}/", spec, parallel_io=self.parallel_io)

    def kvstore_spec(self) -> dict[str, object]:
        return dict(self._spec)

    @property
    def context(self) -> ts.Context:
        return _CONTEXT

    def _get(self, name: str) -> bytes | None:
        found = self._call("read", name, lambda: self._kv.read(name))
        return None if found.state == "missing" else found.value

    def _range(self, name: str, start: int, stop: int | None) -> bytes:
        check_name(self.url, name)
        if start == stop:  # TensorStore takes no empty range
            if not self.exists(name):
                raise NotFoundError(f"{self.url}{name} does not exist.")
            return b""
        try:
            found = self._kv.read(name, byte_range=slice(start, stop)).result()
        except (ValueError, OSError, RuntimeError) as error:
            # Not a search in the text: addresses and ids of requests may hold any number.
            if not str(error).startswith("OUT_OF_RANGE"):
                raise self._failed("read", name, error) from error
            data = self.read(name) if stop is None else None  # rare, and nothing else tells an object's size
            if data is not None and len(data) == start:
                return b""
            raise CorruptionError(
                f"{self.url}{name} is too short: bytes {start} to {stop} were wanted, "
                f"it has {_size_told(error, start)}."
            ) from error
        if found.state == "missing":
            raise NotFoundError(f"{self.url}{name} does not exist.")
        if stop is not None and len(found.value) != stop - start:
            raise CorruptionError(
                f"{self.url}{name} is too short: bytes {start} to {stop} were wanted, {len(found.value)} came."
            )
        return found.value

    def _call(self, verb: str, name: str, start: Any) -> Any:
        check_name(self.url, name)
        try:
            return start().result()
        except (ValueError, OSError, RuntimeError) as error:
            raise self._failed(verb, name, error) from error

    def _failed(self, verb: str, name: str, error: Exception) -> StorageError:
        return StorageError(f"Could not {verb} {self.url}{name}: {error}")


@final
class _KvWriter(AbstractDataWriter):
    def __init__(self, store: KvStore, name: str) -> None:
        self.name, self._store, self._parts, self._is_sent = name, store, bytearray(), False

    def append(self, data: np.ndarray) -> int:
        offset = len(self._parts)
        self._parts += memoryview(data)
        return offset

    def close(self) -> int:
        size = len(self._parts)
        self._is_sent = True
        self._store.write(self.name, self._parts)
        self._parts = bytearray()
        return size

    def abort(self) -> None:
        self._parts = bytearray()
        if self._is_sent:  # also where the answer was an error: the object may be there
            with contextlib.suppress(StorageError):  # what failed before matters more
                self._store.delete(self.name)


def _exactly(name: str) -> Any:
    return ts.KvStore.KeyRange(name, name + "\0")


def _starting(prefix: str) -> Any:
    if not prefix:
        return ts.KvStore.KeyRange()
    last = prefix.encode()
    return ts.KvStore.KeyRange(prefix, last[:-1] + bytes([last[-1] + 1]))


def _is_unique(data: bytes) -> bool:
    """Whether no other writer would write these very bytes: they carry a write id."""
    return b"write-id" in data


def _size_told(error: Exception, start: int) -> str:
    """The object's size as far as an error about its range tells it: servers do not where all of it lies behind."""
    told = re.search(r"\bsize (\d+)$", str(error))
    return told[1] if told else f"at most {start}"
