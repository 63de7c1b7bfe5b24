"""What the processes of the manager's tests do; run by run_processes, results as JSON."""

import os
import resource
import signal
import time

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.core.events import Event, Flushed, subscribe


def tree(step: int, size: int = 64) -> dict:
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("d"))
    values = np.full((size, 8), step, np.float32)
    return {"w": jax.make_array_from_callback(values.shape, sharding, lambda box: values[box]), "step": step}


def train(root: str, seconds: float | None) -> dict:
    policy = jc.every(steps=2) if seconds is None else jc.every(seconds=seconds)
    seen = {}
    with jc.CheckpointManager(root, save=policy, keep=jc.latest(2), timeout_s=30) as manager:
        step, state = manager.resume(tree(0))
        seen["fresh"] = step
        # Clocks that differ: each process takes its own time for a step.
        saved = []
        for step in range(1, 9):
            time.sleep(0.02 * (1 + jax.process_index()))
            if manager.save(step, tree(step), metrics={"loss": 1 / step}):
                saved.append(step)
        seen["saved"] = saved
        manager.wait()
        seen["after wait"] = manager.all_steps()
        seen["best"] = manager.best_step("loss")
        manager.delete(seen["after wait"][0])
        seen["after delete"] = manager.all_steps()
    again = jc.CheckpointManager(root, timeout_s=30)
    step, state = again.resume(tree(0))
    seen["resumed"] = [step, state["step"], float(state["w"].addressable_data(0).max())]
    again.close()
    return seen


def one_cannot_write(root: str, victim: int) -> dict:
    """The file system refuses a write of process ``victim`` in the save of step 2."""
    manager = jc.CheckpointManager(root, timeout_s=30)
    manager.save(1, tree(1))
    manager.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if jax.process_index() == victim:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    manager.save(2, tree(2, size=1 << 14))
    errors = []
    try:
        manager.wait()
    except jc.CheckpointError as error:
        errors.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    states, listed = manager.poll(), manager.all_steps()
    manager.save(2, tree(2))
    manager.close()
    return {"errors": errors, "state": states[2], "listed": listed, "after": manager.all_steps()}


def die_in_a_save(root: str, step: int) -> None:
    manager = jc.CheckpointManager(root)
    manager.save(1, tree(1))
    manager.wait()

    def die(event: Event) -> None:
        if isinstance(event, Flushed):
            os.kill(os.getpid(), signal.SIGKILL)

    subscribe(die)
    manager.save(step, tree(step))
    manager.wait()


def one_leaves(root: str) -> str:
    """Process 1 raises in the block; the others must not wait for it in vain."""
    try:
        with jc.CheckpointManager(root, timeout_s=60) as manager:
            manager.save(1, tree(1))
            if jax.process_index() == 1:
                raise KeyError("batch")
            manager.wait()
            manager.save(2, tree(2))
            manager.wait()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"
