"""An NNX LLaMA with FSDP and tensor parallelism: trains, stops, and goes on on another mesh.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/nnx_llama.py /tmp/llama
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

import jaxckpt as jc
from jaxckpt.integrations import nnx as jnx
from models.llama import Llama, LlamaConfig
from models.sharding import batch_sharding, make_mesh, shardings_of
from models.text import train_batch

CONFIG = LlamaConfig(embed=64, mlp=128, layers=2, heads=4, kv_heads=2)


def make() -> tuple[Llama, nnx.Optimizer]:
    model = Llama(CONFIG, rngs=nnx.Rngs(params=0))
    return model, nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)


@nnx.jit
def train_step(model: Llama, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    def loss_of(model: Llama) -> jax.Array:
        logits = model(tokens[:, :-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
    return loss


def run(folder: Path, mesh: Mesh, last: int) -> Llama:
    """A program: goes on from the newest step, on whatever mesh, and trains to step ``last``."""
    with jc.CheckpointManager(folder, save=jc.every(steps=8), keep=jc.latest(2)) as manager:
        found, (model, optimizer) = jnx.resume(manager, make, where(mesh))  # restored, or made, where it belongs
        begin = 1 if found is None else found + 1
        loss = jnp.zeros(())
        for step in range(begin, last + 1):
            batch = train_batch(seed=0, step=step, batch=8, length=64)
            loss = train_step(model, optimizer, jax.device_put(batch, batch_sharding(mesh)))
            manager.save(step, nnx.state((model, optimizer)), metrics={"loss": float(loss)})
    print(f"  steps {begin}-{last} on {dict(mesh.shape)}: loss {float(loss):.3f}; there is {manager.all_steps()}")
    return model


def where(mesh: Mesh):  # heads and hidden units over "model", the rest of each weight over "data"
    return lambda state: shardings_of(state, mesh, fsdp=True)


def main(folder: Path) -> None:
    n = jax.device_count()
    model_axis = 2 if n % 2 == 0 else 1
    mesh, turned = make_mesh(n // model_axis, model_axis), make_mesh(model_axis, n // model_axis)
    model = run(folder, mesh, 12)
    print(f"a LLaMA of {sum(x.size for x in jax.tree.leaves(nnx.state(model))):,} parameters")
    print("  the power fails at step 12, and another slice takes over from step 8")
    kernel = run(folder, turned, 12).layers[0].mlp.gate
    print(f"  a weight {kernel.shape} lies in pieces of {shard_shape(kernel)}")


def shard_shape(variable: nnx.Variable) -> tuple[int, ...]:
    return variable.get_value().addressable_shards[0].data.shape


if __name__ == "__main__":
    main(Path(sys.argv[1]))
