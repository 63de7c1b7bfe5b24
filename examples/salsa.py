"""SALSA: a soup of two fine-tuned models as the frozen reference of reinforcement learning (arXiv 2411.01798).

python examples/salsa.py [folder]

Two supervised models, fine-tuned from one base on different halves of the data, are averaged straight from storage onto
the policy's mesh. The average starts the policy, and stays as the frozen tree that the KL term holds it to. No library
function is needed beyond `average`: the reference is a second tree with the policy's sharding.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxckpt as jc
from jaxckpt import averaging

CONTEXTS, ACTIONS, WIDTH, BETA, STEPS = 64, 16, 32, 0.1, 200
Params = dict[str, jax.Array]


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    rng = np.random.default_rng(0)
    contexts = jnp.asarray(rng.standard_normal((CONTEXTS, 8)), jnp.float32)
    best = jnp.asarray(rng.integers(0, ACTIONS, CONTEXTS))
    reward = jax.nn.one_hot(best, ACTIONS) + jnp.asarray(0.1 * rng.standard_normal((CONTEXTS, ACTIONS)), jnp.float32)

    base = init(jax.random.key(0))
    for half in range(2):  # each saw the right answers of half of the contexts
        rows = slice(half * CONTEXTS // 2, (half + 1) * CONTEXTS // 2)
        jc.save(folder / f"sft{half}", fine_tune(base, contexts[rows], best[rows]), overwrite=True)

    mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(AxisType.Auto,))
    specs = {"in": PartitionSpec(None, "model"), "out": PartitionSpec("model")}
    like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs[n])) for n, x in base.items()}
    references = {
        "one model": jc.restore(folder / "sft0", like),
        "soup": averaging.average([folder / "sft0", folder / "sft1"], [0.5, 0.5], like=like),
    }
    found = {}
    for name, reference in references.items():
        # Copied: the policy is donated at every step, the reference never.
        policy = jax.tree.map(jnp.copy, reference)
        for _ in range(STEPS):
            policy = jax.block_until_ready(improve(policy, reference, contexts, reward))
        assert policy["in"].sharding == reference["in"].sharding
        gain, distance = measures(policy, reference, contexts, reward)
        found[name] = float(gain)
        start = float(measures(reference, reference, contexts, reward)[0])
        print(
            f"reference: {name:10} reward {start:.3f} -> {float(gain):.3f}, KL from the reference {float(distance):.3f}"
        )
    return 0 if found["soup"] > found["one model"] else 1


def init(key: jax.Array) -> Params:
    a, b = jax.random.split(key)
    return {"in": jax.random.normal(a, (8, WIDTH)), "out": jax.random.normal(b, (WIDTH, ACTIONS)) / 8}


def log_policy(params: Params, contexts: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(jnp.tanh(contexts @ params["in"]) @ params["out"])


def fine_tune(params: Params, contexts: jax.Array, answers: jax.Array) -> Params:
    def loss(p: Params) -> jax.Array:
        return -jnp.take_along_axis(log_policy(p, contexts), answers[:, None], axis=1).mean()

    step = jax.jit(lambda p: jax.tree.map(lambda x, g: x - 0.3 * g, p, jax.grad(loss)(p)))
    for _ in range(100):
        params = step(params)
    return params


def measures(policy: Params, reference: Params, contexts: jax.Array, reward: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The expected reward, and the divergence from the reference."""
    ours, theirs = log_policy(policy, contexts), log_policy(reference, contexts)
    return (jnp.exp(ours) * reward).sum(1).mean(), (jnp.exp(ours) * (ours - theirs)).sum(1).mean()


@partial(jax.jit, donate_argnums=0)
def improve(policy: Params, reference: Params, contexts: jax.Array, reward: jax.Array) -> Params:
    def objective(p: Params) -> jax.Array:
        gain, distance = measures(p, reference, contexts, reward)
        return gain - BETA * distance

    return jax.tree.map(lambda x, g: x + 0.5 * g, policy, jax.grad(objective)(policy))


if __name__ == "__main__":
    sys.exit(main())
