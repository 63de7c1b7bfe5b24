"""What only folders do: full disks, permissions, descriptors, what a crash leaves."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from jaxckpt.core.errors import AlreadyExistsError, NotFoundError, StorageError
from jaxckpt.storage.descriptors import OPEN_FILES
from jaxckpt.storage.local import LocalStore
from jaxckpt.testing.stores import CrashAfter, SimulatedCrash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1024 * 1024
TOO_MUCH = bytes(2 * MIB)
NOBODY = 65534


def _write(store: LocalStore) -> None:
    store.write("sub/big", TOO_MUCH)


def _write_all(store: LocalStore) -> None:
    store.write_all({"sub/small": b"new", "sub/big": TOO_MUCH})


def _create(store: LocalStore) -> None:
    store.create("sub/big", TOO_MUCH)


def _append(store: LocalStore) -> None:
    writer = store.open_data("sub/big")
    try:
        for _ in range(4):
            writer.append(np.zeros(MIB // 2, np.uint8))
    finally:
        writer.abort()


WRITES = [_write, _write_all, _create, _append]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A folder with room for 1 MiB, and the errno when it is full: a real disk where we may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "jaxckpt-tests", str(disk)]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        try:
            yield disk, errno.ENOSPC
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
        return
    # The next best: the system refuses files above a size. Python ignores the signal that goes with it.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        yield disk, errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", WRITES)
def test_a_full_disk_is_told_and_leaves_what_was_there(
    small_disk: tuple[Path, int], write: Callable[[LocalStore], None]
) -> None:
    disk, expected = small_disk
    store = LocalStore(disk)
    store.write("sub/small", b"old")
    with pytest.raises(StorageError) as caught:
        write(store)
    assert caught.value.errno == expected
    assert f"{store.url}sub/" in str(caught.value)
    assert "big" in str(caught.value)
    assert os.strerror(expected) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert os.listdir(disk / "sub") == ["small"]  # nothing temporary either
    assert store.read("sub/small") == b"old"
    store.write("sub/small", bytes(MIB // 2))  # there is room again


@pytest.fixture
def forbidden() -> Iterator[LocalStore]:
    """A store in which we may read and list but not write, and in "closed" not even look."""
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, whose parents are closed to others
        root = Path(folder) / "root"
        (root / "closed").mkdir(parents=True)
        (root / "a").write_bytes(b"old")
        (root / "secret").write_bytes(b"s")
        (root / "closed" / "b").write_bytes(b"x")
        for path, mode in ((folder, 0o755), (root / "closed", 0), (root / "secret", 0), (root, 0o555)):
            os.chmod(path, mode)
        try:
            with _not_as_root():
                yield LocalStore(root)
        finally:
            for path in (root, root / "closed"):
                os.chmod(path, 0o755)


@contextlib.contextmanager
def _not_as_root() -> Iterator[None]:
    user = os.geteuid()
    if user != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("a", lambda store: store.write("a", b"new")),
        ("new/a", lambda store: store.write("new/a", b"new")),
        ("a", lambda store: store.write_all({"a": b"new"})),
        ("b", lambda store: store.create("b", b"new")),
        ("b", lambda store: store.open_data("b")),
        ("a", lambda store: store.delete("a")),
        ("a", lambda store: store.delete_prefix("a")),
        ("secret", lambda store: store.read("secret")),
        ("secret", lambda store: store.read_into("secret", 0, np.empty(1, np.uint8))),
        ("closed/b", lambda store: store.read("closed/b")),
        ("closed/b", lambda store: store.exists("closed/b")),
        ("closed/b", lambda store: store.write("closed/b", b"new")),
        ("closed", lambda store: store.names()),
        ("closed", lambda store: store.names("closed/")),
        ("", lambda store: store.child("closed").folders()),
    ],
)
def test_what_is_not_permitted_is_told(forbidden: LocalStore, name: str, use: Callable[[LocalStore], None]) -> None:
    with pytest.raises(StorageError) as caught:
        use(forbidden)
    assert caught.value.errno == errno.EACCES
    assert f"{forbidden.url}{name}" in str(caught.value)
    assert forbidden.read("a") == b"old"


@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.write("file/a", b"x"),
        lambda store: store.write_all({"file/a": b"x"}),
        lambda store: store.create("file/a", b"x"),
        lambda store: store.open_data("file/a"),
        lambda store: store.create("file/b/a", b"x"),
    ],
)
def test_a_file_in_the_way_of_a_folder_is_told(tmp_path: Path, use: Callable[[LocalStore], None]) -> None:
    store = LocalStore(tmp_path)
    store.write("file", b"x")
    with pytest.raises(StorageError, match="not a folder") as caught:
        use(store)
    assert caught.value.errno == errno.ENOTDIR
    assert not isinstance(caught.value, AlreadyExistsError)
    assert not store.exists("file/a")
    with pytest.raises(NotFoundError):
        store.read("file/a")
    assert store.names() == ["file"]


def test_a_root_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"x")
    store = LocalStore(tmp_path / "root")
    with pytest.raises(StorageError):
        store.write("a", b"x")
    assert store.names() == []
    store.delete_prefix("")
    assert (tmp_path / "root").read_bytes() == b"x"


def test_deletion_removes_links_and_not_what_they_lead_to(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a").write_bytes(b"x")
    store = LocalStore(tmp_path / "root")
    store.write("5/a", b"x")
    (tmp_path / "root/5/link").symlink_to(elsewhere)
    (tmp_path / "root/5/circle").symlink_to(tmp_path / "root")
    assert store.names() == ["5/a"]
    store.delete_prefix("5/")
    assert store.folders() == []
    assert (elsewhere / "a").read_bytes() == b"x"


def test_what_a_crash_leaves_is_no_object(tmp_path: Path) -> None:
    code = """
