"""Claims about the metrics, against numpy and scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.lcsc import metrics

RNG = np.random.default_rng(1)
X = RNG.normal(size=(200, 5)).astype(np.float32) @ RNG.normal(size=(5, 5)).astype(np.float32)
Y = RNG.normal(size=(200, 5)).astype(np.float32) + 0.5


def test_frechet_distance_is_scipys() -> None:
    s1, s2 = np.cov(X.T.astype(np.float64)), np.cov(Y.T.astype(np.float64))
    expected = ((X.mean(0) - Y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * np.real(np.asarray(sqrtm(s1 @ s2))))
    assert float(jax.jit(metrics.frechet_distance)(X, Y)) == pytest.approx(expected, rel=1e-3)
    assert float(metrics.frechet_distance(X, metrics.moments(Y))) == pytest.approx(expected, rel=1e-3)


def test_energy_distance_is_numpys() -> None:
    expected = 2 * cdist(X, Y).mean() - cdist(X, X).mean() - cdist(Y, Y).mean()
    assert float(metrics.energy_distance(X, Y)) == pytest.approx(expected, rel=1e-3)


def test_mmd_is_numpys() -> None:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-(cdist(a, b) ** 2) / 8).mean())

    expected = kernel(X, X) + kernel(Y, Y) - 2 * kernel(X, Y)
    assert float(metrics.mmd(X, Y, bandwidth=2.0)) == pytest.approx(expected, rel=1e-3)


def test_sliced_wasserstein_of_one_dimension_is_scipys() -> None:
    found = metrics.sliced_wasserstein(X[:, :1], Y[:, :1], jax.random.key(0))
    assert float(found) == pytest.approx(wasserstein_distance(X[:, 0], Y[:, 0]), rel=1e-4)


def test_a_set_is_at_no_distance_from_itself() -> None:
    assert abs(float(metrics.frechet_distance(X, X))) < 1e-2
    assert abs(float(metrics.energy_distance(X, X))) < 1e-5
    assert abs(float(metrics.mmd(X, X))) < 1e-6


@pytest.mark.parametrize("name", ["frechet_distance", "energy_distance", "mmd"])
def test_gradients_are_finite_and_lead_downhill(name: str) -> None:
    def shifted(t: jax.Array) -> jax.Array:
        return getattr(metrics, name)(Y + t, Y[::-1].copy(), lambda z: jnp.tanh(z))

    slope = jax.grad(shifted)(jnp.float32(0.5))
    assert bool(jnp.isfinite(slope))
    assert slope > 0
    flat = jax.grad(lambda x: getattr(metrics, name)(x, Y))(jnp.zeros((20, 5)))  # all samples alike
    assert bool(jnp.isfinite(flat).all())


def test_cross_entropy_and_error_rate_are_numpys() -> None:
    labels = RNG.integers(0, 5, 200)
    powers = np.exp(X - X.max(1, keepdims=True))
    expected = -np.log((powers / powers.sum(1, keepdims=True))[np.arange(200), labels]).mean()
    assert float(metrics.cross_entropy(jnp.asarray(X), jnp.asarray(labels))) == pytest.approx(expected, rel=1e-4)
    assert float(metrics.error_rate(jnp.asarray(X), jnp.asarray(labels))) == pytest.approx(
        (X.argmax(1) != labels).mean()
    )


def test_held_out_loss_draws_rows_by_key() -> None:
    objective = metrics.held_out_loss(
        lambda p, batch: (p * batch["x"]).mean(), {"x": np.arange(10.0, dtype=np.float32)}, 4
    )
    one, two = (float(objective(jnp.float32(1), jax.random.key(i))) for i in (0, 1))
    assert one != two
    assert float(objective(jnp.float32(1), jax.random.key(0))) == one
    with pytest.raises(InvalidArgumentError, match="size is 11, and data has 10 rows; give a number from 1 to 10"):
        metrics.held_out_loss(lambda p, batch: 0, {"x": np.arange(10.0)}, 11)


def test_a_covariance_of_one_sample_is_an_error_also_under_jit() -> None:
    moments = metrics.moments(Y)
    for call in (metrics.frechet_distance, jax.jit(metrics.frechet_distance)):
        with pytest.raises(InvalidArgumentError, match="samples has 1 row; a covariance needs two at least"):
            call(X[:1], Y)
        with pytest.raises(InvalidArgumentError, match="samples has 1 row"):
            call(X[:1], moments)
        with pytest.raises(InvalidArgumentError, match="reference has 1 row"):
            call(X, Y[:1])
    with pytest.raises(InvalidArgumentError, match="reference has 1 row"):
        metrics.moments(X[:1])


def test_sliced_wasserstein_of_unequal_numbers_is_an_error_also_under_jit() -> None:
    for call in (metrics.sliced_wasserstein, jax.jit(metrics.sliced_wasserstein)):
        with pytest.raises(InvalidArgumentError, match="samples has 50 rows and reference 200; .* take 50 of both"):
            call(X[:50], Y, jax.random.key(0))


@pytest.mark.parametrize("name", ["frechet_distance", "energy_distance", "mmd", "sliced_wasserstein"])
def test_other_numbers_of_features_and_no_samples_are_errors(name: str) -> None:
    key = (jax.random.key(0),) if name == "sliced_wasserstein" else ()
    with pytest.raises(InvalidArgumentError, match="samples has 1 features and reference 5"):
        getattr(metrics, name)(X[:, :1], Y, *key)
    with pytest.raises(InvalidArgumentError, match=r"samples has shape \[0, 5\]"):
        getattr(metrics, name)(X[:0], Y, *key)
