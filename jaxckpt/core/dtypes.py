"""Names of dtypes and back, and the plain unsigned view in which bytes of any dtype are moved."""

from functools import lru_cache
from operator import attrgetter

import jax.numpy as jnp
import ml_dtypes
import numpy as np

# zarr v3 has no name for these in TensorStore 0.1.86; their bytes are stored as uint8.
ZARR3_DTYPES = {
    "bool", "int2", "int4", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
    "float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz", "float8_e8m0fnu", "bfloat16", "float16", "float32", "float64", "complex64", "complex128",
}  # fmt: skip
_MOVERS = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
    16: np.dtype(np.complex128),
}


name_of = lru_cache(maxsize=256)(attrgetter("name"))  # of a dtype: numpy puts it together anew each time


@lru_cache(maxsize=256)
def dtype_of(name: str) -> np.dtype:
    """The dtype of a name, those of ml_dtypes included. Raises TypeError for an unknown name."""
    try:
        return np.dtype(name)
    except TypeError:
        return np.dtype(getattr(ml_dtypes, name, None) or getattr(jnp, name))


@lru_cache(maxsize=256)
def mover(dtype: np.dtype) -> np.dtype:
    """An unsigned dtype of the same size: numpy copies it in blocks, where extension dtypes go element by element."""
    return _MOVERS.get(dtype.itemsize, dtype)


def is_packed(dtype: np.dtype) -> bool:
    """Whether XLA may keep several elements in one byte, where numpy and the checkpoint have a byte for each."""
    return dtype.kind == "V" and dtype.name.startswith(("int", "uint", "float4", "float6"))


def is_storable(dtype: np.dtype) -> bool:
    """Whether arrays of this dtype can be stored: numeric, boolean or an ml_dtypes extension."""
    return dtype.kind in "biufc" or (dtype.kind == "V" and dtype.fields is None and hasattr(ml_dtypes, dtype.name))
