"""The sidecar ``jaxckpt.json``: typed tree, leaves, chunk table with checksums, lineage. Canonical JSON, no pickle.

``docs/format.md`` is the normative description. The last member is the crc32c of every byte before it.
"""

import base64
import json
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import numpy as np

from jaxckpt.core.errors import CorruptionError, UnsupportedFormatError
from jaxckpt.core.tree import NONE, Node

FILE_NAME = "jaxckpt.json"
FORMAT_VERSION = 1
_COLUMNS = {"file": "<u4", "offset": "<u8", "length": "<u8", "crc32c": "<u4"}
NO_MANIFEST = -2  # in ``supersedes``: the checkpoint before had none


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafEntry:
    """One leaf. Arrays have ``dtype``, ``shape`` and ``chunk``; plain Python values are in ``value``.

    ``kind``: "array" (jax.Array), "numpy", "numpy_scalar", "prng_key", "bytes", and "int", "float", "bool", "complex",
    "str" for Python values.
    """

    name: str
    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    chunk: tuple[int, ...] = ()
    zstd_level: int | None = None
    sharding: int = -1  # index into Sidecar.shardings; -1: host memory
    memory_kind: str = ""
    prng_impl: str = ""
    value: Any = None

    @property
    def stored(self) -> bool:
        """Whether the leaf has chunks in the database (a zero-size array has none)."""
        return self.dtype != ""

    @property
    def grid(self) -> tuple[int, ...]:
        """Chunks per dimension."""
        return tuple([-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True)])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkTable:
    """All chunks in order of (leaf, grid index): where the bytes are, how many, and their crc32c.

    ``offset`` and ``length`` cover the chunk with its trailing checksum; ``crc32c`` is of the bytes before it.
    """

    file: np.ndarray  # uint32, index into Sidecar.files
    offset: np.ndarray  # uint64
    length: np.ndarray  # uint64
    crc32c: np.ndarray  # uint32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sidecar:
    """Everything a restore needs to know, in one read."""

    structure: Node
    leaves: tuple[LeafEntry, ...]
    shardings: tuple[dict[str, Any], ...]
    files: tuple[str, ...]
    table: ChunkTable
    manifest_crc32c: int
    supersedes: tuple[int, ...] = ()  # manifests that may still be in place after an interrupted overwrite
    step: int | None = None
    time_ns: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    processes: int = 1
    metadata: dict[str, Any] = field(default_factory=dict)
    parents: tuple[dict[str, Any], ...] = ()

    def first_chunks(self) -> np.ndarray:
        """int64 [leaves + 1]: position in the table of each leaf's first chunk."""
        counts = [int(np.prod(e.grid, dtype=np.int64)) if e.stored else 0 for e in self.leaves]
        return np.concatenate([[0], np.cumsum(np.array(counts, np.int64))]).astype(np.int64)


def manifest_checksum(data: bytes) -> int:
    """The crc32c that a database's manifest ends with, -1 if it is damaged.

    Not the crc32c of all its bytes: that is one and the same for all that end with their own.
    """
    found = google_crc32c.value(data[:-4])
    return found if data[-4:] == found.to_bytes(4, "little") else -1


def encode_sidecar(sidecar: Sidecar) -> bytes:
    """The bytes of ``jaxckpt.json``."""
    table = sidecar.table
    body = json.dumps(
        {
            "format": "jaxckpt",
            "version": FORMAT_VERSION,
            "step": sidecar.step,
            "time_ns": sidecar.time_ns,
            "versions": sidecar.versions,
            "processes": sidecar.processes,
            "metadata": sidecar.metadata,
            "parents": list(sidecar.parents),
            "manifest_crc32c": sidecar.manifest_crc32c,
            "supersedes": list(sidecar.supersedes),
            "tree": encode_node(sidecar.structure),
            "leaves": [
                {
                    "name": entry.name,
                    "kind": entry.kind,
                    **{n: value for n, default in _DEFAULTS.items() if (value := getattr(entry, n)) != default},
                }
                for entry in sidecar.leaves
            ],
            "shardings": list(sidecar.shardings),
            "files": list(sidecar.files),
            "chunks": {
                "count": len(table.file),
                **{
                    name: base64.b64encode(np.ascontiguousarray(getattr(table, name), dtype).tobytes()).decode("ascii")
                    for name, dtype in _COLUMNS.items()
                },
            },
        },
        separators=(",", ":"),
        allow_nan=False,
    ).encode()[:-1]
    return body + b',"crc32c":"%08x"}\n' % google_crc32c.value(body)


