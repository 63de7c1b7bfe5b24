"""Post-hoc EMA: averages of any length, chosen after training, from snapshots of two.

Karras et al., "Analyzing and improving the training dynamics of diffusion models" (CVPR 2024, arXiv 2312.02696),
section 3 and appendix C. The profile of width ``sigma_rel`` at time t weighs the weights of time tau by
``(gamma + 1) tau^gamma / t^(gamma + 1)``; ``sigma_rel`` is its standard deviation over t.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt.averaging.average import average
from jaxckpt.averaging.ema import moved, shadow
from jaxckpt.averaging.sources import check_sources
from jaxckpt.core.errors import InvalidArgumentError

PyTree = Any
DEFAULT_SIGMAS = (0.05, 0.10)  # the two that the paper tracks


class PowerEmaState(NamedTuple):
    """``averages``: one tree per profile, float32 where the weights are floating; after ``count`` updates.

    ``gammas``: float32 [P], the exponents of the profiles (``sigma_of`` gives their widths). States saved before it was
    there are restored by ``restore(path, init(params, sigmas), partial=True)``, with the widths that they were of.
    """

    count: jax.Array
    averages: tuple[PyTree, ...]
    gammas: jax.Array


class Snapshot(NamedTuple):
    """A saved average: where it is, of which profile, and after how many updates."""

    source: Any
    sigma_rel: float
    step: int


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a profile (appendix C): the largest root of the cubic that ``sigma_of`` gives.

    Example:
        >>> round(gamma_of(0.05), 2), round(gamma_of(0.10), 2)
        (16.97, 6.94)
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise InvalidArgumentError(
            f"sigma_rel is {sigma_rel}; it is above 0 and below {12**-0.5:.4f} (a uniform mean)."
        )
    squared = sigma_rel**-2
    return float(np.roots([1, 7, 16 - squared, 12 - squared]).real.max())


def sigma_of(gamma: float) -> float:
    """The relative width of a profile (section 3)."""
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


def init(params: PyTree, sigmas: Sequence[float] = DEFAULT_SIGMAS) -> PowerEmaState:
    """The state before the first update, for these profiles; save it now and then while training."""
    gammas = jnp.asarray([gamma_of(sigma) for sigma in sigmas], jnp.float32)
    return PowerEmaState(jnp.zeros((), jnp.int32), tuple(shadow(params) for _ in sigmas), gammas)


def update(state: PowerEmaState, params: PyTree) -> PowerEmaState:
    """After update t: ``average <- b * average + (1 - b) * params`` with ``b = (1 - 1/t)^(gamma + 1)`` (section 3).

    Example:
        >>> state = init({"w": jnp.zeros(2)})
        >>> for x in (1.0, 2.0, 3.0):
        ...     state = update(state, {"w": jnp.full(2, x)})
        >>> bool(2.9 < state.averages[0]["w"][0] < 3)
        True
    """
    t = (state.count + 1).astype(jnp.float32)
    rates = -jnp.expm1((state.gammas + 1) * jnp.log1p(-1 / t))  # 1 - b; near one, b itself has too few digits
    averages = tuple(moved(one, params, rates[i]) for i, one in enumerate(state.averages))
    return PowerEmaState(state.count + 1, averages, state.gammas)


def solve(snapshots: Sequence[tuple[float, int]], sigma_rel: float, step: int) -> np.ndarray:
    """float64 [K]: the weights of snapshots ``(sigma_rel, step)`` whose sum is nearest to the profile wanted.

    Least squares between profiles over all times (appendix C, with the integrals in closed form), in float64; weights
    are signed. Snapshots after ``step`` get none. Normalised to sum to one.

    Args:
        snapshots: width and number of updates of each.
        sigma_rel: width of the profile wanted.
        step: its time, at most that of the newest snapshot.

    Example:
        >>> weights = solve([(0.05, 100), (0.10, 100)], sigma_rel=0.05, step=100)
        >>> bool(abs(weights[0] - 1) < 1e-6)
        True
    """
    steps = np.array([one[1] for one in snapshots], np.float64)
    used = np.nonzero(steps <= step)[0].tolist()
    if not used or steps[used].max() < step:
        raise InvalidArgumentError(
            f"The profile at step {step} needs a snapshot of that step; there are {sorted({int(s) for s in steps})}."
        )
    gammas = np.array([gamma_of(snapshots[i][0]) for i in used])
    times = steps[used]
    inner = _inner(gammas[:, None], times[:, None], gammas[None], times[None])
    wanted = _inner(gammas, times, np.float64(gamma_of(sigma_rel)), np.float64(step))
    # Profiles have very different norms: scale them to one, so that the cut of small singular values is fair.
    norm = np.sqrt(np.diag(inner))
    found = np.linalg.lstsq(inner / np.outer(norm, norm), wanted / norm, rcond=1e-13)[0] / norm
    weights = np.zeros(len(snapshots))
    weights[used] = found / found.sum()
    return weights


def post_hoc_ema(snapshots: Sequence[Snapshot], sigma_rel: float, step: int | None = None, **how: Any) -> PyTree:
    """The EMA of this width, as if it had been tracked.

    Args:
        snapshots: saved averages (paths or trees), of at least two widths, at several steps.
        sigma_rel: width of the average wanted, between about those tracked; 0.05 to 0.25 are usual.
        step: the newest by default.
        how: the other arguments of ``average``, as ``like``, or ``eval_params`` to find the average in a saved state.

    Example:
        >>> one, two = Snapshot({"w": np.ones(2)}, 0.05, 9), Snapshot({"w": np.zeros(2)}, 0.10, 9)
        >>> bool(0 < post_hoc_ema([one, two], 0.07)["w"][0] < 1)
        True
    """
    check_sources(snapshots, "snapshots", "Snapshot(source, sigma_rel, step)")
    step = max(one.step for one in snapshots) if step is None else step
    weights = solve([(one.sigma_rel, one.step) for one in snapshots], sigma_rel, step)
    return average([one.source for one in snapshots], weights, **how)


def power_weights(steps: Sequence[int], sigma_rel: float) -> np.ndarray:
    """float64 [K]: a profile of this width over checkpoints of the weights themselves, oldest first.

    Each stands for the time since the one before: ``(t_k / T)^(gamma+1) - (t_(k-1) / T)^(gamma+1)``.

    Example:
        >>> power_weights([1, 2, 3, 4], 0.2).sum().item()
        1.0
    """
    times = np.array([0, *steps], np.float64)
    if len(times) < 2 or (np.diff(times) <= 0).any():
        raise InvalidArgumentError(f"steps are {list(steps)}; they are positive and ascending.")
    return np.diff((times / times[-1]) ** (gamma_of(sigma_rel) + 1))


def _inner(gamma_a: Any, t_a: Any, gamma_b: Any, t_b: Any) -> np.ndarray:
    """The integral of the product of two profiles, scaled so that no power overflows."""
    least = np.minimum(t_a, t_b)
    ratio = (least / t_a) ** gamma_a * (least / t_b) ** gamma_b * (least / (t_a * t_b))
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio
