"""What every store must do, as tests: subclass StoreSuite and override its ``store`` fixture."""

# ruff: noqa: D102 - the names of the tests are the claims

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorstore as ts

from jaxckpt.core.errors import AlreadyExistsError, CorruptionError, InvalidArgumentError, NotFoundError
from jaxckpt.storage.store import AbstractStore

_TEN = bytes(range(10))
_THREADS = 8
# Spaces, escapes of URLs, letters of more than one byte in UTF-8, what shells and globs would expand.
ODD_NAMES = [
    'with space', '100%', 'a%20b', '~', '~user/x', 'a#b?c=d&e', 'plus+and=equals',
    "grüße/日本/🙂", "[0]/{x}*", "quote'\"", "a:b@c,d;e", ".hidden", "dots..in..name", "x" * 200,
]  # fmt: skip


class StoreSuite:
    """Tests of one kind of store. ``store`` must be empty, and its root may be used by nobody else."""

    @pytest.fixture
    def store(self) -> AbstractStore:
        raise NotImplementedError(f"{type(self).__name__} must override the fixture `store`.")

    # Whole objects.

    @pytest.mark.parametrize("size", [0, 1, 4095, 100_000])
    def test_what_is_written_is_read(self, store: AbstractStore, size: int) -> None:
        data = np.random.default_rng(size).bytes(size)
        store.write("a", data)
        assert store.read("a") == data
        assert store.exists("a")

    def test_a_write_replaces_all_of_the_object(self, store: AbstractStore) -> None:
        for data in (b"long and old", b"new", b""):
            store.write("a", data)
            assert store.read("a") == data

    @pytest.mark.parametrize("name", ["a", "d/data", "x/d/data"])
    def test_a_replacement_is_seen_by_those_who_read_before(self, store: AbstractStore, name: str) -> None:
        store.write(name, b"old")
        assert store.read(name) == b"old"
        store.write(name, b"new")
        assert store.read(name) == b"new"
        store.delete(name)
        store.write_all({name: b"newer"})
        assert store.read(name) == b"newer"
        store.delete(name)
        with pytest.raises(NotFoundError):
            store.read(name)
        assert store.create(name, b"newest")
        assert store.read(name) == b"newest"

    def test_readers_see_the_old_or_the_new_object(self, store: AbstractStore) -> None:
        size, writes = 50_000, 10
        store.write("a", bytes(size))
        done = threading.Event()

        def read() -> set[tuple[int, int]]:
            seen = set()
            while not done.wait(0.001):
                data = store.read("a")
                seen.add((len(data), len(set(data))))
            return seen

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            try:
                for i in range(1, writes):
                    store.write("a", bytes([i]) * size)
            finally:
                done.set()
            for reader in readers:
                assert reader.result() <= {(size, 1)}

    def test_a_missing_object_is_named(self, store: AbstractStore) -> None:
        store.write("other", b"x")
        for read in (
            lambda: store.read("a/b"),
            lambda: store.read("a/b", start=1, stop=2),
            lambda: store.read("a/b", start=1, stop=1),
            lambda: store.read_into("a/b", 0, np.empty(1, np.uint8)),
        ):
            with pytest.raises(NotFoundError) as caught:
                read()
            assert f"{store.url}a/b" in str(caught.value)
        assert not store.exists("a/b")

    def test_a_folder_is_no_object(self, store: AbstractStore) -> None:
        store.write("a/b", b"x")
        assert not store.exists("a")
        with pytest.raises(NotFoundError):
            store.read("a")

    def test_write_all_writes_all(self, store: AbstractStore) -> None:
        store.write("b", b"old")
        objects = {"z": b"1", "b": b"2", "sub/a": b"3", "empty": b""}
        store.write_all(objects)
        assert {name: store.read(name) for name in store.names()} == objects
        store.write_all({})

    def test_threads_do_not_disturb_each_other(self, store: AbstractStore) -> None:
        def use(i: int) -> bytes:
            store.write(f"sub-{i}/a", bytes([i]) * 1000)
            return store.read(f"sub-{i}/a", start=1, stop=3)

        with ThreadPoolExecutor(_THREADS) as pool:
            assert list(pool.map(use, range(32))) == [bytes([i, i]) for i in range(32)]

    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_odd_names_are_names(self, store: AbstractStore, name: str) -> None:
        store.write(name, b"1")
        assert store.read(name) == b"1"
        assert store.exists(name)
        assert store.names() == [name]
        assert store.names(name) == [name]
        folder = f"-{name}"
        store.child(folder).write(name, b"2")
        assert store.child(folder).read(name) == store.read(f"{folder}/{name}") == b"2"
        assert store.child(folder).names() == [name]
        store.delete_prefix(f"{folder}/")
        assert store.names() == [name]
        store.delete(name)
        assert store.names() == []

    @pytest.mark.parametrize("name", ["..", "../a", "b/../a", "b/..", "/a", "/"])
    def test_no_name_leads_out_of_the_root(self, store: AbstractStore, name: str) -> None:
        store.write("a", b"outside")
        inside = store.child("sub")
        inside.write("b/a", b"inside")
        for use in (
            lambda: inside.read(name),
            lambda: inside.read(name, start=0, stop=1),
            lambda: inside.read_into(name, 0, np.empty(1, np.uint8)),
            lambda: inside.exists(name),
            lambda: inside.write(name, b"x"),
            lambda: inside.write_all({name: b"x"}),
            lambda: inside.create(name, b"x"),
            lambda: inside.open_data(name),
            lambda: inside.names(f"{name}/"),
            lambda: inside.delete(name),
            lambda: inside.delete_prefix(f"{name}/"),
            lambda: inside.child(name),
        ):
            with pytest.raises(InvalidArgumentError) as caught:
                use()
            assert repr(name)[:-1] in str(caught.value)
            assert inside.url in str(caught.value)
        assert {name: store.read(name) for name in store.names()} == {"a": b"outside", "sub/b/a": b"inside"}

    # Ranges.

    @pytest.mark.parametrize(
        ("start", "stop"), [(0, 10), (0, 3), (3, 7), (9, 10), (7, 10), (4, 4), (0, 0), (0, None), (3, None), (10, None)]
    )
    @pytest.mark.parametrize("name", ["a", "d/a"])
    def test_a_range_is_read(self, store: AbstractStore, name: str, start: int, stop: int | None) -> None:
        store.write(name, _TEN)
        assert store.read(name, start=start, stop=stop) == _TEN[start:stop]
        out = np.full(14, 99, np.uint8)
        size = len(_TEN[start:stop])
        store.read_into(name, start, out[2 : 2 + size])
        assert out[2 : 2 + size].tobytes() == _TEN[start:stop]
        assert set(out[:2]) | set(out[2 + size :]) == {99}

    @pytest.mark.parametrize(("start", "stop"), [(0, 11), (5, 11), (9, 100), (10, 11), (11, 12), (50, 60)])
    @pytest.mark.parametrize("name", ["a", "d/a"])
    def test_an_object_that_is_too_short_is_corrupt(
        self, store: AbstractStore, name: str, start: int, stop: int
    ) -> None:
        store.write(name, _TEN)
        for read in (
            lambda: store.read(name, start=start, stop=stop),
            lambda: store.read_into(name, start, np.empty(stop - start, np.uint8)),
        ):
            with pytest.raises(CorruptionError) as caught:
                read()
            assert f"{store.url}{name}" in str(caught.value)
            assert f"{start} to {stop}" in str(caught.value)
            # Not every server tells the size when the whole range lies behind the end.
            sizes = ["it has 10"] if start < len(_TEN) else ["it has 10", f"it has at most {start}"]
            assert any(size in str(caught.value) for size in sizes)

    def test_an_empty_object_has_no_bytes(self, store: AbstractStore) -> None:
        store.write("a", b"")
        assert store.exists("a")
        assert store.read("a", start=0) == b""
        with pytest.raises(CorruptionError):
            store.read("a", start=0, stop=1)

    # Create if absent.

    @pytest.mark.parametrize("data", [b"", b"first"])
    def test_create_leaves_what_is_there(self, store: AbstractStore, data: bytes) -> None:
        assert store.create("sub/a", data) is True
        assert store.create("sub/a", b"second") is False
        assert store.create("sub/a", data) is False
        assert store.read("sub/a") == data
        assert store.names() == ["sub/a"]

    def test_create_again_after_delete(self, store: AbstractStore) -> None:
        assert store.create("a", b"1")
        store.delete("a")
        assert store.create("a", b"2")
        assert store.read("a") == b"2"

    @pytest.mark.parametrize("same", [False, True])
    def test_one_of_many_creators_wins(self, store: AbstractStore, same: bool) -> None:
        for attempt in range(2):
            name, start = f"sub-{attempt}/lock", threading.Barrier(_THREADS)
            offers = [b"same" if same else f"from {i}".encode() for i in range(_THREADS)]

            def create(data: bytes, name: str = name, start: threading.Barrier = start) -> bool:
                start.wait(30)
                return store.create(name, data)

            with ThreadPoolExecutor(_THREADS) as pool:
                won = list(pool.map(create, offers))
            assert won.count(True) == 1
            assert store.read(name) == offers[won.index(True)]
            assert store.names(f"sub-{attempt}/") == [name]

    # Data objects.

    def test_appended_bytes_have_the_offsets_that_were_told(self, store: AbstractStore) -> None:
        writer = store.open_data("d/data")
        assert writer.name == "d/data"
        piece = np.empty(1000, np.uint8)
        for i in range(5):
            piece[:] = i  # reused at once
            assert writer.append(piece[: 200 * i]) == sum(200 * k for k in range(i))
        assert writer.close() == 2000
        expected = b"".join(bytes([i]) * 200 * i for i in range(5))
        assert store.read("d/data") == expected
        assert store.read("d/data", start=150, stop=650) == expected[150:650]

    @pytest.mark.parametrize("count", [1, 3, 2500])
    def test_parts_are_appended_one_after_the_other(self, store: AbstractStore, count: int) -> None:
        parts = [np.full(i % 7, i % 251, np.uint8) for i in range(count)]  # empty ones too
        writer = store.open_data("d/data")
        assert writer.append(np.zeros(10, np.uint8)) == 0
        assert writer.append_all(parts) == 10
        writer.close()
        assert store.read("d/data") == bytes(10) + b"".join(part.tobytes() for part in parts)

    def test_a_read_only_array_can_be_appended(self, store: AbstractStore) -> None:
        writer = store.open_data("a")
        writer.append(np.frombuffer(_TEN, np.uint8))
        writer.close()
        assert store.read("a") == _TEN

    def test_a_writer_without_bytes_leaves_an_empty_object(self, store: AbstractStore) -> None:
        assert store.open_data("a").close() == 0
        assert store.read("a") == b""

    def test_data_is_never_overwritten(self, store: AbstractStore) -> None:
        store.write("d/a", b"old")
        with pytest.raises(AlreadyExistsError) as caught:
            store.open_data("d/a")
        assert f"{store.url}d/a" in str(caught.value)
        assert store.read("d/a") == b"old"

    def test_an_aborted_object_is_gone(self, store: AbstractStore) -> None:
        writer = store.open_data("d/a")
        writer.append(np.zeros(10, np.uint8))
        writer.abort()
        writer.abort()
        assert not store.exists("d/a")
        assert store.names() == []

    def test_an_object_can_be_aborted_after_its_close(self, store: AbstractStore) -> None:
        writer = store.open_data("d/a")
        writer.append(np.zeros(10, np.uint8))
        writer.close()
        writer.abort()
        assert store.names() == []

    def test_several_writers_work_at_once(self, store: AbstractStore) -> None:
        def use(i: int) -> int:
            writer = store.open_data(f"d/{i}")
            for _ in range(3):
                writer.append(np.full(100, i, np.uint8))
            return writer.close()

        with ThreadPoolExecutor(_THREADS) as pool:
            assert list(pool.map(use, range(16))) == [300] * 16
        for i in range(16):
            assert store.read(f"d/{i}") == bytes([i]) * 300

    # Lists and deletion.

    def test_an_empty_store_lists_nothing(self, store: AbstractStore) -> None:
        assert store.names() == []
        assert store.names("a/") == []
        assert store.folders() == []
        assert store.child("a").names() == []
        assert not store.exists("a")

    def test_names_are_sorted_and_start_with_the_prefix(self, store: AbstractStore) -> None:
        names = ["a", "a-b", "a/b", "a/c/d", "ab/c", "b", "ü/x"]
        for name in reversed(names):
            if name != "a":  # a file system has no file and folder of one name
                store.write(name, b"")
        assert store.names() == sorted(names[1:])
        for prefix in ("a", "a/", "a/c", "a/c/", "a/c/d", "a/c/d/", "ab", "b", "c", "b/", "ü", "ü/"):
            assert store.names(prefix) == sorted(name for name in names[1:] if name.startswith(prefix)), prefix
        assert store.folders() == ["a", "ab", "ü"]

    def test_delete_removes_one_object(self, store: AbstractStore) -> None:
        store.write_all({"a": b"", "ab": b"", "b/a": b""})
        store.delete("a")
        store.delete("a")
        store.delete("missing/a")
        assert store.names() == ["ab", "b/a"]

    @pytest.mark.parametrize(
        ("prefix", "left"),
        [
            ("a/", ["a-b", "ab/c", "b"]),
            ("a/c/", ["a-b", "a/b", "ab/c", "b"]),
            ("a/c", ["a-b", "a/b", "ab/c", "b"]),
            ("a", ["b"]),
            ("b", ["a-b", "a/b", "a/c/d", "ab/c"]),
            ("b/", ["a-b", "a/b", "a/c/d", "ab/c", "b"]),
            ("missing", ["a-b", "a/b", "a/c/d", "ab/c", "b"]),
            ("missing/x/", ["a-b", "a/b", "a/c/d", "ab/c", "b"]),
            ("", []),
        ],
    )
    def test_delete_prefix_removes_what_starts_with_it(
        self, store: AbstractStore, prefix: str, left: list[str]
    ) -> None:
        store.write_all(dict.fromkeys(["a-b", "a/b", "a/c/d", "ab/c", "b"], b"x"))
        store.delete_prefix(prefix)
        store.delete_prefix(prefix)
        assert store.names() == left
        assert store.folders() == sorted({name.split("/")[0] for name in left if "/" in name})

    def test_a_store_can_be_used_after_all_is_deleted(self, store: AbstractStore) -> None:
        store.write("a/b", b"x")
        store.delete_prefix("")
        store.write("a/b", b"y")
        assert store.read("a/b") == b"y"

    # Children and TensorStore.

    def test_a_child_is_the_store_of_a_folder(self, store: AbstractStore) -> None:
        child = store.child("5").child("sub")
        child.write("a", b"x")
        assert child.url == f"{store.url}5/sub/"
        assert store.url.endswith("/")
        assert store.names() == ["5/sub/a"]
        assert child.names() == ["a"]
        assert store.child("5").folders() == ["sub"]
        assert type(child) is type(store)
        assert (child.data_file_bytes, child.parallel_io) == (store.data_file_bytes, store.parallel_io)
        child.sync()
        store.sync()

    def test_tensorstore_sees_the_same_objects(self, store: AbstractStore) -> None:
        spec = store.child("sub").kvstore_spec()
        assert str(spec["path"]).endswith("/")
        kv = ts.KvStore.open(spec, context=store.context).result()
        kv.write("from-ts", b"1").result()
        store.write("sub/to-ts", b"2")
        assert store.read("sub/from-ts") == b"1"
        assert kv.read("to-ts").result().value == b"2"

    @pytest.mark.parametrize("ocdbt", [False, True])
    def test_tensorstore_drivers_open_on_it(self, store: AbstractStore, ocdbt: bool) -> None:
        values = np.arange(64, dtype=np.float32).reshape(8, 8)
        spec = _array_spec(store.child("arrays"), "w", ocdbt=ocdbt)
        array = ts.open({**spec, "metadata": _METADATA, "create": True}, context=store.context).result()
        array.write(values).result()
        # Another context with the store's as its parent: what a reader with a cache of its own does.
        context = ts.Context({"cache_pool": {"total_bytes_limit": 1_000_000}}, parent=store.context)
        again = ts.open({**spec, "open": True}, context=context).result()
        np.testing.assert_array_equal(again.read().result(), values)
        expected = "arrays/manifest.ocdbt" if ocdbt else "arrays/w/zarr.json"
        assert expected in store.names()


_METADATA = {
    "shape": [8, 8],
    "data_type": "float32",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 4]}},
}


def _array_spec(store: AbstractStore, name: str, *, ocdbt: bool) -> dict[str, object]:
    base = store.kvstore_spec()
    if ocdbt:
        return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
    return {"driver": "zarr3", "kvstore": {**base, "path": f"{base['path']}{name}/"}}
