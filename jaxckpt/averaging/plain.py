"""Sums so small that numpy has them before a program would be compiled. The arithmetic is that of the programs."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxckpt.averaging.plan import Sum

MOST_TERMS = 16 * 1024 * 1024  # elements, times sources, times results: some 50 ms; compiling takes 200 or more


def are_plain(sums: Sequence[Sum]) -> bool:
    """Whether all of these together are small, and of dtypes that numpy rounds as XLA does."""
    terms = sum(math.prod(one.shape) * one.weights.size for one in sums)
    return terms <= MOST_TERMS and all(jnp.issubdtype(d, jnp.inexact) for one in sums for d in (*one.dtypes, one.dtype))


def plain_sums(rows: np.ndarray, weights: np.ndarray, sums: np.ndarray | None, dtype: np.dtype | None) -> np.ndarray:
    """``sums`` [1, P, n] and the weighted rows [K, n], in float64; rounded once to ``dtype`` unless that is None.

    A number of complex rows is two, here and in what is returned.
    """
    if jnp.issubdtype(rows.dtype, jnp.complexfloating):
        rows = rows.view(np.finfo(rows.dtype).dtype)
        dtype = None if dtype is None else np.finfo(dtype).dtype
    with np.errstate(all="ignore"):
        for k, row in enumerate(rows):
            wide = row.astype(np.float64)
            terms = (wide * weights[:, k, None])[None]
            sums = terms if sums is None else np.add(sums, terms, out=sums)
        assert sums is not None
        if dtype is None:
            return sums
        return (sums.astype(np.float32) if dtype.itemsize < np.dtype(np.float32).itemsize else sums).astype(dtype)
