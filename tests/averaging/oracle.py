"""What sums must be: float64 numpy, rounded once."""

from __future__ import annotations

import numpy as np


def random_stack(k: int, shape: tuple[int, ...], dtype: type, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((k, *shape), np.float32).astype(dtype)


def weighted(stack: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64."""
    return np.tensordot(np.asarray(weights, np.float64), np.asarray(stack).astype(np.float64), axes=1)


def ulps(found: object, oracle: np.ndarray) -> int:
    """How many representable numbers the worst element is away from the rounded oracle."""
    array = np.asarray(found)
    rounded = oracle.astype(np.float32).astype(array.dtype) if array.dtype != np.float64 else oracle
    kind = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[array.dtype.itemsize]
    ordered = []
    for part in (array, rounded):
        bits = np.ascontiguousarray(part).view(kind).astype(np.int64)
        ordered.append(np.where(bits < 0, np.iinfo(kind).min - bits, bits))
    return int(np.abs(ordered[0] - ordered[1]).max(initial=0))
