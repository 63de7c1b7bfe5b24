"""Shards on their way to the host: packed, cut and copied on the device, and the same elements when they arrive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxckpt.core.box import Box, whole
from jaxckpt.transfer.send import PACKED_BYTES, Part, gather, pieces_of, pinned

LARGE = (PACKED_BYTES // 4, 2)


def part(leaf: int, data: jax.Array, wanted: Box | None = None) -> Part:
    box = whole(data.shape)
    return Part(leaf, box, data, wanted or box)


def landed(parts: list[Part], *, copies: bool) -> dict[int, tuple[Box, np.ndarray]]:
    found = {}
    for one in pinned(gather(parts, copies=copies)):
        for leaf, piece in pieces_of(one, np.asarray(one.data)):
            found[leaf] = (piece.box, piece.data)
    return found


@pytest.mark.parametrize("copies", [False, True])
def test_many_small_shards_of_any_dtype_arrive_as_they_were(copies: bool) -> None:
    dtypes = ["float32", "bfloat16", "bool", "int8", "int4", "complex64", "float8_e4m3fn"]
    data = [jnp.asarray(np.arange(k % 7 + 1) % 2, jnp.dtype(dtypes[k % len(dtypes)])) for k in range(600)]
    found = landed([part(k, x) for k, x in enumerate(data)], copies=copies)
    assert sorted(found) == list(range(600))
    for k, x in enumerate(data):
        box, there = found[k]
        assert box == whole(x.shape)
        assert there.dtype == x.dtype
        assert there.tobytes() == np.asarray(x).tobytes()


def test_few_transfers_carry_many_small_shards() -> None:
    assert len(gather([part(k, jnp.full(4, k)) for k in range(500)], copies=False)) == 2


@pytest.mark.parametrize("shape", [(8, 6), LARGE])
def test_only_what_is_wanted_of_a_shard_is_moved(shape: tuple[int, int]) -> None:
    data = jnp.arange(shape[0] * shape[1], dtype=jnp.float32).reshape(shape)
    box = Box((100, 0), shape)  # of the shard, in an array that is larger
    wanted = Box((100 + shape[0] // 2, 1), (shape[0] // 4, 1))
    sent = gather([Part(0, box, data, wanted)], copies=False)
    assert sum(one.data.nbytes for one in sent) == wanted.size * 4
    ((_, piece),) = pieces_of(sent[0], np.asarray(sent[0].data))
    assert piece.box == wanted
    assert piece.data.tolist() == np.asarray(data)[shape[0] // 2 : shape[0] // 2 + shape[0] // 4, 1:2].tolist()


@pytest.mark.parametrize("size", [10, PACKED_BYTES])
def test_copies_share_no_memory_with_their_sources(size: int) -> None:
    data = jax.jit(lambda: jnp.arange(size, dtype=jnp.float32))()
    (one,) = gather([part(0, data)], copies=True)
    assert one.data.unsafe_buffer_pointer() != data.unsafe_buffer_pointer()


def test_large_shards_are_moved_from_where_they_lie() -> None:
    data = jnp.zeros(LARGE)
    (one,) = gather([part(0, data)], copies=False)
    assert one.data is data
