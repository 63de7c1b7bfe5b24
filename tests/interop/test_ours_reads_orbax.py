"""What Orbax writes, in every layout, we restore, inspect, verify and compare."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1

import jaxckpt as jc


def mesh(rows: int, columns: int) -> jax.sharding.Mesh:
    return jax.make_mesh((rows, columns), ("d", "m"), axis_types=(AxisType.Auto,) * 2)


def tree() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    placed = NamedSharding(mesh(4, 2), P("d", "m"))
    return {
        "params": {"w": jax.device_put(rng.standard_normal((16, 8)).astype(np.float32), placed)},
        "layers": [jnp.arange(6, dtype=jnp.bfloat16), {"bias": jnp.ones(5)}],
        "host": rng.integers(0, 9, (3, 3)),
        "step": 7,
        "rate": 0.25,
    }


def v0(**options: Any) -> Callable[[Path, Any], Path]:
    def save(path: Path, saved: Any) -> Path:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
            checkpointer.save(path, ocp.args.PyTreeSave(saved))
        return path

    return save


def v0_standard(path: Path, saved: Any) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, saved)
    return path


def v0_async(path: Path, saved: Any) -> Path:
    with ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, ocp.args.PyTreeSave(saved))
    return path


def v1_save(path: Path, saved: Any) -> Path:
    v1.save(path, saved)
    return path


def manager_step(path: Path, saved: Any) -> Path:
    with ocp.CheckpointManager(path) as manager:
        manager.save(5, args=ocp.args.StandardSave(saved))
    return path / "5"


def composite_item(path: Path, saved: Any) -> Path:
    with ocp.CheckpointManager(path) as manager:
        items = ocp.args.Composite(state=ocp.args.StandardSave(saved), notes=ocp.args.JsonSave({"a": 1}))
        manager.save(5, args=items)
    return path / "5" / "state"


WRITERS: dict[str, Callable[[Path, Any], Path]] = {
    "v0 zarr2 ocdbt zstd": v0(),
    "v0 zarr2 ocdbt raw": v0(use_compression=False),
    "v0 zarr2 folders": v0(use_ocdbt=False),
    "v0 zarr2 folders raw": v0(use_ocdbt=False, use_compression=False),
    "v0 zarr3 ocdbt": v0(use_zarr3=True),
    "v0 zarr3 folders": v0(use_zarr3=True, use_ocdbt=False),
    "v0 standard": v0_standard,
    "v0 async": v0_async,
    "v1": v1_save,
    "manager step": manager_step,
    "composite item": composite_item,
}


def other_mesh(saved: Any) -> Any:
    placed = NamedSharding(mesh(2, 4), P("m", "d"))

    def target(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed if leaf.ndim == 2 else None)

    return jax.tree.map(target, saved)


LIKES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda saved: None,
    "arrays": lambda saved: saved,
    "another mesh": other_mesh,
    "numpy": lambda saved: jc.on_host,
    "a function": lambda saved: lambda name, spec: NamedSharding(mesh(8, 1), P()),
}


def assert_equal(found: Any, saved: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(saved)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(saved), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("writer", WRITERS)
def test_what_orbax_wrote_is_restored(tmp_path: Path, writer: str) -> None:
    saved = tree()
    path = WRITERS[writer](tmp_path / "orbax", saved)
    for like in LIKES.values():
        assert_equal(jc.restore(path, like(saved)), saved)
    assert_equal(jc.restore(path, only="params"), {"params": saved["params"]})
    assert {leaf.name for leaf in jc.inspect(path).leaves} >= {"params.w", "layers.0", "layers.1.bias", "step"}
    report = jc.verify(path)
    assert report.ok
    assert not report.checksums
    jc.save(tmp_path / "ours", saved)
    assert not jc.diff(path, tmp_path / "ours"), str(jc.diff(path, tmp_path / "ours"))
    with pytest.raises(jc.MismatchError, match="extra"):
        jc.restore(path, {**saved, "extra": jnp.ones(2)})
