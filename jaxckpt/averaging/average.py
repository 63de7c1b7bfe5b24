"""Average checkpoints: any weights, any mesh, never more than one model and a bucket in memory."""

import json
import math
import time
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, Literal

import jax
import numpy as np

from jaxckpt.averaging.kernel import Accumulate, resolve
from jaxckpt.averaging.onmesh import mesh_sums
from jaxckpt.averaging.plan import Copy, Missing, Policy, Sum, Weights, make_plan
from jaxckpt.averaging.reading import Want, boxes_of, check_free, fetch, finished, is_tree, made_together, opener
from jaxckpt.averaging.sources import EvalParams, arrays_of, check_sources, open_sources
from jaxckpt.averaging.stream import stream_sums
from jaxckpt.checkpoint.exchange import is_shared
from jaxckpt.checkpoint.leaves import plain_value
from jaxckpt.checkpoint.lineage import Lineage
from jaxckpt.checkpoint.match import Only
from jaxckpt.checkpoint.save import save
from jaxckpt.checkpoint.source import OwnSource, Source
from jaxckpt.core.errors import InvalidArgumentError, MismatchError
from jaxckpt.core.events import Restored, emit
from jaxckpt.core.text import nearest
from jaxckpt.storage.url import Location, StorageOptions

PyTree = Any
Where = Literal["auto", "host", "device"]


def average(
    sources: Sequence[Any],
    weights: Any = None,
    *,
    like: PyTree = None,
    only: Only = None,
    missing: Missing = "error",
    policy: Policy = None,
    eval_params: EvalParams = None,
    accumulate: Accumulate = "auto",
    dtype: Any = None,
    where: Where = "auto",
    finalize: Callable[[PyTree], PyTree] | None = None,
    options: StorageOptions | None = None,
) -> Any:
    """The weighted sum of K checkpoints, leaf by leaf, directly on the target mesh.

    Sources are streamed: while one bucket (a mebibyte of each source, or one stored chunk) is summed, another is read,
    and each process reads only what its devices need. Sums are kept in float64 (or in float32 pairs) and rounded once,
    so a result is the nearest number to the exact sum, or the one beside it. Subnormal float32 numbers count as zero,
    as XLA has it. In a ``jax.distributed`` job all processes call it together.

    Args:
        sources: checkpoints (paths, URLs; ours or Orbax's) and live trees, K of them, of one run or of several.
        weights: [K] for one result; [P, K] for P results from one pass over storage; a dict of globs (names, subtrees)
            to either, the first that matches counts; None: 1/K each. Any finite numbers: they may be negative and need
            not sum to one. Sources of weight zero are not read.
        like: what to average into, as of ``restore``: a tree of arrays or ``jax.ShapeDtypeStruct`` with shardings and
            dtypes, a function ``(name, spec) -> Sharding or None``, or None: as the first source was saved.
        only: average these leaves alone (a name, a subtree, a glob, several, or a function of the name).
        missing: for leaves that some sources lack. ``"error"``; ``"keep"``: take them from those that have them,
            weights scaled to the same sum, one-sided leaves as they are (Dynamic Y-KD, arXiv 2303.06015: old and new
            model are averaged where both have a part); ``"skip"``: leave them out, or as they are in ``like``.
        policy: ``"average"``, ``"first"``, ``"last"`` or ``"equal_or_error"``, for all leaves, by glob in a dict, or by
            a function ``(name, entry)``. Unsaid, floating and complex leaves are averaged, and integers, booleans, PRNG
            keys, counters, strings and bytes are those of the last source. Averaged integers are rounded.
        eval_params: ``state -> tree``, the point to average of each source (one function, or one per source): an EMA
            subtree, ``optax.contrib.schedule_free_eval_params``... Traced once; a leaf of its result reads only
            the leaves of the state that it depends on.
        accumulate: ``"float64"``, ``"float32"`` (pairs), or ``"auto"``: float64, but pairs for what is summed on TPUs.
        dtype: of floating results, where ``like`` does not say; a complex one is of complex results.
        where: ``"host"`` sums on the CPU and moves one model to the devices, ``"device"`` sums on the devices.
            ``"auto"``: on the host for CPU and numpy results of one process, else on the devices.
        finalize: called with each result, as to re-estimate batch-norm statistics (``averaging.batch_norm``).
        options: endpoint, region and credentials of object stores.

    Returns:
        A tree, whose arrays own their memory and may be donated; for weights [P, K] a list of P trees.

    Raises:
        MismatchError: lists the leaves that some source lacks, or that differ in shape or kind.
        NotFoundError, NotCommittedError, CorruptionError: as of ``restore``.

    Example:
        >>> from jaxckpt.checkpoint.save import save
        >>> for step in (1, 2):
        ...     save(f"memory://docs/average/{step}", {"w": np.full(2, step, np.float32), "step": step})
        >>> average(["memory://docs/average/1", "memory://docs/average/2"], [0.25, 0.75])
        {'w': array([1.75, 1.75], dtype=float32), 'step': 2}
    """
    count = check_sources(sources)
    given = weights if isinstance(weights, Weights) else Weights(weights, count)
    return average_opened(
        made_together(like, lambda: open_sources(sources, eval_params, options)),
        given,
        like=like,
        only=only,
        missing=missing,
        policy=policy,
        accumulate=accumulate,
        dtype=dtype,
        where=where,
        finalize=finalize,
    )


