"""The weighted average of two neighbours, rounded once: sums carry their rounding error along.

CheckFree (Blagoev, Ersoy, Chen, arXiv 2506.15461, section 4.2): W = (a L + b R) / (a + b), with a and b the gradient
norms of the neighbours (``power`` 1) or their squares (``power`` 2). Where L and R nearly cancel, plain float32 loses
all digits; here a value is an unevaluated sum of two floats (Dekker 1971; Knuth's two-sum). Every product is of parts
short enough to be exact, so that a compiler that fuses multiply and add changes nothing. A program has these operations
once for every leaf and must be compiled while training waits, so there are few.
"""

import jax
import jax.numpy as jnp

Double = tuple[jax.Array, jax.Array | None]  # the value is their sum; the second is at most half an ulp of the first


def neighbour_weights(left: jax.Array, right: jax.Array, power: int) -> tuple[Double, Double]:
    """Weights of two neighbours from their norms, float32, any equal shape.

    Both zero, or one of them not finite or negative: equal weights. Scaled by a power of two, which changes no ratio.
    """
    good = jnp.isfinite(left) & jnp.isfinite(right) & (left >= 0) & (right >= 0) & (left + right > 0)
    left, right = (jnp.where(good, x, jnp.ones_like(x)).astype(jnp.float32) for x in (left, right))
    _, exponent = jnp.frexp(jnp.maximum(left, right))
    left, right = (jnp.ldexp(x, -exponent) for x in (left, right))
    return ((left, None), (right, None)) if power == 1 else (_product(left, left), _product(right, right))


def weighted_average(left: jax.Array, right: jax.Array, a: Double, b: Double) -> jax.Array:
    """(a L + b R) / (a + b) in the dtype of L, within one ulp; a and b broadcast against L and R.

    A neighbour of weight zero is not used at all. Integers and keys are not averaged: they are the left one's.
    """
    dtype = left.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        parts = [weighted_average(f(left), f(right), a, b) for f in (jnp.real, jnp.imag)]
        return jax.lax.complex(parts[0], parts[1])
    if not jnp.issubdtype(dtype, jnp.floating):
        return left
    if dtype == jnp.float64:
        wide_a, wide_b = (sum(part.astype(dtype) for part in x if part is not None) for x in (a, b))
        return (wide_a * left + wide_b * right) / (wide_a + wide_b)
    wide_left, wide_right = left.astype(jnp.float32), right.astype(jnp.float32)
    # Far from where sums overflow and small products vanish; powers of two round nothing.
    size = jnp.maximum(jnp.abs(wide_left), jnp.abs(wide_right))
    down, up, one = (jnp.asarray(x, jnp.float32) for x in (2.0**-16, 2.0**60, 1.0))
    scale = jnp.where(size > 2.0**100, down, jnp.where(size < 2.0**-20, up, one))
    wide_left, wide_right = wide_left * scale, wide_right * scale
    top = _add(_scaled(wide_left, a), _scaled(wide_right, b))
    average = (_quotient(top, _add(_whole(a), _whole(b))) / scale).astype(dtype)
    # Select: 0 x inf is NaN.
    average = jnp.where(b[0] == 0, left, jnp.where(a[0] == 0, right, average))
    same = a[0] == b[0]
    if a[1] is not None and b[1] is not None:
        same &= a[1] == b[1]
    middle = (wide_left + wide_right) * jnp.asarray(0.5, jnp.float32)
    return jnp.where(same, (middle / scale).astype(dtype), average)


def _quotient(x: tuple[jax.Array, jax.Array], y: tuple[jax.Array, jax.Array]) -> jax.Array:
    first = x[0] / y[0]
    (q_high, q_low), (y_high, y_low) = _split(first), _split(y[0])
    rest = x[0] - q_high * y_high - q_high * y_low - q_low * y_high - q_low * y_low
    return first + (rest + x[1] - first * y[1]) / y[0]


def _two_sum(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def _add(x: tuple[jax.Array, jax.Array], y: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    total, error = _two_sum(x[0], y[0])
    low, low_error = _two_sum(x[1], y[1])
    middle, rest = _two_sum(error, low)
    total, error = _two_sum(total, middle)
    return _two_sum(total, error + (rest + low_error))


def _product(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Exact: 48 bits in two floats."""
    x_high, x_low = _split(x)
    y_high, y_low = _split(y)
    middle, error = _two_sum(x_high * y_low, x_low * y_high)
    total, rest = _two_sum(x_high * y_high, middle)
    return total, rest + (error + x_low * y_low)  # small ones first: no sum has more than 24 bits


def _scaled(x: jax.Array, weight: Double) -> tuple[jax.Array, jax.Array]:
    found = _product(x, weight[0])
    return found if weight[1] is None else _add(found, _product(x, weight[1]))


def _whole(x: Double) -> tuple[jax.Array, jax.Array]:
    return x[0], jnp.zeros_like(x[0]) if x[1] is None else x[1]


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # By the bits, to the nearest: 12 in the first half, and 11 and a sign in the second.
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(0x800)) & jnp.uint32(0xFFFFF000)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high
