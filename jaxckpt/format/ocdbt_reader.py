"""Read back the keys of an uncompressed OCDBT database, for inspection, tests and recovery without the sidecar.

Databases that TensorStore wrote are read too, as long as they are uncompressed and keep their versions in
``manifest.ocdbt``. Only nodes are read here, never the values in data files.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import google_crc32c
import numpy as np

from jaxckpt.core.errors import CorruptionError, UnsupportedFormatError
from jaxckpt.format.ocdbt import MANIFEST_MAGIC, MAX_NODE_ENTRIES, MISSING, NODE_MAGIC, Value

MANIFEST_FILE = "manifest.ocdbt"

_ENVELOPE_BYTES = 4 + 8 + 2 + 4  # magic, length, version and compression, checksum

ReadFile = Callable[[str, int, int], bytes]
"""``read(name, start, stop)``: bytes of a file, named relative to the root of the database."""


def decode_database(manifest: bytes, read: ReadFile) -> list[Value]:
    """Return the values of the newest version of a database, sorted by key.

    Args:
        manifest: the contents of ``manifest.ocdbt``.
        read: called for each B+tree node; its own errors pass through.

    Raises:
        CorruptionError: the manifest or a node is not what was written; names the file and the offset.
        UnsupportedFormatError: a newer version, compressed nodes, or versions outside ``manifest.ocdbt``.
    """
    root = _decode_manifest(manifest)
    return [] if root is None else list(_walk(root, read))


@dataclass(frozen=True, slots=True, kw_only=True)
class _NodeRef:
    base_path: bytes  # the paths inside the node are relative to it
    path: bytes  # whole, base_path included
    offset: int
    length: int
    height: int
    prefix: bytes  # of all keys below, left out of the node
    first_key: bytes  # no key below comes before it


@dataclass(slots=True, kw_only=True)
class _Cursor:
    """A position in the body of a manifest or node; whatever cannot be decoded raises and names ``where``."""

    data: bytes
    position: int
    where: str

    def fail(self, why: str) -> CorruptionError:
        return CorruptionError(f"{self.where}: {why}; it was damaged, or not written as OCDBT")

    def take(self, size: int) -> bytes:
        taken = self.data[self.position : self.position + size]
        if len(taken) != size:
            raise self.fail(f"needs {size} bytes at byte {self.position} of its {len(self.data)}")
        self.position += size
        return taken

    def varint(self) -> int:
        return int(self.varints(1)[0])

    def varints(self, count: int) -> np.ndarray:
        if count == 0:
            return np.zeros(0, np.uint64)
        window = np.frombuffer(self.data, np.uint8, offset=self.position)[: 10 * count]
        ends = np.flatnonzero(window < 0x80)[:count]
        if len(ends) < count:
            raise self.fail(f"needs {count} integers at byte {self.position}, finds {len(ends)}")
        starts = np.concatenate([[0], ends[:-1] + 1])
        sizes = ends - starts + 1
        if sizes.max() > 10 or (window[ends[sizes == 10]] > 1).any():
            raise self.fail(f"an integer after byte {self.position} is too large")
        window = window[: ends[-1] + 1]
        shifts = 7 * (np.arange(len(window)) - np.repeat(starts, sizes))
        groups = (window & 0x7F).astype(np.uint64) << shifts.astype(np.uint64)
        self.position += len(window)
        return np.add.reduceat(groups, starts)

    def bounded(self, count: int, bound: int, what: str) -> list[int]:
        """Read ``count`` integers, each less than ``bound``."""
        values = self.varints(count)
        if count and int(values.max()) >= bound:
            raise self.fail(f"{what} {int(values.max())} is not less than {bound}")
        return values.tolist()

    def finish(self) -> None:
        if self.position != len(self.data):
            raise self.fail(f"has {len(self.data) - self.position} bytes too many")


def _decode_manifest(manifest: bytes) -> _NodeRef | None:
    body = _open_frame(manifest, MANIFEST_MAGIC, MANIFEST_FILE)
    body.take(16)  # uuid
    if kind := body.take(1)[0]:
        raise UnsupportedFormatError(f"{MANIFEST_FILE}: manifest kind {kind}; only 0, a single file, can be read")
    body.varints(2)  # limits for writers
    body.take(1)  # arity of the version tree
    if body.varint() != 0:  # what writers would compress with; each node says for itself
        body.take(4)  # level
    files = _decode_file_table(body, b"")
    count = body.varint()
    if not 1 <= count <= MAX_NODE_ENTRIES:
        raise body.fail(f"has {count} versions")
    body.varints(count)  # generation numbers
    heights = body.take(count)
    file_ids = body.bounded(count, len(files), "file id")
    offsets, lengths = body.varints(count), body.varints(count)
    # Statistics, commit times and older versions follow, which nothing here needs.
    base_path, path = files[file_ids[-1]]
    offset, length = int(offsets[-1]), int(lengths[-1])
    if (offset, length) == (MISSING, MISSING):
        return None
    if max(offset, length) >= 2**63:
        raise body.fail(f"the root node has offset {offset} and length {length}")
    return _NodeRef(
        base_path=base_path, path=path, offset=offset, length=length, height=heights[-1], prefix=b"", first_key=b""
    )


def _walk(ref: _NodeRef, read: ReadFile) -> Iterator[Value]:
    name = _name(ref.path)
    where = f"{name} at offset {ref.offset}"
    data = read(name, ref.offset, ref.offset + ref.length)
    if len(data) != ref.length:
        raise CorruptionError(f"{where}: the file gives {len(data)} bytes of a node of {ref.length}; it was cut short")
    body = _open_frame(data, NODE_MAGIC, where)
    if (height := body.take(1)[0]) != ref.height:
        raise body.fail(f"the node has height {height}, its parent says {ref.height}")
    files = _decode_file_table(body, ref.base_path)
    count = body.varint()
    if not 1 <= count <= MAX_NODE_ENTRIES:
        raise body.fail(f"the node has {count} entries")
    if height == 0:
        yield from _decode_leaf(body, ref, files, count)
    else:
        for child in _decode_interior(body, ref, files, count):
            yield from _walk(child, read)


def _decode_leaf(body: _Cursor, ref: _NodeRef, files: list[tuple[bytes, bytes]], count: int) -> list[Value]:
    keys, _ = _decode_keys(body, ref, count, interior=False)
    lengths = body.bounded(count, 2**63, "value length")
    kinds = body.take(count)
    if max(kinds) > 1:
        raise body.fail(f"value kind {max(kinds)} is not 0 or 1")
    indirect = sum(kinds)
    file_ids = iter(body.bounded(indirect, len(files), "file id"))
    offsets = iter(body.bounded(indirect, 2**63, "value offset"))
    names = [_name(path) for _, path in files]
    values = [
        Value(key=key, file=names[next(file_ids)], offset=next(offsets), length=length)
        if kind
        else Value(key=key, inline=body.take(length))
        for key, kind, length in zip(keys, kinds, lengths, strict=True)
    ]
    body.finish()
    return values


def _decode_interior(body: _Cursor, ref: _NodeRef, files: list[tuple[bytes, bytes]], count: int) -> list[_NodeRef]:
    keys, subtree_prefixes = _decode_keys(body, ref, count, interior=True)
    file_ids = body.bounded(count, len(files), "file id")
    offsets = body.bounded(count, 2**63, "node offset")
    lengths = body.bounded(count, 2**63, "node length")
    body.varints(3 * count)  # statistics
    body.finish()
    return [
        _NodeRef(
            base_path=files[file_id][0],
            path=files[file_id][1],
            offset=offset,
            length=length,
            height=ref.height - 1,
            prefix=key[: len(ref.prefix) + shared],
            first_key=key,
        )
        for key, shared, file_id, offset, length in zip(keys, subtree_prefixes, file_ids, offsets, lengths, strict=True)
    ]


def _decode_keys(body: _Cursor, ref: _NodeRef, count: int, *, interior: bool) -> tuple[list[bytes], list[int]]:
    """Return whole keys and, in an interior node, how much of each its subtree shares beyond the node's prefix."""
    prefix_sizes = [0, *body.varints(count - 1).tolist()]
    suffix_sizes = body.varints(count).tolist()
    subtree_prefixes = body.varints(count).tolist() if interior else []
    keys, relative, previous = [], b"", ref.first_key
    for i, (prefix_size, suffix_size) in enumerate(zip(prefix_sizes, suffix_sizes, strict=True)):
        if prefix_size > len(relative):
            raise body.fail(f"key {i} shares {prefix_size} bytes with a key of {len(relative)}")
        relative = relative[:prefix_size] + body.take(suffix_size)
        if interior and subtree_prefixes[i] > len(relative):
            raise body.fail(f"child {i} shares {subtree_prefixes[i]} bytes of a key of {len(relative)}")
        key = ref.prefix + relative
        if key < previous or (key == previous and i):
            raise body.fail(f"key {key!r} comes after {previous!r}")
        keys.append(key)
        previous = key
    return keys, subtree_prefixes


