"""Orbax restores what jaxckpt saved, and jaxckpt restores what Orbax saved: the same calls, the same files.

Run it:  python examples/orbax_both_ways.py [folder]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import jaxckpt as jc


def main() -> int:
    """The exit status is 0 if all four ways give back equal trees."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="jaxckpt-example-")).absolute()
    key = jax.random.key(0)
    tree = {
        "layers": [{"kernel": jax.random.normal(key, (64, 32)), "scale": jnp.ones(32, jnp.bfloat16)} for _ in range(3)],
        "step": jnp.array(7),
    }
    orbax = ocp.PyTreeCheckpointer()
    jc.save(root / "ours", tree)
    orbax.save(root / "orbax", tree)

    # Orbax warns where it is not told which sharding is wanted; `item` alone tells it the structure.
    how = ocp.checkpoint_utils.construct_restore_args(tree)
    restored = {
        "ours, by jaxckpt": jc.restore(root / "ours", tree),
        "ours, by Orbax": orbax.restore(root / "ours", item=tree, restore_args=how),
        "Orbax's, by jaxckpt": jc.restore(root / "orbax", tree),
        "Orbax's, by Orbax": orbax.restore(root / "orbax", item=tree, restore_args=how),
    }
    for name, found in restored.items():
        print(f"{name:20} equal to the bit: {same(found, tree)}")
    print(jc.inspect(root / "ours"))
    return 0 if all(same(found, tree) for found in restored.values()) else 1


def same(a: Any, b: Any) -> bool:
    """Whether two trees have the same structure and equal bytes."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


if __name__ == "__main__":
    sys.exit(main())
