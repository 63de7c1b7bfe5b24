"""The programs of a capture on TPU slices: copies where the state lies, copies to the host, and no collective."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxckpt.core.box import Box
from jaxckpt.transfer.in_step import with_capture
from jaxckpt.transfer.send import _packer
from tests.tpu.slices import SLICES, SMALL, compile_for_slice, devices, mesh

MIB = 1024 * 1024


@pytest.mark.parametrize("name", SLICES)
def test_clone_of_a_bucket_takes_the_memory_of_the_bucket(name: str) -> None:
    """Shards of this device alone, so that no device waits for another."""
    shapes = [(1024, 1024), (4096, 512), (2 * MIB,)] + [(64, 128)] * 100
    found, size_bytes = _pack(name, [(shape, jnp.bfloat16, None) for shape in shapes])
    assert not found.collectives
    assert found.argument_bytes >= size_bytes
    assert size_bytes <= found.output_bytes <= 1.02 * size_bytes
    assert found.temp_bytes <= 100 * 64 * 128 * 2 * 2, "more than the small shards are copied twice"


@pytest.mark.parametrize("name", SLICES)
def test_only_the_part_that_is_written_leaves_a_replicated_shard(name: str) -> None:
    """Data-parallel peers write different rows: each cuts its own out before the transfer."""
    part = Box((256, 0), (128, 8192))
    found, _ = _pack(name, [((2048, 8192), jnp.float32, part)])
    assert not found.collectives
    assert found.output_bytes == 128 * 8192 * 4
    assert found.temp_bytes < MIB


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.int8, jnp.bool_, jnp.float16, jnp.uint32, jnp.int4])
def test_every_dtype_can_be_packed(dtype: Any) -> None:
    found, _ = _pack(SMALL[0], [((32, 128), np.dtype(dtype), None), ((7,), np.dtype(dtype), None)])
    assert not found.collectives


@pytest.mark.parametrize("name", SLICES)
def test_a_step_that_captures_adds_copies_to_the_host_and_nothing_else(name: str) -> None:
    """The collectives of the step stay what they are; the old state arrives in pinned_host; the donation holds."""
    chips = len(devices(name))
    on = mesh(name, (chips // 4, 4), ("data", "model"))
    rows, both = NamedSharding(on, PartitionSpec("data")), NamedSharding(on, PartitionSpec("data", "model"))
    state = {k: jax.ShapeDtypeStruct((4096, 4096), jnp.float32, sharding=both) for k in ("w", "mu", "nu")}
    batch = jax.ShapeDtypeStruct((1024, 4096), jnp.float32, sharding=rows)

    def step(state: dict[str, jax.Array], x: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w - x) ** 2))(state["w"])
        mu, nu = 0.9 * state["mu"] + grad, 0.99 * state["nu"] + grad**2
        return {"w": state["w"] - 0.1 * mu * jax.lax.rsqrt(nu + 1e-8), "mu": mu, "nu": nu}, loss

    homes = {k: both for k in state}
    plain = jax.jit(step, donate_argnums=0, out_shardings=(homes, NamedSharding(on, PartitionSpec())))
    where = plain.lower(state, batch).compile().output_shardings
    capturing = with_capture(plain)._compile((both,) * 3, (True,) * 3, where)
    before, after = compile_for_slice(plain, state, batch), compile_for_slice(capturing, state, batch)
    shard_bytes = 3 * 4096 * 4096 * 4 // chips
    assert before.collectives
    assert sorted(after.collectives) == sorted(before.collectives)
    assert before.host_output_bytes == 0
    assert after.host_output_bytes == shard_bytes
    assert after.output_bytes == before.output_bytes
    assert after.temp_bytes + after.output_bytes - after.alias_bytes <= (
        before.temp_bytes + before.output_bytes - before.alias_bytes + shard_bytes
    ), "more than the old state beside the new one"


def _pack(name: str, forms: list[tuple[tuple[int, ...], Any, Box | None]]) -> tuple[Any, int]:
    """The compiled program for these shards on one device, and the bytes that they have."""
    home = SingleDeviceSharding(devices(name)[0])
    program, _ = _packer(tuple((shape, np.dtype(dtype), taken) for shape, dtype, taken in forms))
    shards = [jax.ShapeDtypeStruct(shape, dtype, sharding=home) for shape, dtype, _ in forms]
    sizes = [int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype, _ in forms]
    return compile_for_slice(program, shards), sum(sizes)