def _decode_file_table(body: _Cursor, transitive_path: bytes) -> list[tuple[bytes, bytes]]:
    """Return the base path and the whole path of each file, both relative to the root of the database."""
    count = body.varint()
    if count > len(body.data):
        raise body.fail(f"names {count} data files")
    shared = [0, *body.varints(max(count, 1) - 1).tolist()]
    suffix_sizes = body.varints(count).tolist()
    base_sizes = body.varints(count).tolist()
    files, path = [], b""
    for i in range(count):
        if shared[i] > len(path):
            raise body.fail(f"path {i} shares {shared[i]} bytes with a path of {len(path)}")
        path = path[: shared[i]] + body.take(suffix_sizes[i])
        if base_sizes[i] > len(path):
            raise body.fail(f"base path {i} has {base_sizes[i]} bytes of a path of {len(path)}")
        files.append((transitive_path + path[: base_sizes[i]], transitive_path + path))
    return files


def _open_frame(data: bytes, magic: int, where: str) -> _Cursor:
    body = _Cursor(data=data[:-4], position=0, where=where)
    if len(data) < _ENVELOPE_BYTES:
        raise body.fail(f"has {len(data)} bytes, at least {_ENVELOPE_BYTES} are needed")
    if (found := struct.unpack_from(">I", data)[0]) != magic:
        raise body.fail(f"starts with {found:#010x} where {magic:#010x} belongs")
    if (length := struct.unpack_from("<Q", data, 4)[0]) != len(data):
        raise body.fail(f"says it has {length} bytes, has {len(data)}")
    stored, computed = struct.unpack_from("<I", data, len(data) - 4)[0], google_crc32c.value(body.data)
    if stored != computed:
        raise body.fail(f"its crc32c is {stored:#010x}, its bytes have {computed:#010x}")
    body.position = 12
    if version := body.varint():
        raise UnsupportedFormatError(f"{where}: OCDBT version {version}; only version 0 can be read")
    if compression := body.varint():
        raise UnsupportedFormatError(
            f"{where}: OCDBT compression {compression} (1 is zstd); only uncompressed databases can be read here, "
            "TensorStore reads the others"
        )
    return body


def _name(path: bytes) -> str:
    return path.decode(errors="surrogateescape")
