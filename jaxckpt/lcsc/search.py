"""``search``: coefficients over saved checkpoints that minimise an objective, found honestly and resumably.

Liu et al., "Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better", arXiv 2404.02241.
"""

import math
import operator
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, Literal

import jax
import numpy as np

from jaxckpt.averaging.average import average_opened, check_opened
from jaxckpt.averaging.reading import made_together
from jaxckpt.averaging.sources import EvalParams, open_sources
from jaxckpt.checkpoint.match import Only
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.lcsc.checkpoints import located, origin, parameters_of, steps_of
from jaxckpt.lcsc.evaluate import MEMORY_BYTES, Objective, Resident
from jaxckpt.lcsc.load import Placement, loaded, make_evaluator, not_finite, with_products
from jaxckpt.lcsc.merge import Lora
from jaxckpt.lcsc.progress import Advance, Line, Watch, watcher
from jaxckpt.lcsc.report import Report, Result
from jaxckpt.lcsc.run import GRADIENT_COST, Clock, Run, root_key, warm_keys
from jaxckpt.lcsc.selection import concerns, select
from jaxckpt.lcsc.space import Kind, Space, profiles
from jaxckpt.lcsc.state import Saver, State, as_json, read
from jaxckpt.lcsc.strategies import canonical, make_strategy
from jaxckpt.storage.url import Location, StorageOptions

PyTree = Any
SINGLES = 64  # at most so many checkpoints are tried alone, evenly spaced over the run
_ADVICE = "Nothing was searched. Give only=... for leaves that are alike in all, or leave out checkpoints that differ."
DECAYS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # of the EMA profiles over stored checkpoints


