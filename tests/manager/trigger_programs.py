"""What the processes of the trigger tests do; run by run_processes, results as JSON."""

import os
import signal
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.coordination.jax_client import current_coordinator
from jaxckpt.integrations.data import ElasticIterator

POLICIES = {
    "preemption": lambda: jc.every(steps=1000) | jc.on_preemption(timeout_s=30),
    "usr1": lambda: jc.on_signal(signal.SIGUSR1, timeout_s=30),
    "optimal": lambda: jc.optimal(mtbf_s=0.2, first=3) | jc.on_preemption(timeout_s=30),
}


def train(root: str, policy: str, signals: dict[str, list[Any]], most: int, free: bool = True) -> dict[str, Any]:
    """A loop of at most ``most`` steps; ``signals``: rank -> [(step, signal), ...] sent to itself before the step."""
    rank = current_coordinator().rank
    mine = {step: number for step, number in signals.get(str(rank), [])}
    data = ElasticIterator(np.arange(10_000), batch_size=2, seed=1)
    saved: list[int] = []
    state = {"w": sums(0.0)}
    with jc.CheckpointManager(root, save=POLICIES[policy]()) as manager:
        start, state = manager.resume(like=state, extras={"data": data})
        first = (start or 0) + 1
        for step in range(first, first + most):
            if step in mine:
                os.kill(os.getpid(), mine[step])
            if free:
                time.sleep(0.005 * (1 + rank))  # the work of a step; some are slower
            state = {"w": sums(own(state["w"]) + float(next(data).sum()))}
            if manager.save(step, state, extras={"data": data}):
                saved.append(step)
            if manager.preempted:
                break
        explained = manager.explain()
    return {
        "began_after": start,
        "saved": saved,
        "last": step,  # of at least one
        "preempted": manager.preempted,
        "all": manager.all_steps(),
        "sum": own(state["w"]),
        "explained": explained,
    }


def sums(value: float) -> jax.Array:
    """What each process has summed up, as one array."""
    mesh = jax.make_mesh((jax.process_count(),), ("process",), axis_types=(AxisType.Auto,))
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P("process")), np.full(1, value, np.float32))


def own(values: jax.Array) -> float:
    return float(values.addressable_data(0)[0])
