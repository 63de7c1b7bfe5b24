"""The images are real and their parts share none; the classifier names them, and its features are what metrics take."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxckpt.lcsc.metrics import frechet_distance
from models import classifier, images


@pytest.mark.parametrize(
    ("name", "side", "sizes"), [("digits", 8, (1000, 398, 399)), ("mnist", 14, (3000, 1000, 1000))]
)
def test_parts_share_no_image(name: str, side: int, sizes: tuple[int, ...]) -> None:
    data = images.load(name, seed=3)
    assert tuple(len(part.labels) for part in data) == sizes
    assert data.side == side
    assert all(part.pixels.dtype == np.float32 and abs(part.pixels).max() <= 1 for part in data)
    seen = [{row.tobytes() for row in part.pixels} for part in data]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert sorted(np.unique(data.test.labels)) == list(range(images.CLASSES))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="cifar"):
        images.load("cifar")


def test_it_names_digits_it_has_not_seen() -> None:
    data = images.load("digits")
    params = classifier.train(data.train, steps=300)
    assert classifier.accuracy(params, data.test) > 0.9
    features = classifier.features(data.side, params)
    assert features(jnp.asarray(data.test.pixels)).shape == (len(data.test.labels), classifier.FEATURES)
    real = float(frechet_distance(jnp.asarray(data.validation.pixels), jnp.asarray(data.test.pixels), features))
    noise = np.random.default_rng(0).uniform(-1, 1, data.test.pixels.shape).astype(np.float32)
    assert real < 0.1 * float(frechet_distance(jnp.asarray(noise), jnp.asarray(data.test.pixels), features))