def average_to(
    path: Location,
    sources: Sequence[Any],
    weights: Any = None,
    *,
    method: str = "average",
    metric: dict[str, Any] | None = None,
    step: int | None = None,
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
    eval_params: EvalParams = None,
    options: StorageOptions | None = None,
    **how: Any,
) -> None:
    """Average and save: an ordinary checkpoint, whose lineage names the sources, weights, method and metric.

    Args:
        path: where to save; for weights [P, K], ``{p}`` in it is replaced by the number of the result.
        sources: as of ``average``.
        weights: as of ``average``.
        method: how the weights were found.
        metric: what they were chosen by, as ``{"name": "loss", "value": 0.1, "split": "validation"}``.
        step: of the new checkpoint; the step of the last source by default.
        metadata: JSON values of your own.
        overwrite: replace a checkpoint that is there.
        eval_params: as of ``average``.
        options: endpoint, region and credentials of object stores.
        how: the other arguments of ``average``.

    Raises:
        TypeError: ``how`` has what ``average`` has not.

    Example:
        >>> average_to("memory://docs/averaged", [{"w": np.ones(2)}, {"w": np.zeros(2)}], [3, -2], method="by hand")
    """
    for name in how.keys() - signature(average_opened).parameters.keys():
        near = nearest(name, [*signature(average_to).parameters, *signature(average).parameters])
        raise TypeError(
            f"average_to() got an unexpected argument {name!r}"
            + (f"; did you mean {near!r}?" if near else ": it takes those of average() and no others.")
        )
    _check_json("metric", metric)
    _check_json("metadata", metadata)
    given = Weights(weights, check_sources(sources))
    opened = made_together(how.get("like"), lambda: open_sources(sources, eval_params, options))
    text = str(path)
    if given.many and "{p}" not in text:
        raise InvalidArgumentError(f'{given.models} results cannot all be saved to {text}: put "{{p}}" into the path.')
    places = [text.replace("{p}", str(p)) for p in range(given.models)] if given.many else [path]
    for place in places:
        check_free(place, options, overwrite=overwrite)
    found = average_opened(opened, given, **how)
    steps = [step_of(source) for source in opened]
    known = [one for one in steps if one is not None]
    for p, tree in enumerate(found if given.many else [found]):
        single = given.matrix()[p] if not given.per_path else None
        parents = [
            Lineage(path=source.url, step=steps[k], weight=None if single is None else float(single[k]), method=method)
            for k, source in enumerate(opened)
        ]
        record = {"method": method, "weights": given.record(p), "metric": metric}
        save(
            places[p],
            tree,
            overwrite=overwrite,
            step=step if step is not None else (known[-1] if known else None),
            metadata={**(metadata or {}), "averaging": record},
            parents=parents,
            options=options,
        )


def average_opened(
    sources: Sequence[Source],
    weights: Any,
    *,
    like: PyTree = None,
    only: Only = None,
    missing: Missing = "error",
    policy: Policy = None,
    accumulate: Accumulate = "auto",
    dtype: Any = None,
    where: Where = "auto",
    finalize: Callable[[PyTree], PyTree] | None = None,
) -> Any:
    """``average`` of sources that ``open_sources`` gave: for those who read them many times."""
    weights = weights if isinstance(weights, Weights) else Weights(weights, len(sources))
    start = time.perf_counter()
    how = resolve(accumulate)
    if where not in ("auto", "host", "device"):
        raise InvalidArgumentError(f'where is {where!r}; it is "auto", "host" or "device".')
    plan = made_together(
        like,
        lambda: make_plan(
            sources, weights, like, is_tree=is_tree(like), only=only, missing=missing, policy=policy, dtype=dtype
        ),
    )
    values: list[list[Any]] = [[] for _ in plan.results]  # P of each
    place = {id(result): i for i, result in enumerate(plan.results)}
    sums = [one for one in plan.results if isinstance(one, Sum)]
    stored = [one for one in sums if one.entry.stored]
    on_mesh = [one for one in stored if one.want.sharding is not None and _on_devices(one, where)]
    on_host = [one for one in stored if one.want.sharding is None or not _on_devices(one, where)]
    read_bytes: dict[int, int] = {}

    for one in sums:
        if not one.entry.stored:
            values[place[id(one)]] = _sum_numbers(sources, one)
    if on_mesh:
        arrays, read_bytes = mesh_sums(sources, on_mesh, how=how)
        for one, found in zip(on_mesh, arrays, strict=True):
            values[place[id(one)]] = [finished(one.want, one.entry, array) for array in found]
    if on_host:
        with jax.enable_x64(True):  # results of 64 bits are allocated as such
            opened = opener(on_host, plan.models)
        more = stream_sums(
            sources,
            on_host,
            lambda one: (opened(one), boxes_of(one.want, one.shape)),
            lambda one, filled: values[place[id(one)]].extend(
                finished(one.want, one.entry, each.finish()) for each in filled
            ),
            how="float64" if accumulate == "auto" else how,
        )
        read_bytes = {k: read_bytes.get(k, 0) + more.get(k, 0) for k in {*read_bytes, *more}}
    _copy(sources, plan.results, values, plan.models, read_bytes)
    for k, size in sorted(read_bytes.items()):
        emit(
            Restored(
                path=sources[k].url,
                process=jax.process_index(),
                read_bytes=size,
                seconds=time.perf_counter() - start,
            )
        )
    trees = [plan.assemble([each[p] for each in values]) for p in range(plan.models)]
    trees = [finalize(tree) for tree in trees] if finalize is not None else trees
    return trees if weights.many else trees[0]


