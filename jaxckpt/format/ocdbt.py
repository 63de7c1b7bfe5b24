"""Encode the B+tree and manifest of an OCDBT database over data files that somebody else wrote.

TensorStore's OCDBT format keeps values in data files of any name, and finds them through B+tree nodes whose root is
named by ``manifest.ocdbt``. Chunk bytes can therefore go straight into files, and two byte strings made here turn
those files into a database that TensorStore and Orbax read. Nothing here does I/O or reads a clock.

Everything is written uncompressed, as one generation, with paths relative to the database root. A node takes the form
of columns (all prefix lengths, then all suffix lengths, ...), which numpy encodes a node at a time.
"""

import itertools
import operator
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.format.ocdbt_columns import (
    encode_file_table,
    encode_keys,
    encode_varint,
    encode_varints,
    frame,
    shared_prefix_bytes,
    sizes_of,
)

MANIFEST_MAGIC = 0x0CDB3A2A
NODE_MAGIC = 0x0CDB20DE
MISSING = 2**64 - 1  # offset and length of the root of an empty database

MAX_KEY_BYTES = 65535
MAX_PATH_BYTES = 65535
MAX_INLINE_BYTES = 2**20
MAX_NODE_ENTRIES = 2**20

# What a later writer that opens the database goes by; nothing of it limits what readers accept.
_MAX_INLINE_VALUE_BYTES = 4096
_MAX_DECODED_NODE_BYTES = 8 * 2**20  # TensorStore's default
_VERSION_TREE_ARITY_LOG2 = 4  # TensorStore's default

# A reader of one key fetches one node per level whole, a reader of all keys wants few requests.
_NODE_BYTES = 2**20
_ENTRY_OVERHEAD_BYTES = 16  # file id, offset, length and key lengths, about


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One key and its value: the bytes themselves (``inline``), or where they lie in a data file.

    ``file`` is relative to the root of the database, e.g. ``"ocdbt.process_0/d/<hex>"``.
    ``file``, ``offset`` and ``length`` mean nothing when ``inline`` is given.
    """

    key: bytes
    inline: bytes | None = None
    file: str = ""
    offset: int = 0
    length: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Many values as parallel columns, the fast way in.

    ``file_ids[i]`` indexes ``files``, or is -1 where the value is ``inline[i]``; ``inline[i]`` is ``b""`` elsewhere.
    """

    keys: Sequence[bytes]
    inline: Sequence[bytes]
    files: Sequence[str]
    file_ids: Sequence[int] | np.ndarray
    offsets: Sequence[int] | np.ndarray
    lengths: Sequence[int] | np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """The bytes that make a database out of data files: a file of B+tree nodes, and ``manifest.ocdbt``.

    Write ``nodes`` and the data files before ``manifest``, which makes them visible. ``nodes`` of an empty database
    is empty, and its file need not exist.
    """

    nodes: bytes
    manifest: bytes


def encode_database(
    values: Iterable[Value], *, nodes_file: str, uuid: bytes, commit_time_ns: int, node_bytes: int = _NODE_BYTES
) -> Database:
    """Encode the database that holds ``values``, given in any order.

    Args:
        values: the values, each key once.
        nodes_file: path of the file that will hold ``Database.nodes``, relative to the root of the database.
        uuid: 16 bytes that identify the database.
        commit_time_ns: time of the one generation, in nanoseconds since the Unix epoch.
        node_bytes: a node ends with the entry that fills it to this size.

    Raises:
        InvalidArgumentError: a key is given twice, or something is outside the limits of the format.

    >>> value = Value(key=b"w/c/0", file="d/0123", offset=0, length=64)
    >>> database = encode_database([value], nodes_file="d/4567", uuid=bytes(16), commit_time_ns=0)
    >>> database.nodes[:4].hex()
    '0cdb20de'
    """
    values = list(values)
    files: dict[str, int] = {}
    file_ids = [-1 if v.inline is not None else files.setdefault(v.file, len(files)) for v in values]
    columns = Columns(
        keys=[v.key for v in values],
        inline=[b"" if v.inline is None else v.inline for v in values],
        files=list(files),
        file_ids=file_ids,
        offsets=[v.offset for v in values],
        lengths=[v.length for v in values],
    )
    return encode_database_columns(
        columns, nodes_file=nodes_file, uuid=uuid, commit_time_ns=commit_time_ns, node_bytes=node_bytes
    )


