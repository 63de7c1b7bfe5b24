"""For stage_recovery.py: one process of a pipeline, which keeps its part of the run outside of itself at every step.

python examples/_stage_worker.py FOLDER --coordinator host:9876 --processes 4 --process 0     (on a pod: --distributed)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _stage_memory import HostMemory, bits, shards
from _stage_resume import resume
from _stage_train import Trainer

import jaxckpt as jc
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.events import Recovered, subscribe
from models import text
from models.presets import PIPELINE_PRESETS

CANNOT_GO_ON = 2  # exit code: another launch would fail in the same way


def main() -> None:
    args = arguments().parse_args()
    jax.config.update("jax_compilation_cache_dir", args.cache)  # the next launch compiles little
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.distributed.initialize(args.coordinator, args.processes, args.process, heartbeat_timeout_seconds=10)
    if args.stages % jax.process_count() or jax.device_count() % args.stages:
        have = f"{jax.process_count()} processes with {jax.device_count()} devices together"
        raise InvalidArgumentError(f"--stages {args.stages} over {have}: every process holds as many whole stages.")
    trainer = Trainer(args.stages, args.preset, swap=args.swap, copy_every=args.copy_every)
    memory = HostMemory(Path(args.memory) / str(jax.process_index()))
    subscribe(lambda event: tell("event", text=str(event)) if isinstance(event, Recovered) else None)
    run, done, log = resume(args, trainer, memory, tell)
    held_out = text.eval_batch(batch=32, length=32)
    loss = float(trainer.loss(run.state["params"], held_out))
    for step in range(done, args.steps + 1):
        if step > done:
            run, _ = trainer.step(run, train_batch(trainer, step), np.int32(step - 1))
            loss = float(trainer.loss(run.state["params"], held_out))
        memory.write(step, run, {"taken": int(run.copies.taken), "log": log.metadata()})
        tell("step" if step > done else "ready", step=step, bits=bits(shards(run.state)), held_out=loss)
        if step > done and step % args.save_every == 0:
            jc.save(f"{args.folder}/{step}", run, step=step, metadata=log.metadata(), overwrite=True)
    jax.distributed.shutdown()


def train_batch(trainer: Trainer, step: int) -> np.ndarray:
    return text.train_batch(seed=0, step=step, batch=16 * trainer.mesh.shape["data"], length=32)


def tell(kind: str, **facts: Any) -> None:
    """One line of JSON."""
    sys.stdout.write(json.dumps({"kind": kind, "process": jax.process_index()} | facts) + "\n")
    sys.stdout.flush()


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of checkpoints, every --save-every steps: one that all processes see, or a URL")
    parser.add_argument("--memory", default="/dev/shm/stages", help="folder in the memory of this machine")
    parser.add_argument("--cache", default="/tmp/stages-compiled", help="folder for compiled programs")
    for name, default in (("stages", 4), ("steps", 40), ("save-every", 10), ("copy-every", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--preset", choices=sorted(PIPELINE_PRESETS), help="of models; without it a tiny one")
    parser.add_argument("--swap", action="store_true", help="half of the microbatches out of order, as in CheckFree+")
    parser.add_argument("--no-copies", action="store_true", help="do as if no stage had a copy")
    parser.add_argument("--source", help="where a lost stage comes from; without it the cheapest is chosen")
    parser.add_argument("--distributed", action="store_true", help="join the job that the environment describes")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    return parser


if __name__ == "__main__":
    try:
        main()
    except InvalidArgumentError:
        traceback.print_exc()
        os._exit(CANNOT_GO_ON)
    except Exception:  # another process died: leave at once, so that those who wait for this one notice too
        traceback.print_exc()
        os._exit(1)
