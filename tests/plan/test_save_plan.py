"""The plan of a save: every element once, within one process's box, evenly, and the same on every process."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt.core.box import Box, cell_box, contains
from jaxckpt.plan.chunks import ChunkRule
from jaxckpt.plan.save import ArraySpec, plan_save
from jaxckpt.plan.shards import layout_of
from jaxckpt.testing.strategies import array_specs, meshes

RULES = [ChunkRule(), ChunkRule(smallest=16, largest=64, ceiling=128), ChunkRule(smallest=1, largest=8, ceiling=8)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_element_is_written_once_by_a_process_that_holds_it(data: Any) -> None:
    mesh = data.draw(meshes())
    specs = data.draw(st.lists(array_specs(mesh), min_size=1, max_size=4))
    per_process = data.draw(st.sampled_from([n for n in (1, 2, 4, 8) if mesh.size % n == 0]))
    processes, rule = mesh.size // per_process, data.draw(st.sampled_from(RULES))
    plans = [
        plan_save(specs, rank=rank, processes=processes, devices_per_process=per_process, rule=rule)
        for rank in range(processes)
    ]
    for plan in plans[1:]:
        assert (plan.chunks, plan.grids) == (plans[0].chunks, plans[0].grids)
        assert plan.load_bytes.tolist() == plans[0].load_bytes.tolist()
    for i, spec in enumerate(specs):
        written = np.zeros(spec.shape, np.int32)
        layout = layout_of(spec.sharding, spec.shape, devices_per_process=per_process)
        for rank, plan in enumerate(plans):
            held: list[Box] = layout.boxes_of(rank)
            for place in plan.mine[i].tolist():
                index = np.unravel_index(place, plan.grids[i]) if plan.grids[i] else ()
                box = cell_box(tuple(int(n) for n in index), plan.chunks[i], spec.shape)
                assert any(contains(outer, box) for outer in held)
                written[box.slices()] += 1
        assert (written == 1).all()


@pytest.mark.parametrize("processes", [2, 3, 4, 7, 16, 64])
@pytest.mark.parametrize("sizes", [[(1000, 130)], [(512, 512), (43, 31), (7,)], [(64, 64)] * 5, [(4096, 1024)] * 3])
def test_replicated_leaves_are_shared_evenly(processes: int, sizes: list[tuple[int, ...]]) -> None:
    sharding = NamedSharding(AbstractMesh((processes,), ("x",)), P())
    specs = [ArraySpec(shape=shape, itemsize=4, sharding=sharding) for shape in sizes]
    total = sum(math.prod(shape) * 4 for shape in sizes)
    load = plan_save(specs, processes=processes).load_bytes
    # No leaf is cut into pieces below 1 KiB, so a share of hardly more cannot be even.
    assert load.max() / load.mean() <= (1.05 if total // processes >= 4096 else 2)