def encode_database_columns(
    columns: Columns, *, nodes_file: str, uuid: bytes, commit_time_ns: int, node_bytes: int = _NODE_BYTES
) -> Database:
    """Encode like ``encode_database``, from columns: no Python object per value beyond its key."""
    if len(uuid) != 16:
        raise InvalidArgumentError(f"uuid of an OCDBT database has {len(uuid)} bytes; give 16")
    if not 0 <= commit_time_ns < 2**63:
        raise InvalidArgumentError(
            f"commit_time_ns={commit_time_ns} is not a time that OCDBT can hold; give 0 <= ns < 2**63"
        )
    if not 1 <= node_bytes <= _MAX_DECODED_NODE_BYTES:
        raise InvalidArgumentError(f"node_bytes={node_bytes}; give 1 <= bytes <= {_MAX_DECODED_NODE_BYTES}")
    nodes_path = nodes_file.encode()
    for what, path in (("nodes_file", nodes_file), *(("data file", name) for name in columns.files)):
        if not 1 <= len(path.encode()) <= MAX_PATH_BYTES:
            raise InvalidArgumentError(
                f"{what} {path[:80]!r} has {len(path.encode())} bytes; an OCDBT path has 1 to {MAX_PATH_BYTES}"
            )
    table = _sort_by_key(_check_columns(columns))
    nodes = bytearray()
    level = _append_leaves(nodes, table, node_bytes)
    height = 0
    while len(level) > 1:
        height += 1
        level = _append_interiors(nodes, level, nodes_path, height, node_bytes)
    root = level[0] if level else None
    manifest = _encode_manifest(root, height, nodes_path, uuid, commit_time_ns)
    return Database(nodes=bytes(nodes), manifest=manifest)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """Checked columns, the file ids in the order of the sorted paths, and no empty value out of line."""

    keys: Sequence[bytes]
    inline: Sequence[bytes]
    paths: Sequence[bytes]
    file_ids: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """A node that lies in the nodes file, as its parent describes it."""

    key: bytes  # its first key, whole
    excluded_bytes: int  # of that key: the prefix that the node itself leaves out of its keys
    offset: int
    length: int
    num_keys: int
    tree_bytes: int
    indirect_bytes: int


def _check_columns(columns: Columns) -> _Table:
    keys, inline = columns.keys, columns.inline
    try:
        file_ids, offsets, lengths = (
            np.asarray(column, dtype=np.int64) for column in (columns.file_ids, columns.offsets, columns.lengths)
        )
    except OverflowError:
        raise InvalidArgumentError("a file id, offset or length of a value does not fit 64 bits") from None
    counts = (len(keys), len(inline), len(file_ids), len(offsets), len(lengths))
    if len(set(counts)) != 1:
        raise InvalidArgumentError(f"keys, inline, file_ids, offsets, lengths differ in length: {counts}")
    key_bytes, inline_bytes = sizes_of(keys), sizes_of(inline)
    indirect = file_ids >= 0
    end_overflows = lengths > np.iinfo(np.int64).max - np.maximum(offsets, 0)
    for bad, why in (
        (key_bytes > MAX_KEY_BYTES, f"is longer than the {MAX_KEY_BYTES} bytes that OCDBT allows"),
        (inline_bytes > MAX_INLINE_BYTES, f"has more than {MAX_INLINE_BYTES} inline bytes: use a data file"),
        ((file_ids < -1) | (file_ids >= len(columns.files)), f"has no file id in [-1, {len(columns.files)})"),
        (indirect & (inline_bytes > 0), "has both inline bytes and a data file: give one"),
        (indirect & ((offsets < 0) | (lengths < 0) | end_overflows), "has an offset and length outside [0, 2**63)"),
    ):
        if bad.any():
            raise InvalidArgumentError(f"key {keys[int(bad.argmax())]!r} {why}")
    # Nothing to read is better said in the node than by a range of a file that may have no byte there.
    file_ids = np.where(lengths == 0, -1, file_ids)
    named = [path.encode() for path in columns.files]
    paths = sorted(set(named))
    if paths:
        rank = {path: i for i, path in enumerate(paths)}
        order = np.array([*(rank[path] for path in named), -1])  # -1 indexes the last: inline stays -1
        file_ids = order[file_ids]
    lengths = np.where(file_ids >= 0, lengths, inline_bytes)
    return _Table(keys=keys, inline=inline, paths=paths, file_ids=file_ids, offsets=offsets, lengths=lengths)


def _sort_by_key(table: _Table) -> _Table:
    keys = table.keys
    if all(map(operator.lt, keys, itertools.islice(keys, 1, None))):
        return table
    order = sorted(range(len(keys)), key=keys.__getitem__)
    keys = [keys[i] for i in order]
    for key, following in itertools.pairwise(keys):
        if key == following:
            raise InvalidArgumentError(f"key {key!r} is given twice; a key of a database has one value")
    return replace(
        table,
        keys=keys,
        inline=[table.inline[i] for i in order],
        file_ids=table.file_ids[order],
        offsets=table.offsets[order],
        lengths=table.lengths[order],
    )


def _append_leaves(nodes: bytearray, table: _Table, node_bytes: int) -> list[_Node]:
    indirect = table.file_ids >= 0
    sizes = sizes_of(table.keys) + np.where(indirect, 0, table.lengths) + _ENTRY_OVERHEAD_BYTES
    groups = [(0, len(sizes))] if 0 < sizes.sum() < node_bytes else _split(sizes.tolist(), node_bytes, 1)
    level = []
    for start, stop in groups:
        keys = table.keys[start:stop]
        # The root has no parent to hold the prefix for it.
        excluded = 0 if len(groups) == 1 else shared_prefix_bytes(keys[0], keys[-1])
        body = _encode_leaf(table, start, stop, excluded)
        indirect_bytes = sum(table.lengths[start:stop][indirect[start:stop]].tolist())
        level.append(
            _append_node(
                nodes, body, keys[0], excluded, num_keys=len(keys), tree_bytes=0, indirect_bytes=indirect_bytes
            )
        )
    return level


