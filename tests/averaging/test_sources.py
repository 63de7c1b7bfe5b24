"""Where averages read from: functions of states, other libraries' checkpoints, damaged files, errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxckpt as jc
from jaxckpt.averaging import stream
from jaxckpt.averaging.average import average, average_opened
from jaxckpt.averaging.sources import open_sources
from jaxckpt.core.events import Restored, subscribe
from tests.averaging.oracle import ulps, weighted

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("where", ["host", "device"])
def test_eval_params_maps_states_to_the_point_to_average(tmp_path: Path, where: Any) -> None:
    rng = np.random.default_rng(0)
    y, z = rng.standard_normal((2, 3, 64, 4), np.float32)
    for k in range(3):
        jc.save(
            tmp_path / f"{k}",
            {
                "params": {"w": jnp.asarray(y[k])},
                "opt": {"z": {"w": jnp.asarray(z[k])}, "b1": 0.9, "ema": [jnp.asarray(z[k])]},
            },
        )
    paths = [tmp_path / f"{k}" for k in range(3)]
    like = lambda name, spec: jax.sharding.SingleDeviceSharding(jax.devices()[2])  # noqa: E731

    def schedule_free(state: dict) -> dict:
        b1 = state["opt"]["b1"]
        return jax.tree.map(lambda a, b: (a - (1 - b1) * b) / b1, state["params"], state["opt"]["z"])

    found = average(paths, [2, -2, 1], eval_params=schedule_free, like=like, where=where)
    x = np.stack([np.asarray((y[k] - np.float32(1 - 0.9) * z[k]) / np.float32(0.9)) for k in range(3)])
    np.testing.assert_allclose(found["w"], weighted(x, np.array([2, -2, 1])), rtol=1e-5, atol=1e-6)
    events: list[Any] = []
    stop = subscribe(events.append)
    found = average(paths, [2, -2, 1], eval_params=lambda state: state["opt"]["ema"], like=like, where=where)
    stop()
    assert ulps(found[0], weighted(z, np.array([2, -2, 1]))) <= 1
    assert sum(e.read_bytes for e in events if isinstance(e, Restored)) < 1.1 * z.nbytes + 3000


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("is_stored", [False, True])
def test_eval_params_computes_as_its_caller_would(tmp_path: Path, where: Any, x64: bool, is_stored: bool) -> None:
    """Sums are made with x64 on, in threads of their own; the function's dtypes are those that the caller has."""
    trees = [{"w": np.full(3, 1.0 + k, np.float32), "n": np.arange(3), "d": np.full(3, 0.5)} for k in range(2)]
    sources: list[Any] = trees
    if is_stored:
        sources = [tmp_path / f"{k}" for k in range(2)]
        for path, tree in zip(sources, trees, strict=True):
            jc.save(path, tree)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])

    def halved(state: dict) -> dict:
        return {"w": state["w"] * 0.5, "m": jnp.mean(state["n"]) * jnp.linspace(0, 2, 3), "d": state["d"] * 2}

    with jax.enable_x64(x64):
        like = (lambda name, spec: place) if where == "device" else None
        found = average(sources, eval_params=halved, where=where, like=like)
        assert np.asarray(found["w"]).tolist() == [0.75] * 3
        assert np.asarray(found["m"]).tolist() == [0, 1, 2]
        assert np.asarray(found["d"]).tolist() == [1.0] * 3
        for name, leaf in jax.eval_shape(halved, trees[0]).items():
            assert found[name].dtype == leaf.dtype


class Failing:
    """A source whose leaves cannot be read; counts how often it was asked."""

    asked = 0

    def __init__(self, source: Any, fails: bool) -> None:
        self._source, self._fails = source, fails

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def fill(self, targets: Any) -> int:
        Failing.asked += 1
        if self._fails:
            raise jc.CorruptionError("a bit is wrong")
        return self._source.fill(targets)


def test_nothing_more_is_read_after_an_error() -> None:
    trees = [{f"{i}": np.ones(300_000, np.float32) for i in range(20)} for _ in range(10)]
    sources: Any = [Failing(source, k == 0) for k, source in enumerate(open_sources(trees, None, None))]
    Failing.asked = 0
    with pytest.raises(jc.CorruptionError, match="a bit is wrong") as caught:
        average_opened(sources, None)
    assert any("source 0 of 10" in note for note in caught.value.__notes__)
    assert Failing.asked <= 4 * stream.WORKERS


def test_checkpoints_of_orbax_are_averaged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stack = rng.standard_normal((3, 600, 40), np.float32)
    for k in range(3):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / f"{k}", {"w": jnp.asarray(stack[k])})
    found = average([tmp_path / f"{k}" for k in range(3)], [1.5, -1, 0.5])
    assert ulps(found["w"], weighted(stack, np.array([1.5, -1, 0.5]))) <= 1


@pytest.mark.parametrize("where", ["host", "device"])
def test_a_damaged_source_is_named(tmp_path: Path, where: Any) -> None:
    for k in range(2):
        jc.save(tmp_path / f"{k}", {"w": jnp.arange(300_000.0) * k})
    data = max((tmp_path / "1").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    like = {"w": jax.ShapeDtypeStruct((300_000,), np.float32)}
    with pytest.raises(jc.CorruptionError) as caught:
        average([tmp_path / "0", tmp_path / "1"], like=like, where=where)
    assert any(f"{tmp_path}/1/, source 1 of 2" in note for note in caught.value.__notes__)
