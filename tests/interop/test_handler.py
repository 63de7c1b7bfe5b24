"""Real Orbax managers and checkpointers work with our handler, and what it writes belongs to both libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxckpt as jc
from jaxckpt.interop.orbax_handler import Handler, registry

if TYPE_CHECKING:
    from pathlib import Path

    from jax.sharding import Mesh

P = PartitionSpec
pytestmark = pytest.mark.filterwarnings("ignore")  # Orbax's own deprecations


def tree_on(mesh: Mesh, spec: PartitionSpec | None = None) -> dict[str, Any]:
    kernel = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
    placed = jax.device_put(kernel, NamedSharding(mesh, spec or P("data", "model")))
    return {"params": {"w": placed}, "host": np.arange(3), "step": 7}


def abstract_on(mesh: Mesh, spec: PartitionSpec) -> dict[str, Any]:
    return {
        "params": {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, spec))},
        "host": np.zeros(3, np.int64),
        "step": 0,
    }


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def is_ours(path: Path) -> bool:
    return (path / "jaxckpt.json").exists()


def test_a_manager_saves_keeps_and_restores_onto_another_mesh(tmp_path: Path, mesh_4x2: Mesh) -> None:
    tree = tree_on(mesh_4x2)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(tmp_path / "run", options=options, handler_registry=registry()) as manager:
        for step in range(4):
            manager.save(step, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
        assert manager.all_steps() == [2, 3]
        other = P(None, ("data", "model"))
        again = manager.restore(3, args=ocp.args.StandardRestore(abstract_on(mesh_4x2, other)))
    assert_same(again, tree)
    assert again["params"]["w"].sharding.spec == other
    assert is_ours(tmp_path / "run" / "3" / "default")
    assert_same(jc.restore(tmp_path / "run" / "3" / "default"), tree)


def test_a_new_manager_restores_and_describes_without_args(tmp_path: Path, mesh_4x2: Mesh) -> None:
    tree = tree_on(mesh_4x2)
    with ocp.CheckpointManager(tmp_path / "run", handler_registry=registry()) as manager:
        manager.save(1, args=ocp.args.StandardSave(tree))
    with ocp.CheckpointManager(tmp_path / "run", handler_registry=registry()) as manager:
        metadata = manager.item_metadata(1)
        assert metadata["params"]["w"].shape == (8, 8)
    with ocp.CheckpointManager(tmp_path / "run", handler_registry=registry()) as manager:
        assert_same(manager.restore(1), tree)
        # What is described can be restored into.
        again = manager.restore(1, args=ocp.args.StandardRestore(metadata))
        assert_same(again, tree)


def test_plain_orbax_restores_what_was_saved(tmp_path: Path, mesh_4x2: Mesh) -> None:
    tree = tree_on(mesh_4x2)
    with ocp.CheckpointManager(tmp_path / "run", handler_registry=registry()) as manager:
        manager.save(1, args=ocp.args.PyTreeSave(tree))
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        assert_same(manager.restore(1), tree)
        assert_same(manager.restore(1, args=ocp.args.StandardRestore(abstract_on(mesh_4x2, P("data")))), tree)


def test_steps_that_plain_orbax_saved_are_restored(tmp_path: Path, mesh_4x2: Mesh) -> None:
    tree = tree_on(mesh_4x2)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, args=ocp.args.StandardSave(tree))
    with ocp.CheckpointManager(tmp_path / "run", handler_registry=registry()) as manager:
        like = abstract_on(mesh_4x2, P("model"))
        assert_same(manager.restore(1, args=ocp.args.StandardRestore(like)), tree)
        assert_same(manager.restore(1, args=ocp.args.PyTreeRestore(like)), tree)


def test_named_items_stand_beside_json_and_the_best_is_kept(tmp_path: Path, mesh_4x2: Mesh) -> None:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, best_fn=lambda metrics: metrics["loss"], best_mode="min")
    tree = tree_on(mesh_4x2)
    with ocp.CheckpointManager(tmp_path / "run", options=options, handler_registry=registry("state")) as manager:
        for step, loss in enumerate([3.0, 1.0, 2.0]):
            args = ocp.args.Composite(state=ocp.args.StandardSave(tree), notes=ocp.args.JsonSave({"step": step}))
            manager.save(step, args=args, metrics={"loss": loss})
        manager.wait_until_finished()
        assert manager.best_step() == 1
        args = ocp.args.Composite(state=ocp.args.StandardRestore(tree), notes=ocp.args.JsonRestore())
        again = manager.restore(1, args=args)
    assert again.notes == {"step": 1}
    assert_same(again.state, tree)


def test_restore_args_place_cast_and_choose_types(tmp_path: Path, mesh_4x2: Mesh) -> None:
    tree = tree_on(mesh_4x2)
    checkpointer = ocp.AsyncCheckpointer(Handler())
    checkpointer.save(tmp_path / "x", args=ocp.args.PyTreeSave(tree))
    checkpointer.wait_until_finished()
    restore_args = {
        "params": {
            "w": ocp.ArrayRestoreArgs(dtype=jnp.bfloat16, sharding=NamedSharding(mesh_4x2, P("model"))),
        },
        "host": ocp.RestoreArgs(restore_type=np.ndarray),
        "step": ocp.RestoreArgs(restore_type=int),
    }
    for item in (tree, None):
        again = checkpointer.restore(tmp_path / "x", args=ocp.args.PyTreeRestore(item, restore_args=restore_args))
        assert again["params"]["w"].dtype == jnp.bfloat16
        assert again["params"]["w"].sharding.spec == P("model")
        assert again["step"] == 7
        assert isinstance(again["host"], np.ndarray)
    mesh_args = ocp.ArrayRestoreArgs(mesh=mesh_4x2, mesh_axes=P("data"))
    part = ocp.args.PyTreeRestore({"params": {"w": 0}}, {"params": {"w": mesh_args}}, partial_restore=True)
    assert checkpointer.restore(tmp_path / "x", args=part)["params"]["w"].sharding.spec == P("data")
    checkpointer.close()


def test_a_plain_checkpointer_takes_the_older_style_of_call(tmp_path: Path, mesh_4x2: Mesh) -> None:
    tree = tree_on(mesh_4x2)
    with ocp.Checkpointer(Handler()) as checkpointer:
        checkpointer.save(tmp_path / "x", tree)
        checkpointer.save(tmp_path / "x", tree, force=True)
        assert_same(checkpointer.restore(tmp_path / "x"), tree)
        assert_same(checkpointer.restore(tmp_path / "x", item=tree), tree)
    assert_same(ocp.PyTreeCheckpointer().restore(tmp_path / "x"), tree)


def test_placeholders_are_left_out(tmp_path: Path, mesh_4x2: Mesh) -> None:
    tree = tree_on(mesh_4x2)
    with ocp.Checkpointer(Handler()) as checkpointer:
        checkpointer.save(tmp_path / "x", tree)
        wanted = tree | {"host": ocp.PLACEHOLDER}
        again = checkpointer.restore(tmp_path / "x", args=ocp.args.StandardRestore(wanted))
    assert again["host"] is ocp.PLACEHOLDER
    assert_same(again["params"], tree["params"])


def test_what_does_not_fit_is_refused(tmp_path: Path, mesh_4x2: Mesh) -> None:
    tree = tree_on(mesh_4x2)
    with ocp.Checkpointer(Handler()) as checkpointer:
        checkpointer.save(tmp_path / "x", tree)
        with pytest.raises(jc.MismatchError, match=r"params\.weight"):
            checkpointer.restore(tmp_path / "x", args=ocp.args.StandardRestore({"params": {"weight": jnp.ones(3)}}))
        with pytest.raises(ValueError, match="transforms"):
            checkpointer.restore(tmp_path / "x", args=ocp.args.PyTreeRestore(tree, transforms={"a": 1}))


def test_save_args_cast(tmp_path: Path) -> None:
    with ocp.Checkpointer(Handler()) as checkpointer:
        save_args = {"w": ocp.SaveArgs(dtype=jnp.bfloat16), "b": ocp.SaveArgs()}
        checkpointer.save(tmp_path / "x", args=ocp.args.PyTreeSave({"w": jnp.ones(4), "b": jnp.ones(2)}, save_args))
        again = checkpointer.restore(tmp_path / "x")
    assert (again["w"].dtype, again["b"].dtype) == (jnp.bfloat16, jnp.float32)


def test_a_tree_that_is_donated_after_the_call_is_saved_as_it_was(tmp_path: Path, mesh_4x2: Mesh) -> None:
    double = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + leaf, tree), donate_argnums=0)
    tree = {"w": tree_on(mesh_4x2)["params"]["w"]}
    before = np.asarray(tree["w"]).copy()
    with ocp.CheckpointManager(tmp_path / "run", handler_registry=registry()) as manager:
        for step in range(3):
            manager.save(step, args=ocp.args.StandardSave(tree))
            tree = double(tree)
        manager.wait_until_finished()
        for step in range(3):
            assert np.array_equal(manager.restore(step)["w"], before * 2**step)


def test_an_error_in_the_background_surfaces_as_orbax_surfaces_them(tmp_path: Path, mesh_4x2: Mesh) -> None:
    class Full(Handler):
        """Finds no room when it comes to writing."""

        def _request(self, directory: Any, args: Any) -> Any:
            from dataclasses import replace

            def no_room() -> None:
                raise OSError(28, "No space left on device")

            return replace(super()._request(directory, args), attach=no_room)

    manager = ocp.CheckpointManager(tmp_path / "run", handler_registry=registry(handler=Full()))
    manager.save(1, args=ocp.args.StandardSave(tree_on(mesh_4x2)))
    with pytest.raises(OSError, match="No space left"):
        manager.wait_until_finished()
    manager.close()
    with ocp.CheckpointManager(tmp_path / "run", handler_registry=registry()) as manager:
        assert manager.all_steps() == []
