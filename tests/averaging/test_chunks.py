"""Stored chunks, ours and of other libraries, large and of several shapes: each is read and decoded once."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.averaging import cells, stream
from jaxckpt.averaging.average import average, average_opened
from jaxckpt.averaging.sources import open_sources
from jaxckpt.checkpoint.source import ForeignSource
from jaxckpt.core.events import Restored, subscribe
from tests.averaging.oracle import ulps, weighted

if TYPE_CHECKING:
    from pathlib import Path

    from jaxckpt.checkpoint.foreign import ForeignCheckpoint, ForeignLeaf
    from jaxckpt.core.box import Box

SIGNED = np.array([1.5, -1.25, 0.5])
SHAPE = (1200, 2048)  # 9.4 MiB in float32


class Counting:
    """A checkpoint of another library that counts how often each of its chunks is decoded."""

    def __init__(self, foreign: ForeignCheckpoint) -> None:
        self._foreign = foreign
        self.decoded: Counter[tuple[int, ...]] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._foreign, name)

    def read(self, leaf: ForeignLeaf, box: Box) -> np.ndarray:
        chunk = self._foreign.chunk_shape(leaf)
        ranges = [range(a // c, -(-(a + n) // c)) for a, n, c in zip(box.start, box.shape, chunk, strict=True)]
        self.decoded.update(
            tuple(r.start + i for r, i in zip(ranges, at, strict=True)) for at in np.ndindex(*map(len, ranges))
        )
        return self._foreign.read(leaf, box)


def mesh(rows: int) -> jax.sharding.Mesh:
    return jax.make_mesh((rows, jax.device_count() // rows), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def stack_of(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, *shape), np.float32).astype(dtype)


def save_orbax(folder: Path, stack: np.ndarray, sharding: Any = None) -> list[Path]:
    for k, value in enumerate(stack):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / f"{k}", {"w": jax.device_put(jnp.asarray(value), sharding)})
    return [folder / f"{k}" for k in range(len(stack))]


@pytest.mark.parametrize("alone", [0, stream.ALONE_BYTES])
@pytest.mark.parametrize("like", ["host", "one device", "rows", "columns", "tiles"])
@pytest.mark.parametrize("saved", ["whole", "sharded"])
def test_a_chunk_of_orbax_is_decoded_once(
    tmp_path: Path, saved: str, like: str, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "ALONE_BYTES", alone)
    monkeypatch.setattr(cells, "LARGEST_CELL_BYTES", 1024 * 1024)
    stack = stack_of(SHAPE)
    paths = save_orbax(tmp_path, stack, NamedSharding(mesh(8), P("a")) if saved == "sharded" else None)
    sources = open_sources(paths, None, None)
    counters = []
    for source in sources:
        assert isinstance(source, ForeignSource)
        counters.append(Counting(source.foreign))
        source.foreign = counters[-1]  # type: ignore[assignment]
    place = {
        "one device": jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        "rows": NamedSharding(mesh(8), P("a")),
        "columns": NamedSharding(mesh(8), P(None, "a")),
        "tiles": NamedSharding(mesh(2), P("b", "a")),
    }.get(like)
    wanted = np.zeros(SHAPE, np.float32) if like == "host" else jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=place)
    found = average_opened(sources, SIGNED, like={"w": wanted}, where="host")["w"]
    assert ulps(found, weighted(stack, SIGNED)) <= 1
    for counter in counters:
        assert len(counter.decoded) == (8 if saved == "sharded" else 1)
        assert set(counter.decoded.values()) == {1}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_chunks_of_ours_and_of_orbax_mix(tmp_path: Path, dtype: Any) -> None:
    stack = stack_of((2400, 2048), dtype)
    paths: list[Any] = save_orbax(tmp_path, stack)
    jc.save(tmp_path / "ours", {"w": stack[1]})
    weights = np.stack([SIGNED, SIGNED[::-1]])
    events: list[Any] = []
    stop = subscribe(events.append)
    found = average([tmp_path / "ours", paths[0], {"w": stack[2]}], weights)
    stop()
    for p in range(2):
        assert ulps(found[p]["w"], weighted(stack[[1, 0, 2]], weights[p])) <= 1
    read = {event.path: event.read_bytes for event in events if isinstance(event, Restored)}
    assert read[f"file://{paths[0]}/"] == stack[0].nbytes
    assert read[f"file://{tmp_path}/ours/"] < 1.01 * stack[0].nbytes


def test_our_chunks_of_two_meshes_are_read_once(tmp_path: Path) -> None:
    stack = stack_of((2048, 2048))
    for k, spec in enumerate([P("a", "b"), P("b", "a"), P(None, "b")]):
        jc.save(tmp_path / f"{k}", {"w": jax.device_put(stack[k], NamedSharding(mesh(4), spec))})
    events: list[Any] = []
    stop = subscribe(events.append)
    found = average([tmp_path / f"{k}" for k in range(3)], SIGNED, like={"w": np.zeros(SHAPE[1:] * 2, np.float32)})
    stop()
    assert ulps(found["w"], weighted(stack, SIGNED)) <= 1
    assert sum(event.read_bytes for event in events if isinstance(event, Restored)) < 1.02 * stack.nbytes
