"""What becomes of every leaf of an average: summed with which weights, or taken from which source."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxckpt.averaging.globs import check_globs, matches
from jaxckpt.averaging.reading import Want, want_saved
from jaxckpt.averaging.union import common, union
from jaxckpt.checkpoint.match import Only, Places, describe_entry, prune, selector
from jaxckpt.checkpoint.place import want_like
from jaxckpt.checkpoint.source import Source
from jaxckpt.core.dtypes import dtype_of
from jaxckpt.core.errors import InvalidArgumentError, MismatchError
from jaxckpt.core.text import counted
from jaxckpt.core.tree import NONE, NamedLeaf, Node, Path, build, flatten, path_name, rebuild
from jaxckpt.format.sidecar import LeafEntry

Missing = Literal["error", "keep", "skip"]
Policy = str | Mapping[str, str] | Callable[[str, Any], str | None] | None
POLICIES = ("average", "first", "last", "equal_or_error")
SHOWN = 10
ADVICE = (
    'Nothing was averaged. missing="keep" takes leaves that some sources lack from those that have them, '
    'missing="skip" leaves them out, only=... averages chosen leaves.'
)


class Sum(NamedTuple):
    """A leaf to be summed. ``weights`` is float64 [P, sources]; sources whose weights are all zero are left out."""

    name: str
    sources: tuple[int, ...]
    leaves: tuple[int, ...]  # of each of these sources
    dtypes: tuple[np.dtype, ...]
    weights: np.ndarray
    shape: tuple[int, ...]
    dtype: np.dtype  # of the result
    want: Want  # the form of the result; its leaf counts in the first of the sources
    entry: LeafEntry


class Copy(NamedTuple):
    """A leaf to be taken from one source; ``equal_to``: (source, leaf) that must have the same value."""

    name: str
    source: int
    want: Want
    equal_to: tuple[tuple[int, int], ...]


class Plan(NamedTuple):
    """All distinct results, and how they make up a tree."""

    results: list[Sum | Copy]
    models: int  # P
    assemble: Callable[[Sequence[Any]], Any]  # values of the results -> tree


class Weights:
    """The weights of every leaf: one vector or matrix for all, or one per glob (of the ``argument`` of this name)."""

    def __init__(self, weights: Any, count: int, argument: str = "weights") -> None:
        self.argument = argument
        self._globs: list[tuple[str, np.ndarray]]
        if weights is None:
            weights = np.full(count, 1 / count)
        self.per_path = isinstance(weights, Mapping)
        pairs = list(weights.items()) if isinstance(weights, Mapping) else [("*", weights)]
        if not pairs:
            raise InvalidArgumentError(
                'weights is an empty dict; give weights for the globs of leaves, as {"*": [...]}.'
            )
        self._globs = [(glob, _matrix(value, count, glob if self.per_path else "")) for glob, value in pairs]
        shapes = {(value.shape[0], np.ndim(raw)) for (_, value), (_, raw) in zip(self._globs, pairs, strict=True)}
        if len(shapes) != 1:
            raise InvalidArgumentError(f"weights give vectors and matrices, or matrices of different P: {shapes}.")
        ((self.models, ndim),) = shapes
        self.many = ndim == 2

    def of(self, name: str) -> np.ndarray | None:
        """float64 [P, K], of the first glob that the name matches; None if it matches none."""
        for glob, value in self._globs:
            if matches(name, glob):
                return value
        return None

    def globs(self) -> list[str]:
        """All of them; ``*`` where there is one vector or matrix."""
        return [glob for glob, _ in self._globs]

    def record(self, p: int) -> Any:
        """Those of one result, as JSON."""
        plain = {glob: value[p].tolist() for glob, value in self._globs}
        return plain if self.per_path else plain["*"]

    def matrix(self) -> np.ndarray:
        """float64 [P, K] of the first glob."""
        return self._globs[0][1]


def make_plan(
    sources: Sequence[Source],
    weights: Weights,
    like: Any,
    *,
    is_tree: bool,
    only: Only,
    missing: Missing,
    policy: Policy,
    dtype: Any,
    advice: str = ADVICE,
) -> Plan:
    """Match the leaves of all sources, and of ``like``.

    Raises:
        MismatchError: lists all leaves that some source lacks, or that differ in shape or kind.
    """
    if missing not in ("error", "keep", "skip"):
        raise InvalidArgumentError(f'missing is {missing!r}; it is "error", "keep" or "skip".')
    if dtype is not None and _rank(dtype) < 2:
        raise InvalidArgumentError(
            f"dtype is {np.dtype(dtype).name}; it is that of floating results, as float32 or bfloat16. Leave it out, "
            "and round the result yourself."
        )
    names = _names(sources, like if is_tree else None)
    check_globs(weights.globs() if weights.per_path else (), names, weights.argument)
    check_globs(policy if isinstance(policy, Mapping) else (), names, "policy")
    if isinstance(policy, str):
        policy = {"*": policy}
    places = [Places(source.structure, only) for source in sources]
    structure = common([source.structure for source in sources]) if missing == "skip" else sources[0].structure
    if is_tree:
        wanted = [leaf for leaf in flatten(like)[0] if only is None or selector(only)(leaf.name)]
    else:
        if missing == "keep":
            structure = union([source.structure for source in sources])
        chosen = Places(structure, only)
        wanted = [NamedLeaf(path_name(path), path, None) for path in chosen.leaves]
    if not wanted:
        raise MismatchError(
            f"{sources[0].url} has no leaf that matches only={only!r}. jaxckpt inspect shows its leaves."
        )
    problems: list[str] = []
    if missing == "error":
        problems += _unexpected(sources, places, wanted)
    results: dict[Any, Sum | Copy] = {}
    keys: dict[Path, Any] = {}
    for leaf in wanted:
        found = [place.find(leaf.path) for place in places]
        held = tuple((k, places[k].leaves[path]) for k, path in enumerate(found) if path is not None)
        if len(held) < len(sources):
            if missing == "error" or (missing == "keep" and not held):
                lacking = [sources[k].url for k, path in enumerate(found) if path is None]
                problems.append(
                    f'"{leaf.name}" is not in {lacking[0]}' + (f" and {len(lacking) - 1} more" if lacking[1:] else "")
                )
                continue
            if missing == "skip":
                continue
        made = _one(sources, leaf, held, weights, policy, like, is_tree, dtype)
        if isinstance(made, str):
            problems.append(made)
            continue
        key = (held, made.want, type(made), made.weights.tobytes() if isinstance(made, Sum) else made.source)
        results.setdefault(key, made)
        keys[leaf.path] = key
    if problems:
        raise MismatchError(_report(problems, advice))
    order = {key: i for i, key in enumerate(results)}
    example = like if is_tree else getattr(sources[0], "example", None)
    has_all = is_tree or (example is not None and {leaf.path for leaf in flatten(example)[0]} == keys.keys())

    def assemble(values: Sequence[Any]) -> Any:
        if has_all:
            return rebuild(example, lambda path, old: values[order[keys[path]]] if path in keys else old)
        kept = prune(structure, lambda leaf, path: path in keys) or NONE
        paths = _numbered(kept, keys)
        return build(paths[0], lambda i: values[order[keys[paths[1][i]]]])

    return Plan(list(results.values()), weights.models, assemble)


def _names(sources: Sequence[Source], like: Any) -> list[str]:
    """Of all leaves, in the order of the first source; leaves that are not averaged are among them."""
    leaves = {path: None for source in sources for path in Places(source.structure).leaves}
    return [*(path_name(path) for path in leaves), *(leaf.name for leaf in flatten(like)[0])]


def _numbered(structure: Node, keys: Mapping[Path, Any]) -> tuple[Node, list[Path]]:
    """The structure with leaves numbered by place, and their paths: indices of several sources do not mix."""
    paths: list[Path] = []

    def number(node: Node, path: Path) -> Node:
        if node.kind == "leaf":
            paths.append(path)
            return Node(kind="leaf", leaf=len(paths) - 1)
        children = tuple(number(child, (*path, key)) for key, child in zip(node.keys, node.children, strict=True))
        return Node(kind=node.kind, type=node.type, keys=node.keys, children=children)

    return number(structure, ()), paths


def _one(
    sources: Sequence[Source],
    leaf: NamedLeaf,
    held: tuple[tuple[int, int], ...],
    weights: Weights,
    policy: Any,
    like: Any,
    is_tree: bool,
    dtype: Any,
) -> Sum | Copy | str:
    entries = [sources[k].leaves[i] for k, i in held]
    how = _policy(policy, leaf.name, entries[0])
    if how != "average":
        place = 0 if how == "first" else -1
        source, index = held[place]
        want, wrong = _want(sources[source], index, leaf, like, is_tree, cast=False)
        return wrong or Copy(leaf.name, source, want, held[:-1] if how == "equal_or_error" else ())
    if any(e.shape != entries[0].shape or _family(e) != _family(entries[0]) for e in entries):
        k = next(k for k, e in enumerate(entries) if (e.shape, _family(e)) != (entries[0].shape, _family(entries[0])))
        return (
            f'"{leaf.name}" is {describe_entry(entries[0])} in {sources[held[0][0]].url}, and '
            f"{describe_entry(entries[k])} in {sources[held[k][0]].url}"
        )
    given = weights.of(leaf.name)
    if given is None:
        return f'"{leaf.name}" matches none of the globs of weights (add "*" for the rest, or a policy)'
    chosen = _renormalised(given, [k for k, _ in held])
    if chosen is None:
        return f'"{leaf.name}": the weights of the sources that have it sum to zero, so it cannot be kept from them'
    used = [j for j in range(len(held)) if chosen[:, j].any()] or [0]
    first = held[used[0]]
    want, wrong = _want(sources[first[0]], first[1], leaf, like, is_tree, cast=True)
    entry = entries[used[0]]
    wrong = wrong or _lost(leaf.name, entry, want)
    if wrong:
        return wrong
    own = dtype_of(entry.dtype or "float64")
    out = own if is_tree or dtype is None or not entry.stored or _rank(dtype) != _rank(own) else np.dtype(dtype)
    if len(used) == 1 and (chosen[:, used[0]] == 1).all() and (want.cast is not None or out == own):
        return Copy(leaf.name, first[0], want, ())
    stored = [entries[j] for j in used]
    return Sum(
        name=leaf.name,
        sources=tuple(held[j][0] for j in used),
        leaves=tuple(held[j][1] for j in used),
        dtypes=tuple(dtype_of(e.dtype or "float64") for e in stored),
        weights=chosen[:, used],
        shape=entry.shape,
        dtype=want.cast or out,
        want=want,
        entry=entry,
    )


def _want(source: Source, index: int, leaf: NamedLeaf, like: Any, is_tree: bool, *, cast: bool) -> tuple[Want, str]:
    if is_tree:
        return want_like(source, index, leaf, cast=cast, pad=False)
    return want_saved(source, index, like), ""


def _family(entry: LeafEntry) -> str:
    if not entry.stored:
        return entry.kind
    dtype = dtype_of(entry.dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return "complex array"
    return "array" if jnp.issubdtype(dtype, jnp.inexact) else "integer array"


def _rank(dtype: Any) -> int:
    """Boolean, integer, floating, complex: each holds what those before it hold, but for rounding."""
    kinds = (np.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    return next((rank for rank, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind)), -1)


def _lost(name: str, entry: LeafEntry, want: Want) -> str:
    """A line about a leaf of ``like`` whose dtype cannot hold what an average is: imaginary parts, or fractions."""
    wanted = want.cast or want.array_dtype
    ranks = {"bool": 0, "int": 1, "float": 2, "complex": 3}
    stored = _rank(dtype_of(entry.dtype)) if entry.stored else ranks.get(entry.kind, 0)
    if wanted is None or _rank(wanted) >= stored:
        return ""
    what = ("", "its numbers", "its fractions", "its imaginary parts")[stored]
    held = ("bool", "integer", "floating", "complex")[stored]
    return (
        f'"{name}": the sources have {describe_entry(entry)}, `like` wants {wanted.name}, and {what} would be lost: '
        f'give `like` a {held} dtype, or choose the policy "first" or "last"'
    )


def _policy(policy: Any, name: str, entry: LeafEntry) -> str:
    floating = entry.kind in ("float", "complex") or _family(entry) in ("array", "complex array")
    default = "average" if floating and entry.kind != "prng_key" else "last"
    if callable(policy):
        chosen = policy(name, entry)
    else:
        globs = (policy or {}).items()
        chosen = next((p for g, p in globs if matches(name, g)), None)
        if policy is not None and list(policy) == ["*"] and not floating and chosen == "average":
            chosen = None  # policy="average" is said of the numbers
    chosen = chosen or default
    if chosen not in POLICIES:
        raise InvalidArgumentError(f'The policy of leaf "{name}" is {chosen!r}; it is one of {", ".join(POLICIES)}.')
    can = floating or (entry.kind == "int") or (entry.stored and entry.kind not in ("prng_key", "bytes"))
    if chosen == "average" and not can:
        raise InvalidArgumentError(
            f'Leaf "{name}" is {describe_entry(entry)}, which has no average: choose first, last or equal_or_error.'
        )
    return chosen


def _renormalised(weights: np.ndarray, held: list[int]) -> np.ndarray | None:
    """The columns of the sources that have a leaf, scaled to the sum of all; None where they sum to zero."""
    if len(held) == weights.shape[1]:
        return weights
    columns = weights[:, held]
    if len(held) == 1:
        return np.ones_like(columns)  # one-sided: kept as it is
    sums = columns.sum(axis=1, keepdims=True)
    return None if (sums == 0).any() else columns * (weights.sum(axis=1, keepdims=True) / sums)


def _unexpected(sources: Sequence[Source], places: Sequence[Places], wanted: Sequence[NamedLeaf]) -> list[str]:
    found = []
    for source, place in zip(sources, places, strict=True):
        used = {place.find(leaf.path) for leaf in wanted}
        found += [
            f'"{path_name(path)}" of {source.url} is not in the result' for path in place.leaves if path not in used
        ]
    return found


def _report(problems: list[str], advice: str) -> str:
    lines = [f"The sources do not fit together; {counted(len(problems), 'leaf differs', 'leaves differ')}:"]
    lines += [f"  {line}" for line in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  ... and {len(problems) - SHOWN} more")
    lines.append(advice)
    return "\n".join(lines)


def _matrix(value: Any, count: int, glob: str) -> np.ndarray:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"weights are {value!r}; they are numbers [K] or [P, K].") from error
    where = f' of "{glob}"' if glob else ""
    if array.ndim not in (1, 2) or array.shape[-1] != count or not array.size:
        raise InvalidArgumentError(
            f"weights{where} have the shape {array.shape} for {counted(count, 'source')}; they are [{count}] or [P, "
            f"{count}]."
        )
    if not np.isfinite(array).all():
        raise InvalidArgumentError(f"weights{where} are not all finite: {array.tolist()}.")
    return array if array.ndim == 2 else array[None]
