"""Train a small LLaMA on all devices of a job, with checkpoints; goes on from the newest one, on whatever mesh.

On a pod, Slurm or Open MPI:  train.py ROOT --distributed
By hand:                      train.py ROOT --coordinator host:9876 --processes 2 --process 0, and so on
Facts are printed as lines of JSON; "saved" and "restored" carry a fingerprint of the state, which is the same on
every mesh. SIGTERM on any process: all save the same step and end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from typing import Any

import jax

import jaxckpt as jc
from jaxckpt.checkpoint.fingerprint import fingerprint
from jaxckpt.core.events import Committed, Event, subscribe
from models import text
from models.llama import PRESETS, LlamaConfig
from models.sharding import batch_sharding, make_mesh
from models.training import TrainState, abstract_state, init_state, train_step


def main() -> None:
    """Train, or go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder of the run: one that all processes see, or gs://bucket/folder")
    parser.add_argument("--preset", default="124m", choices=sorted(PRESETS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="passages per device of the data axis")
    parser.add_argument("--length", type=int, default=64, help="tokens per passage")
    parser.add_argument("--mesh", help="data x model, as 8x2; by default all devices are on the data axis")
    parser.add_argument("--distributed", action="store_true", help="join the job that the environment describes")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    args = parser.parse_args()
    if args.distributed or args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)

    config = PRESETS[args.preset]
    data, model = map(int, args.mesh.split("x")) if args.mesh else (jax.device_count(), 1)
    mesh = make_mesh(data, model)
    update = train_step(config, mesh, fsdp=True)
    due = jc.every(steps=args.save_every) | jc.at({args.steps}) | jc.on_preemption()
    subscribe(tell_durable)
    with jc.CheckpointManager(args.root, save=due) as manager:
        state = resume(manager, config, mesh)
        for step in range(int(state.step) + 1, args.steps + 1):
            tokens = text.train_batch(seed=0, step=step, batch=args.batch * data, length=args.length)
            batch = jax.make_array_from_callback(tokens.shape, batch_sharding(mesh), lambda part, t=tokens: t[part])
            state, loss = update(state, batch)
            tell("step", step=step, loss=float(loss))
            if manager.should_save(step):
                tell("saving", step=step, digest=digest(state))
            manager.save(step, state)
            if manager.preempted:
                break
    tell("done", step=int(state.step))


def resume(manager: jc.CheckpointManager, config: LlamaConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """The newest checkpoint on this mesh, or a fresh state."""
    step, state = manager.resume(like=abstract_state(config, mesh, fsdp=True))
    if step is None:
        return init_state(config, mesh, fsdp=True)
    tell("restored", step=step, digest=digest(state))
    return state


def tell_durable(event: Event) -> None:
    """On process 0, from the thread that has committed a step."""
    if isinstance(event, Committed):
        tell("durable", step=event.step)


def digest(state: TrainState) -> str:
    """A word for the bits of a state, whatever its sharding."""
    return hashlib.sha256(repr(sorted(fingerprint(state).items())).encode()).hexdigest()[:16]


def tell(event: str, **facts: Any) -> None:
    """One line of JSON from process 0."""
    if jax.process_index() == 0:
        line = {"event": event, "processes": jax.process_count(), "devices": jax.device_count(), **facts}
        sys.stdout.write(json.dumps(line) + "\n")  # at once, as threads tell as well
        sys.stdout.flush()


if __name__ == "__main__":
    main()
