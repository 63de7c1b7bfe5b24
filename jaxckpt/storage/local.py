"""Local files and shared folders (NFS and the like): plain system calls, no copy, fsync of files and of their names."""

# ruff: noqa: D102 - the interface says what the methods do

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final
from uuid import uuid4

import numpy as np

from jaxckpt.core.errors import AlreadyExistsError, CorruptionError, NotFoundError, StorageError
from jaxckpt.storage.descriptors import OpenFiles
from jaxckpt.storage.store import AbstractDataWriter, AbstractStore, check_name

_TEMPORARY = ".jaxckpt-tmp-"
_HAS_PWRITEV = hasattr(os, "pwritev")  # not on Windows
_MOST_PARTS = 1024  # of one call
_PARALLEL_IO = min(4, max(2, os.cpu_count() or 1))


@final
class LocalStore(AbstractStore):
    """A folder. It need not exist: it is made by the first write."""

    data_file_bytes = None

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.path.abspath(root)
        self.parallel_io = _PARALLEL_IO
        self._unsynced: set[str] = set()
        self._lock = threading.Lock()
        self._syncing = threading.Lock()

    @cached_property
    def url(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride] most saves never name it
        return Path(self.root, "x").as_uri()[:-1]

    @property
    def background_io(self) -> int:
        # Two threads in the page cache of two cores hinder each other: twice the CPU time of one, for the same bytes.
        return max(1, self.parallel_io // 2)

    @cached_property
    def _files(self) -> "OpenFiles":
        return OpenFiles()

    def read(self, name: str, *, start: int = 0, stop: int | None = None) -> bytes:
        with self._files.open(self._path(name), name, self._failed) as fd:
            size = os.fstat(fd).st_size
            end = size if stop is None else stop
            if end > size or start > size:
                raise self._short(name, start, end, size)
            data = bytearray(end - start)
            self._fill(fd, name, start, memoryview(data))
            return bytes(data)

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        with self._files.open(self._path(name), name, self._failed) as fd:
            self._fill(fd, name, start, memoryview(out))

    def exists(self, name: str) -> bool:
        # Not os.path.isfile: "not permitted" is no "no".
        try:
            return stat.S_ISREG(os.stat(self._path(name)).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise self._failed("look at", name, error) from error

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        temporary = f"{os.path.dirname(path)}/{_TEMPORARY}{uuid4().hex}"
        try:
            self._make_folder(os.path.dirname(path))
            self._put(temporary, data, os.O_CREAT | os.O_EXCL)
            os.replace(temporary, path)
            _sync_path(os.path.dirname(path))
        except OSError as error:
            _unlink(temporary)
            raise self._failed("write", name, error) from error
        self._files.forget(path)
        self.sync()

    def write_all(self, objects: dict[str, bytes]) -> None:
        """Replace several objects in order; the bytes of all are durable before the first one becomes visible."""
        staged = []
        try:
            for name, data in objects.items():
                path = self._path(name)
                self._make_folder(os.path.dirname(path))
                temporary = f"{os.path.dirname(path)}/{_TEMPORARY}{uuid4().hex}"
                staged.append((name, temporary, path))
                self._put(temporary, data, os.O_CREAT | os.O_EXCL, sync=False)
            # At once: a journalling file system makes many files durable in the time of one.
            with ThreadPoolExecutor(8, thread_name_prefix="jaxckpt-sync") as pool:
                list(pool.map(_sync_path, [temporary for _, temporary, _ in staged]))
            self.sync()
            for _, temporary, path in staged:
                os.replace(temporary, path)
            if "_files" in self.__dict__:  # nothing is open where nothing was read
                for _, _, path in staged:
                    self._files.forget(path)
            for folder in {os.path.dirname(path) for _, _, path in staged}:
                _sync_path(folder)
        except OSError as error:
            for _, temporary, _ in staged:
                _unlink(temporary)
            raise self._failed("write", ", ".join(objects), error) from error

    def create(self, name: str, data: bytes) -> bool:
        # A link makes the name appear with all its bytes, and only if it is free.
        path = self._path(name)
        temporary = f"{os.path.dirname(path)}/{_TEMPORARY}{uuid4().hex}"
        try:
            self._make_folder(os.path.dirname(path))
            self._put(temporary, data, os.O_CREAT | os.O_EXCL)
            try:
                os.link(temporary, path)
            except FileExistsError:
                # A network folder may lose its answer and ask again, and then it finds the link that it has made.
                if os.stat(temporary).st_nlink != 2:
                    return False
            except OSError:  # no hard links here
                if os.path.exists(path):
                    return False
                self._put(path, data, os.O_CREAT | os.O_EXCL)
            _sync_path(os.path.dirname(path))
        except FileExistsError:
            return False
        except OSError as error:
            raise self._failed("create", name, error) from error
        finally:
            _unlink(temporary)
        self.sync()
        return True

    def open_data(self, name: str) -> AbstractDataWriter:
        path = self._path(name)
        try:
            self._make_folder(os.path.dirname(path))
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError as error:
            raise AlreadyExistsError(f"{self.url}{name} exists already; data files are never overwritten.") from error
        except OSError as error:
            raise self._failed("create", name, error) from error
        with self._lock:
            self._unsynced.add(os.path.dirname(path))
        return _LocalWriter(self, name, path, fd)

    def names(self, prefix: str = "") -> list[str]:
        found: list[str] = []
        pending = [prefix.rpartition("/")[0]]
        while pending:
            folder = pending.pop()
            base = f"{folder}/" if folder else ""
            try:
                with os.scandir(self._path(folder)) as entries:
                    for entry in entries:
                        name = f"{base}{entry.name}"
                        if entry.is_dir():
                            if f"{name}/".startswith(prefix) and not entry.is_symlink():  # links may go in circles
                                pending.append(name)
                        elif name.startswith(prefix) and not entry.name.startswith(_TEMPORARY):
                            found.append(name)
            except (FileNotFoundError, NotADirectoryError):
                continue  # never there, or deleted meanwhile
            except OSError as error:
                raise self._failed("list", folder, error) from error
        return sorted(found)

    def folders(self) -> list[str]:
        try:
            with os.scandir(self.root) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._failed("list", "", error) from error

    def delete(self, name: str) -> None:
        try:
            os.unlink(self._path(name))
            _sync_path(os.path.dirname(self._path(name)))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise self._failed("delete", name, error) from error
        finally:
            self._files.forget(self._path(name))

    def delete_prefix(self, prefix: str) -> None:
        check_name(self.url, prefix)
        self._files.close()
        folder, _, start = prefix.rpartition("/")
        try:
            if start:
                for name in _entries(self._path(folder)):
                    if name.startswith(start):
                        _remove(os.path.join(self._path(folder), name))
            elif os.path.isdir(self._path(folder)):
                _remove(self._path(folder))
        except OSError as error:
            raise self._failed("delete", prefix, error) from error

    def move_folder(self, old: str, new: str) -> None:
        """Give a folder another name, durably, in one step. StorageError: it has the old one, or ``new`` was there."""
        self._files.close()
        try:
            os.rename(self._path(old), self._path(new))
            try:
                _sync_path(self.root)
            except OSError:
                os.rename(self._path(new), self._path(old))
                raise
        except OSError as error:
            raise self._failed("rename", f"{old} to {new}", error) from error

    def sync(self) -> None:
        # One at a time: a thread that finds nothing left to sync may rely on it being done.
        with self._syncing:
            with self._lock:
                folders, self._unsynced = self._unsynced, set()
            try:
                # Deepest first: a folder's own name is durable once its parent is.
                for folder in sorted(folders, key=len, reverse=True):
                    _sync_path(folder)
            except OSError as error:
                with self._lock:
                    self._unsynced |= folders
                raise self._failed("sync", "", error) from error

    def child(self, name: str) -> "LocalStore":
        check_name(self.url, name)
        return LocalStore(os.path.join(self.root, name))

    def kvstore_spec(self) -> dict[str, object]:
        return {"driver": "file", "path": self.root + "/"}

    def close(self) -> None:
        """Close files kept open for reading."""
        self._files.close()

    def _path(self, name: str) -> str:
        if name.startswith("/") or ".." in name:
            check_name(self.url, name)
        return os.path.join(self.root, name) if name else self.root

    def _make_folder(self, folder: str) -> None:
        missing = []
        while not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for path in reversed(missing):
            try:
                os.mkdir(path)
            except FileExistsError:
                if not os.path.isdir(path):
                    raise NotADirectoryError(errno.ENOTDIR, f"{path} is not a folder") from None
            with self._lock:
                self._unsynced.update((path, os.path.dirname(path)))

    def _put(self, path: str, data: bytes, flags: int, *, sync: bool = True) -> None:
        fd = os.open(path, os.O_WRONLY | flags | os.O_CLOEXEC, 0o666)
        try:
            _write_all(fd, [memoryview(data)], 0)
            if sync:
                os.fsync(fd)
        except OSError:
            _unlink(path)  # it is ours, and half of an object would keep its name for ever
            raise
        finally:
            os.close(fd)

    def _fill(self, fd: int, name: str, start: int, view: memoryview) -> None:
        done, wanted = 0, len(view)
        while done < wanted:
            try:
                got = os.preadv(fd, [view[done:]], start + done)
            except OSError as error:
                raise self._failed("read", name, error) from error
            if got == 0:
                raise self._short(name, start, start + wanted, os.fstat(fd).st_size)
            done += got

    def _short(self, name: str, start: int, stop: int, size: int) -> CorruptionError:
        return CorruptionError(f"{self.url}{name} is too short: bytes {start} to {stop} were wanted, it has {size}.")

    def _failed(self, verb: str, name: str, error: OSError) -> Exception:
        if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)) and verb == "read":
            return NotFoundError(f"{self.url}{name} does not exist.")
        failure = StorageError(f"Could not {verb} {self.url}{name}: {error.strerror or error}")
        failure.errno = error.errno
        return failure


