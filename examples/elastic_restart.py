"""Four processes train; one gets SIGTERM; all save at one step and leave; two go on. No sample is lost or repeated.

python examples/elastic_restart.py /tmp/elastic      (a parent that starts real jax.distributed jobs on this machine)
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

SAMPLES, BATCH = 24_000, 12


def worker(folder: Path, port: str, size: int, rank: int) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxckpt as jc
    from jaxckpt.integrations.data import ElasticIterator

    jax.distributed.initialize(f"localhost:{port}", size, rank)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.NamedSharding(mesh, jax.P("data"))
    make = jax.jit(lambda: {"seen": jnp.zeros(BATCH), "step": jnp.zeros((), jnp.int32)}, out_shardings=where_of(mesh))
    data = ElasticIterator(np.arange(SAMPLES), batch_size=BATCH, seed=1)
    add = jax.jit(lambda s, x: {"seen": s["seen"] + x, "step": s["step"] + 1}, donate_argnums=0)
    # SIGTERM on any process is news for all; each keeps the state of its data, and any number of them goes on from it.
    with jc.CheckpointManager(folder / "steps", save=jc.on_preemption()) as manager:
        before, state = manager.resume(like=make(), extras={"data": data})
        for step, batch in enumerate(data, start=(before or 0) + 1):
            with (folder / f"seen-{size}-{rank}.txt").open("a") as log:
                log.write("".join(f"{sample}\n" for sample in batch))
            state = add(state, jax.make_array_from_process_local_data(where, np.asarray(batch, np.float32)))
            if rank == 0:
                print(f"step {step}", flush=True)
            manager.save(step, state, extras={"data": data})
            if manager.preempted:
                break
    jax.distributed.shutdown()


def where_of(mesh):
    import jax

    return {"seen": jax.NamedSharding(mesh, jax.P("data")), "step": jax.NamedSharding(mesh, jax.P())}


def job(folder: Path, size: int, *, preempt: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, __file__, str(folder), port, str(size)]
    workers = [subprocess.Popen([*command, str(r)], stdout=subprocess.PIPE, text=True, env=env) for r in range(size)]
    lines = []
    for line in workers[0].stdout or ():
        lines.append(line.strip())
        if preempt and line.strip() == "step 3":
            print(f"  {size} processes are at step 3: SIGTERM to process {size - 1}")
            workers[-1].send_signal(signal.SIGTERM)
    if any(worker.wait(60) for worker in workers):
        raise SystemExit("a process failed")
    print(f"  {size} processes left after {lines[-1]}, {sorted(p.name for p in (folder / 'steps').iterdir())} is there")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    job(folder, 4, preempt=True)
    job(folder, 2, preempt=False)
    seen = sorted(int(line) for path in folder.glob("seen-*.txt") for line in path.read_text().split())
    print(f"  {len(seen)} samples seen by 4 and then 2 processes, each once: {seen == list(range(SAMPLES))}")


if __name__ == "__main__":
    path, *rest = sys.argv[1:]
    worker(Path(path), rest[0], int(rest[1]), int(rest[2])) if rest else main(Path(path))
