"""Trees: what is taken apart is put together again, and names are unique."""

from typing import Any

from hypothesis import given, settings

from jaxckpt.core.tree import build, flatten, leaf_paths, rebuild
from jaxckpt.testing.strategies import trees


@settings(max_examples=150, deadline=None)
@given(trees())
def test_flatten_and_build_are_inverse(tree: Any) -> None:
    leaves, structure = flatten(tree)
    assert repr(build(structure, lambda i: leaves[i].value)) == repr(tree)
    assert repr(rebuild(tree, lambda path, old: old)) == repr(tree)
    assert leaf_paths(structure) == [leaf.path for leaf in leaves]
    assert len({leaf.name for leaf in leaves}) == len(leaves)
