"""Sum leaves on the devices they are wanted on: one jitted, donating multiply-add per leaf and source.

For accelerators, and for leaves that live on several processes: every stored byte is read once over all of them. While
the devices add the leaves of one source, those of the next are read.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxckpt.averaging.kernel import add_terms, along, finish, split_weights
from jaxckpt.averaging.plan import Sum
from jaxckpt.averaging.reading import Want
from jaxckpt.averaging.sources import arrays_of
from jaxckpt.checkpoint.source import Source
from jaxckpt.core.errors import CheckpointError

BUCKET_BYTES = 32 * 1024 * 1024  # of one source, on this process


def mesh_sums(
    sources: Sequence[Source], sums: Sequence[Sum], *, how: str
) -> tuple[list[list[jax.Array]], dict[int, int]]:
    """P arrays of each sum, and the bytes read by source. All processes of a job call it together."""
    results: list[list[jax.Array]] = []
    read_bytes: dict[int, int] = {}
    with jax.enable_x64(True):  # float64 sources and accumulators; the dtypes of results are said
        for bucket in _buckets(sums):
            totals: list[Any] = [None] * len(bucket)
            for k in sorted({source for one in bucket for source in one.sources}):
                using = [i for i, one in enumerate(bucket) if k in one.sources]
                places = {i: bucket[i].sources.index(k) for i in using}
                wants = [Want(leaf=bucket[i].leaves[places[i]], sharding=bucket[i].want.sharding) for i in using]
                try:
                    values, more = arrays_of(sources[k], wants)
                except CheckpointError as error:
                    error.add_note(f"While averaging {sources[k].url}, source {k} of {len(sources)}.")
                    raise
                read_bytes[k] = read_bytes.get(k, 0) + more
                for i, value in zip(using, values, strict=True):
                    parts = split_weights(bucket[i].weights[:, places[i], None])
                    add = _start if totals[i] is None else _add
                    used = not bucket[i].weights.all()  # each of P results has sources of its own
                    program = add(bucket[i].want.sharding, how, used=used)
                    totals[i] = program(value, parts) if totals[i] is None else program(value, parts, totals[i])
                del values
            results += [_finish(one.want.sharding, one.dtype)(total) for one, total in zip(bucket, totals, strict=True)]
            del totals
    return results, read_bytes


def _buckets(sums: Sequence[Sum]) -> Iterator[list[Sum]]:
    """All processes cut alike: by the size of whole leaves over the devices that share them."""
    bucket: list[Sum] = []
    size = 0
    for one in sums:
        bucket.append(one)
        assert one.want.sharding is not None
        part = math.prod(one.want.sharding.shard_shape(one.shape)) if one.shape else 1
        size += part * max(dtype.itemsize for dtype in one.dtypes) * len(jax.local_devices())
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


@lru_cache(maxsize=256)
def _start(sharding: Sharding, how: str, *, used: bool = False) -> Any:
    return jax.jit(
        lambda value, parts: _terms(value, parts, None, how, used=used), out_shardings=stacked_sharding(sharding)
    )


@lru_cache(maxsize=256)
def _add(sharding: Sharding, how: str, *, used: bool = False) -> Any:
    return jax.jit(
        lambda value, parts, total: _terms(value, parts, total, how, used=used),
        out_shardings=stacked_sharding(sharding),
        donate_argnums=2,
    )


@lru_cache(maxsize=256)
def _finish(sharding: Sharding, dtype: Any) -> Any:
    def finished(totals: list[Any]) -> list[jax.Array]:
        if jnp.issubdtype(dtype, jnp.complexfloating):
            real, *imaginary = (finish(total, jnp.finfo(dtype).dtype) for total in totals)
            found = jax.lax.complex(real, imaginary[0] if imaginary else jnp.zeros_like(real))
        else:
            found = finish(totals[0], dtype)
        return [found[p] for p in range(found.shape[0])]

    return jax.jit(finished, out_shardings=sharding)


def stacked_sharding(sharding: Sharding) -> Sharding | None:
    """Of several arrays with this sharding, stacked on a new first axis; None where XLA may choose."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec), memory_kind=sharding.memory_kind)
    return sharding if isinstance(sharding, SingleDeviceSharding) else None


def _terms(value: jax.Array, parts: Any, total: Any, how: str, *, used: bool) -> list[Any]:
    """P sums [P, ...] of the value, or of its real and of its imaginary part."""
    is_complex = jnp.issubdtype(value.dtype, jnp.complexfloating)
    halves = [jnp.real(value), jnp.imag(value)] if is_complex else [value]
    before = [None] * len(halves) if total is None else total
    parts = along(parts, value.ndim)
    return [add_terms(old, [half[None]], parts, how=how, used=used) for half, old in zip(halves, before, strict=True)]
