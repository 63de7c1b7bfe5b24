"""Weighted sums of arrays that are right to the last bit: wide accumulators in registers, one rounding at the end.

A plain float32 sum of K weighted terms is wrong by many units in the last place where weights are negative and terms
cancel. Two accumulators are offered: ``float64``, converted to and from inside the fused loop, so that memory traffic
stays that of the stored arrays; and ``float32`` pairs (about 47 bits) for hardware without float64. The pairs are
Dekker's and Knuth's error-free sums (Dekker 1971, "A floating-point technique for extending the available precision";
Knuth, TAOCP 2, 4.2.2, theorem B) over products that are exact because both factors are cut to 12 bits: contracting a
product and a sum into one fused multiply-add, as XLA does, changes nothing then.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxckpt.core.errors import InvalidArgumentError

Accumulate = Literal["auto", "float32", "float64"]
Accumulator = Any  # float64 array, or a pair of float32 arrays
UNROLLED = 64  # terms written out in one loop body; more run in blocks


def resolve(accumulate: Accumulate) -> str:
    """``"float64"`` or ``"float32"``; ``"auto"`` is float64, but on TPUs, which only emulate it, float32 pairs."""
    if accumulate == "auto":
        return "float32" if jax.default_backend() == "tpu" else "float64"
    if accumulate not in ("float32", "float64"):
        raise InvalidArgumentError(f'accumulate is {accumulate!r}; it is "auto", "float32" or "float64".')
    return accumulate


def split_weights(weights: Any) -> Any:
    """float64 weights [...] as three float32 parts [3, ...] whose sum they are: JAX without x64 has no float64.

    Traced and JAX weights are float32 (or narrower) already: they are the first part.
    """
    if isinstance(weights, jax.Array):
        first = weights.astype(jnp.float32)
        rest = jnp.zeros_like(first)
        if weights.dtype == jnp.float64:
            with jax.enable_x64(True):
                rest = (weights - first.astype(jnp.float64)).astype(jnp.float32)
        return jnp.stack([first, rest, jnp.zeros_like(first)])
    wide = np.asarray(weights, np.float64)
    parts = []
    for _ in range(3):
        parts.append(wide.astype(np.float32))
        wide = wide - parts[-1].astype(np.float64)
    return np.stack(parts)


def add_terms(
    accumulator: Accumulator | None, terms: Sequence[jax.Array], parts: Any, *, how: str, used: bool = False
) -> Accumulator:
    """``accumulator + sum_k weights[k] * terms[k]``, in one fused loop over the elements.

    Args:
        accumulator: the sum so far, or None for a start.
        terms: K arrays of one shape: floating, integer or boolean.
        parts: the weights as ``split_weights`` gives them, float32 [3, K], or [3, K, ...] of weights that broadcast
            with the terms: P sums are one, see ``along``.
        how: "float64" or "float32" (pairs).
        used: a term of weight zero is left out, which matters where it is not finite. Without it, gradients with
            respect to such weights are right.
    """
    total = accumulator
    if used:
        terms = [jnp.where(parts[0, k] == 0, jnp.zeros_like(term), term) for k, term in enumerate(terms)]
    if how == "float64":
        with jax.enable_x64(True):
            weights = sum_parts(parts)
            # Products are rounded before they are added, as numpy does it: where terms cancel to nothing, what is left
            # is rounding, and then at least it is the same. XLA would contract both to one fused multiply-add; it
            # cannot see that these bits stay as they are.
            lead = lax.optimization_barrier(jnp.ravel(parts)[0])
            nothing = (lead != lead).astype(jnp.uint64)  # 0; were it NaN, all is
            for k, term in enumerate(terms):
                product = _as_float(_as_bits(term.astype(jnp.float64) * weights[k]) ^ nothing)
                total = product if total is None else total + product
        return total
    for k, term in enumerate(terms):
        total = _add_pair(total, _cut(term.astype(jnp.float32)), parts[:, k])
    return total


def finish(accumulator: Accumulator, dtype: Any) -> jax.Array:
    """The sum, rounded once to this dtype (integers: to the nearest)."""
    with jax.enable_x64(True):
        total = accumulator[0] + accumulator[1] if isinstance(accumulator, tuple) else accumulator
        if not jnp.issubdtype(dtype, jnp.inexact):
            total = jnp.rint(total)
        if total.dtype == jnp.float64 and jnp.finfo(dtype).bits < 32 if jnp.issubdtype(dtype, jnp.floating) else False:
            total = total.astype(jnp.float32)
        return total.astype(dtype)


def sum_parts(parts: Any) -> jax.Array:
    """The float64 weights again; call it with x64 enabled."""
    first, second, third = (parts[i].astype(jnp.float64) for i in range(3))
    return first + (second + third)


def weighted_sums(stack: jax.Array, parts: Any, *, how: str, dtype: Any) -> jax.Array:
    """For every p the sum over k of ``weights[p, k] * stack[k]``, rounded once to ``dtype``: [P, ...].

    ``stack`` is [K, ...] of any real dtype, ``parts`` float32 [3, P, K]. P sums are one array, so that K terms are
    compiled, and not P * K.
    """
    count = stack.shape[0]
    if _is_paired(stack, dtype, how):
        return _paired_bfloat16(stack, parts)
    parts = along(parts, stack.ndim - 1)
    if count <= UNROLLED:
        return finish(add_terms(None, [stack[k : k + 1] for k in range(count)], parts, how=how), dtype)
    block = UNROLLED // 2
    first = count - count // block * block or block
    total = add_terms(None, [stack[k : k + 1] for k in range(first)], parts[:, :first], how=how)

    def more(i: Any, total: Accumulator) -> Accumulator:
        start = first + i * block
        terms = lax.dynamic_slice_in_dim(stack, start, block)
        factors = lax.dynamic_slice_in_dim(parts, start, block, axis=1)
        return add_terms(total, [terms[k : k + 1] for k in range(block)], factors, how=how)

    return finish(lax.fori_loop(0, (count - first) // block, more, total), dtype)


def along(parts: Any, dimensions: int) -> jax.Array:
    """Weights [3, P, K] as [3, K, P, 1, ...]: of a sum [P, ...] whose elements have so many dimensions more."""
    moved = jnp.moveaxis(jnp.asarray(parts), 1, 2)
    return moved.reshape(*moved.shape, *(1,) * dimensions)


def add_words(accumulator: Any, words: Sequence[jax.Array], parts: Any, *, used: bool = False) -> tuple[Any, Any]:
    """``add_terms`` for bfloat16 that comes two to a uint32 word: sums of the even and of the odd elements, in float64.

    XLA on CPU widens bfloat16 element by element; words are widened by one shift and one mask, many at a time.
    """
    low = [lax.bitcast_convert_type(word << np.uint32(16), jnp.float32) for word in words]
    high = [lax.bitcast_convert_type(word & np.uint32(0xFFFF0000), jnp.float32) for word in words]
    even, odd = accumulator or (None, None)
    return tuple(add_terms(half, terms, parts, how="float64", used=used) for half, terms in ((even, low), (odd, high)))


def finish_words(pair: tuple[Any, Any]) -> jax.Array:
    """The sums of ``add_words``, rounded to nearest even, as words again."""
    even, odd = (_rounded_bits(finish(half, jnp.float32)) for half in pair)
    return (odd << np.uint32(16)) | even


def _as_bits(value: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(value, jnp.uint64)


def _as_float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float64)


def _is_paired(stack: jax.Array, dtype: Any, how: str) -> bool:
    even = stack.ndim > 1 and stack.shape[-1] % 2 == 0 and stack.shape[0] <= UNROLLED
    return even and stack.dtype == jnp.bfloat16 == dtype and how == "float64" and jax.default_backend() == "cpu"


def _paired_bfloat16(stack: jax.Array, parts: Any) -> jax.Array:
    words = lax.bitcast_convert_type(stack.reshape(*stack.shape[:-1], stack.shape[-1] // 2, 2), jnp.uint32)
    pair = add_words(None, [words[k : k + 1] for k in range(stack.shape[0])], along(parts, words.ndim - 1))
    return lax.bitcast_convert_type(finish_words(pair), jnp.bfloat16).reshape(parts.shape[1], *stack.shape[1:])


def _rounded_bits(value: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(value, jnp.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return jnp.where(is_nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded)


def _top(value: jax.Array) -> jax.Array:
    """A float32 cut to its upper 12 bits of significand, by its bits: no rounding mode can change that."""
    bits = lax.bitcast_convert_type(value, jnp.uint32)
    return lax.bitcast_convert_type(bits & np.uint32(0xFFFFF000), jnp.float32)


def _cut(term: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(upper bits, lower bits, all of it, upper bits) where infinite terms keep the last part alone."""
    finite, top = jnp.isfinite(term), _top(term)
    zero = jnp.zeros_like(term)
    return jnp.where(finite, top, zero), jnp.where(finite, term - top, zero), jnp.where(finite, term, zero), top


def _add_pair(
    pair: Any, term: tuple[jax.Array, jax.Array, jax.Array, jax.Array], weight: Any
) -> tuple[jax.Array, jax.Array]:
    high, low, whole, leading = term
    first = jnp.asarray(weight[0])
    top = _top(first)
    rest = first - top
    lead = leading * top
    total, error = (lead, jnp.zeros_like(lead)) if pair is None else _two_sum(pair[0], lead)
    correction = error if pair is None else pair[1] + error
    for product in (low * top, high * rest):
        total, error = _two_sum(total, product)
        correction = correction + error
    # Past infinity the errors are NaN, and nothing is left to correct.
    correction = correction + (low * rest + whole * weight[1])
    return total, jnp.where(jnp.isfinite(total), correction, jnp.zeros_like(correction))


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)
