"""A stage's process is killed: the others lose no step and no bit, and the loss goes on where it was."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt.recovery.record import RecoveryLog

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RISE = 0.05  # nats, of held-out loss: what the fork test allows a stage that comes back from its own older weights


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # Programs are small: what they gain by optimization is less than it costs.
    environment = os.environ | {"WORKER_XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "stage_recovery.py"), str(folder), *options],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"PYTHONPATH": str(EXAMPLES.parent)},
    )


def facts(done: subprocess.CompletedProcess[str], folder: Path) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return [json.loads(line) for line in (folder / "facts.jsonl").read_text().splitlines()]


def check_loss(told: list[dict[str, Any]], launch: int, lost: list[int], *, rise: float = RISE) -> dict[str, Any]:
    """The claims about one loss, from what each process told; ``lost`` are processes. Returns the recovery."""
    recovered = [f for f in told if f["kind"] == "recovered" and f["launch"] == launch + 1]
    assert recovered
    assert all(f | {"process": 0} == recovered[0] | {"process": 0} for f in recovered)  # all decided alike
    step = recovered[0]["step"]
    looks = [f for f in told if f["kind"] in ("ready", "step")]
    before = {(f["process"], f["step"]): f for f in looks if f["launch"] == launch}
    after = {f["process"]: f for f in looks if f["launch"] == launch + 1 and f["kind"] == "ready"}
    survivors = sorted(set(after) - set(lost))
    assert survivors
    last_done = min(max(s for p, s in before if p == survivor) for survivor in survivors)
    assert last_done - step <= 0, "steps lost by the others"
    for survivor in survivors:
        assert after[survivor]["bits"] == before[survivor, step]["bits"]
        assert after[survivor]["step"] == step
    assert after[survivors[0]]["held_out"] - before[survivors[0], step]["held_out"] <= rise
    return recovered[0]


def check_end(told: list[dict[str, Any]], folder: Path) -> None:
    steps = [f["step"] for f in told if f["kind"] == "step" and f["process"] == 0]
    assert set(steps) == set(range(1, 41))
    losses = {f["step"]: f["held_out"] for f in told if f["kind"] == "step"}
    assert losses[40] < losses[8] < losses[1]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(400)
def test_a_process_killed_at_any_step_costs_the_others_no_step_and_no_bit(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    done = run(tmp_path, "--processes", "3", "--stages", "3", "--seed", str(seed))
    told = facts(done, tmp_path)
    rng = random.Random(seed)
    _, victim = rng.randint(8, 30), rng.randrange(3)
    event = check_loss(told, 0, [victim])
    assert event["lost"] == [victim]
    assert set(event["sources"]) <= {"same_step_copy", "stale_copy", "checkpoint_stage", "rollback"}
    check_end(told, tmp_path)
    assert "steps lost by the others: 0; their stages to the bit as they were: True" in done.stdout
    # The next checkpoint tells of it.
    log = RecoveryLog.from_metadata(jc.inspect(tmp_path / "checkpoints" / "40").metadata)
    assert [(record.stages, record.step) for record in log.records] == [((victim,), event["step"])]
    assert any(f["kind"] == "event" and "Recovered(" in f["text"] for f in told) or event["sources"] == ["rollback"]


@pytest.mark.timeout(300)
def test_a_process_with_two_stages_is_killed(tmp_path: Path) -> None:
    options = ["--processes", "2", "--steps", "9", "--save-every", "4", "--kill", "6:1"]
    told = facts(run(tmp_path, *options), tmp_path)
    event = check_loss(told, 0, [1])
    assert event["lost"] == [2, 3]
    assert event["sources"] == ["checkpoint_stage", "stale_copy"]  # the copy of stage 2 was on stage 3
    assert {f["step"] for f in told if f["kind"] == "step"} == set(range(1, 10))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--processes", "3"], "--processes 3 does not divide --stages 4"),
        (["--kill", "12"], "'12' is not STEP:PROCESS[,PROCESS], such as 12:0"),
        (["--kill", "12:1", "--kill", "20:4"], "--kill 20:4: processes are 0 to 3"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: list[str], match: str, tmp_path: Path) -> None:
    done = run(tmp_path / "run", *options)
    assert done.returncode != 0
    assert match in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(120)
def test_processes_that_die_at_start_are_told_with_their_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(tmp_path / "run", "--processes", "2", "--kill", "6:1", "--memory", str(tmp_path / "file"))
    assert done.returncode != 0
    assert "ended by itself with exit code" in done.stderr
    assert "Not a directory" in done.stderr
    assert "is gone" not in done.stdout


@pytest.mark.timeout(300)
def test_the_first_the_last_and_two_adjacent_stages_come_back_in_one_process(tmp_path: Path) -> None:
    done = run(tmp_path, "--simulate", "--kill", "12:0", "--kill", "17:3", "--kill", "24:1,2")
    told = facts(done, tmp_path)
    assert check_loss(told, 0, [0])["sources"] == ["stale_copy"]
    assert check_loss(told, 1, [3])["sources"] == ["stale_copy"]
    both = check_loss(told, 2, [1, 2])
    assert both["sources"] == ["checkpoint_stage", "stale_copy"]  # the copy of stage 1 was on stage 2
    assert "stage 1 from checkpoint_stage: its own weights from the checkpoint, 4 steps old" in both["why"]
    check_end(told, tmp_path)
    assert len(jc.inspect(tmp_path / "checkpoints" / "40").metadata["recoveries"]) == 3


@pytest.mark.timeout(300)
def test_without_copies_a_stage_is_averaged_and_two_adjacent_ones_are_refused(tmp_path: Path) -> None:
    options = ["--simulate", "--no-copies", "--save-every", "100"]
    done = run(tmp_path / "refused", *options, "--kill", "12:1", "--kill", "20:1,2")
    assert done.returncode != 0
    assert "sources=('average',)" in done.stdout  # the first loss
    assert "Stages (1, 2) of 4 cannot come back" in done.stderr
    for reason in ("neighbour stage 2 is lost too", "no neighbour keeps a copy", "checkpoint_stage: no checkpoint"):
        assert reason in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_coordinator_the_last_and_two_adjacent_processes_are_killed_in_one_run(tmp_path: Path) -> None:
    told = facts(run(tmp_path, "--kill", "12:0", "--kill", "17:3", "--kill", "24:1,2"), tmp_path)
    for launch, lost in enumerate(([0], [3], [1, 2])):
        assert check_loss(told, launch, lost)["lost"] == lost
    check_end(told, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_cannot_go_on_ends_with_the_reasons(tmp_path: Path) -> None:
    done = run(tmp_path, "--kill", "12:1,2", "--save-every", "100")
    assert done.returncode != 0
    assert "The job cannot go on" in done.stderr
    assert "its holder, stage 2, is lost too" in done.stderr
    assert "rollback: no snapshot and no checkpoint" in done.stderr


def test_host_memory_keeps_two_whole_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    monkeypatch.syspath_prepend(str(EXAMPLES))
    from _stage_memory import HostMemory, assemble

    mesh = jax.make_mesh((4, 2), ("stage", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    where = jax.NamedSharding(mesh, jax.P("stage"))
    tree = {"w": jax.device_put(np.arange(8, dtype=np.float32).reshape(4, 2), where)}
    memory = HostMemory(tmp_path)
    for step in range(1, 5):
        memory.write(step, tree, {"taken": step})
        (tmp_path / "half-written.npz").write_bytes(b"killed here")
    assert memory.steps() == [3, 4]
    parts, told = memory.read(4)
    assert told == {"taken": 4}
    np.testing.assert_array_equal(assemble(tree, parts)["w"], tree["w"])
    lost = {name: part for name, part in parts.items() if "@2," not in name}
    assert np.isnan(np.asarray(assemble(tree, lost)["w"])).all(axis=1).tolist() == [False, False, True, False]
    memory.write(2, tree, {"taken": 2})  # after a rollback nothing newer is left
    assert memory.steps() == [2]
