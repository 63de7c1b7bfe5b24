"""For stage_recovery.py: what to train on from, when processes have lost their part of a run or none of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from _stage_memory import HostMemory, assemble, tell_all
from _stage_train import Run, Trainer

import jaxckpt as jc
from jaxckpt.recovery.copies import init_copies
from jaxckpt.recovery.plan import Available, CostModel, RecoveryPlan, plan_recovery
from jaxckpt.recovery.record import RecoveryLog
from jaxckpt.recovery.recover import recover_stage


def resume(
    args: argparse.Namespace, trainer: Trainer, memory: HostMemory, tell: Callable[..., None]
) -> tuple[Run, int, RecoveryLog]:
    """This process's part from its host memory; the part of a process that has none is recovered from the others'."""
    saved, mine = newest_checkpoint(args), memory.steps()
    have = [one["steps"] for one in tell_all({"steps": mine})]
    if not any(have) and saved:  # all were lost
        log = RecoveryLog.from_metadata(jc.inspect(f"{args.folder}/{saved}").metadata)
        return jc.restore(f"{args.folder}/{saved}", like=trainer.abstract), saved, log
    if not any(have):
        return trainer.begin(), 0, RecoveryLog()
    step = min(steps[-1] for steps in have if steps)  # the last that all survivors have done
    parts, facts = memory.read(step) if mine else ({}, {})
    finite = all(np.isfinite(part).all() for name, part in parts.items() if name.startswith("state"))
    told = tell_all(facts | {"finite": finite})
    survivor = next(one for one, steps in zip(told, have, strict=True) if steps)
    run, log = assemble(trainer.abstract, parts), RecoveryLog.from_metadata(survivor["log"])
    group = args.stages // jax.process_count()
    lost = [s for s in range(args.stages) if not have[s // group]]
    bad = frozenset(s for s in range(args.stages) if not told[s // group]["finite"])
    if not lost:
        return run, step, log
    return recovered(args, trainer, run, lost, step, survivor["taken"], saved, log, tell, bad)


def recovered(
    args: argparse.Namespace, trainer: Trainer, run: Run, lost: list[int], step: int, taken: int, saved: int | None,
    log: RecoveryLog, tell: Callable[..., None], bad: frozenset[int] = frozenset(),
) -> tuple[Run, int, RecoveryLog]:  # fmt: skip
    """Choose where the lost stages come from, and fill them."""
    checkpoint = f"{args.folder}/{saved}"
    available = Available(
        copies={} if args.no_copies else dict.fromkeys(range(args.stages), step - taken),
        bad=bad,
        checkpoint_age=step - saved if saved else None,
        checkpoint_path=checkpoint if saved else "",
    )
    stage_bytes = sum(x.nbytes for x in jax.tree.leaves(run.copies.values)) // args.stages
    plan = plan_recovery(lost, trainer.layout, available, CostModel(stage_bytes=stage_bytes), source=args.source)
    run, log = refilled(trainer, run, plan, step, checkpoint), log.add(plan, step=step)
    if plan.rollback and saved:
        step, log = saved, log.rolled_back(saved)
    tell("recovered", step=step, lost=lost, sources=[one.source for one in plan.steps] or ["rollback"], why=plan.why)
    return run, step, log


def refilled(trainer: Trainer, run: Run, plan: RecoveryPlan, step: int, checkpoint: str) -> Run:
    """The lost stages filled as planned, the others as they are; in a rollback all come from the checkpoint."""
    if plan.rollback:
        return jc.restore(checkpoint, like=trainer.abstract)
    state, layout, saved = run.state, trainer.layout, None
    if any(one.source == "checkpoint_stage" for one in plan.steps):  # the stages' weights alone, each process its own
        like: Any = {"params": {"stages": trainer.abstract.state["params"]["stages"]}}
        saved = jc.restore(checkpoint, like={"state": like}, only="state.params.stages")["state"]["params"]
    for one in plan.steps:
        state = recover_stage(
            state, replace(plan, steps=(one,)), trainer.mesh, norms=run.norms.clipped, tx=trainer.tx, step=step,
            copies=saved if one.source == "checkpoint_stage" else run.copies.values, fill_replicated=True,
        )  # fmt: skip
    # The lost stage held the copy of the one before it: all are taken anew.
    return Run(state, run.norms, init_copies({"stages": state["params"]["stages"]}, layout, trainer.mesh, step=step))


def newest_checkpoint(args: argparse.Namespace) -> int | None:
    """Its step, on whatever storage."""
    for step in range(args.steps // args.save_every * args.save_every, 0, -args.save_every):
        try:
            return jc.inspect(f"{args.folder}/{step}").step
        except (jc.NotFoundError, jc.NotCommittedError):
            continue
    return None