def search(
    checkpoints: Sequence[Any] | Location,
    objective: Objective,
    *,
    like: PyTree = None,
    strategy: str = "cma_es",
    options: Mapping[str, Any] | None = None,
    space: Kind = "sum_to_one",
    groups: Sequence[str] | str = ("*",),
    scale: float | None = None,
    bounds: tuple[float, float] | None = None,
    l1_penalty: float | None = None,
    negative_penalty: float = 0.0,
    budget: int = 1024,
    population: int = 16,
    key: jax.Array | np.ndarray | int = 0,
    noise: Literal["fresh", "fixed"] = "fresh",
    decays: Sequence[float] = DECAYS,
    finalists: int = 5,
    draws: int = 8,
    validation: Objective | None = None,
    guard: Objective | None = None,
    held_out: Objective | None = None,
    jit: bool = True,
    lora: Lora | None = None,
    placement: Placement = "auto",
    memory_bytes: int = MEMORY_BYTES,
    mesh: jax.sharding.Mesh | None = None,
    axis: str = "data",
    state: str | None = None,
    progress: Watch | bool | None = None,
    record: Mapping[str, Any] | None = None,
    only: Only = None,
    eval_params: EvalParams = None,
    storage: StorageOptions | None = None,
) -> Result:
    """Search for the coefficients; the search mean or a finalist is returned, whichever scores best on fresh noise.

    All candidates of a generation see the same noise, and every generation sees fresh noise. EMA profiles,
    checkpoints alone and soups of the best of these are measured first: the best is where the search begins, and what
    is returned if nothing beats it.

    Args:
        checkpoints: K paths or trees, oldest first, as of ``average``; or the folder of a run, for all its steps.
        objective: ``(params, key) -> scalar``, smaller is better; all randomness from ``key``.
        like: the parameters, as of ``average``: a tree with shapes, dtypes and shardings.
        strategy: a name of ``lcsc.names()``; ``"CMA-ES"``, ``"DE"`` and other usual spellings are understood.
        options: of the strategy: fields of ``evolution.Evolution``, ``strategies.Gradient`` or evosax' parameters;
            "random" has none.
        space: ``"sum_to_one"`` (signed), ``"simplex"`` or ``"free"``.
        groups: globs of leaf names, each with coefficients of its own; a string is one glob.
        scale: what a step of one changes in a coefficient; None: ``0.03 * 40 / K``.
        bounds: lowest and highest coefficient; ``(0, math.inf)`` is bounded on one side.
        l1_penalty: what a sum of magnitudes of one above one costs, in units of the objective; None: a tenth of the
            best score before the search, so that it fits more than its metric; where that score is not above zero, a
            tenth of how far the median of the scores before the search is above it. Give it for an objective that is
            positive by a constant added to it: the tenth is of that too. A likelihood can go without: 0.
        negative_penalty: what a negative mass of one costs; 0 or more.
        budget: evaluations of single models, those before the search included: profiles, at most 64 checkpoints
            alone, and at most four soups; a gradient counts as three. The final scores come on top: ``draws`` for each
            of ``finalists`` and of at most five others, and as many of ``guard`` and of ``held_out``
            (``report.final_evaluations``).
        population: candidates in a generation.
        key: one PRNG key, as ``jax.random.key(0)`` (typed, or of the older uint32 kind), or a seed.
        noise: ``"fresh"`` in each generation, or ``"fixed"``: one draw for the whole search.
        decays: of the EMA profiles.
        finalists: how many of the best seen are scored again.
        draws: of fresh noise for the final scores, averaged.
        validation: what finalists are scored with; the objective by default.
        guard: another metric, reported only; a warning tells when it got worse.
        held_out: the metric on data that chose nothing, reported only.
        jit: False for objectives in plain Python, called with one candidate after another; so are ``validation``,
            ``guard`` and ``held_out``.
        lora: how low-rank factors are combined (``lcsc.Lora``); None: each by itself, as any leaf.
        placement: of the checkpoints: ``"device"``, ``"host"`` (in host memory, brought to the devices for each chunk
            of candidates), ``"stream"`` (read from their place for each chunk) or ``"auto"``: the first of them that
            half of the free memory holds.
        memory_bytes: of each device, for the merged models that are evaluated at a time; what the objective itself
            needs for them comes on top.
        mesh: candidates are spread over its ``axis``; weights stay sharded over the others, as in ``like``. Inside the
            objective its axes are of type Auto.
        axis: see mesh.
        state: a folder or URL in which every generation is saved, in the background; a search that finds its own state
            there goes on, and with a larger budget for longer; that of other settings, checkpoints or parameters is
            refused. A kill costs the generation that runs, and the one before it while that is still being saved.
        progress: called after each generation with an ``Advance``, when the generation before is saved; True shows a
            line, False none, None one where standard error is a terminal.
        record: JSON values for the report: metric, sampler, number of function evaluations.
        only: these leaves alone are the parameters, as of ``average``.
        eval_params: as of ``average``.
        storage: endpoint, region and credentials of object stores.

    Returns:
        Coefficients, the merged parameters (summed in float64, rounded once), and the report.

    Raises:
        InvalidArgumentError: an argument is wrong in itself; the objective gives no number, or none that is finite.
        MismatchError: the checkpoints differ, a leaf is in no group, or ``state`` is of another search.

    Example:
        >>> import jax.numpy as jnp
        >>> trees = [{"w": jnp.array([0.0])}, {"w": jnp.array([1.0])}]
        >>> found = search(trees, lambda p, key: (p["w"][0] - 1.5) ** 2, strategy="evolution", budget=327)
        >>> bool(abs(found.params["w"][0] - 1.5) < 0.05), round(float(found.coefficients.sum()), 6)
        (True, 1.0)
    """
    began = time.perf_counter()
    population, budget = _whole("population", population, 1), _whole("budget", budget, 1)
    finalists, draws = _whole("finalists", finalists, 0), _whole("draws", draws, 1)
    if noise not in ("fresh", "fixed") or not len(decays):
        raise InvalidArgumentError(f'noise is {noise!r} ("fresh" or "fixed"), decays {list(decays)} (one at least).')
    for name, penalty in (("l1_penalty", l1_penalty), ("negative_penalty", negative_penalty)):
        if penalty is not None and not 0 <= penalty < math.inf:
            raise InvalidArgumentError(f"{name} is {penalty}; give a finite number, 0 for none or more.")
    if lora is not None and not isinstance(lora, Lora):
        raise InvalidArgumentError(f'lora is {lora!r}; give lcsc.Lora(), such as lcsc.Lora(space="product").')
    _check_functions({"objective": objective, "validation": validation, "guard": guard, "held_out": held_out})
    groups = (groups,) if isinstance(groups, str) else tuple(groups)
    places = located(checkpoints, storage)
    shape = Space(kind=space, count=len(places), groups=groups, scale=scale, bounds=bounds)
    root, seed = root_key(key)
    strategy = canonical(strategy)
    settings = as_json(
        {
            "strategy": strategy,
            "options": {} if options is None else options,
            "space": space,
            "groups": list(groups),
            "scale": shape.step,
            "bounds": None if shape.bounds is None else [_finite(one) for one in shape.bounds],
            "lora": None if lora is None else [lora.space, list(lora.pairs), lora.rank],
            "l1_penalty": l1_penalty,
            "negative_penalty": negative_penalty,
            "checkpoints": shape.count,
            "budget": budget,
            "population": population,
            "seed": seed,
            "key": np.asarray(jax.random.key_data(root)).tolist(),
            "generator": str(jax.random.key_impl(root)),
            "noise": noise,
            "decays": list(decays),
            "finalists": finalists,
            "record": {} if record is None else record,
        }
    )
    uses_gradient = strategy == "gradient"
    first = _limited(profiles(shape.count, decays), shape)
    # Not in the simplex: from a corner, where logarithms are steep, a search does not get away.
    single = np.eye(shape.count)[_spaced(shape.count, 0 if space == "simplex" else SINGLES)]
    alone = _limited(single, shape)
    cost = GRADIENT_COST if uses_gradient else population
    with ThreadPoolExecutor(1, thread_name_prefix="jaxckpt-search") as pool:
        pool.submit(warm_keys, root)
        sources = made_together(like, lambda: open_sources(places, eval_params, storage))
        how = {"like": like, "only": only}
        check_opened(sources, **how, advice=_ADVICE)
        steps = steps_of(places, sources, storage)
        last = loaded(sources, how, shape.count - 1)  # what is not combined is the last one's
        settings["sources"] = [origin(source, reads_trees=state is not None) for source in sources]
        if state is not None:
            others = () if eval_params is None or callable(eval_params) else range(shape.count - 1)
            trees = chain((loaded(sources, how, k) for k in others), [last])
            settings["parameters"] = parameters_of(trees, reads_values=eval_params is not None)
        evaluate = make_evaluator(
            sources,
            last,
            shape,
            how=how,
            lora=lora,
            placement=placement,
            is_jitted=jit,
            population=1 if uses_gradient else population,
            memory_bytes=memory_bytes,
            mesh=mesh,
            axis=axis,
        )
        del last
        # evosax is loaded, and the strategy's programs are compiled, while the first models are evaluated: not while
        # checkpoints are read, where each file would wait for the interpreter.
        making = pool.submit(make_strategy, strategy, population=population, size=shape.size, options=options or {})
        if options or population < 4 or population % 2:
            making.result()  # what some strategies do not take is told before anything is evaluated
        if uses_gradient and not isinstance(evaluate, Resident):
            raise InvalidArgumentError(
                f'strategy "gradient" needs jit=True and placement="device", and has jit={jit} and placement='
                f'"{evaluate.placement}"; averaging.learned_soup streams gradients from storage.'
            )
        run = Run(
            space=shape,
            making=making.result,
            evaluate=evaluate,
            objective=objective,
            l1_penalty=l1_penalty,
            negative_penalty=negative_penalty,
            key=root,
            width=1 if uses_gradient else population,
            cost=cost,
            is_fixed=noise == "fixed",
            kept=max(finalists, 1),
            first=first,
            alone=alone,
            budget=budget,
            clock=Clock(),
            not_finite=lambda: not_finite(sources, how),
        )
        if run.generations < 1:
            raise InvalidArgumentError(
                f"budget is {budget}: {run.begun} profiles (decays), checkpoints alone and soups, and one generation "
                f"of {cost} do not fit."
            )
        watch = watcher(progress)
        for name, metric in (("validation", validation), ("guard", guard), ("held_out", held_out)):
            run.check(name, metric)
        now = _searched(run, watch, began, state, settings, storage, pool)

    def measure(what: Objective | None) -> Any:
        return None if what is None else lambda points, keys: run.measured(what, points, keys)

    last, uniform = (
        np.zeros((len(shape.groups), shape.count)),
        np.full((len(shape.groups), shape.count), 1 / shape.count),
    )
    last[:, -1] = 1
    penalty = run.penalty(now)
    chosen, rows = select(
        run.finalists(now, finalists),
        {"last": last, "uniform": uniform},
        keys=run.final_keys(draws),
        objective=measure(validation or objective),
        guard=measure(guard),
        held_out=measure(held_out),
        penalty=penalty,
    )
    warned = concerns(chosen, next(row for row in rows if row.name == "profile"))
    params = average_opened(sources, dict(zip(groups, chosen.coefficients, strict=True)), **how)
    params = with_products(params, evaluate, chosen.coefficients)
    report = Report(
        rows=tuple(rows),
        chosen=chosen.name,
        fitness=now.fitness,
        path=now.path,
        groups=groups,
        evaluations=len(now.profiles) + run.generations * run.cost,
        final_evaluations=len(rows) * draws * (1 + (guard is not None) + (held_out is not None)),
        seconds=time.perf_counter() - began,
        objective_seconds=run.clock.seconds,
        settings=settings | {"l1_penalty": penalty.l1},
        concerns=tuple(warned),
        profiles={float(decay): float(score) for decay, score in zip(decays, now.profiles, strict=False)},
        steps=tuple(steps),
        placement=evaluate.placement,
    )
    coefficients = chosen.coefficients if len(groups) > 1 else chosen.coefficients[0]
    found = tuple((source.url, step) for source, step in zip(sources, steps, strict=True))
    return Result(coefficients=coefficients, params=params, report=report, sources=found)


