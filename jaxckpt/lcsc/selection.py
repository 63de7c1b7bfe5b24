"""Honest selection: finalists scored again on fresh noise, beside a guard metric and held-out data."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxckpt.lcsc.evaluate import Keys

LARGE_L1 = 5.0  # rounding of stored weights, amplified by such coefficients, costs a digit


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One candidate: ``score`` is that of the objective on fresh noise, penalty included; None: not asked for."""

    name: str
    coefficients: np.ndarray  # float64 [G, K]
    score: float
    guard: float | None = None
    held_out: float | None = None

    @property
    def l1(self) -> float:
        """The sum of magnitudes, of the worst group."""
        return float(np.abs(self.coefficients).sum(-1).max())

    @property
    def negative_mass(self) -> float:
        """The sum of the magnitudes of negative coefficients, of the worst group."""
        return float(np.maximum(-self.coefficients, 0).sum(-1).max())

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return float(np.abs(self.coefficients).max())


@dataclass(frozen=True, slots=True)
class Penalty:
    """``l1 * max(sum |a| - 1, 0) + negative * (sum of the magnitudes of negative a)``, mean over groups."""

    l1: float = 0.0
    negative: float = 0.0

    def __call__(self, coefficients: Any) -> Any:
        """[P] of coefficients [P, G, K], of numpy or jax."""
        above = abs(coefficients).sum(-1) - 1
        negative = (abs(coefficients) - coefficients).sum(-1) / 2
        return (self.l1 * (abs(above) + above) / 2 + self.negative * negative).mean(-1)


Measure = Callable[[np.ndarray, Keys], np.ndarray]  # coefficients [P, G, K], keys -> [P]


def select(
    finalists: Mapping[str, np.ndarray],
    references: Mapping[str, np.ndarray],
    *,
    keys: Sequence[Keys],
    objective: Measure,
    guard: Measure | None,
    held_out: Measure | None,
    penalty: Penalty,
) -> tuple[Row, list[Row]]:
    """The finalist with the lowest score on draws that no generation has seen, and all rows.

    ``keys`` are for the objective, the guard and the held-out metric. Guard and held-out values are
    reported and choose nothing. References are only reported.
    """
    everyone = {**finalists, **references}
    points = np.stack(list(everyone.values()))
    scores = objective(points, keys[0]) + penalty(points)
    guards = None if guard is None else guard(points, keys[1])
    helds = None if held_out is None else held_out(points, keys[2])
    rows = [
        Row(
            name=name,
            coefficients=points[i],
            score=float(scores[i]),
            guard=None if guards is None else float(guards[i]),
            held_out=None if helds is None else float(helds[i]),
        )
        for i, name in enumerate(everyone)
    ]
    able = [row for row in rows if row.name in finalists]
    return min(able, key=lambda row: row.score if np.isfinite(row.score) else np.inf), rows


def concerns(chosen: Row, start: Row) -> list[str]:
    """What speaks against the chosen one, compared with the best of the initial profiles; warned of as well."""
    found: list[str] = []
    if chosen.guard is not None and start.guard is not None and not chosen.guard <= start.guard:
        found.append(
            f"The guard metric disagrees: {chosen.guard:.6g} for the searched coefficients, {start.guard:.6g} for the "
            f"best EMA profile, while the objective went from {start.score:.6g} to {chosen.score:.6g}. The search has "
            "fitted its metric: set l1_penalty or negative_penalty, bounds, or search a sum of both metrics."
        )
    if chosen.l1 > LARGE_L1:
        found.append(
            f"Coefficients are large: their magnitudes sum to {chosen.l1:.3g}, above {LARGE_L1:g}; rounding of the "
            "stored weights is amplified as much. Set l1_penalty or bounds."
        )
    for text in found:
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    return found
