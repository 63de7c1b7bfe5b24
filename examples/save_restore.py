"""Save and restore a training state over every process of a job: one machine, or all workers of a TPU pod.

On one machine:  python examples/save_restore.py [folder]
On a pod:        tpu_scripts/save_restore.sh (it runs this with --distributed on every worker)
By hand:         ... folder --coordinator localhost:9876 --processes 2 --process 0, and the same with --process 1
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import jaxckpt as jc
from models.llama import PRESETS
from models.sharding import make_mesh
from models.training import abstract_state, init_state


def main() -> int:
    """The exit status is 0 if every shard that this process holds came back equal to the bit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "path",
        nargs="?",
        help="a folder that all processes see, or gs://bucket/folder; of one process: a temporary one",
    )
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--distributed", action="store_true", help="join the job that the environment describes")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    args = parser.parse_args()
    if args.distributed or args.coordinator:
        if args.path is None:
            parser.error("several processes need a path that all of them see")
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    path = args.path or str(Path(tempfile.mkdtemp(prefix="jaxckpt-example-")) / "state")
    print(f"saving to {path}", flush=True)
    return 1 if save_and_restore(path, args.preset) else 0


def save_and_restore(path: str, preset: str = "tiny") -> int:
    """Save, restore on another mesh and back; returns how many arrays differ. All processes call it together."""
    config = PRESETS[preset]
    model = 2 if jax.device_count() % 2 == 0 else 1
    mesh = make_mesh(jax.device_count() // model, model)
    state = jax.block_until_ready(init_state(config, mesh, fsdp=True))

    started = time.perf_counter()
    jc.save(path, state)
    saved = time.perf_counter()
    # On the mesh turned round, so that bytes have to change hands.
    turned = make_mesh(model, jax.device_count() // model)
    moved = jax.block_until_ready(jc.restore(path, abstract_state(config, turned, fsdp=True)))
    restored = time.perf_counter()
    back = jc.restore(path, abstract_state(config, mesh, fsdp=True))

    wrong = sum(not _equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True))
    print(
        f"process {jax.process_index()} of {jax.process_count()}: {len(jax.tree.leaves(moved))} arrays on "
        f"{jax.device_count()} devices, saved in {saved - started:.2f} s, restored on another mesh in "
        f"{restored - saved:.2f} s, {wrong} differ after the way back",
        flush=True,
    )
    return wrong


def _equal(a: jax.Array, b: jax.Array) -> bool:
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    pairs = zip(a.addressable_shards, b.addressable_shards, strict=True)
    return all(np.asarray(x.data).tobytes() == np.asarray(y.data).tobytes() for x, y in pairs)


if __name__ == "__main__":
    sys.exit(main())