import os, sys
from jaxckpt.storage.local import LocalStore
os.replace = os.link = lambda *_: os._exit(7)
store = LocalStore(sys.argv[1])
store.write("a", b"new") if sys.argv[2] == "write" else store.create("b", b"new")
"""
    store = LocalStore(tmp_path)
    store.write("a", b"old")
    for operation in ("write", "create"):
        assert subprocess.run([sys.executable, "-c", code, tmp_path, operation], check=False).returncode == 7
    assert len(os.listdir(tmp_path)) == 3
    assert store.names() == store.names("") == ["a"]
    assert store.read("a") == b"old"
    store.delete_prefix("")
    assert not tmp_path.exists()


# What only network folders do, in a process of its own, where system calls are not what they are here.
_OTHER_CALLS = """
import errno, os, sys
from jaxckpt.core.errors import StorageError
from jaxckpt.storage.local import LocalStore
link = os.link
def lose_the_answer(source, target):
    link(source, target)
    raise FileExistsError(errno.EEXIST, "File exists")  # the repeated request found what the first one made
def refuse(source, target):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")
"""


def _with_other_calls(code: str, *args: object) -> str:
    command = [sys.executable, "-c", _OTHER_CALLS + code, *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_create_whose_answer_was_lost_has_created(tmp_path: Path) -> None:
    code = "os.link = lose_the_answer; store = LocalStore(sys.argv[1])\n"
    code += "print(store.create('new', b'x'), store.create('new', b'x'), store.create('old', b'x'))"
    LocalStore(tmp_path).write("old", b"old")
    assert _with_other_calls(code, tmp_path) == "True False False\n"
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def test_create_needs_no_links(tmp_path: Path) -> None:
    code = "os.link = refuse; store = LocalStore(sys.argv[1])\n"
    code += "print(store.create('a', b'1'), store.create('a', b'2'))"
    assert _with_other_calls(code, tmp_path) == "True False\n"
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"1"


def test_a_create_that_fails_without_links_leaves_the_name_free(small_disk: tuple[Path, int]) -> None:
    # Room for the temporary file but not for the object beside it.
    disk, expected = small_disk
    if expected != errno.ENOSPC:
        pytest.skip("needs a disk of its own")
    code = """
