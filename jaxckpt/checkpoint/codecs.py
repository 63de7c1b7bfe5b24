"""zstd compression of chunks, per leaf. Off unless asked for: weights and moments hardly compress."""

import threading
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import zstandard

from jaxckpt.core.errors import CorruptionError

_local = threading.local()


@lru_cache(maxsize=64)
def encoder(level: int | None) -> Callable[[np.ndarray], bytes] | None:
    """A function from a chunk's bytes to a zstd frame; None for no compression."""
    if level is None:
        return None

    def encode(data: np.ndarray) -> bytes:
        # Compressors are not thread safe.
        compressors = _local.__dict__.setdefault("compressors", {})
        if level not in compressors:
            compressors[level] = zstandard.ZstdCompressor(level=level, write_content_size=True)
        return compressors[level].compress(memoryview(data))

    return encode


@lru_cache(maxsize=2)
def decoder(compressed: bool) -> Callable[[np.ndarray, int], bytes] | None:
    """A function from a zstd frame and the size of its content to that content; None for no compression."""
    if not compressed:
        return None

    def decode(data: np.ndarray, size: int) -> bytes:
        try:
            found = zstandard.ZstdDecompressor().decompress(memoryview(data), max_output_size=size)
        except zstandard.ZstdError as error:
            raise CorruptionError(f"a compressed chunk cannot be decoded: {error}") from error
        if len(found) != size:
            raise CorruptionError(f"a compressed chunk holds {len(found)} bytes, {size} were expected.")
        return found

    return decode
