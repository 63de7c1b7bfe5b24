"""The OCDBT encoder against TensorStore, and against this library's own reader."""

import contextlib
import json
import random
import struct
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxckpt.core.errors import CorruptionError, InvalidArgumentError, UnsupportedFormatError
from jaxckpt.format.ocdbt import (
    Columns,
    Database,
    Value,
    encode_database,
    encode_database_columns,
    encode_varint,
    encode_varints,
)
from jaxckpt.format.ocdbt_reader import decode_database

NODES_FILE = "d/0123456789abcdef0123456789abcdef"
UUID = bytes(range(16))
DATA_FILES = ["ocdbt.process_0/d/00", "ocdbt.process_0/d/01", "ocdbt.process_12/d/00", "d/0f", "x"]

# Few letters and shared stems, so that prefixes of every length occur; zero bytes, as numpy pads with them.
KEYS = st.one_of(
    st.binary(max_size=12),
    st.builds(
        lambda stem, tail: stem + bytes(tail),
        st.sampled_from([b"params.dense.kernel/c/", b"params.dense.bias/c/", b"a", b"a\0", b""]),
        st.lists(st.sampled_from(b"\0a/1\xff"), max_size=6),
    ),
)
# key -> (data file or None for inline, value)
CONTENTS = st.dictionaries(
    KEYS,
    st.tuples(st.one_of(st.none(), st.sampled_from(DATA_FILES)), st.binary(max_size=40)),
    max_size=60,
)
PROFILE = settings(deadline=None, max_examples=60)


def lay_out(contents: dict[bytes, tuple[str | None, bytes]]) -> tuple[list[Value], dict[str, bytes]]:
    files: dict[str, bytearray] = {}
    values = []
    for key, (file, data) in contents.items():
        if file is None:
            values.append(Value(key=key, inline=data))
        else:
            held = files.setdefault(file, bytearray(b"before"))
            values.append(Value(key=key, file=file, offset=len(held), length=len(data)))
            held += data
    return values, {name: bytes(held) for name, held in files.items()}


def encode(values: list[Value], **options: int) -> Database:
    return encode_database(
        values, nodes_file=NODES_FILE, uuid=UUID, commit_time_ns=1_700_000_000_000_000_000, **options
    )


def files_of(database: Database, data_files: dict[str, bytes]) -> dict[str, bytes]:
    return {**data_files, NODES_FILE: database.nodes, "manifest.ocdbt": database.manifest}


def open_in_memory(files: dict[str, bytes]) -> ts.KvStore:
    context = ts.Context()
    base = ts.KvStore.open("memory://database/", context=context).result()
    for name, data in files.items():
        base[name] = data
    return ts.KvStore.open({"driver": "ocdbt", "base": "memory://database/"}, context=context).result()


def open_in_files(root: Path, files: dict[str, bytes]) -> ts.KvStore:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{root}/"}).result()


def read_all(store: ts.KvStore) -> dict[bytes, bytes]:
    keys = store.list().result()
    reads = {key: store.read(key) for key in keys}
    return {key: read.result().value for key, read in reads.items()}


def decode(database: Database) -> list[Value]:
    return decode_database(database.manifest, lambda _, start, stop: database.nodes[start:stop])


def as_decoded(values: list[Value]) -> list[Value]:
    """In key order, an empty value inline."""
    empty_inline = [v if v.inline is not None or v.length else Value(key=v.key, inline=b"") for v in values]
    return sorted(empty_inline, key=lambda v: v.key)


@PROFILE
@given(contents=CONTENTS, node_bytes=st.sampled_from([1, 60, 200, 2**20]))
def test_tensorstore_lists_and_reads_every_value(contents: dict, node_bytes: int) -> None:
    values, data_files = lay_out(contents)
    store = open_in_memory(files_of(encode(values, node_bytes=node_bytes), data_files))
    assert read_all(store) == {key: data for key, (_, data) in contents.items()}


@PROFILE
@given(contents=CONTENTS, node_bytes=st.sampled_from([1, 60, 200, 2**20]))
def test_decoding_returns_what_was_encoded(contents: dict, node_bytes: int) -> None:
    values, _ = lay_out(contents)
    assert decode(encode(values, node_bytes=node_bytes)) == as_decoded(values)


@PROFILE
@given(contents=CONTENTS, absent=KEYS, node_bytes=st.sampled_from([1, 200]))
def test_tensorstore_finds_no_key_that_was_not_given(contents: dict, absent: bytes, node_bytes: int) -> None:
    contents.pop(absent, None)
    values, data_files = lay_out(contents)
    store = open_in_memory(files_of(encode(values, node_bytes=node_bytes), data_files))
    assert store.read(absent).result().state == "missing"


