"""A Linen classifier learns handwritten digits, stops half-way, and goes on from its checkpoint on another mesh.

python examples/linen_digits.py /tmp/digits      (pip install scikit-learn)
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from sklearn.datasets import load_digits

import jaxckpt as jc
from jaxckpt.integrations import linen as jln
from models.mlp import Classifier, accuracy, new_state, train_step
from models.sharding import make_mesh

MODEL = Classifier()
SHADES = " .:-=+*#"


def main(folder: Path) -> None:
    pixels, names = load_digits(return_X_y=True)
    images, labels = np.asarray(pixels, np.float32) / 16, np.asarray(names, np.int32)
    devices = jax.device_count()
    first = make_mesh(1, 2 if devices % 2 == 0 else 1)
    other = make_mesh(2 if devices % 2 == 0 else 1, 1)

    with jc.CheckpointManager(folder, save=jc.every(steps=30), keep=jc.best(1, "loss")) as manager:
        _, state = jln.resume(manager, lambda: new_state(MODEL, 64), first)
        state = train(manager, state, first, images, labels, 60)
    print(f"step 60 saved, {percent(state, first, images, labels)} right on digits it has not seen")

    # Another program begins here: it makes nothing, it restores where things belong.
    with jc.CheckpointManager(folder, save=jc.every(steps=30), keep=jc.best(1, "loss")) as manager:
        _, state = jln.resume(manager, lambda: new_state(MODEL, 64), other)
        print(f"restored on {dict(other.shape)}, not {dict(first.shape)}: {percent(state, other, images, labels)}")
        state = train(manager, state, other, images, labels, 300)
    print(f"steps {manager.all_steps()} are kept: the newest, and the best by loss")
    print(f"step {int(state.step)}: {percent(state, other, images, labels)} right\n")
    with jax.set_mesh(other):
        guess = int(state.apply_fn({"params": state.params}, images[-1:]).argmax())
    for row in images[-1].reshape(8, 8):
        print("    " + "".join(SHADES[int(value * 7)] * 2 for value in row))
    print(f"\nthis is a {guess}, it says; it is a {labels[-1]}")


def train(manager: jc.CheckpointManager, state, mesh: Mesh, images, labels, last: int):
    with jax.set_mesh(mesh):
        for step in range(int(state.step) + 1, last + 1):
            chosen = np.random.default_rng(step).integers(0, 1500, 128)  # a batch is a function of its step
            state, loss = train_step(state, images[chosen], labels[chosen])
            manager.save(step, state, metrics={"loss": float(loss)})
    return state


def percent(state, mesh: Mesh, images, labels) -> str:
    with jax.set_mesh(mesh):
        return f"{float(accuracy(state, images[1500:], labels[1500:])):.1%}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
