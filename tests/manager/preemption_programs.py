"""What the processes of the preemption tests do; run by run_processes, results as JSON."""

import os
import signal
import time

import jax
import numpy as np

import jaxckpt as jc
from jaxckpt.coordination.jax_client import current_coordinator, preemption_service
from jaxckpt.coordination.session import Session, session_name
from jaxckpt.core.events import Preempted, subscribe
from jaxckpt.manager.preemption import listen

MOST_STEPS = 8000  # the service takes its time


def train(root: str, victims: dict[str, int], in_step: bool, every: int, signals: list[int]) -> dict:
    """A loop that saves when told to; ``victims`` get their signal before a step: rank -> step."""
    coordinator = current_coordinator()
    events: list[object] = []
    subscribe(events.append)
    notice = listen(*signals, timeout_s=30)
    rank, saved = coordinator.rank, None
    for step in range(1, MOST_STEPS):
        if victims.get(str(rank)) == step:
            os.kill(os.getpid(), signals[0] if signals else signal.SIGTERM)
        if in_step:
            _train_step(step)
        else:
            time.sleep(0.01 * (1 + rank % 2))  # the work of a step: some are slower
        if step % every == 0 and notice.reached(step):
            jc.save(f"{root}/{step}", {"step": step, "w": np.arange(8)}, timeout_s=30)
            saved = step
            break
    again = notice.reached(MOST_STEPS)
    notice.close()
    reasons = [event.reason for event in events if isinstance(event, Preempted)]
    return {"saved": saved, "again": again, "reasons": reasons, "service": preemption_service() is not None}


def _train_step(step: int) -> None:
    """No process begins the next step before all have done this one, as in a step with a collective."""
    session = Session(current_coordinator(), session_name("training"))
    session.arrive("step", str(step).encode())
    assert session.collect("step", timeout_s=30) == [str(step).encode()] * jax.process_count()
    session.close()
    time.sleep(0.005)


def one_leaves_early(victim: int) -> list:
    """Process ``victim`` ends its loop; another hears of a signal afterwards and must not wait for it."""
    coordinator = current_coordinator()
    notice = listen(signal.SIGUSR1, timeout_s=30)
    notice.reached(1)
    if coordinator.rank == victim:
        notice.close()
        coordinator.put("left", b"")
        coordinator.get("told", timeout_s=30)
        return [coordinator.rank]
    coordinator.get("left", timeout_s=30)
    os.kill(os.getpid(), signal.SIGUSR1)
    step = 2
    while not notice.reached(step):
        step += 1
    coordinator.put("told", b"")
    notice.close()
    return [coordinator.rank, step]
