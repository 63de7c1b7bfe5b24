"""Who needs which chunks in a restore: the sparse answer is the one that a table of chunks and processes gives."""

from itertools import product
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jaxckpt.core.box import Box
from jaxckpt.plan.restore import Groups, sharing
from jaxckpt.plan.save import chunks_of_box
from jaxckpt.plan.shards import layout_of

MESH = AbstractMesh((2, 3, 2), ("a", "b", "c"))
SPECS = [(), ("a",), ("b",), (None, "c"), ("a", "b"), ("c", "a"), (("a", "c"),), (None, ("b", "a")), (("c", "b"), "a")]
Form = tuple[NamedSharding, tuple[int, ...]]


def dense(wanted: tuple[Form, ...], shape: tuple[int, ...], chunk: tuple[int, ...], processes: int) -> np.ndarray:
    grid = tuple(-(-n // c) for n, c in zip(shape, chunk, strict=True))
    needs = np.zeros((int(np.prod(grid)), processes), bool)
    for sharding, target_shape in wanted:
        layout = layout_of(sharding, target_shape)
        for low, high, holders in zip(layout.lo, layout.hi, layout.holders, strict=True):
            lo, hi = np.minimum(low, shape), np.minimum(high, shape)
            touched = chunks_of_box(Box(tuple(lo.tolist()), tuple((hi - lo).tolist())), chunk, grid)
            needs[np.ix_(touched, holders[holders >= 0])] = True
    return needs


def dense_groups(needs: np.ndarray) -> Groups:
    """Components by the closure of "shares a chunk with"."""
    processes = needs.shape[1]
    shared = needs[needs.sum(axis=1) > 1].astype(int)
    together = (shared.T @ shared + np.eye(processes, dtype=int)) > 0
    for _ in range(processes):
        together = (together.astype(int) @ together.astype(int)) > 0
    groups = tuple(sorted({tuple(np.nonzero(row)[0].tolist()) for row in together}))
    equal = len(shared) and len({len(group) for group in groups}) == 1
    return groups if equal else (tuple(range(processes)),)


def check(wanted: tuple[Form, ...], shape: tuple[int, ...], chunk: tuple[int, ...]) -> None:
    needs, found = dense(wanted, shape, chunk, 12), sharing(wanted, shape, chunk, 12)
    assert (found.needs == needs).all()
    assert found.groups == dense_groups(needs)
    count = needs.sum(axis=1)
    for rank in range(12):
        assert found.alone(rank) == np.nonzero(needs[:, rank] & (count == 1))[0].tolist()
    assert found.shared() == [(i, tuple(np.nonzero(needs[i])[0].tolist())) for i in np.nonzero(count > 1)[0].tolist()]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_sharing_is_what_a_table_of_chunks_and_processes_says(data: Any) -> None:
    shape = tuple(12 * n for n in data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3))))
    chunk = tuple(data.draw(st.integers(1, n + 3)) for n in shape)
    forms = []
    for _ in range(data.draw(st.integers(1, 3))):
        # Wanted shapes may be larger or smaller than the stored one.
        wanted = tuple(12 * n for n in data.draw(st.tuples(st.integers(0, 4), st.integers(1, 4))))
        forms.append((NamedSharding(MESH, PartitionSpec(*data.draw(st.sampled_from(SPECS)))), wanted))
    check(tuple(forms), shape, chunk)


def test_every_pair_of_specs_on_chunks_of_the_first() -> None:
    for one, other in product(SPECS, SPECS):
        shape = (24, 24)
        saved = layout_of(NamedSharding(MESH, PartitionSpec(*one)), shape)
        check(((NamedSharding(MESH, PartitionSpec(*other)), shape),), shape, saved.cell)


def test_scalars_are_needed_by_all() -> None:
    check(((NamedSharding(MESH, PartitionSpec()), ()),), (), ())


def test_a_chain_of_neighbours_is_one_group() -> None:
    """Chunks that straddle the border of two parts join each process to the next."""
    mesh = AbstractMesh((12,), ("x",))
    check(((NamedSharding(mesh, PartitionSpec("x")), (48,)),), (48,), (3,))
