"""Train while saving, then make better models of the checkpoints: averages of many kinds, none of which trains again.

python examples/averaging.py [folder]

A classifier learns a noisy task at a constant rate, so that its last weights jump about. Every average is made from
storage, straight onto the mesh, and judged on data that none of the choices saw.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxckpt as jc
from jaxckpt import averaging

STEPS, EVERY, WIDTH, CLASSES = 600, 25, 64, 8


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(AxisType.Auto,))
    train, validation, test = (examples(seed, count) for seed, count in ((0, 2048), (1, 2048), (2, 8192)))
    like = jax.eval_shape(lambda: init(jax.random.key(0)))
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())), like
    )
    paths = run(folder, train)

    found = {"last": jc.restore(paths[-1], like)}
    found["uniform, newest 12"] = averaging.lawa(folder, 12, like=like)
    grid = averaging.average(paths, [averaging.ema_weights(len(paths), d) for d in (0.5, 0.8, 0.9, 0.95)], like=like)
    found["EMA, best of 4"] = min(grid, key=lambda params: float(loss(params, validation)))
    greedy = averaging.greedy_soup(
        paths, lambda params: float(loss(params, validation)), mode="min", progress=folder / "greedy.json", like=like
    )
    found["greedy soup"] = greedy.params
    learned = averaging.learned_soup(
        paths[-8:], lambda params: loss(params, validation), like=like, steps=20, normalize="sum", learning_rate=0.01
    )
    found["learned soup, newest 8"] = learned.params

    print(f"{'':24} validation   test")
    scores = {name: float(loss(params, test)) for name, params in found.items()}
    for name, params in found.items():
        print(f"{name:24} {float(loss(params, validation)):10.4f} {scores[name]:6.4f}")
    rise = averaging.barrier(found["last"], found["greedy soup"], lambda params: loss(params, test), n=11)
    print(f"loss barrier between the last weights and the greedy soup: {float(rise.height):.4f}")

    averaging.average_to(
        folder / "best", paths, greedy.weights, method="greedy soup", metric={"name": "loss", "value": greedy.score},
        like=like, overwrite=True,
    )  # fmt: skip
    print(f"saved with {len(jc.inspect(folder / 'best').parents)} parents: {folder / 'best'}")
    return 0 if scores["greedy soup"] < scores["last"] else 1


def run(folder: Path, train: tuple[jax.Array, jax.Array]) -> list[Path]:
    params, key, paths = init(jax.random.key(0)), jax.random.key(1), []
    for step in range(1, STEPS + 1):
        batch = jax.random.randint(jax.random.fold_in(key, step), (32,), 0, len(train[0]))
        params = update(params, (train[0][batch], train[1][batch]))
        if step > STEPS // 2 and step % EVERY == 0:
            paths.append(folder / f"{step}")
            jc.save(paths[-1], params, step=step, overwrite=True)
    return paths


def examples(seed: int, count: int) -> tuple[jax.Array, jax.Array]:
    rng, teacher = np.random.default_rng(seed), np.random.default_rng(99).standard_normal((16, CLASSES))
    x = rng.standard_normal((count, 16))
    noisy = np.tanh(x) @ teacher + 1.5 * rng.standard_normal((count, CLASSES))
    return jnp.asarray(x, jnp.float32), jnp.asarray(noisy.argmax(1))


def init(key: jax.Array) -> dict[str, jax.Array]:
    a, b = jax.random.split(key)
    return {"in": jax.random.normal(a, (16, WIDTH)) / 4, "out": jax.random.normal(b, (WIDTH, CLASSES)) / 8}


@jax.jit
def loss(params: dict[str, jax.Array], data: tuple[jax.Array, jax.Array]) -> jax.Array:
    scores = jax.nn.log_softmax(jnp.tanh(data[0] @ params["in"]) @ params["out"])
    return -jnp.take_along_axis(scores, data[1][:, None], axis=1).mean()


@jax.jit
def update(params: dict[str, jax.Array], data: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params, data))


if __name__ == "__main__":
    sys.exit(main())
