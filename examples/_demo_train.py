"""The demo's trainer: goes on from the newest committed step of a folder, or starts one, and saves as it goes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
from _demo_state import (
    BATCH,
    CONFIG,
    LENGTH,
    differing,
    digests,
    emit,
    held_out_loss,
    like,
    mesh_of,
    newest_committed,
    read_record,
    size_bytes,
    write_record,
)

import jaxckpt as jc
from models import text
from models.sharding import batch_sharding
from models.training import TrainState, init_state, train_step


def main() -> None:
    """Train up to a step; each fact worth showing is printed as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--mesh", required=True, help="data x model, as 4x2")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-every", type=int, required=True)
    args = parser.parse_args()

    mesh = mesh_of(args.mesh)
    state = resume(args.root, args.records, mesh)
    if state is None:
        state = init_state(CONFIG, mesh, fsdp=True)
    emit("ready", devices=mesh.size, leaves=len(jax.tree.leaves(state)), size_bytes=size_bytes(state))

    update = train_step(CONFIG, mesh, fsdp=True)
    pending = None
    for step in range(int(state.step), args.steps):
        tokens = text.train_batch(seed=0, step=step, batch=BATCH, length=LENGTH)
        state, loss = update(state, jax.device_put(tokens, batch_sharding(mesh)))
        emit("step", step=step + 1, loss=float(loss))
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            if pending is not None:
                pending.result(timeout_s=60)
            write_record(args.records, step + 1, {"loss": held_out_loss(state, mesh), "leaves": digests(state)})
            started = time.perf_counter()
            pending = jc.save_async(args.root / str(step + 1), state)
            # From here on the state is captured: the next update may overwrite its memory, and does.
            emit("saving", step=step + 1, stall_s=time.perf_counter() - started)
    if pending is not None:
        pending.result(timeout_s=60)
    emit("done", step=int(state.step))


def resume(root: Path, records: Path, mesh: jax.sharding.Mesh) -> TrainState | None:
    """The newest committed state, on this mesh, compared leaf by leaf with what its trainer wrote down."""
    step, torn = newest_committed(root)
    if step is None:
        return None
    started = time.perf_counter()
    state = jax.block_until_ready(jc.restore(root / str(step), like(mesh)))
    seconds = time.perf_counter() - started
    saved = read_record(records, step)
    emit(
        "restored",
        step=step,
        torn=torn,
        seconds=seconds,
        leaves=len(saved["leaves"]),
        differing=differing(state, saved["leaves"]),
        loss_saved=saved["loss"],
        loss_restored=held_out_loss(state, mesh),
    )
    return state


if __name__ == "__main__":
    main()
