"""The training of ``lcsc_consistency.py``, its arguments and its pictures."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import jax
import numpy as np

import jaxckpt as jc
from models import consistency, diffusion, images

EVERY = 50  # steps between checkpoints


def arguments(about: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(tempfile.gettempdir(), "lcsc_consistency"))
    parser.add_argument("--images", choices=images.NAMES, default="digits")
    parser.add_argument("--smoke", action="store_true", help="small and short, poor images")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    return args


def tiled(rows: list[np.ndarray]) -> np.ndarray:
    """One picture of rows of images (n, s, s), every pixel 3 x 3, with a margin around each image."""
    lines = [np.hstack(list(np.pad(row, ((0, 0), (1, 1), (1, 1)), constant_values=-1))) for row in rows]
    return np.kron(np.vstack(lines), np.ones((3, 3)))


def train(root: Path, config: diffusion.DenoiserConfig, pixels: jax.Array, begin: int, end: int):
    advance = consistency.train(config, batch=64, steps=EVERY)
    with jc.CheckpointManager(root, save=jc.every(steps=EVERY)) as manager:
        _, state = manager.resume(like=diffusion.new_state(config, learning_rate=1e-3))
        for step in range(int(state.step) + EVERY, end + 1, EVERY):
            state, loss = advance(state, pixels, None)
            manager.save(step, state, metrics={"loss": float(loss)})
    print(f"trained to step {int(state.step)}; checkpoints of every {EVERY} steps after {begin} are searched")
    return state
