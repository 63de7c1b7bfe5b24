"""For stage_recovery.py: the same losses in one process, where a stage is lost when all that it held becomes NaN."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from _stage_memory import bits, shards
from _stage_resume import newest_checkpoint, recovered
from _stage_train import Run, Trainer
from _stage_worker import arguments, train_batch

import jaxckpt as jc
from jaxckpt.core.events import Recovered, subscribe
from jaxckpt.recovery.record import RecoveryLog
from models import text


def simulate(folder: str, options: list[str], losses: list[tuple[int, list[int]]]) -> list[dict[str, Any]]:
    """Trains, losing stages as ``losses`` says: (step, stages). Returns what workers would have told."""
    stop = subscribe(lambda event: print(event) if isinstance(event, Recovered) else None)
    try:
        return _simulate(folder, options, losses)
    finally:
        stop()


def _simulate(folder: str, options: list[str], losses: list[tuple[int, list[int]]]) -> list[dict[str, Any]]:
    args = arguments().parse_args([folder, *options])
    facts: list[dict[str, Any]] = []
    trainer = Trainer(args.stages, args.preset, swap=args.swap, copy_every=args.copy_every)
    held_out = text.eval_batch(batch=32, length=32)
    run, log, step, launch = trainer.begin(), RecoveryLog(), 0, 0

    def tell(kind: str, **more: Any) -> None:
        facts.append({"kind": kind, "process": 0, "launch": launch} | more)

    def look(kind: str) -> None:
        loss, found = float(trainer.loss(run.state["params"], held_out)), shards(run.state)
        for stage in range(args.stages):
            own = {name: part for name, part in found.items() if name.split("@")[1].split(",")[0] == str(stage)}
            tell(kind, process=stage, step=step, bits=bits(own), held_out=loss)

    look("ready")
    while step < args.steps:
        run, _ = trainer.step(run, train_batch(trainer, step + 1), np.int32(step))
        step += 1
        look("step")
        if step % args.save_every == 0:
            jc.save(f"{folder}/{step}", run, step=step, metadata=log.metadata(), overwrite=True)
        if launch < len(losses) and losses[launch][0] == step:
            lost, launch = losses[launch][1], launch + 1
            taken, saved = int(run.copies.taken), newest_checkpoint(args)
            run, step, log = recovered(args, trainer, without(run, lost), lost, step, taken, saved, log, tell)
            look("ready")
    return facts


def without(run: Run, lost: list[int]) -> Run:
    def one(x: jax.Array) -> jax.Array:
        if tuple(x.sharding.spec)[:1] != ("stage",):  # pyright: ignore[reportAttributeAccessIssue]
            return x
        host = np.array(x)
        host[lost] = np.nan if np.issubdtype(x.dtype, np.floating) else np.iinfo(x.dtype).max
        return jax.device_put(host, x.sharding)

    return jax.tree.map(one, run)
