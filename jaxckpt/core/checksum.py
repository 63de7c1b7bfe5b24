"""crc32c (Castagnoli) of host memory, computed without holding the interpreter's lock where that can be had.

``google_crc32c`` holds the lock while it computes, so threads that read and check chunks would take turns. The C
library inside its wheel has a plain C interface, which ctypes calls with the lock released; where it is not found,
the Python function is used.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np

UNLOCKED_BYTES = 32 * 1024  # below this the call costs more than it frees


def crc32c(data: np.ndarray, before: int = 0) -> int:
    """The crc32c of a contiguous uint8 array, or of what had ``before`` as its crc32c followed by the array."""
    if _extend is None or data.nbytes < UNLOCKED_BYTES:
        return google_crc32c.extend(before, data)
    return _extend(before, data.ctypes.data, data.nbytes)


def _load() -> Callable[[int, int, int], int] | None:
    package = Path(str(google_crc32c.__file__)).parent
    for path in sorted([*package.parent.glob("google_crc32c.libs/libcrc32c*"), *package.glob(".dylibs/libcrc32c*")]):
        try:
            function = ctypes.CDLL(str(path)).crc32c_extend
        except (OSError, AttributeError):
            continue
        function.argtypes, function.restype = [ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_uint32
        if function(0, b"123456789", 9) == google_crc32c.value(b"123456789"):
            return function
    return None


_extend = _load()