def _searched(
    run: Run,
    watch: Watch | None,
    began: float,
    path: str | None,
    settings: dict[str, Any],
    storage: Any,
    pool: ThreadPoolExecutor,
) -> State:
    """The state after the last generation; each is on storage before ``watch`` is told of the next."""
    compiled = pool.submit(run.warm)
    saved = None if path is None else read(path, run.empty, settings, storage)
    now = run.begin() if saved is None else saved
    compiled.result()
    saver = None if path is None else Saver(path, settings, storage)

    def told(seen: Advance) -> None:
        if saver is not None:
            saver.wait()
        if watch is not None:
            watch(seen)

    try:
        if saver is not None and saved is None:
            saver.save(now)
        while now.generation < run.generations:
            now = run.advance(now, told, began)
            if saver is not None:
                saver.save(now)
    finally:
        if isinstance(watch, Line):
            watch.close()
        if saver is not None:
            saver.wait()
    return now


def _limited(points: np.ndarray, space: Space) -> np.ndarray:
    """Profiles [n, K] for each group, [n, G, K], within the bounds."""
    wide = np.repeat(points[:, None], len(space.groups), axis=1)
    zero = np.zeros((len(points), space.size))
    return wide if space.kind == "simplex" and space.bounds is None else space.coefficients(zero, wide)


def _spaced(count: int, limit: int) -> np.ndarray:
    """Places of at most ``limit`` checkpoints, evenly spaced, the last among them."""
    return np.unique(np.linspace(count - 1, 0, min(count, limit)).round().astype(int))


def _whole(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise InvalidArgumentError(f"{name} is {value!r}; give a whole number, {least} or more.")
    return number


def _check_functions(metrics: Mapping[str, Any]) -> None:
    for name, metric in metrics.items():
        if not callable(metric) and (name == "objective" or metric is not None):
            raise InvalidArgumentError(f"{name} is {metric!r}; give a function (params, key) -> number.")


def _finite(value: float) -> float | None:
    """As JSON has it."""
    return value if math.isfinite(value) else None
