"""The weighted average of two neighbours, rounded once: sums carry their rounding error along.

CheckFree (Blagoev, Ersoy, Chen, arXiv 2506.15461, section 4.2): W = (a L + b R) / (a + b), with a and b the gradient
norms of the neighbours (``power`` 1) or their squares (``power`` 2). Where L and R nearly cancel, plain float32 loses
all digits; here a value is an unevaluated sum of two floats (Dekker 1971; Knuth's two-sum). Every product is of parts
short enough to be exact, so that a compiler that fuses multiply and add changes nothing.
"""

import jax
import jax.numpy as jnp

Double = tuple[jax.Array, jax.Array]  # the value is their sum; the second is at most half an ulp of the first


def neighbour_weights(left: jax.Array, right: jax.Array, power: int) -> tuple[Double, Double]:
    """Weights of two neighbours from their norms, float32, any equal shape.

    Both zero, or one of them not finite or negative: equal weights. Scaled by a power of two, which changes no ratio.
    """
    good = jnp.isfinite(left) & jnp.isfinite(right) & (left >= 0) & (right >= 0) & (left + right > 0)
    left, right = (jnp.where(good, x, jnp.ones_like(x)).astype(jnp.float32) for x in (left, right))
    _, exponent = jnp.frexp(jnp.maximum(left, right))
    left, right = (jnp.ldexp(x, -exponent) for x in (left, right))
    if power == 1:
        zero = jnp.zeros_like(left)
        return (left, zero), (right, zero)
    return _product(left, left), _product(right, right)


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
        wide_a, wide_b = (x[0].astype(dtype) + x[1].astype(dtype) for x in (a, b))
        return (wide_a * left + wide_b * right) / (wide_a + wide_b)
    wide_left, wide_right = left.astype(jnp.float32), right.astype(jnp.float32)
    # From the heavier one: what the other's share is rounded by is then small beside both terms.
    swap = b[0] > a[0]
    near, far = jnp.where(swap, wide_right, wide_left), jnp.where(swap, wide_left, wide_right)
    share = _share(*(tuple(jnp.where(swap, x, y) for x, y in zip(*p, strict=True)) for p in ((b, a), (a, b))))
    average = _between(near, far, share).astype(dtype)
    # Select: 0 x inf is NaN.
    average = jnp.where(b[0] == 0, left, jnp.where(a[0] == 0, right, average))
    same = (a[0] == b[0]) & (a[1] == b[1])
    half = jnp.asarray(0.5, jnp.float32)
    return jnp.where(same, (wide_left * half + wide_right * half).astype(dtype), average)


def _share(a: Double, b: Double) -> Double:
    """b / (a + b), to 46 bits."""
    total = _add(a, b)
    first = b[0] / total[0]
    rest = _add(b, _negative(_scaled(first, total)))
    return _two_sum(first, rest[0] / total[0])


def _between(near: jax.Array, far: jax.Array, share: Double) -> jax.Array:
    """near + share (far - near). Few operations: a program has them once for every leaf, and compiles them."""
    # Far from where differences overflow and small products vanish; powers of two round nothing.
    size = jnp.maximum(jnp.abs(near), jnp.abs(far))
    large, tiny, one = (jnp.asarray(x, jnp.float32) for x in (2.0**-16, 2.0**60, 1.0))
    scale = jnp.where(size > 2.0**100, large, jnp.where(size < 2.0**-60, tiny, one))
    near, far = near * scale, far * scale
    apart, low = _two_sum(far, -near)
    (x_high, x_low), (y_high, y_low) = _split(apart), _split(share[0])
    total, first = _two_sum(near, x_high * y_high)
    total, second = _two_sum(total, x_high * y_low)
    total, third = _two_sum(total, x_low * y_high)
    rest = x_low * y_low + low * share[0] + apart * share[1]
    return (total + (first + second + third + rest)) / scale


def _two_sum(x: jax.Array, y: jax.Array) -> Double:
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def _add(x: Double, y: Double) -> Double:
    total, error = _two_sum(x[0], y[0])
    low, low_error = _two_sum(x[1], y[1])
    total, error = _two_sum(total, error + low)
    return _two_sum(total, error + low_error)


def _product(x: jax.Array, y: jax.Array) -> Double:
    x_high, x_low = _split(x)
    y_high, y_low = _split(y)
    total = _two_sum(x_high * y_high, x_high * y_low)
    total = _add(total, (x_low * y_high, jnp.zeros_like(total[0])))
    return _add(total, (x_low * y_low, jnp.zeros_like(total[0])))


def _scaled(x: jax.Array, weight: Double) -> Double:
    return _add(_product(x, weight[0]), _product(x, weight[1]))


def _negative(x: Double) -> Double:
    return -x[0], -x[1]


def _split(x: jax.Array) -> Double:
    # By the bits: 12 in each half. Multiplying by 4097 would overflow for large values.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high