def check_opened(sources: Sequence[Source], *, like: PyTree, only: Only, advice: str) -> None:
    """Raise the MismatchError of ``average_opened``, with this advice, where sources or ``like`` do not fit."""
    made_together(
        like,
        lambda: make_plan(
            sources,
            Weights(None, len(sources)),
            like,
            is_tree=is_tree(like),
            only=only,
            missing="error",
            policy=None,
            dtype=None,
            advice=advice,
        ),
    )


def _on_devices(one: Sum, where: Where) -> bool:
    if is_shared(one.want) or where == "device":
        return True
    sharding = one.want.sharding
    return where == "auto" and sharding is not None and any(d.platform != "cpu" for d in sharding.device_set)


def _copy(
    sources: Sequence[Source],
    results: Sequence[Sum | Copy],
    values: list[list[Any]],
    models: int,
    read_bytes: dict[int, int],
) -> None:
    """The leaves that are taken from one source, read together."""
    for k, source in enumerate(sources):
        chosen = [(i, one) for i, one in enumerate(results) if isinstance(one, Copy) and one.source == k]
        if not chosen:
            continue
        found, more = _taken(source, [one for _, one in chosen])
        read_bytes[k] = read_bytes.get(k, 0) + more
        for (i, one), value in zip(chosen, found, strict=True):
            _check_equal(sources, one)
            values[i] = [value, *(_copied(value) for _ in range(models - 1))]


def _taken(source: Source, copies: Sequence[Copy]) -> tuple[list[Any], int]:
    if isinstance(source, OwnSource):
        return fetch(source, [one.want for one in copies])
    found: list[Any] = []
    read_bytes = 0
    for one in copies:
        entry = source.leaves[one.want.leaf]
        if entry.stored and is_shared(one.want):
            (value,), more = arrays_of(source, [one.want])
            value = value if one.want.cast is None else value.astype(one.want.cast)
            value = jax.random.wrap_key_data(value, impl=entry.prng_impl) if entry.kind == "prng_key" else value
            found.append(one.want.convert(value))
        else:
            (value,), more = fetch(source, [one.want])
            found.append(value)
        read_bytes += more
    return found, read_bytes


def _copied(value: Any) -> Any:
    """The same value in memory of its own: one result may be donated without the others."""
    return value.copy() if isinstance(value, jax.Array | np.ndarray) else value


def _check_equal(sources: Sequence[Source], one: Copy) -> None:
    if not one.equal_to:
        return

    def value(k: int, leaf: int) -> Any:
        entry = sources[k].leaves[leaf]
        return np.asarray(fetch(sources[k], [Want(leaf=leaf)])[0][0]) if entry.stored else plain_value(entry)

    expected = value(one.source, one.want.leaf)
    for k, leaf in one.equal_to:
        found = value(k, leaf)
        same = (
            found.shape == expected.shape and found.dtype == expected.dtype and found.tobytes() == expected.tobytes()
            if isinstance(found, np.ndarray) and isinstance(expected, np.ndarray)
            else type(found) is type(expected) and found == expected
        )
        if not same:
            raise MismatchError(
                f'Leaf "{one.name}" must be equal in all sources (policy "equal_or_error"): it is {_short(found)} in '
                f"{sources[k].url} and {_short(expected)} in {sources[one.source].url}. "
                'Choose the policy "first" or "last" for it, or leave the source out.'
            )


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _sum_numbers(sources: Sequence[Source], one: Sum) -> list[Any]:
    """Python numbers, in float64."""
    numbers = [plain_value(sources[k].leaves[leaf]) for k, leaf in zip(one.sources, one.leaves, strict=True)]
    found = []
    for row in one.weights.tolist():
        terms = [w * x for w, x in zip(row, numbers, strict=True) if w]
        total: Any = sum(terms, 0j) if any(isinstance(x, complex) for x in numbers) else math.fsum(terms)
        found.append(one.want.convert(round(total) if all(type(x) is int for x in numbers) else total))
    return found


def _check_json(name: str, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"{name} is {_short(value)}, which cannot be kept as JSON: {error}. Give plain values, as float(value)."
        ) from error


def step_of(source: Source) -> int | None:
    """The step that a checkpoint of ours was saved with."""
    inner = getattr(source, "source", source)
    return inner.sidecar.step if isinstance(inner, OwnSource) else None