@settings(deadline=None, max_examples=25)
@given(contents=CONTENTS, added=st.dictionaries(KEYS, st.binary(max_size=9000), min_size=1, max_size=4))
def test_tensorstore_can_add_keys_to_the_database(contents: dict, added: dict[bytes, bytes]) -> None:
    values, data_files = lay_out(contents)
    store = open_in_memory(files_of(encode(values, node_bytes=200), data_files))
    for key, data in added.items():
        store[key] = data
    assert read_all(store) == {key: data for key, (_, data) in contents.items()} | added


@PROFILE
@given(contents=CONTENTS, node_bytes=st.sampled_from([60, 2**20]), order=st.randoms())
def test_the_order_of_values_does_not_matter(contents: dict, node_bytes: int, order: random.Random) -> None:
    values, _ = lay_out(contents)
    shuffled = values.copy()
    order.shuffle(shuffled)
    assert encode(shuffled, node_bytes=node_bytes) == encode(values, node_bytes=node_bytes)


def many_values(count: int) -> tuple[dict[bytes, bytes], list[Value], dict[str, bytes]]:
    contents = {
        f"params.layer_{i // 50}.kernel/c/{i % 50}".encode(): (DATA_FILES[i % 3] if i % 7 else None, b"%d" % i)
        for i in range(count)
    }
    values, data_files = lay_out(contents)
    return {key: data for key, (_, data) in contents.items()}, values, data_files


def test_a_database_of_several_levels_on_disk(tmp_path: Path) -> None:
    expected, values, data_files = many_values(3000)
    database = encode(values, node_bytes=1000)
    store = open_in_files(tmp_path, files_of(database, data_files))
    assert read_all(store) == expected
    store["new"] = b"n" * 10_000
    again = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/"}).result()
    assert read_all(again) == expected | {b"new": b"n" * 10_000}


def test_tensorstore_sees_the_heights_and_statistics_of_its_subtrees() -> None:
    _, values, data_files = many_values(3000)
    database = encode(values, node_bytes=1000)
    context = ts.Context()
    base = ts.KvStore.open("memory://database/", context=context).result()
    for name, data in files_of(database, data_files).items():
        base[name] = data

    def check(location: str, statistics: dict, height: int) -> tuple[int, int, int]:
        node = ts.ocdbt.dump(base, location, context=context).result()
        assert node["height"] == height
        if height:
            sums = [check(e["location"], e["statistics"], height - 1) for e in node["entries"]]
        else:
            sums = [
                (1, 0, int(e["indirect_value"].split(":")[-1]) if "indirect_value" in e else 0) for e in node["entries"]
            ]
        own = int(location.split(":")[-1])
        num_keys, tree_bytes, indirect = (sum(column) for column in zip(*sums, strict=True))
        assert statistics == {
            "num_keys": num_keys,
            "num_tree_bytes": tree_bytes + own,
            "num_indirect_value_bytes": indirect,
        }
        return num_keys, tree_bytes + own, indirect

    manifest = ts.ocdbt.dump(base, context=context).result()
    (version,) = manifest["versions"]
    assert version["generation_number"] == 1
    assert version["commit_time"] == 1_700_000_000_000_000_000
    assert version["root_height"] >= 2
    root = version["root"]
    num_keys, tree_bytes, indirect = check(root["location"], root["statistics"], version["root_height"])
    assert (num_keys, tree_bytes) == (3000, len(database.nodes))
    assert indirect == sum(value.length for value in values if value.inline is None)


def test_an_empty_database_opens_and_takes_keys() -> None:
    database = encode([])
    assert database.nodes == b""
    assert decode(database) == []
    store = open_in_memory({"manifest.ocdbt": database.manifest})
    assert read_all(store) == {}
    store["k"] = b"v"
    assert read_all(store) == {b"k": b"v"}


def test_an_empty_value_needs_no_data_file() -> None:
    database = encode([Value(key=b"k", file="d/absent", offset=7, length=0)])
    assert read_all(open_in_memory(files_of(database, {}))) == {b"k": b""}


@pytest.mark.parametrize("node_bytes", [1, 2**20])
def test_keys_as_long_as_the_format_allows(node_bytes: int) -> None:
    contents = {bytes([97 + i % 3]) * 65534 + bytes([i]): (DATA_FILES[0], b"%d" % i) for i in range(9)}
    contents |= {b"%03d" % i: (None, b"short") for i in range(300)}
    values, data_files = lay_out(contents)
    database = encode(values, node_bytes=node_bytes)
    assert decode(database) == as_decoded(values)
    store = open_in_memory(files_of(database, data_files))
    assert read_all(store) == {key: data for key, (_, data) in contents.items()}


