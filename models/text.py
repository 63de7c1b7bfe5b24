"""Batches of real English text as bytes: the language reference that ships with Python.

A batch is a function of seed and step alone, so a run that resumes at a step sees what it would have seen.
"""

from __future__ import annotations

from functools import cache
from pydoc_data import topics

import numpy as np

VOCAB = 256
_HELD_OUT = 0.05


@cache
def corpus() -> np.ndarray:
    """About 460 KB of text, uint8 (bytes,), the same for every process of one Python version."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    data = np.frombuffer(text.encode("utf-8"), np.uint8)
    data.flags.writeable = False
    return data


def train_batch(*, seed: int, step: int, batch: int, length: int) -> np.ndarray:
    """Random passages, int32 (batch, length + 1): inputs and, moved by one, targets."""
    text = corpus()
    return _passages(text[: _boundary(text)], np.random.default_rng((seed, step)), batch, length)


def eval_batch(*, batch: int, length: int) -> np.ndarray:
    """The same passages at each call, from the end of the text, which training does not see."""
    text = corpus()
    return _passages(text[_boundary(text) :], np.random.default_rng(0), batch, length)


def _passages(text: np.ndarray, rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    starts = rng.integers(0, text.size - length, size=batch)
    return text[starts[:, None] + np.arange(length + 1)[None, :]].astype(np.int32)


def _boundary(text: np.ndarray) -> int:
    return int(text.size * (1 - _HELD_OUT))
