"""Processes that die, stop or are killed at random in the saves of a manager; run by run_processes."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt as jc
from jaxckpt.coordination.jax_client import current_coordinator
from jaxckpt.core.events import Captured, Event, Flushed, Progress, subscribe

PATIENCE_S = 60
STAGES: dict[str, Any] = {"capture": Captured, "write": Progress, "written": Flushed}  # an event that ends or is in it


def state(step: int, leaves: int = 4) -> dict[str, Any]:
    """Arrays over all processes, and the step."""
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(AxisType.Auto,))
    values = {f"l{i}": np.full((64, 32), step + i / 8, np.float32) for i in range(leaves)}
    specs = {name: P("d") if i % 2 == 0 else P() for i, name in enumerate(values)}
    arrays = {
        name: jax.make_array_from_callback(value.shape, NamedSharding(mesh, specs[name]), value.__getitem__)
        for name, value in values.items()
    }
    return arrays | {"step": step}


def is_whole(found: dict[str, Any], step: int, leaves: int = 4) -> bool:
    """Whether every bit that this process has is that of the step."""
    return found["step"] == step and all(
        (np.asarray(found[f"l{i}"].addressable_data(0)) == np.float32(step + i / 8)).all() for i in range(leaves)
    )


class Hit:
    """Sends itself a signal when its state is asked for, before anything of the save has begun."""

    def __init__(self, how: int | None) -> None:
        self.how = how

    def get_state(self) -> int:
        if self.how is not None:
            os.kill(os.getpid(), self.how)
        return 1

    def set_state(self, state: int) -> None:
        """Nothing is kept."""


def killed(root: str, victim: int, stage: str, how: int, *, waits: bool) -> dict[str, Any]:
    """Process ``victim`` gets a signal in the save of step 2, or between two steps; what the others are told."""
    coordinator = current_coordinator()
    mine = coordinator.rank == victim
    manager = jc.CheckpointManager(root, timeout_s=2)
    manager.save(1, state(1))
    manager.wait()
    coordinator.put(f"test/pid/{coordinator.rank}", str(os.getpid()).encode())
    meet("saved 1")
    pid = int(coordinator.get(f"test/pid/{victim}", timeout_s=PATIENCE_S))
    if victim == 0:  # it hosts the store, so it may stop only when the others have read all of this
        touch_and_wait(root, "ready", coordinator.rank, coordinator.size)
    if mine and stage == "step":
        os.kill(os.getpid(), how)
    if mine and stage in STAGES:
        stop = subscribe(lambda event: hit(event, stage, how, lambda: stop()))
    started, message = time.monotonic(), ""
    try:
        manager.save(2, state(2), extras={"hit": Hit(how if mine and stage == "extras" else None)})
        if waits:
            manager.wait()
        while True:
            manager.poll()
            time.sleep(0.05)  # a step of training
    except jc.CheckpointError as error:
        message = f"{error} {' '.join(getattr(error, '__notes__', []))}"
    told = {"message": message, "after_s": time.monotonic() - started, "listed": manager.all_steps()}
    if how != signal.SIGSTOP:
        return told
    if victim == 0:  # and with it the store through which all talk: its wake-up is agreed on in the file system
        touch_and_wait(root, "told", coordinator.rank, coordinator.size - 1 if coordinator.rank == 1 else 0)
        if coordinator.rank == 1:
            os.kill(pid, signal.SIGCONT)
        return told
    if not mine:
        # It is woken, hears of it too, and the job goes on with the same managers.
        coordinator.put(f"test/told/{coordinator.rank}", b"")
        if coordinator.rank == 0:
            for rank in set(range(coordinator.size)) - {victim}:
                coordinator.get(f"test/told/{rank}", timeout_s=PATIENCE_S)
            os.kill(pid, signal.SIGCONT)
    meet("all were told")
    manager.save(2, state(2), force=True)
    manager.wait()
    found = manager.restore(2, state(0))
    told |= {"again": manager.all_steps(), "whole": is_whole(found, 2)}
    manager.close()
    return told


def touch_and_wait(root: str, name: str, rank: int, n: int) -> None:
    """Say so in the file system, and wait until ``n`` processes have."""
    Path(f"{root} {name} {rank}").touch()
    while len(list(Path(root).parent.glob(f"* {name} *"))) < n:
        time.sleep(0.05)


def hit(event: Event, stage: str, how: int, stop: Any) -> None:
    if isinstance(event, STAGES[stage]):
        stop()  # once
        os.kill(os.getpid(), how)


def resumed(root: str) -> dict[str, Any]:
    """What a new job of any size finds, and that it can go on."""
    with jc.CheckpointManager(root, timeout_s=30) as manager:
        step, found = manager.resume(state(0))
        whole = step is not None and is_whole(found, step)
        manager.save((step or 0) + 1, state((step or 0) + 1))
        manager.wait()
        steps = manager.all_steps()
        manager.delete(steps[-1])
    return {"step": step, "whole": whole, "then": steps}


def train(root: str, kills: dict[str, float]) -> dict[str, Any]:
    """A loop that saves every step until a process is killed, ``kills``: rank -> seconds after its first step."""
    delay = kills.get(str(jax.process_index()))
    manager = jc.CheckpointManager(root, keep=jc.latest(3), timeout_s=2)
    start, found = manager.resume(state(0))
    seen = {"start": start, "whole": start is None or is_whole(found, start)}
    try:
        for step in range(0 if start is None else start + 1, 100_000):
            manager.save(step, state(step))
            if delay is not None:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
                delay = None
    except jc.CheckpointError as error:
        return seen | {"message": str(error)}
    raise AssertionError("nobody was killed")


def meet(name: str) -> None:
    """Wait for all processes."""
    coordinator = current_coordinator()
    coordinator.put(f"test/{name}/{coordinator.rank}", b"")
    for rank in range(coordinator.size):
        coordinator.get(f"test/{name}/{rank}", timeout_s=PATIENCE_S)
