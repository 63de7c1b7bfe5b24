"""The parts that OCDBT nodes and manifests are made of: varints, key columns, file tables, framed with a checksum."""

import itertools
import struct
from collections.abc import Sequence

import google_crc32c
import numpy as np

_COMPARED_BYTES = 2**24  # bound of the scratch memory of one key comparison


def frame(magic: int, body: list[bytes]) -> bytes:
    """Magic, length of everything, format version 0, compression 0, body, checksum of all before it."""
    length = 4 + 8 + 2 + sum(map(len, body)) + 4
    framed = b"".join([struct.pack(">I", magic), struct.pack("<Q", length), b"\0\0", *body])
    return framed + struct.pack("<I", google_crc32c.value(framed))


def encode_file_table(paths: list[bytes]) -> bytes:
    """Encode sorted paths, all with an empty base path: they are relative to the root, wherever they are read from."""
    shared = [shared_prefix_bytes(a, b) for a, b in itertools.pairwise(paths)]
    suffixes = [path[keep:] for path, keep in zip(paths, [0, *shared], strict=False)]
    return b"".join(
        [
            encode_varint(len(paths)),
            *map(encode_varint, shared),
            *(encode_varint(len(suffix)) for suffix in suffixes),
            bytes(len(paths)),  # lengths of the base paths
            *suffixes,
        ]
    )


def encode_keys(keys: Sequence[bytes], excluded: int) -> tuple[bytes, bytes, bytes]:
    """Return the columns of prefix lengths, suffix lengths and suffixes of sorted keys.

    The first ``excluded`` bytes, which the keys share, are left out.
    """
    relative = [key[excluded:] for key in keys] if excluded else keys
    shared = _shared_with_previous(relative, sizes_of(relative)) if len(relative) > 1 else np.zeros(0, np.int64)
    suffixes = [key[keep:] for key, keep in zip(relative, [0, *shared.tolist()], strict=True)]
    return encode_varints(shared), encode_varints(sizes_of(suffixes)), b"".join(suffixes)


def _shared_with_previous(keys: Sequence[bytes], sizes: np.ndarray) -> np.ndarray:
    """Return, for each key but the first, how many bytes it starts with in common with the key before it."""
    width = max(1, int(sizes.max()))
    rows = max(1, _COMPARED_BYTES // width)
    shared = []
    for start in range(0, len(keys) - 1, rows):
        block = keys[start : start + rows + 1]
        matrix = np.array(block, dtype=f"S{width}").view(np.uint8).reshape(len(block), width)
        same = matrix[1:] == matrix[:-1]
        shared.append(np.where(same.all(axis=1), width, same.argmin(axis=1)))
    # numpy pads with zero bytes, which a key may also end with: no prefix is longer than the shorter key.
    return np.minimum(np.concatenate([*shared, np.zeros(0, np.int64)]), np.minimum(sizes[1:], sizes[:-1]))


def shared_prefix_bytes(a: bytes, b: bytes) -> int:
    """How many bytes two keys start with in common."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def sizes_of(items: Sequence[bytes]) -> np.ndarray:
    """The lengths of byte strings."""
    return np.fromiter(map(len, items), np.int64, len(items))


def encode_varint(value: int) -> bytes:
    """Encode one unsigned integer as unsigned LEB128."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def encode_varints(values: np.ndarray) -> bytes:
    """Encode integers, none negative, as unsigned LEB128 back to back."""
    if not len(values):
        return b""
    largest = int(values.max())
    if largest < 0x80:
        return values.astype(np.uint8).tobytes()
    values = values.astype(np.uint64)
    shifts = np.arange(0, largest.bit_length(), 7, dtype=np.uint64)
    rest = values[:, None] >> shifts  # column k: what is left when k groups of seven bits are out
    keep = rest != 0
    keep[:, 0] = True
    more = rest >= 0x80
    return ((rest & np.uint64(0x7F)).astype(np.uint8) | more.astype(np.uint8) << 7)[keep].tobytes()
