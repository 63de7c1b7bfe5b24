"""What the processes of the tests of extras do; run by run_processes, results as JSON."""

from typing import Any

import numpy as np

import jaxckpt as jc
from jaxckpt.coordination.jax_client import current_coordinator
from jaxckpt.core.errors import CheckpointError
from jaxckpt.integrations.data import ElasticIterator


def train(root: str, steps: int | None, length: int) -> list[int]:
    """Go on from the newest step, take ``steps`` batches (None: all), save the last: the samples of this process."""
    data = ElasticIterator(np.arange(length), batch_size=12, seed=3)
    seen: list[int] = []
    with jc.CheckpointManager(root, timeout_s=30) as manager:
        step = manager.resume(like={"w": np.zeros(4)}, extras={"data": data})[0] or 0
        for taken, batch in enumerate(data, start=1):
            seen += batch.tolist()
            if taken == steps:
                manager.save(step + taken, {"w": np.ones(4)}, extras={"data": data, "rank": data.rank})
                break
    return seen


def one_cannot_store(root: str) -> list[Any]:
    """Process 1's extra is no state: what each process is told, and which steps there are."""
    rank, told = current_coordinator().rank, ""
    with jc.CheckpointManager(root, timeout_s=30) as manager:
        manager.save(1, {"w": np.ones(4)}, extras={"x": {1, 2} if rank == 1 else 0})
        try:
            manager.wait()
        except CheckpointError as error:
            told = str(error)
        manager.save(1, {"w": np.ones(4)}, extras={"x": rank})
        manager.wait()
        return [told, manager.all_steps(), manager.restore_extras(1)["x"]]


def resume_damaged(root: str) -> list[Any]:
    """What a job is told whose newest step has a damaged file of extras, and which steps there are."""
    data, told = ElasticIterator(np.arange(480), batch_size=12, seed=3), ""
    with jc.CheckpointManager(root, timeout_s=30) as manager:
        try:
            manager.resume(like={"w": np.zeros(4)}, extras={"data": data})
        except CheckpointError as error:
            told = f"{type(error).__name__}: {error}"
        return [told, manager.all_steps()]
