"""The text: real, split in two, and the same batch for the same seed and step."""

from __future__ import annotations

import numpy as np

from models import text


def test_corpus_is_english() -> None:
    data = bytes(text.corpus())
    assert len(data) > 300_000
    assert data.count(b" the ") > 1_000


def test_batch_depends_on_seed_and_step_alone() -> None:
    def batch(seed: int, step: int) -> np.ndarray:
        return text.train_batch(seed=seed, step=step, batch=4, length=16)

    np.testing.assert_array_equal(batch(3, 7), batch(3, 7))
    assert (batch(3, 7) != batch(3, 8)).any()
    assert (batch(3, 7) != batch(4, 7)).any()
    assert batch(3, 7).shape == (4, 17)
    assert batch(3, 7).dtype == np.int32


def test_held_out_text_is_not_trained_on() -> None:
    held = bytes(text.eval_batch(batch=1, length=200).astype(np.uint8)[0])
    whole = bytes(text.corpus())
    assert whole.rindex(held) >= int(len(whole) * 0.95)
