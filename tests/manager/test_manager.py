"""The manager in one process: what is listed, kept, told and read by Orbax."""

import resource

import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxckpt.core.errors import AlreadyExistsError, CheckpointError
from jaxckpt.manager.manager import CheckpointManager
from jaxckpt.manager.policies import StepRecord, best, every, latest, newer_than, to_delete


def tree(step):
    return {"w": np.full((4, 2), step, np.float32)}


def test_a_run_resumes_from_its_newest_step(tmp_path):
    with CheckpointManager(tmp_path, save=every(steps=2), keep=latest(2)) as manager:
        assert manager.resume(like=tree(0))[0] is None
        assert [manager.save(step, tree(step)) for step in range(1, 7)] == [False, True] * 3
    again = CheckpointManager(tmp_path)
    step, state = again.resume(like=tree(0))
    assert (again.all_steps(), step) == ([4, 6], 6)
    np.testing.assert_array_equal(state["w"], tree(6)["w"])
    with pytest.raises(AlreadyExistsError, match="Step 6"):
        again.save(6, tree(6))


def test_orbax_reads_our_steps_and_metrics(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.3)):
            manager.save(step, tree(step), metrics={"loss": loss})
    assert manager.best_step("loss") == 2
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"], best_mode="min")
    with ocp.CheckpointManager(tmp_path, options=options) as theirs:
        assert (list(theirs.all_steps()), theirs.best_step()) == ([1, 2, 3], 2)
        restored = theirs.restore(3, args=ocp.args.StandardRestore(tree(0)))
    np.testing.assert_array_equal(restored["w"], tree(3)["w"])


def test_we_read_steps_and_metrics_of_orbax(tmp_path):
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"], best_mode="min")
    with ocp.CheckpointManager(tmp_path, options=options) as theirs:
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.3)):
            theirs.save(step, args=ocp.args.StandardSave(tree(step)), metrics={"loss": loss})
    manager = CheckpointManager(tmp_path)
    assert (manager.all_steps(), manager.best_step("loss")) == ([1, 2, 3], 2)
    np.testing.assert_array_equal(manager.restore(3, tree(0))["w"], tree(3)["w"])


def test_a_step_whose_write_fails_is_told_once_never_listed_and_can_be_saved_again(tmp_path):
    manager = CheckpointManager(tmp_path)
    big = {"w": np.ones(1 << 20, np.float32)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))  # EFBIG from the real file system
    try:
        manager.save(2, big)
        with pytest.raises(CheckpointError, match="process 0.*step 2"):
            manager.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert manager.poll() == {2: "failed"}
    assert manager.all_steps() == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    manager.save(2, big)
    manager.close()
    assert manager.all_steps() == [2]


RECORDS = st.dictionaries(st.integers(0, 99), st.floats(allow_nan=True), max_size=12).map(
    lambda found: [StepRecord(step=s, time_s=s, metrics={"loss": v}) for s, v in sorted(found.items())]
)
KEEPS = st.sampled_from(
    [latest(2), best(2, "loss"), best(1, "loss", "max") & latest(3), every(steps=7) | newer_than(9)]
)


@given(RECORDS, KEEPS)
def test_the_newest_step_is_never_deleted(found, keep):
    gone = to_delete(found, keep, 50.0)
    assert not found or found[-1].step not in gone
    assert set(gone) <= {one.step for one in found} - keep.kept(found, 50.0)
