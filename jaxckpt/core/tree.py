"""Trees: nested containers to named leaves and back, with the types of every key and node on record.

JAX's own flattening sorts dictionary keys and so refuses ``{1: ..., "a": ...}``; this one keeps every key as it is.
"""

import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

PyTree = Any
Path = tuple[Hashable, ...]  # keys from the root: str and int told apart; ("layers", 0, "kernel")


class NamedLeaf(NamedTuple):
    """A leaf with its place in the tree."""

    name: str  # unique; "layers.0.kernel"
    path: Path
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What one container of a saved tree was: enough to rebuild it, or to tell how it differs.

    ``kind`` is "dict", "list", "tuple", "namedtuple", "node" (any other registered pytree), "none" or "leaf".
    """

    kind: str
    type: str = ""  # "module:qualname" of namedtuples and other nodes, and of dict subclasses
    keys: tuple[Hashable, ...] = ()
    children: tuple["Node", ...] = ()
    leaf: int = -1  # index of the leaf


LEAF_KINDS = ("leaf", "none")
NONE = Node(kind="none")


def flatten(tree: PyTree) -> tuple[list[NamedLeaf], Node]:
    """All leaves of a tree in order, and the record of its structure.

    ``None`` and empty containers are structure, not leaves. Names are the path joined by dots, as Orbax names
    parameters; where two paths would get one name (``{"a.b": x, "a": {"b": y}}`` or ``{1: x, "1": y}``) the later
    ones get a suffix ``~2``, ``~3``...

    Example:
        >>> leaves, structure = flatten({"w": 1.0, "b": [2, None]})
        >>> [leaf.name for leaf in leaves]
        ['w', 'b.0']
    """
    found: list[tuple[Path, Any]] = []
    structure = _record(tree, (), found)
    names = [".".join(map(str, path)) for path, _ in found]
    if len(set(names)) != len(names):
        names = _distinct(names)
    return [NamedLeaf(name, path, value) for name, (path, value) in zip(names, found, strict=True)], structure


def children_of(tree: PyTree) -> tuple[str, str, tuple[Hashable, ...], list[Any]] | None:
    """(kind, type name, keys, children) of one container; None when ``tree`` is a leaf."""
    kind = type(tree)
    if kind is dict:
        return "dict", "", tuple(tree), list(tree.values())
    if kind is list or kind is tuple:
        return kind.__name__, "", tuple(range(len(tree))), list(tree)
    if tree is None:
        return "none", "", (), []
    if kind in _PLAIN_LEAVES or isinstance(tree, jax.Array):
        return None
    if kind in (OrderedDict, defaultdict):
        return "dict", _type_name(kind), tuple(tree), list(tree.values())
    fields = getattr(kind, "_fields", None)
    if fields is not None and isinstance(tree, tuple):
        return "namedtuple", _type_name(kind), tuple(fields), list(tree)
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if treedef == _LEAF:
        return None
    return "node", _type_name(kind), tuple(_key(path[0]) for path, _ in pairs), [child for _, child in pairs]


def rebuild(like: PyTree, leaf: Callable[[Path, Any], Any], path: Path = ()) -> PyTree:
    """A tree of the same containers as ``like`` with every leaf replaced by ``leaf(path, old leaf)``."""
    kind = type(like)
    if kind is dict:
        return {k: rebuild(v, leaf, (*path, k)) for k, v in like.items()}
    if kind is list or kind is tuple:
        return kind(rebuild(v, leaf, (*path, i)) for i, v in enumerate(like))
    below = children_of(like)
    if below is None:
        return leaf(path, like)
    shape, _, keys, children = below
    if shape == "none":
        return None
    new = [rebuild(child, leaf, (*path, key)) for key, child in zip(keys, children, strict=True)]
    if kind is OrderedDict:
        return OrderedDict(zip(keys, new, strict=True))
    if kind is defaultdict:
        return defaultdict(like.default_factory, zip(keys, new, strict=True))
    if shape == "namedtuple":
        return kind(*new)
    return jax.tree_util.tree_structure(like, is_leaf=lambda x: x is not like).unflatten(new)


def build(structure: Node, leaves: Callable[[int], Any]) -> PyTree:
    """A tree from its record alone, without an example.

    Types are never imported: a namedtuple or a plain registered dataclass is rebuilt only where its module is loaded
    already and its fields are the same; any other registered node becomes a dict of its children.
    """
    if structure.kind == "leaf":
        return leaves(structure.leaf)
    if structure.kind == "none":
        return None
    new = [build(child, leaves) for child in structure.children]
    if structure.kind == "list":
        return new
    if structure.kind == "tuple":
        return tuple(new)
    if structure.kind == "dict":
        pairs = zip(structure.keys, new, strict=True)
        return OrderedDict(pairs) if structure.type == _type_name(OrderedDict) else dict(pairs)
    return _build_typed(structure, new)


def walk(structure: Node, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """All nodes of a record with their paths, parents first."""
    yield path, structure
    for key, child in zip(structure.keys, structure.children, strict=True):
        yield from walk(child, (*path, key))


def leaf_paths(structure: Node) -> list[Path]:
    """The path of every leaf, at the position of its leaf index; a tied leaf gives its first path."""
    found: dict[int, Path] = {}
    for path, node in walk(structure):
        if node.kind == "leaf":
            found.setdefault(node.leaf, path)
    return [found[index] for index in sorted(found)]


def path_name(path: Path) -> str:
    """A path as people write it: ``("layers", 0, "kernel")`` is ``layers.0.kernel``."""
    return ".".join(map(str, path))


def map_leaves(structure: Node, index: Callable[[int], int]) -> Node:
    """The same record with other leaf indices (tied leaves share one)."""
    if structure.kind == "leaf":
        return Node(kind="leaf", leaf=index(structure.leaf))
    if not structure.children:
        return structure
    return Node(
        kind=structure.kind,
        type=structure.type,
        keys=structure.keys,
        children=tuple(map_leaves(child, index) for child in structure.children),
    )


def _record(tree: PyTree, path: Path, found: list[tuple[Path, Any]]) -> Node:
    below = children_of(tree)
    if below is None:
        found.append((path, tree))
        return Node(kind="leaf", leaf=len(found) - 1)
    kind, type_name, keys, children = below
    if kind == "none":
        return NONE
    return Node(
        kind=kind,
        type=type_name,
        keys=keys,
        children=tuple([_record(child, (*path, key), found) for key, child in zip(keys, children, strict=True)]),
    )


def _distinct(names: list[str]) -> list[str]:
    names, taken, seen = list(names), set(names), Counter()
    for i, name in enumerate(names):
        seen[name] += 1
        if seen[name] > 1:
            count = seen[name]
            while f"{name}~{count}" in taken:
                count += 1
            names[i] = f"{name}~{count}"
            taken.add(names[i])
    return names


def _key(entry: Any) -> Hashable:
    if isinstance(entry, DictKey | FlattenedIndexKey):
        return entry.key
    if isinstance(entry, SequenceKey):
        return entry.idx
    if isinstance(entry, GetAttrKey):
        return entry.name
    # Some libraries bring key classes of their own with one of these attributes.
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)


def _type_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _build_typed(structure: Node, new: list[Any]) -> PyTree:
    plain = dict(zip(structure.keys, new, strict=True))
    found = _loaded_type(structure.type)
    if found is None:
        return plain
    if structure.kind == "namedtuple":
        same = issubclass(found, tuple) and tuple(getattr(found, "_fields", ())) == structure.keys
        return found(*new) if same else plain
    if hasattr(found, "__dataclass_fields__") and set(found.__dataclass_fields__) == set(structure.keys):
        return found(**{str(k): v for k, v in plain.items()})
    return plain


def _loaded_type(name: str) -> type | None:
    # sys.modules only: a file must not be able to make this process import anything.
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


_LEAF = jax.tree_util.tree_structure(0)
_PLAIN_LEAVES = {int, float, bool, complex, str, bytes, np.ndarray}
