"""What `jaxckpt.save` writes, the real Orbax restores bit for bit, by every way it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding

import jaxckpt
from jaxckpt.format import orbax_metadata as om
from tests.checkpoint.bits import assert_same_tree
from tests.interop.trees import abstract, as_orbax_keeps, elsewhere, ours_only, training_state

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

v1 = ocp.v1
TEXT = {"name": "hello", "nested": ["é", ""]}

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return training_state()


@pytest.fixture(scope="module", params=["plain", "zstd", "overwritten"])
def saved(request: pytest.FixtureRequest, state: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "c"
    if request.param == "overwritten":
        jaxckpt.save(path, {"old": jnp.ones(9), "model": 3})
    jaxckpt.save(
        path,
        state,
        step=7,
        overwrite=request.param == "overwritten",
        compression={"model.*": 3, "numpy": 19} if request.param == "zstd" else None,
    )
    return path


def v0_restore_args(path: Path, like: Any) -> Any:
    args = ocp.checkpoint_utils.construct_restore_args(like)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(like, restore_args=args))


def v0_standard(path: Path, like: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


READERS: dict[str, Callable[[Any, Any], Any]] = {
    "v0 PyTreeCheckpointer": v0_restore_args,
    "v0 StandardCheckpointer": v0_standard,
    "v1 load": lambda path, like: v1.load(path, like),
}


@pytest.mark.parametrize("reader", READERS)
def test_orbax_restores_onto_the_same_mesh(saved: Path, state: Any, reader: str) -> None:
    assert_same_tree(READERS[reader](saved, abstract(state)), state)


@pytest.mark.parametrize("reader", READERS)
def test_orbax_restores_onto_another_mesh(saved: Path, state: Any, reader: str) -> None:
    found = READERS[reader](saved, abstract(state, elsewhere))
    assert_same_tree(found, state, placed=False)
    for new in jax.tree.leaves(found):
        if isinstance(new, jax.Array):
            assert new.sharding == elsewhere(new)


@pytest.mark.parametrize("reader", ["v0", "v1"])
def test_orbax_restores_without_a_target_where_it_was(saved: Path, state: Any, reader: str) -> None:
    found = ocp.PyTreeCheckpointer().restore(saved) if reader == "v0" else v1.load(saved)
    assert_same_tree(found, as_orbax_keeps(state))


@pytest.mark.parametrize("reader", ["v0", "v1"])
def test_orbax_reads_text_and_what_it_does_not_write_itself(tmp_path: Path, reader: str) -> None:
    tree = {**ours_only(), "text": TEXT, "flag": True}
    jaxckpt.save(tmp_path / "c", tree)
    found = ocp.PyTreeCheckpointer().restore(tmp_path / "c") if reader == "v0" else v1.load(tmp_path / "c")
    as_arrays = {
        "numpy_scalar": np.asarray(np.float32(0.5)),
        "bytes": np.frombuffer(b"abc", np.uint8),
        "complex": np.asarray(1 - 2j),
    }
    assert_same_tree(found, {**tree, **as_arrays}, placed=False)


def test_orbax_reports_the_metadata_of_every_leaf(saved: Path, state: Any) -> None:
    wanted = as_orbax_keeps(state)
    for found in (
        ocp.PyTreeCheckpointer().metadata(saved).item_metadata.tree,
        ocp.StandardCheckpointer().metadata(saved).item_metadata.tree,
        v1.pytree_metadata(saved).metadata,
    ):
        leaves = dict(jax.tree_util.tree_leaves_with_path(found))
        assert leaves.keys() == dict(jax.tree_util.tree_leaves_with_path(wanted)).keys()
        for path, value in jax.tree_util.tree_leaves_with_path(wanted):
            if isinstance(value, jax.Array) and not jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
                assert (tuple(leaves[path].shape), leaves[path].dtype) == (value.shape, value.dtype), path
                if isinstance(value.sharding, NamedSharding):
                    sharding = leaves[path].sharding  # v0 has a record of it, v1 the sharding itself
                    sharding = sharding if isinstance(sharding, NamedSharding) else sharding.to_jax_sharding()
                    assert sharding == value.sharding, path


def test_orbax_reads_a_single_array(tmp_path: Path) -> None:
    jaxckpt.save(tmp_path / "array", jnp.arange(6.0))
    assert_same_tree(
        v1.load(tmp_path / "array", jax.ShapeDtypeStruct((6,), jnp.float32)), jnp.arange(6.0), placed=False
    )
    assert_same_tree(ocp.PyTreeCheckpointer().restore(tmp_path / "array"), jnp.arange(6.0), placed=False)


@pytest.mark.parametrize("compression", [None, 3])
def test_a_checkpoint_that_lost_our_sidecar_is_still_ours_to_read(
    tmp_path: Path, state: Any, compression: int | None
) -> None:
    tree = {**state, **ours_only(), "text": TEXT, "flag": True}
    jaxckpt.save(tmp_path / "whole", tree)
    jaxckpt.save(tmp_path / "c", tree, compression=compression)
    (tmp_path / "c/jaxckpt.json").unlink()
    assert_same_tree(jaxckpt.restore(tmp_path / "c", tree), tree)
    assert_same_tree(jaxckpt.restore(tmp_path / "c", abstract(tree, elsewhere)), tree, placed=False)
    assert not jaxckpt.diff(tmp_path / "c", tmp_path / "whole")
    assert not jaxckpt.diff(tmp_path / "whole", tmp_path / "c")
    assert jaxckpt.verify(tmp_path / "c").ok


HANDLERS = {
    "v0 standard": "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler",
    "v0 pytree": om.PYTREE_HANDLER,
}


def test_a_checkpoint_of_ours_is_an_item_of_a_step_when_the_call_says_what_it_is(tmp_path: Path, state: Any) -> None:
    jaxckpt.save(tmp_path / "run/5/default", state, step=5)
    for args in (ocp.args.StandardRestore(abstract(state)), ocp.args.PyTreeRestore(abstract(state))):
        with ocp.CheckpointManager(tmp_path / "run") as manager:
            assert manager.all_steps() == [5]
            assert_same_tree(manager.restore(5, args=args), state)
    assert_same_tree(jaxckpt.restore(tmp_path / "run/5", state), state)
    assert_same_tree(v1.load(tmp_path / "run/5/default", abstract(state)), state)


@pytest.mark.parametrize("handler", HANDLERS)
def test_with_step_metadata_the_managers_restore_it_untold_and_go_on(tmp_path: Path, state: Any, handler: str) -> None:
    # All that Orbax wants beside the item: who reads it.
    for item in ("default", "state"):
        jaxckpt.save(tmp_path / item / "5" / item, state, step=5)
        record = om.encode_checkpoint_metadata(
            init_timestamp_ns=1, commit_timestamp_ns=2, item_handlers={item: HANDLERS[handler]}
        )
        (tmp_path / item / "5/_CHECKPOINT_METADATA").write_bytes(record)
    with ocp.CheckpointManager(tmp_path / "default") as manager:
        assert_same_tree(manager.restore(5), as_orbax_keeps(state))
        save = ocp.args.StandardSave if handler == "v0 standard" else ocp.args.PyTreeSave
        manager.save(6, args=save({"a": jnp.ones(3)}))
        manager.wait_until_finished()
        assert manager.all_steps() == [5, 6]
    with v1.training.Checkpointer(tmp_path / "state") as checkpointer:
        assert_same_tree(checkpointer.load(5), as_orbax_keeps(state))
        assert_same_tree(checkpointer.load(5, abstract(state)), state)
    assert_same_tree(jaxckpt.restore(tmp_path / "state/5", state), state)
