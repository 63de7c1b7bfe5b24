"""zarr v3 metadata of an array and the keys of its chunks.

Chunks are stored raw (little-endian, C order), optionally through zstd, and end in a crc32c of the bytes before it:
the standard codecs ``bytes``, ``zstd``, ``crc32c``, which TensorStore and Orbax check with no code of ours.
"""

import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from jaxckpt.core.dtypes import ZARR3_DTYPES

CHECKSUM_BYTES = 4


@lru_cache(maxsize=4096)
def array_metadata(shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...], zstd_level: int | None) -> bytes:
    """The ``zarr.json`` of an array."""
    stored = dtype if dtype in ZARR3_DTYPES else "uint8"
    # Single-byte types have no byte order.
    codecs: list[dict[str, object]] = [_BYTES if stored in _ONE_BYTE or "float4" in stored else _BYTES_LITTLE]
    if zstd_level is not None:
        codecs.append({"name": "zstd", "configuration": {"level": zstd_level, "checksum": False}})
    codecs.append({"name": "crc32c"})
    fill: object = (
        [0.0, 0.0] if stored.startswith("complex") else False if stored == "bool" else 0.0 if "float" in stored else 0
    )
    return json.dumps(
        {
            "chunk_grid": {"configuration": {"chunk_shape": list(chunk)}, "name": "regular"},
            "chunk_key_encoding": {"name": "default"},
            "codecs": codecs,
            "data_type": stored,
            "fill_value": fill,
            "node_type": "array",
            "shape": list(shape),
            "zarr_format": 3,
        },
        separators=(",", ":"),
    ).encode()


def metadata_key(name: str) -> str:
    """The database key of an array's metadata."""
    return f"{name}/zarr.json" if name else "zarr.json"


def chunk_keys(name: str, grid: tuple[int, ...]) -> list[str]:
    """The database keys of all chunks of an array, in C order of the grid."""
    keys = [f"{name}/c" if name else "c"]
    for extent in grid:
        keys = [f"{key}/{i}" for key in keys for i in range(extent)]
    return keys


def grid_of(shape: Sequence[int], chunk: Sequence[int]) -> tuple[int, ...]:
    """Number of chunks per dimension."""
    return tuple(-(-n // c) for n, c in zip(shape, chunk, strict=True))


def count(grid: Sequence[int]) -> int:
    """Number of chunks of a grid."""
    return int(np.prod(grid, dtype=np.int64))


_BYTES: dict[str, object] = {"name": "bytes"}
_BYTES_LITTLE: dict[str, object] = {"name": "bytes", "configuration": {"endian": "little"}}
_ONE_BYTE = {"bool", "int2", "int4", "int8", "uint8"} | {
    f"float8_{x}" for x in ("e3m4", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
}
