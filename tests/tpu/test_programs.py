"""Every device program of ours compiles for v5e, v5p and v6e slices, with the collectives and the memory it should."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxckpt.checkpoint.exchange import ROUND_BYTES, exchange_program
from jaxckpt.checkpoint.fingerprint import sums_program
from jaxckpt.plan.restore import sharing
from tests.tpu.slices import LARGE, SLICES, Compiled, compile_for_slice, devices, mesh, processes

MIB = 1024 * 1024
PLACES = 4  # devices of a process


@pytest.mark.parametrize("name", SLICES)
def test_exchange_of_a_data_parallel_state_is_one_all_gather(name: str) -> None:
    """Every process needs all: each brings what it read, and gets what all others read, once per process."""
    hosts = processes(name)
    replicated = NamedSharding(mesh(name, (len(devices(name)),), ("data",)), PartitionSpec())
    plan = sharing(((replicated, (1024, 1024)),), (1024, 1024), (128, 1024), hosts)
    assert plan.needs.all()
    assert plan.groups == (tuple(range(hosts)),)
    _assert_one_all_gather(_exchange(name, plan.groups, ROUND_BYTES // 4), hosts, ROUND_BYTES // 4)


@pytest.mark.parametrize("name", SLICES)
def test_exchange_of_a_state_sharded_within_replicas_stays_in_groups(name: str) -> None:
    """Two replicas of an FSDP state: only the two processes that hold the same shards exchange them."""
    hosts, chips = processes(name), len(devices(name))
    sharded = NamedSharding(mesh(name, (2, chips // 2), ("data", "fsdp")), PartitionSpec("fsdp"))
    plan = sharing(((sharded, (4096, 64)),), (4096, 64), (4096 // (chips // 2), 64), hosts)
    assert plan.groups == tuple((i, i + hosts // 2) for i in range(hosts // 2))
    _assert_one_all_gather(_exchange(name, plan.groups, ROUND_BYTES), 2, ROUND_BYTES)


@pytest.mark.parametrize("name", SLICES)
def test_processes_tell_each_other_of_errors_by_one_small_collective(name: str) -> None:
    """1 KiB per process: XLA makes one sum of so small a gather."""
    hosts = processes(name)
    found = _exchange(name, (tuple(range(hosts)),), 1024)
    assert [c.kind in ("all-gather", "all-reduce") for c in found.collectives] == [True], found.collectives
    assert found.output_bytes == hosts * 1024 // PLACES


@pytest.mark.parametrize("name", SLICES)
def test_fingerprints_sum_a_few_words_and_gather_nothing(name: str) -> None:
    chips = len(devices(name))
    on = mesh(name, (chips // 4, 4), ("data", "model"))
    specs = {
        "w": (jnp.bfloat16, (8192, 8192), PartitionSpec("data", "model")),
        "column": (jnp.float32, (8192, 4096), PartitionSpec(None, "model")),
        "replica": (jnp.float32, (2048, 1024), PartitionSpec()),
        "narrow": (jnp.float8_e4m3fn, (4096, 1024), PartitionSpec(("data", "model"))),
        "packed": (jnp.int4, (4096, 1024), PartitionSpec("data")),
        "flags": (jnp.bool_, (4096,), PartitionSpec("model")),
        "step": (jnp.int32, (), PartitionSpec()),
    }
    leaves = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(on, spec)) for dtype, shape, spec in specs.values()
    ]
    found = compile_for_slice(sums_program(tuple(on.devices.flat)), leaves)
    assert {c.kind for c in found.collectives} == {"all-reduce"}
    # Two sums of each leaf; XLA may take a few at once, and pads nothing.
    assert sum(c.size_bytes for c in found.collectives) <= 2 * 4 * len(leaves)
    assert found.temp_bytes < MIB, "a leaf is copied"
    assert found.output_bytes <= 4096


@pytest.mark.parametrize("name", LARGE)
def test_a_large_leaf_has_a_fingerprint_without_a_copy_of_it(name: str) -> None:
    """More than 2**32 elements, so that places take two words."""
    chips = len(devices(name))
    on = mesh(name, (chips,), ("data",))
    leaf = jax.ShapeDtypeStruct((1 << 18, 1 << 15), jnp.bfloat16, sharding=NamedSharding(on, PartitionSpec("data")))
    found = compile_for_slice(sums_program(tuple(on.devices.flat)), [leaf])
    assert [(c.kind, c.size_bytes <= 8) for c in found.collectives] == [("all-reduce", True)]
    assert found.temp_bytes < MIB


def _exchange(name: str, groups: tuple[tuple[int, ...], ...], size_bytes: int) -> Compiled:
    """The program in which every process brings so many bytes."""
    sharding, program = exchange_program(devices(name), groups)
    words = jax.ShapeDtypeStruct((processes(name) * size_bytes // 4,), jnp.uint32, sharding=sharding)
    return compile_for_slice(program, words)


def _assert_one_all_gather(found: Compiled, members: int, size_bytes: int) -> None:
    """Each of the devices of a process carries its part of ``size_bytes`` to ``members`` processes."""
    received = members * size_bytes // PLACES
    assert [(c.kind, c.size_bytes) for c in found.collectives] == [("all-gather", received)]
    assert found.argument_bytes == size_bytes // PLACES
    assert found.output_bytes == received
    assert found.temp_bytes <= received