def _encode_leaf(table: _Table, start: int, stop: int, excluded: int) -> list[bytes]:
    indirect = table.file_ids[start:stop] >= 0
    used, file_ids = np.unique(table.file_ids[start:stop][indirect], return_inverse=True)
    prefixes, suffixes, suffix_bytes = encode_keys(table.keys[start:stop], excluded)
    return [
        b"\0",  # height
        encode_file_table([table.paths[i] for i in used]),
        encode_varint(stop - start),
        prefixes,
        suffixes,
        suffix_bytes,
        encode_varints(table.lengths[start:stop]),
        indirect.astype(np.uint8).tobytes(),
        encode_varints(file_ids),
        encode_varints(table.offsets[start:stop][indirect]),
        b"".join(table.inline[start:stop]),
    ]


def _append_interiors(
    nodes: bytearray, children: list[_Node], nodes_path: bytes, height: int, node_bytes: int
) -> list[_Node]:
    # Two children at least, so that every level is smaller than the one below.
    groups = _split([len(child.key) + 3 * _ENTRY_OVERHEAD_BYTES for child in children], node_bytes, 2)
    level = []
    for start, stop in groups:
        group = children[start:stop]
        excluded = 0
        if len(groups) > 1:
            # A child's own prefix must reach at least as far as the one that this node leaves out.
            excluded = min(shared_prefix_bytes(group[0].key, group[-1].key), *(c.excluded_bytes for c in group))
        body = _encode_interior(group, nodes_path, height, excluded)
        level.append(
            _append_node(
                nodes,
                body,
                group[0].key,
                excluded,
                num_keys=sum(child.num_keys for child in group),
                tree_bytes=sum(child.tree_bytes for child in group),
                indirect_bytes=sum(child.indirect_bytes for child in group),
            )
        )
    return level


def _encode_interior(children: list[_Node], nodes_path: bytes, height: int, excluded: int) -> list[bytes]:
    prefixes, suffixes, suffix_bytes = encode_keys([child.key for child in children], excluded)
    return [
        bytes([height]),
        encode_file_table([nodes_path]),
        encode_varint(len(children)),
        prefixes,
        suffixes,
        _column(children, lambda child: child.excluded_bytes - excluded),
        suffix_bytes,
        bytes(len(children)),  # file ids: all nodes are in the one file
        _column(children, lambda child: child.offset),
        _column(children, lambda child: child.length),
        _column(children, lambda child: child.num_keys),
        _column(children, lambda child: child.tree_bytes),
        _column(children, lambda child: child.indirect_bytes),
    ]


def _column(children: list[_Node], field: Callable[[_Node], int]) -> bytes:
    return b"".join(encode_varint(field(child)) for child in children)


def _append_node(
    nodes: bytearray,
    body: list[bytes],
    key: bytes,
    excluded: int,
    *,
    num_keys: int,
    tree_bytes: int,
    indirect_bytes: int,
) -> _Node:
    offset = len(nodes)
    nodes += frame(NODE_MAGIC, body)
    length = len(nodes) - offset
    return _Node(
        key=key,
        excluded_bytes=excluded,
        offset=offset,
        length=length,
        num_keys=num_keys,
        tree_bytes=tree_bytes + length,
        indirect_bytes=min(indirect_bytes, 2**64 - 1),  # the statistics saturate
    )


def _split(sizes: list[int], target: int, min_entries: int) -> list[tuple[int, int]]:
    """Cut entries into runs, each of which ends with the entry that brings it to ``target``."""
    runs, start, size = [], 0, 0
    for i, entry in enumerate(sizes):
        size += entry
        if size >= target and i + 1 - start >= min_entries:
            runs.append((start, i + 1))
            start, size = i + 1, 0
    if start < len(sizes):
        runs.append((start, len(sizes)))
    return runs


def _encode_manifest(root: _Node | None, height: int, nodes_path: bytes, uuid: bytes, commit_time_ns: int) -> bytes:
    if root is None:
        paths, location, statistics = [b""], (MISSING, MISSING), (0, 0, 0)
    else:
        paths, location = [nodes_path], (root.offset, root.length)
        statistics = (root.num_keys, root.tree_bytes, root.indirect_bytes)
    body = [
        uuid,
        b"\0",  # manifest kind: single file
        encode_varint(_MAX_INLINE_VALUE_BYTES),
        encode_varint(_MAX_DECODED_NODE_BYTES),
        bytes([_VERSION_TREE_ARITY_LOG2]),
        encode_varint(0),  # compression method: none
        encode_file_table(paths),
        encode_varint(1),  # versions in the manifest
        encode_varint(1),  # generation number
        bytes([height]),
        encode_varint(0),  # file id of the root
        *map(encode_varint, (*location, *statistics)),
        struct.pack("<Q", commit_time_ns),
        encode_varint(0),  # version tree nodes, which hold older versions
    ]
    return frame(MANIFEST_MAGIC, body)
