"""The weighted average of two neighbours, rounded once: sums carry their rounding error along.

CheckFree (Blagoev, Ersoy, Chen, arXiv 2506.15461, section 4.2): W = (a L + b R) / (a + b), with a and b the gradient
norms of the neighbours (``power`` 1) or their squares (``power`` 2). Where L and R nearly cancel, plain float32 loses
all digits; here a value is an unevaluated sum of two floats (Dekker 1971; Knuth's two-sum). Every product is of parts
short enough to be exact, so that a compiler that fuses multiply and add changes nothing. A program has these operations
once for every leaf and must be compiled while training waits, so there are few.
"""

import jax
import jax.numpy as jnp

Double = tuple[jax.Array, jax.Array]  # the value is their sum; the second is at most half an ulp of the first
Weight = tuple[jax.Array, jax.Array | None]


def neighbour_weights(left: jax.Array, right: jax.Array, power: int) -> tuple[Weight, Weight]:
    """Weights of two neighbours from their norms, float32, any equal shape.

    Both zero, or one of them not finite or negative: equal weights. Scaled by a power of two, which changes no ratio.
    """
    good = jnp.isfinite(left) & jnp.isfinite(right) & (left >= 0) & (right >= 0) & (left + right > 0)
    left, right = (jnp.where(good, x, jnp.ones_like(x)).astype(jnp.float32) for x in (left, right))
    _, exponent = jnp.frexp(jnp.maximum(left, right))
    left, right = (jnp.ldexp(x, -exponent) for x in (left, right))
    return ((left, None), (right, None)) if power == 1 else (_product(left, left), _product(right, right))


def weighted_average(left: jax.Array, right: jax.Array, a: Weight, b: Weight) -> jax.Array:
    """(a L + b R) / (a + b) in the dtype of L, within one ulp; a and b broadcast against L and R.

    Where the terms cancel to less than 2^-24 of their size, within 2^-46 of that size.

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
    a, b = _whole(a), _whole(b)
    # From the heavier one: what the other's share is rounded by is then small beside both terms.
    swap = b[0] > a[0]
    heavy, light = _chosen(swap, b, a), _chosen(swap, a, b)
    near, far = jnp.where(swap, wide_right, wide_left), jnp.where(swap, wide_left, wide_right)
    average = _between(near, far, _share(light, _add(heavy, light))).astype(dtype)
    # Select: 0 x inf is NaN.
    return jnp.where(b[0] == 0, left, jnp.where(a[0] == 0, right, average))


def _chosen(first: jax.Array, x: Double, y: Double) -> Double:
    return jnp.where(first, x[0], y[0]), jnp.where(first, x[1], y[1])


def _share(x: Double, total: Double) -> Double:
    """x / total, to 48 bits."""
    first = x[0] / total[0]
    product = _add(_product(first, total[0]), _product(first, total[1]))
    rest = _add(x, (-product[0], -product[1]))
    return _two_sum(first, rest[0] / total[0])


def _between(near: jax.Array, far: jax.Array, share: Double) -> jax.Array:
    """near + share (far - near), to 48 bits of the terms."""
    # Away from where differences overflow and small products vanish; powers of two round nothing.
    size = jnp.maximum(jnp.abs(near), jnp.abs(far))
    down, up, one = (jnp.asarray(x, jnp.float32) for x in (2.0**-16, 2.0**60, 1.0))
    scale = jnp.where(size > 2.0**100, down, jnp.where(size < 2.0**-20, up, one))
    near, far = near * scale, far * scale
    apart, low = _two_sum(far, -near)
    (x_high, x_low), (y_high, y_low) = _split(apart), _split(share[0])
    total, first = _two_sum(near, x_high * y_high)
    middle, second = _two_sum(x_high * y_low, x_low * y_high)
    total, third = _two_sum(total, middle)
    rest, fourth = _two_sum(first, third)
    rest, fifth = _two_sum(rest, x_low * y_low)
    small = fourth + fifth + second
    total, rest = _two_sum(total, rest)
    return (total + (rest + (low * share[0] + apart * share[1] + small))) / scale


def _two_sum(x: jax.Array, y: jax.Array) -> Double:
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def _add(x: Double, y: Double) -> Double:
    total, error = _two_sum(x[0], y[0])
    low, low_error = _two_sum(x[1], y[1])
    middle, rest = _two_sum(error, low)
    total, error = _two_sum(total, middle)
    return _two_sum(total, error + (rest + low_error))


def _product(x: jax.Array, y: jax.Array) -> Double:
    """Exact: 48 bits in two floats."""
    x_high, x_low = _split(x)
    y_high, y_low = _split(y)
    middle, error = _two_sum(x_high * y_low, x_low * y_high)
    total, rest = _two_sum(x_high * y_high, middle)
    return total, rest + (error + x_low * y_low)  # small ones first: no sum has more than 24 bits


def _whole(x: Weight) -> Double:
    return x[0], jnp.zeros_like(x[0]) if x[1] is None else x[1]


def _split(x: jax.Array) -> Double:
    # By the bits, to the nearest: 12 in the first half, and 11 and a sign in the second.
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(0x800)) & jnp.uint32(0xFFFFF000)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high