def decode_sidecar(data: bytes, *, where: str) -> Sidecar:
    """The record of a ``jaxckpt.json``. Raises CorruptionError naming ``where`` when any bit differs."""
    body, tail = data[:-_TAIL_BYTES], data[-_TAIL_BYTES:]
    if tail != b',"crc32c":"%08x"}\n' % google_crc32c.value(body):
        raise CorruptionError(
            f"{where} is damaged: its checksum does not match its {len(data)} bytes. The tensors are not affected: "
            f"move {FILE_NAME} away to restore without it (types of nodes and lineage are then lost)."
        )
    record = json.loads(body + b"}")
    if record.get("format") != "jaxckpt" or record.get("version") != FORMAT_VERSION:
        raise UnsupportedFormatError(
            f"{where} has format {record.get('format')!r} version {record.get('version')!r}; this jaxckpt reads "
            f"'jaxckpt' version {FORMAT_VERSION}. Upgrade jaxckpt, or move the file away to restore without it."
        )
    chunks = record["chunks"]
    return Sidecar(
        structure=decode_node(record["tree"]),
        leaves=tuple(_decode_leaf(e) for e in record["leaves"]),
        shardings=tuple(record["shardings"]),
        files=tuple(record["files"]),
        table=ChunkTable(
            **{name: _unpack(chunks[name], dtype) for name, dtype in _COLUMNS.items()},
        ),
        manifest_crc32c=record["manifest_crc32c"],
        supersedes=tuple(record["supersedes"]),
        step=record["step"],
        time_ns=record["time_ns"],
        versions=record["versions"],
        processes=record["processes"],
        metadata=record["metadata"],
        parents=tuple(record["parents"]),
    )


def encode_node(node: Node) -> Any:
    """A structure record as JSON: a leaf is its index, None is null, containers are lists led by their kind."""
    if node.kind == "leaf":
        return node.leaf
    if node.kind == "none":
        return None
    children = [encode_node(child) for child in node.children]
    if node.kind in ("list", "tuple"):
        return [node.kind, children]
    return [
        node.kind,
        children,
        [k if isinstance(k, str) else _encode_key(k) for k in node.keys],
        *([node.type] if node.type else []),
    ]


def decode_node(record: Any) -> Node:
    """The inverse of ``encode_node``."""
    if record is None:
        return NONE
    if isinstance(record, int):
        return Node(kind="leaf", leaf=record)
    kind, children = record[0], tuple(decode_node(child) for child in record[1])
    if kind in ("list", "tuple"):
        return Node(kind=kind, keys=tuple(range(len(children))), children=children)
    return Node(
        kind=kind,
        children=children,
        keys=tuple(_decode_key(k) for k in record[2]),
        type=record[3] if len(record) > 3 else "",
    )


_TAIL_BYTES = len(b',"crc32c":"00000000"}\n')
_DEFAULTS = {
    "dtype": "",
    "shape": (),
    "chunk": (),
    "zstd_level": None,
    "sharding": -1,
    "memory_kind": "",
    "prng_impl": "",
    "value": None,
}


def _decode_leaf(record: dict[str, Any]) -> LeafEntry:
    fields = dict(record)
    for name in ("shape", "chunk"):
        if name in fields:
            fields[name] = tuple(fields[name])
    return LeafEntry(**fields)


def _encode_key(key: Hashable) -> Any:
    if isinstance(key, str):
        return key
    if isinstance(key, bool):
        return {"bool": key}
    if isinstance(key, int):
        return {"int": key}
    if isinstance(key, float):
        return {"float": key.hex()}
    if isinstance(key, bytes):
        return {"bytes": base64.b64encode(key).decode()}
    if key is None:
        return {"none": 0}
    if isinstance(key, tuple):
        return {"tuple": [_encode_key(k) for k in key]}
    return {"other": str(key)}


def _decode_key(record: Any) -> Hashable:
    if isinstance(record, str):
        return record
    ((kind, value),) = record.items()
    if kind == "float":
        return float.fromhex(value)
    if kind == "bytes":
        return base64.b64decode(value)
    if kind == "none":
        return None
    if kind == "tuple":
        return tuple(_decode_key(k) for k in value)
    return value


def _unpack(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)
