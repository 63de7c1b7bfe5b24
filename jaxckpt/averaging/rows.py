"""The programs that add weighted rows of stored elements, and the rows as these programs get them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxckpt.averaging.kernel import add_terms, add_words, along, finish, finish_words
from jaxckpt.core.dtypes import is_packed

ROW_GAP_BYTES = 192  # between rows: where all begin at multiples of a large power of two, caches hold few of them
BLOCK_ELEMENTS = 4096  # P sums are made of so many elements of all rows, which the processor's cache holds meanwhile


def viewed(rows: np.ndarray, dtype: np.dtype, words: bool) -> tuple[np.ndarray, bool]:
    """The rows as what the program gets, and whether an element is two numbers there."""
    if words:
        return rows.view(np.uint32), True
    if dtype.kind == "c":
        return rows.view(dtype).view(np.finfo(dtype).dtype), True
    if is_packed(dtype):
        return rows.view(dtype).astype(np.float32), False  # XLA would keep two to a byte
    return rows.view(dtype), False


def staged_out(dtype: np.dtype, *, doubled: bool) -> np.dtype:
    """What the program rounds to: real numbers where a complex one is two, float32 where XLA would pack elements."""
    if is_packed(dtype):
        return np.dtype(np.float32)
    return np.finfo(dtype).dtype if doubled and dtype.kind == "c" else dtype


def packed(sums: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 sums as this dtype; integers are the nearest that it has."""
    if jnp.issubdtype(dtype, jnp.integer):
        known = jnp.iinfo(dtype)
        sums = np.clip(np.rint(sums), int(known.min), int(known.max))
    return sums.astype(dtype)


def _sums(rows: jax.Array, parts: Any, sums: Any, *, size: int, how: str, words: bool, used: bool, out: Any) -> Any:
    """``sums`` [B, P, size / B] and the weighted rows [K, size and the gap]; rounded to ``out`` unless that is None.

    ``words``: of bfloat16, two elements to a word of the rows, summed in float64. ``used``: as of ``add_terms``.
    """
    terms, parts = _blocks(rows, parts, size)
    if not words:
        total = add_terms(sums, terms, parts, how=how, used=used)
        return total if out is None else finish(total, out)
    pair = add_words(sums, terms, parts, used=used)
    if out is None:
        return pair
    if out == jnp.bfloat16:
        return finish_words(pair)
    return jnp.stack([finish(half, out) for half in pair], axis=-1).reshape(*pair[0].shape[:2], -1)


_STATIC = ("size", "how", "words", "used", "out")
added_sums = jax.jit(_sums, static_argnames=_STATIC, donate_argnums=2)
rounded_sums = jax.jit(_sums, static_argnames=_STATIC)  # to another dtype, so there is nothing to donate


def _blocks(rows: jax.Array, parts: Any, size: int) -> tuple[list[jax.Array], Any]:
    """K terms [B, 1, size / B] and the weights [3, K, 1, P, 1] of the one sum [B, P, size / B] that they make.

    As P sums of one loop they would be P * K terms, written out and compiled.
    """
    block = math.gcd(size, BLOCK_ELEMENTS) if parts.shape[1] > 1 else size
    shape = (size // block, 1, block)
    terms = [lax.slice(rows, (k, 0), (k + 1, size)).reshape(shape) for k in range(rows.shape[0])]
    return terms, along(parts, 1)[:, :, None]
