"""How stacked checkpoints become candidates: one contraction per leaf, and products of LoRA factors where wanted."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxckpt.core.errors import InvalidArgumentError, MismatchError
from jaxckpt.core.tree import flatten, rebuild
from jaxckpt.lcsc.space import Space

PyTree = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """How low-rank adapters ``W + left @ right`` are combined.

    Summing the factors apart gives cross terms: ``(sum a_k A_k) (sum a_k B_k)`` is not ``sum a_k A_k B_k``. Within one
    run they are small; between runs they are not.

    Attributes:
        space: ``"factors"``: each factor is summed as any leaf, which keeps the rank; ``"product"``: the products are
            summed, exactly, and cut to ``rank`` by a singular value decomposition, which is the nearest of that rank.
        pairs: names of left factors [..., d, r] (globs) -> those of their right factors [..., r, n], with ``*`` for the
            same text. In torch's order, ``B @ A``, the left one is ``lora_B``.
        rank: of the product: ``"same"`` as that of the checkpoints, ``"exact"`` (K times it, nothing is cut; objectives
            that take any rank see longer factors), or a number.
    """

    space: Literal["factors", "product"] = "product"
    pairs: Mapping[str, str] | tuple[tuple[str, str], ...] = (("*lora_a", "*lora_b"),)
    rank: int | Literal["same", "exact"] = "same"

    def __post_init__(self) -> None:
        pairs = tuple(self.pairs.items()) if isinstance(self.pairs, Mapping) else tuple(self.pairs)
        object.__setattr__(self, "pairs", pairs)
        if self.space not in ("factors", "product"):
            raise InvalidArgumentError(f'lora.space is {self.space!r}; it is "factors" or "product".')
        if self.rank not in ("same", "exact") and not (isinstance(self.rank, int) and self.rank > 0):
            raise InvalidArgumentError(f'lora.rank is {self.rank!r}; it is "same", "exact" or a number above 0.')
        if wrong := [f"{a}: {b}" for a, b in pairs if a.count("*") > 1 or a.count("*") != b.count("*")]:
            raise InvalidArgumentError(f"lora.pairs has {wrong}; each name has one * at most, and both alike.")


@dataclass(frozen=True, slots=True)
class Pair:
    """Places of the factors of one product, and the rank it is cut to (None: it is not)."""

    left: int
    right: int
    rank: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The form of a candidate: what a program is compiled for.

    Attributes:
        structure: of the tree, as jax has it.
        names: of the leaves that are arrays.
        groups: the group of coefficients of each; 0 of those that are not combined.
        fixed: (place, value) of the leaves that are none: text, and Python's integers.
        pairs: LoRA products.
        mesh: over which weights are sharded or candidates spread; its axes are of type Auto.
        axis: the one that candidates are spread over.
        specs: of each array on the mesh.
    """

    structure: Any
    names: tuple[str, ...]
    groups: tuple[int, ...]
    fixed: tuple[tuple[int, Any], ...] = ()
    pairs: tuple[Pair, ...] = ()
    mesh: Mesh | None = None
    axis: str | None = None
    specs: tuple[PartitionSpec, ...] = ()

    def tree(self, leaves: Sequence[Any]) -> PyTree:
        """The tree of these arrays."""
        values = list(leaves)
        for place, value in self.fixed:
            values.insert(place, value)
        return self.structure.unflatten(values)


def make_form(tree: PyTree, space: Space, lora: Lora | None) -> Form:
    """The form of a tree (of arrays, or of their shapes).

    Raises:
        MismatchError: a combined leaf is in no group; a left factor has no right one, or their shapes do not fit.
    """
    leaves, structure = jax.tree.flatten(tree)
    names = names_of(tree)
    is_array = [is_stacked(leaf) for leaf in leaves]
    fixed = tuple((i, leaf) for i, leaf in enumerate(leaves) if not is_array[i])
    arrays = [name for name, one in zip(names, is_array, strict=True) if one]
    if not any(summed(leaf) for leaf in leaves):
        raise MismatchError(f"The checkpoints have no floating leaf to combine; their leaves are {names[:5]}.")
    combined = [name for name, leaf in zip(names, leaves, strict=True) if summed(leaf)]
    group = dict(zip(combined, space.group_of(combined), strict=True))
    groups = tuple(group.get(name, 0) for name in arrays)
    form = Form(structure=structure, names=tuple(arrays), groups=groups, fixed=fixed)
    if lora is None or lora.space == "factors":
        return form
    shapes = [np.shape(leaf) for leaf, one in zip(leaves, is_array, strict=True) if one]
    pairs = tuple(_pairs(form, shapes, space.count, lora))
    return Form(structure=structure, names=form.names, groups=form.groups, fixed=fixed, pairs=pairs)


def names_of(tree: PyTree) -> list[str]:
    """The name of each leaf, in the order of ``jax.tree.leaves``, which sorts the keys of dicts."""
    names = {leaf.path: leaf.name for leaf in flatten(tree)[0]}
    return jax.tree.leaves(rebuild(tree, lambda path, _: names[path]))