@settings(deadline=None, max_examples=40)
@given(contents=st.dictionaries(KEYS, st.binary(max_size=40), min_size=1, max_size=30))
def test_the_bytes_are_those_that_tensorstore_writes(contents: dict[bytes, bytes]) -> None:
    config = {"uuid": UUID.hex(), "compression": None, "max_inline_value_bytes": 4096}
    context = ts.Context()
    base = ts.KvStore.open("memory://database/", context=context).result()
    spec = {"driver": "ocdbt", "base": "memory://database/", "config": config, "assume_config": True}
    store = ts.KvStore.open(spec, context=context).result()
    with ts.Transaction(atomic=True) as transaction:
        for key, data in contents.items():
            store.with_transaction(transaction)[key] = data
    (nodes_file,) = set(base.list().result()) - {b"manifest.ocdbt"}
    (version,) = ts.ocdbt.dump(base, context=context).result()["versions"]
    database = encode_database(
        [Value(key=key, inline=data) for key, data in contents.items()],
        nodes_file=nodes_file.decode(),
        uuid=UUID,
        commit_time_ns=version["commit_time"],
    )
    assert database == Database(nodes=base[nodes_file], manifest=base["manifest.ocdbt"])


def test_tensorstore_opens_a_zarr3_array_of_hand_laid_chunks(tmp_path: Path) -> None:
    array = np.arange(48, dtype=np.float32).reshape(6, 8)
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [6, 8],
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3, 4]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    contents: dict[bytes, tuple[str | None, bytes]] = {b"a.b/zarr.json": (None, json.dumps(metadata).encode())}
    for i in range(2):
        for j in range(2):
            chunk = array[3 * i : 3 * i + 3, 4 * j : 4 * j + 4].astype("<f4").tobytes()
            chunk += struct.pack("<I", google_crc32c.value(chunk))
            contents[b"a.b/c/%d/%d" % (i, j)] = (DATA_FILES[i], chunk)
    values, data_files = lay_out(contents)
    open_in_files(tmp_path, files_of(encode(values), data_files))
    kvstore = {"driver": "ocdbt", "base": f"file://{tmp_path}/", "path": "a.b/"}
    opened = ts.open({"driver": "zarr3", "kvstore": kvstore}).result()
    np.testing.assert_array_equal(opened.read().result(), array)

    damaged = bytearray(data_files[DATA_FILES[0]])
    damaged[20] ^= 1
    (tmp_path / DATA_FILES[0]).write_bytes(damaged)
    reopened = ts.open({"driver": "zarr3", "kvstore": kvstore}).result()
    with pytest.raises(ValueError, match="Digest mismatch"):
        reopened.read().result()


def small_database() -> tuple[dict[bytes, bytes], Database, dict[str, bytes]]:
    expected, values, data_files = many_values(12)
    return expected, encode(values, node_bytes=150), data_files


def test_no_flipped_bit_is_decoded() -> None:
    _, database, _ = small_database()
    for field in ("manifest", "nodes"):
        whole = getattr(database, field)
        for bit in range(8 * len(whole)):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(CorruptionError, match=r"manifest\.ocdbt" if field == "manifest" else "at offset"):
                decode(replace(database, **{field: bytes(damaged)}))


def test_no_flipped_bit_makes_tensorstore_read_something_else() -> None:
    expected, database, data_files = small_database()
    for field in ("manifest", "nodes"):
        whole = getattr(database, field)
        for byte in range(len(whole)):
            damaged = bytearray(whole)
            damaged[byte] ^= 1 << byte % 8
            files = files_of(replace(database, **{field: bytes(damaged)}), data_files)
            with pytest.raises((ValueError, OSError)):
                assert read_all(open_in_memory(files)) != expected


@pytest.mark.parametrize("field", ["manifest", "nodes"])
def test_no_cut_is_decoded(field: str) -> None:
    _, database, _ = small_database()
    whole = getattr(database, field)
    for size in range(len(whole)):
        with pytest.raises(CorruptionError):
            decode(replace(database, **{field: whole[:size]}))


@settings(deadline=None, max_examples=400)
@given(
    position=st.integers(0, 10**6),
    byte=st.integers(0, 255),
    field=st.sampled_from(["manifest", "nodes"]),
    node_bytes=st.sampled_from([150, 2**20]),
)
def test_nonsense_with_a_right_checksum_raises_errors_of_the_library_only(
    position: int, byte: int, field: str, node_bytes: int
) -> None:
    database = encode(many_values(12)[1], node_bytes=node_bytes)
    whole = getattr(database, field)
    start = whole.rindex(whole[:4])  # the root is the last node
    damaged = bytearray(whole[start:-4])
    damaged[position % len(damaged)] = byte
    damaged += struct.pack("<I", google_crc32c.value(bytes(damaged)))
    with contextlib.suppress(CorruptionError, UnsupportedFormatError):
        decode(replace(database, **{field: whole[:start] + bytes(damaged)}))


