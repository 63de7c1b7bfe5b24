"""``search``: coefficients over saved checkpoints that minimise an objective, found honestly and resumably.

Liu et al., "Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better", arXiv 2404.02241.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt.averaging.average import average
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.lcsc.evaluate import MEMORY_BYTES, Objective, Resident
from jaxckpt.lcsc.load import Placement, make_evaluator
from jaxckpt.lcsc.report import Report, Result
from jaxckpt.lcsc.run import FINAL, GRADIENT_COST, Advance, Clock, Run
from jaxckpt.lcsc.selection import Penalty, concerns, select
from jaxckpt.lcsc.space import Kind, Space, profiles
from jaxckpt.lcsc.state import read, write
from jaxckpt.lcsc.strategies import make_strategy
from jaxckpt.storage.url import StorageOptions

PyTree = Any
DECAYS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # of the EMA profiles over stored checkpoints


def search(
    checkpoints: Sequence[Any],
    objective: Objective,
    *,
    like: PyTree = None,
    strategy: str = "cma_es",
    options: Mapping[str, Any] | None = None,
    space: Kind = "sum_to_one",
    groups: Sequence[str] = ("*",),
    scale: float | None = None,
    bounds: tuple[float, float] | None = None,
    l1_penalty: float = 0.0,
    negative_penalty: float = 0.0,
    budget: int = 1024,
    population: int = 16,
    key: jax.Array | int = 0,
    noise: Literal["fresh", "fixed"] = "fresh",
    decays: Sequence[float] = DECAYS,
    finalists: int = 5,
    draws: int = 8,
    validation: Objective | None = None,
    guard: Objective | None = None,
    held_out: Objective | None = None,
    jit: bool = True,
    placement: Placement = "auto",
    memory_bytes: int = MEMORY_BYTES,
    mesh: jax.sharding.Mesh | None = None,
    axis: str = "data",
    state: str | None = None,
    progress: Callable[[Advance], None] | None = None,
    record: Mapping[str, Any] | None = None,
    eval_params: Any = None,
    storage: StorageOptions | None = None,
) -> Result:
    """Search for the coefficients; the search mean or a finalist is returned, whichever scores best on fresh noise.

    All candidates of a generation see the same noise, and every generation sees fresh noise. EMA profiles are measured
    first: the best is where the search begins, and what is returned if nothing beats it.

    Args:
        checkpoints: K paths or trees, oldest first, as of ``average``.
        objective: ``(params, key) -> scalar``, smaller is better; all randomness from ``key``.
        like: the parameters, as of ``average``: a tree with shapes, dtypes and shardings.
        strategy: a name of ``lcsc.names()``.
        options: of the strategy: fields of ``evolution.Evolution``, ``strategies.Gradient`` or evosax' parameters.
        space: ``"sum_to_one"`` (signed), ``"simplex"`` or ``"free"``.
        groups: globs of leaf names, each with coefficients of its own.
        scale: what a step of one changes in a coefficient; None: ``0.03 * 40 / K``.
        bounds: lowest and highest coefficient.
        l1_penalty: what a sum of magnitudes of one above one costs, in units of the objective.
        negative_penalty: what a negative mass of one costs.
        budget: evaluations of single models, profiles included; a gradient counts as three.
        population: candidates in a generation.
        key: a PRNG key, or a seed.
        noise: ``"fresh"`` in each generation, or ``"fixed"``: one draw for the whole search.
        decays: of the EMA profiles.
        finalists: how many of the best seen are scored again.
        draws: of fresh noise for the final scores, averaged.
        validation: what finalists are scored with; the objective by default.
        guard: another metric, reported only; a warning tells when it got worse.
        held_out: the metric on data that chose nothing, reported only.
        jit: False for objectives in plain Python, called with one candidate after another.
        placement: of the checkpoints: ``"device"``, ``"stream"`` (read from their place for each chunk of candidates)
            or ``"auto"``: on the device if they fit.
        memory_bytes: for the merged models that are evaluated at a time.
        mesh: candidates are spread over its ``axis``; weights stay sharded over the others, as in ``like``.
        axis: see mesh.
        state: a folder or URL in which every generation is saved; a search that finds its own state there goes on.
        progress: called after each generation.
        record: JSON values for the report: metric, sampler, number of function evaluations.
        eval_params: as of ``average``.
        storage: endpoint, region and credentials of object stores.

    Returns:
        Coefficients, the merged parameters (summed in float64, rounded once), and the report.

    Raises:
        InvalidArgumentError: an argument is wrong in itself; lists the strategies there are.
        MismatchError: the checkpoints differ, a leaf is in no group, or ``state`` is of another search.

    Example:
        >>> trees = [{"w": jnp.array([0.0])}, {"w": jnp.array([1.0])}]
        >>> found = search(trees, lambda p, key: (p["w"][0] - 1.5) ** 2, strategy="evolution", budget=327)
        >>> bool(abs(found.params["w"][0] - 1.5) < 0.05), round(float(found.coefficients.sum()), 6)
        (True, 1.0)
    """
    began = time.perf_counter()
    shape = Space(kind=space, count=len(checkpoints), groups=tuple(groups), scale=scale, bounds=bounds)
    if noise not in ("fresh", "fixed") or finalists < 0 or draws < 1 or not decays:
        raise InvalidArgumentError(
            f'noise is {noise!r} ("fresh" or "fixed"), finalists {finalists} (>= 0), draws {draws} (>= 1), '
            f"decays {list(decays)} (one at least)."
        )
    how = {"like": like, "eval_params": eval_params, "options": storage}
    root = jax.random.key(key) if isinstance(key, int) else key
    searcher = make_strategy(strategy, population=population, size=shape.size, options=options or {})
    evaluate = make_evaluator(
        checkpoints,
        shape,
        how=how,
        placement=placement,
        is_jitted=jit,
        population=1 if searcher.uses_gradient else population,
        memory_bytes=memory_bytes,
        mesh=mesh,
        axis=axis,
    )
    if searcher.uses_gradient and not isinstance(evaluate, Resident):
        raise InvalidArgumentError(
            'strategy "gradient" needs jit=True and placement="device"; learned_soup streams gradients from storage.'
        )
    run = Run(
        space=shape,
        strategy=searcher,
        evaluate=evaluate,
        objective=objective,
        penalty=Penalty(l1_penalty, negative_penalty),
        key=root,
        width=1 if searcher.uses_gradient else population,
        cost=GRADIENT_COST if searcher.uses_gradient else population,
        is_fixed=noise == "fixed",
        kept=max(finalists, 1),
        first=_limited(profiles(len(checkpoints), decays), shape),
        budget=budget,
        clock=Clock(),
    )
    settings = {
        "strategy": strategy,
        "options": {name: _plain(value) for name, value in (options or {}).items()},
        "space": space,
        "groups": list(groups),
        "scale": shape.step,
        "bounds": None if bounds is None else list(bounds),
        "l1_penalty": l1_penalty,
        "negative_penalty": negative_penalty,
        "checkpoints": len(checkpoints),
        "budget": budget,
        "population": population,
        "key": np.asarray(jax.random.key_data(_typed(root))).tolist(),
        "noise": noise,
        "decays": list(decays),
        "finalists": finalists,
        "record": dict(record or {}),
    }
    now = run.empty()
    found = None if state is None else read(state, now, settings, storage)
    now = run.begin(now) if found is None else found
    while now.generation < run.generations:
        now = run.advance(now, progress, began)
        if state is not None:
            write(state, now, settings, storage)

    def measure(what: Objective | None) -> Any:
        return None if what is None else lambda points, keys: run.measured(what, points, keys)

    last, uniform = (
        np.zeros((len(shape.groups), shape.count)),
        np.full((len(shape.groups), shape.count), 1 / shape.count),
    )
    last[:, -1] = 1
    chosen, rows = select(
        run.finalists(now, finalists),
        {"last": last, "uniform": uniform},
        key=jax.random.fold_in(root, FINAL),
        draws=draws,
        objective=measure(validation or objective),
        guard=measure(guard),
        held_out=measure(held_out),
        penalty=run.penalty,
    )
    warned = concerns(chosen, next(row for row in rows if row.name == "profile"))
    params = average(checkpoints, dict(zip(groups, chosen.coefficients, strict=True)), **how)
    report = Report(
        rows=tuple(rows),
        chosen=chosen.name,
        fitness=now.fitness,
        path=now.path,
        groups=tuple(groups),
        evaluations=len(run.first) + run.generations * run.cost,
        seconds=time.perf_counter() - began,
        objective_seconds=run.clock.seconds,
        settings=settings,
        concerns=tuple(warned),
    )
    coefficients = chosen.coefficients if len(groups) > 1 else chosen.coefficients[0]
    return Result(coefficients=coefficients, params=params, report=report)


def _limited(points: np.ndarray, space: Space) -> np.ndarray:
    """Profiles [n, K] for each group, [n, G, K], within the bounds."""
    wide = np.repeat(points[:, None], len(space.groups), axis=1)
    zero = np.zeros((len(points), space.size))
    return wide if space.kind == "simplex" and space.bounds is None else space.coefficients(zero, wide)


def _typed(key: jax.Array) -> jax.Array:
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value