def is_stacked(leaf: Any) -> bool:
    """Whether a leaf is an array for the objective; text and Python's integers are as in the last checkpoint."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) or type(leaf) is float


def summed(leaf: Any) -> bool:
    """Whether a leaf is combined; others are those of the last checkpoint."""
    return type(leaf) is float or (is_stacked(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact))


def merge(stacked: Sequence[jax.Array], coefficients: jax.Array, form: Form) -> list[jax.Array]:
    """Leaves [P, ...] of stacked leaves [K, ...] and coefficients [P, G, K]: sums in float32, rounded once.

    Leaves that are not floating come as [1, ...], those of the last checkpoint.
    """
    found = [weighted(leaf, coefficients[:, group]) for leaf, group in zip(stacked, form.groups, strict=True)]
    for pair in form.pairs:
        given = coefficients[:, form.groups[pair.left]]
        found[pair.left], found[pair.right] = product(stacked[pair.left], stacked[pair.right], given, pair.rank)
    return found


def weighted(leaf: jax.Array, weights: jax.Array) -> jax.Array:
    """[P, ...] of a leaf [K, ...] and weights [P, K]."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.broadcast_to(leaf[-1], (len(weights), *leaf.shape[1:]))
    wide = leaf if leaf.dtype in (jnp.float64, jnp.complex64, jnp.complex128) else leaf.astype(jnp.float32)
    return jnp.tensordot(weights.astype(wide.dtype), wide, 1, precision="highest").astype(leaf.dtype)


def product(left: Any, right: Any, weights: Any, rank: int | None) -> tuple[Any, Any]:
    """Factors [P, ..., d, R] and [P, ..., R, n] whose product is ``sum_k weights[p, k] left[k] @ right[k]``.

    Exact with R = K r for a rank of None; else the nearest of that rank (Eckart and Young 1936), found from the factors
    by two QR decompositions and one of singular values, never from a matrix [d, n]. Of numpy arrays in their own
    precision; of jax arrays in float32.
    """
    xp: Any = jnp if isinstance(left, jax.Array) else np
    dtype = left.dtype
    if xp is jnp:
        left, right, weights = (x.astype(jnp.float32) for x in (left, right, weights))
    wide = xp.moveaxis(left, 0, -2)  # [..., d, K, r]
    wide = wide.reshape(*wide.shape[:-2], -1)  # [..., d, K r]
    tall = xp.moveaxis(right, 0, -3)
    tall = tall.reshape(*tall.shape[:-3], -1, tall.shape[-1])  # [..., K r, n]
    each = xp.repeat(weights, left.shape[-1], axis=1)  # [P, K r]
    each = each.reshape(len(each), *[1] * (wide.ndim - 1), each.shape[1])  # [P, ..., 1, K r]
    if rank is None:
        return (wide[None] * each).astype(dtype), xp.broadcast_to(tall[None], (len(each), *tall.shape)).astype(dtype)
    turn = {"precision": "highest"} if xp is jnp else {}
    q1, r1 = xp.linalg.qr(wide)
    q2, r2 = xp.linalg.qr(xp.swapaxes(tall, -1, -2))
    core = xp.matmul(r1[None] * each, xp.swapaxes(r2, -1, -2)[None], **turn)
    u, s, v = xp.linalg.svd(core, full_matrices=False)
    kept = min(rank, s.shape[-1])
    root = xp.sqrt(s[..., :kept])
    new_left = xp.matmul(q1[None], u[..., :kept] * root[..., None, :], **turn)
    new_right = xp.matmul(root[..., :, None] * v[..., :kept, :], xp.swapaxes(q2, -1, -2)[None], **turn)
    if kept < rank:  # the form stays that of the checkpoints
        none = [(0, 0)] * (new_left.ndim - 2)
        new_left = xp.pad(new_left, [*none, (0, 0), (0, rank - kept)])
        new_right = xp.pad(new_right, [*none, (0, rank - kept), (0, 0)])
    return new_left.astype(dtype), new_right.astype(dtype)


def _pairs(form: Form, shapes: Sequence[tuple[int, ...]], count: int, lora: Lora) -> Iterator[Pair]:
    place = {name: i for i, name in enumerate(form.names)}
    seen = 0
    for name, left in place.items():
        wanted = next((b.replace("*", _text(name, a)) for a, b in lora.pairs if fnmatchcase(name, a)), None)
        if wanted is None:
            continue
        seen += 1
        right = place.get(wanted)
        if right is None:
            raise MismatchError(f'lora: "{name}" has no right factor "{wanted}"; there are {list(place)[:8]}.')
        a, b = shapes[left], shapes[right]
        if len(a) < 2 or len(a) != len(b) or a[-1] != b[-2] or a[:-2] != b[:-2]:
            raise MismatchError(
                f'lora: "{name}" is {list(a)} and "{wanted}" is {list(b)}; they are [..., d, r] and [..., r, n].'
            )
        if form.groups[left] != form.groups[right]:
            raise MismatchError(f'lora: "{name}" and "{wanted}" are in different groups of coefficients.')
        exact = lora.rank == "exact" or (isinstance(lora.rank, int) and lora.rank >= count * a[-1])
        yield Pair(left, right, None if exact else a[-1] if lora.rank == "same" else int(lora.rank))
    if not seen:
        raise MismatchError(f"lora: no leaf matches {[a for a, _ in lora.pairs]}; there are {list(place)[:8]}.")


def _text(name: str, glob: str) -> str:
    """What the * of a glob stands for."""
    before, _, after = glob.partition("*")
    return name[len(before) : len(name) - len(after)] if "*" in glob else ""
