"""The structure of a tree that has every leaf of several trees, or the leaves that all have."""

from collections.abc import Sequence

from jaxckpt.core.errors import MismatchError
from jaxckpt.core.tree import NONE, Node, path_name


def union(structures: Sequence[Node], path: tuple = ()) -> Node:
    """One record with the children of all. Leaf indices are those of the first that has the leaf.

    Containers that differ become dicts of all their keys.

    Raises:
        MismatchError: a path is a leaf in one and a container in another.
    """
    first = structures[0]
    if all(other == first for other in structures) or all(other.kind == "leaf" for other in structures):
        return first
    containers = [other for other in structures if other.kind not in ("leaf", "none")]
    if any(other.kind == "leaf" for other in structures):
        if containers:
            raise MismatchError(f'"{path_name(path)}" is a leaf in one source and a container in another.')
        return next(other for other in structures if other.kind == "leaf")
    if not containers:
        return first
    keys = dict.fromkeys(key for other in containers for key in other.keys)
    children = tuple(
        union([other.children[other.keys.index(key)] for other in containers if key in other.keys], (*path, key))
        for key in keys
    )
    alike = next((other for other in containers if other.keys == tuple(keys)), None)
    kind, type_name = (alike.kind, alike.type) if alike is not None else ("dict", "")
    return Node(kind=kind, type=type_name, keys=tuple(keys), children=children)


def common(structures: Sequence[Node]) -> Node:
    """The first record without the children that others lack; of lists of several lengths the shortest.

    A list or tuple stays one where its first children are left; otherwise it keeps their indices as a dict.
    """
    first = structures[0]
    if first.kind in ("leaf", "none") or all(other == first for other in structures):
        return first if all((other.kind == "leaf") == (first.kind == "leaf") for other in structures) else NONE
    texts = [{str(key): child for key, child in zip(one.keys, one.children, strict=True)} for one in structures]
    shared = {
        key: common([text[str(key)] for text in texts]) for key in first.keys if all(str(key) in text for text in texts)
    }
    # What has lost all its leaves is left out; None and empty containers are structure.
    left = {key: child for key, child in shared.items() if _has_leaf(child) or not _has_leaf(texts[0][str(key)])}
    keys, children = tuple(left), tuple(left.values())
    if len(keys) == len(first.keys):
        return Node(kind=first.kind, type=first.type, keys=keys, children=children)
    is_start = first.kind in ("list", "tuple") and keys == first.keys[: len(keys)]
    return Node(kind=first.kind if is_start or first.kind == "dict" else "dict", keys=keys, children=children)


def _has_leaf(node: Node) -> bool:
    return node.kind == "leaf" or any(map(_has_leaf, node.children))
