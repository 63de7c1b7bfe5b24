"""The structure of a tree that has every leaf of several trees."""

from collections.abc import Sequence

from jaxckpt.core.errors import MismatchError
from jaxckpt.core.tree import Node, path_name


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