@final
@dataclass(eq=False)
class _LocalWriter(AbstractDataWriter):
    _store: LocalStore
    name: str
    _path: str
    _fd: int
    _size: int = 0

    def append(self, data: np.ndarray) -> int:
        return self.append_all([data])

    def append_all(self, parts: Sequence[np.ndarray]) -> int:
        offset = self._size
        try:
            for first in range(0, len(parts), _MOST_PARTS):
                views = list(map(memoryview, parts[first : first + _MOST_PARTS]))
                self._size += _write_all(self._fd, views, self._size)
        except OSError as error:
            raise self._store._failed("write", self.name, error) from error
        return offset

    def close(self) -> int:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._store._failed("sync", self.name, error) from error
        finally:
            self._close_file()
        return self._size

    def abort(self) -> None:
        self._close_file()
        _unlink(self._path)

    def _close_file(self) -> None:
        # Once only: the number may belong to another file by the second time.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = _close_file


def _write_all(fd: int, views: list[memoryview], offset: int) -> int:
    """Write these at an offset, one after the other, in as few calls as possible; returns their bytes."""
    done = 0
    while views:
        wrote = os.pwritev(fd, views, offset + done) if _HAS_PWRITEV else os.pwrite(fd, views[0], offset + done)
        done += wrote
        while views and wrote >= len(views[0]):
            wrote -= len(views.pop(0))
        if wrote:
            views[0] = views[0][wrote:]
    return done


def _sync_path(path: str) -> None:
    """Make a file or the names in a folder durable."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unlink(path: str) -> None:
    """Clean up as far as possible: what failed before matters more, and readers pass temporary files by."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove(path: str) -> None:
    """Delete a file or a folder with all that is in it, also while others do the same."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.islink(path) or not os.path.isdir(path):
            os.unlink(path)
            return
        for name in os.listdir(path):
            _remove(os.path.join(path, name))
        os.rmdir(path)