def write_with_tensorstore(compression: dict | None) -> tuple[ts.KvStore, dict[bytes, bytes]]:
    """Two databases of processes, merged into one that refers to their nodes, as Orbax does."""
    context = ts.Context()
    base = ts.KvStore.open("memory://merged/", context=context).result()
    config = {"compression": compression, "max_inline_value_bytes": 8, "max_decoded_node_bytes": 500}
    expected = {}
    merged = ts.KvStore.open(
        {"driver": "ocdbt", "base": "memory://merged/", "config": config}, context=context
    ).result()
    for process in range(2):
        spec = {"driver": "ocdbt", "base": f"memory://merged/ocdbt.process_{process}/", "config": config}
        part = ts.KvStore.open(spec, context=context).result()
        with ts.Transaction(atomic=True) as transaction:
            for i in range(100):
                key, data = b"layer_%d/c/%d" % (process, i), b"%d" % i * (i % 9)
                part.with_transaction(transaction)[key] = data
                expected[key] = data
        part.experimental_copy_range_to(merged).result()
    return base, expected


def test_a_database_that_tensorstore_wrote_and_merged_is_decoded() -> None:
    base, expected = write_with_tensorstore(None)
    values = decode_database(base["manifest.ocdbt"], lambda name, start, stop: base[name][start:stop])
    read = {v.key: v.inline if v.inline is not None else base[v.file][v.offset : v.offset + v.length] for v in values}
    assert read == expected
    assert list(read) == sorted(expected)
    assert {v.file.split("/")[0] for v in values if v.inline is None} == {"ocdbt.process_0", "ocdbt.process_1"}


def test_a_compressed_database_is_refused() -> None:
    base, _ = write_with_tensorstore({"id": "zstd", "level": 1})
    with pytest.raises(UnsupportedFormatError, match=r"manifest\.ocdbt.*zstd"):
        decode_database(base["manifest.ocdbt"], lambda name, start, stop: base[name][start:stop])


def test_a_key_given_twice_is_refused_by_name() -> None:
    values = [Value(key=b"b", inline=b"1"), Value(key=b"a", inline=b""), Value(key=b"b", inline=b"2")]
    with pytest.raises(InvalidArgumentError, match="b'b' is given twice"):
        encode(values)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Value(key=b"k" * 65536, inline=b""), "65535"),
        (Value(key=b"k", inline=bytes(2**20 + 1)), "inline"),
        (Value(key=b"k", length=1), "data file ''"),
        (Value(key=b"k", file="f" * 65536, length=1), "65536 bytes"),
        (Value(key=b"k", file="f", offset=-1, length=1), "offset"),
        (Value(key=b"k", file="f", offset=2**63 - 1, length=1), "offset"),
        (Value(key=b"k", file="f", offset=2**63, length=1), "64 bits"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(value: Value, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        encode([value])


@pytest.mark.parametrize(
    "bad",
    [{"uuid": b"short"}, {"commit_time_ns": -1}, {"nodes_file": ""}, {"node_bytes": 0}],
    ids=lambda bad: next(iter(bad)),
)
def test_arguments_outside_their_range_are_refused(bad: dict) -> None:
    good = {"nodes_file": NODES_FILE, "uuid": UUID, "commit_time_ns": 0}
    with pytest.raises(InvalidArgumentError, match=next(iter(bad))):
        encode_database([], **{**good, **bad})


def test_columns_encode_like_values() -> None:
    values = [
        Value(key=b"c", file="y", offset=300, length=4),
        Value(key=b"b", inline=b"inside"),
        Value(key=b"a", file="x", offset=5, length=200),
    ]
    columns = Columns(
        keys=[b"c", b"b", b"a"],
        inline=[b"", b"inside", b""],
        files=["x", "unused", "y"],
        file_ids=[2, -1, 0],
        offsets=np.array([300, 0, 5]),
        lengths=np.array([4, 0, 200]),
    )
    database = encode_database_columns(columns, nodes_file=NODES_FILE, uuid=UUID, commit_time_ns=0)
    assert database == encode_database(values, nodes_file=NODES_FILE, uuid=UUID, commit_time_ns=0)


@given(st.lists(st.integers(0, 2**63 - 1)))
def test_varints_of_a_column_are_those_of_its_values(values: list[int]) -> None:
    assert encode_varints(np.array(values, dtype=np.int64)) == b"".join(map(encode_varint, values))
