"""Spaces of coefficients: how a search vector of scale one becomes weights of the checkpoints, and back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt.averaging.ema import ema_weights
from jaxckpt.averaging.globs import matches
from jaxckpt.core.errors import InvalidArgumentError, MismatchError

Kind = Literal["sum_to_one", "simplex", "free"]
REFERENCE_SCALE, REFERENCE_COUNT = 0.03, 40  # a step of 0.03 for 40 checkpoints; coefficients are of the order 1/K
_FLOOR = 1e-6  # of a coefficient whose logarithm is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Coefficients [G, K] of ``count`` checkpoints and G groups of leaves, searched as vectors of G * K numbers.

    ``sum_to_one``: ``a = centre + scale * (y - mean(y))``, signed, K - 1 free differences; ``simplex``:
    ``softmax(log(centre) + y)``, nothing negative; ``free``: ``centre + scale * y``.

    Attributes:
        kind: the shape of the space.
        count: checkpoints, K.
        groups: globs of leaf names, each with coefficients of its own; the first that matches a leaf counts.
        scale: what a step of one means; None: ``0.03 * 40 / K`` (1 in the simplex, whose steps are factors of e).
        bounds: lowest and highest coefficient; None: none; one of them may be infinite.
    """

    kind: Kind = "sum_to_one"
    count: int
    groups: tuple[str, ...] = ("*",)
    scale: float | None = None
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("sum_to_one", "simplex", "free"):
            raise InvalidArgumentError(f'space is {self.kind!r}; it is "sum_to_one", "simplex" or "free".')
        if self.count < 2 or not self.groups:
            raise InvalidArgumentError(
                f"There are {self.count} checkpoints and {len(self.groups)} groups; a search needs 2 and 1 at least."
            )
        if self.scale is not None:
            scale = _number(self.scale)
            if not 0 < scale < math.inf:
                raise InvalidArgumentError(f"scale is {self.scale!r}; give a finite number above 0.")
            object.__setattr__(self, "scale", scale)
        if self.bounds is not None:
            low, high = _pair(self.bounds)
            object.__setattr__(self, "bounds", (low, high))
            if not low < high or (self.kind != "free" and not low * self.count <= 1 <= high * self.count):
                raise InvalidArgumentError(
                    f"bounds are {self.bounds}; no {self.count} coefficients between them "
                    + ("exist." if self.kind == "free" else "sum to one.")
                )

    @property
    def size(self) -> int:
        """Numbers in a search vector."""
        return len(self.groups) * self.count

    @property
    def step(self) -> float:
        """What one unit of a search vector changes."""
        if self.scale is not None:
            return self.scale
        return 1.0 if self.kind == "simplex" else REFERENCE_SCALE * REFERENCE_COUNT / self.count

    def coefficients(self, y: Any, centre: Any) -> Any:
        """[..., G, K] of search vectors [..., G * K]: float64 of numpy arrays, traceable for those of jax.

        Example:
            >>> space = Space(count=2, scale=0.5)
            >>> space.coefficients(np.array([1.0, -1.0]), np.array([[0.5, 0.5]])).tolist()
            [[1.0, 0.0]]
        """
        xp: Any = jnp if isinstance(y, jax.Array) else np
        wide = xp.float32 if xp is jnp else xp.float64
        y = xp.asarray(y, wide).reshape(*y.shape[:-1], len(self.groups), self.count)
        centre = xp.asarray(centre, wide)
        if self.kind == "simplex":
            logits = xp.log(xp.maximum(centre, _FLOOR)) + self.step * y
            powers = xp.exp(logits - logits.max(-1, keepdims=True))
            found = powers / powers.sum(-1, keepdims=True)
        elif self.kind == "free":
            found = centre + self.step * y
        else:
            found = centre + self.step * (y - y.mean(-1, keepdims=True))
        return found if self.bounds is None else _bounded(found, self.bounds, self.kind == "free", xp)

    def vector(self, coefficients: Any, centre: np.ndarray) -> np.ndarray:
        """float32 [..., G * K]: a search vector of these coefficients [..., G, K] (within floor and bounds)."""
        wanted = np.asarray(coefficients, np.float64)
        if self.kind == "simplex":
            y = np.log(np.maximum(wanted, _FLOOR)) - np.log(np.maximum(centre, _FLOOR))
        else:
            y = wanted - centre
        return (y / self.step).reshape(*wanted.shape[:-2], self.size).astype(np.float32)

    def group_of(self, names: Sequence[str]) -> tuple[int, ...]:
        """The group of each leaf that is combined."""
        found = [next((i for i, glob in enumerate(self.groups) if matches(name, glob)), -1) for name in names]
        if lost := [name for name, group in zip(names, found, strict=True) if group < 0]:
            raise MismatchError(f'No group of {list(self.groups)} matches {lost[:5]}; end the groups with "*".')
        if unused := [glob for i, glob in enumerate(self.groups) if i not in found]:
            raise MismatchError(
                f"Groups {unused} match no floating leaf, or none that an earlier group left: {list(names)[:8]}. Leave "
                "them out."
            )
        return tuple(found)


def profiles(count: int, decays: Sequence[float]) -> np.ndarray:
    """float64 [len(decays), K]: the coefficients that EMAs of these decay rates give, oldest checkpoint first."""
    return np.stack([ema_weights(count, decay) for decay in decays])


def _number(value: Any) -> float:
    """As a float; NaN of what is no number."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _pair(bounds: Any) -> tuple[float, float]:
    found = [_number(one) for one in bounds] if isinstance(bounds, Sequence | np.ndarray) else []
    if len(found) != 2 or any(math.isnan(one) for one in found):
        raise InvalidArgumentError(f"bounds is {bounds!r}; give the lowest and the highest coefficient: (-0.5, 1.0).")
    return found[0], found[1]


def _bounded(a: Any, bounds: tuple[float, float], is_free: bool, xp: Any) -> Any:
    """The nearest point within bounds: for sums of one the shift that restores the sum is found by bisection."""
    low, high = bounds
    if is_free:
        return xp.clip(a, low, high)
    if math.isinf(low) and math.isinf(high):
        return a
    # Bisection needs two ends: where the others are at one bound, the last is at most so far away.
    rest = a.shape[-1] - 1
    low = 1 - rest * high if math.isinf(low) else low
    high = 1 - rest * low if math.isinf(high) else high
    below = a.min(-1, keepdims=True) - high
    above = a.max(-1, keepdims=True) - low
    for _ in range(60):
        middle = (below + above) / 2
        too_much = xp.clip(a - middle, low, high).sum(-1, keepdims=True) > 1
        below, above = xp.where(too_much, middle, below), xp.where(too_much, above, middle)
    return xp.clip(a - (below + above) / 2, low, high)