os.link = refuse
try:
    LocalStore(sys.argv[1]).create("a", bytes(700 * 1024))
except StorageError as error:
    print(error.errno)
"""
    assert _with_other_calls(code, disk) == f"{expected}\n"
    assert os.listdir(disk) == []


def test_a_sync_that_failed_is_not_done() -> None:
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, whose parents are closed to others
        os.chmod(folder, 0o777)
        with _not_as_root():
            store = LocalStore(Path(folder) / "root")
            store.open_data("d/a").close()
            os.chmod(store.root + "/d", 0)
            for _ in range(2):
                with pytest.raises(StorageError) as caught:
                    store.sync()
                assert caught.value.errno == errno.EACCES
            os.chmod(store.root + "/d", 0o755)
            store.sync()
            os.chmod(store.root + "/d", 0)
            store.sync()  # nothing is left to do
            os.chmod(store.root + "/d", 0o755)


def test_a_sync_waits_for_what_another_thread_syncs(tmp_path: Path) -> None:
    code = """
import threading
from concurrent.futures import ThreadPoolExecutor, wait
store = LocalStore(sys.argv[1])
store.open_data("d/a").close()
began, go_on, sync = threading.Event(), threading.Event(), os.fsync
def slow(fd):
    began.set()
    assert go_on.wait(30)
    sync(fd)
os.fsync = slow
with ThreadPoolExecutor(2) as pool:
    first = pool.submit(store.sync)
    assert began.wait(30)
    second = pool.submit(store.sync)
    print(len(wait([second], timeout=0.2).done))
    go_on.set()
    print(first.result(30), second.result(30))
"""
    assert _with_other_calls(code, tmp_path) == "0\nNone None\n"


def test_two_may_delete_the_same(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "root")
    for i in range(20):
        store.child(f"{i}").write_all({f"d/{k}": b"x" for k in range(5)})
    start, errors = threading.Barrier(4), []

    def delete() -> None:
        start.wait(30)
        try:
            LocalStore(tmp_path / "root").delete_prefix("")
        except StorageError as error:
            errors.append(error)

    threads = [threading.Thread(target=delete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert not (tmp_path / "root").exists()


def _open_descriptors(root: Path) -> int:
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{fd}").startswith(str(root))
    return found


def test_few_files_are_kept_open(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for i in range(2 * OPEN_FILES):
        store.write(f"d/{i}", b"x")
        store.read(f"d/{i}")
        store.write(f"{i}", b"x")
        store.read(f"{i}")
    assert _open_descriptors(tmp_path) == OPEN_FILES
    store.delete("d/100")
    assert _open_descriptors(tmp_path) == OPEN_FILES - 1
    store.close()
    assert _open_descriptors(tmp_path) == 0


def test_only_data_files_are_kept_open_wherever_the_root_is(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "d" / "run")
    store.write("marker", b"old")
    assert store.read("marker") == b"old"
    assert _open_descriptors(tmp_path) == 0
    LocalStore(tmp_path / "d" / "run").write("marker", b"new")  # as another process would
    assert store.read("marker") == b"new"


def test_a_deleted_folder_keeps_no_file_open(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("5/d/a", b"x")
    store.read("5/d/a")
    assert _open_descriptors(tmp_path) == 1
    store.delete_prefix("5/")
    assert _open_descriptors(tmp_path) == 0


def test_writers_leave_no_descriptor(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    closed, aborted = store.open_data("a"), store.open_data("b")
    closed.close()
    aborted.abort()
    crashing = CrashAfter(store, 2)
    torn = crashing.open_data("c")
    with pytest.raises(SimulatedCrash):
        torn.append(np.zeros(10, np.uint8))
    del torn
    gc.collect()
    assert _open_descriptors(tmp_path) == 0


def test_abort_after_close_does_not_close_the_file_of_another(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first = store.open_data("a")
    first.close()
    second = store.open_data("b")  # gets the number that the first had
    first.abort()
    second.append(np.zeros(10, np.uint8))
    assert second.close() == 10
    assert store.names() == ["b"]
