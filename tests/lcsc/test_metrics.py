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
    assert float(jax.jit(metrics.frechet_distance)(X, Y)) == pytest.approx(expected, rel=1e-5)
    assert float(metrics.frechet_distance(X, metrics.moments(Y))) == pytest.approx(expected, rel=1e-5)
    assert frechet_float64(X, Y) == pytest.approx(expected, rel=1e-6)


def frechet_float64(x: np.ndarray, y: np.ndarray) -> float:
    """By singular values, which are exact where ``sqrtm`` is not: for covariances without full rank."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = ((one - one.mean(0)) / (len(one) - 1) ** 0.5 for one in (x, y))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)


def samples(n: int, m: int, least: float = 1.0, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Features of scales from 1 to ``least``; the second set is a little wider, and shifted."""
    rng, scales = np.random.default_rng(n + m), np.geomspace(1, least, width)
    x, y = rng.normal(size=(n, width)) * scales, (rng.normal(size=(m, width)) * 1.05 + 0.1) * scales
    return x.astype(np.float32), y.astype(np.float32)


CASES = [(300, 200, 1.0), (300, 200, 1e-3), (20, 200, 1.0), (200, 20, 1.0), (20, 30, 1e-2), (2, 2, 1.0)]


@pytest.mark.parametrize(("n", "m", "least"), CASES)
def test_frechet_distance_is_exact_without_full_rank_and_with_small_features(n: int, m: int, least: float) -> None:
    x, y = samples(n, m, least)
    distance = jax.jit(metrics.frechet_distance)
    assert float(distance(x, y)) == pytest.approx(frechet_float64(x, y), rel=1e-5)
    wider = (1.01 * x).astype(np.float32)
    assert float(distance(x, wider)) == pytest.approx(frechet_float64(x, wider), rel=1e-3)
    assert 0 <= float(distance(x, x)) < 1e-7 * x.var(0).sum()
    assert 0 <= float(distance(x, x[::-1].copy())) < 1e-7 * x.var(0).sum()


@pytest.mark.parametrize(("n", "m", "least"), CASES)
def test_gradients_of_the_frechet_distance_are_its_slopes(n: int, m: int, least: float) -> None:
    x, y = samples(n, m, least)
    rng = np.random.default_rng(0)
    # Of what a model moves: no new directions, along which the distance of too few samples has a kink.
    along = [(one @ rng.normal(size=(48, 48)) / 48 + rng.normal(size=48) / 7).astype(np.float32) for one in (x, y)]
    mixed = [(rng.normal(size=(len(one), len(one))) @ one / len(one)).astype(np.float32) for one in (x, y)]
    found = jax.jit(jax.grad(metrics.frechet_distance, argnums=(0, 1)))(x, y)
    for direction in (along, mixed) if least == 1 else (along,):
        for i in (0, 1):
            both = [[x, y], [x, y]]
            for sign, pair in zip((1, -1), both, strict=True):
                pair[i] = pair[i].astype(np.float64) + sign * 1e-5 * direction[i]
            slope = (frechet_float64(*both[0]) - frechet_float64(*both[1])) / 2e-5
            assert float((found[i] * direction[i]).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-5)


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
    assert 0 <= float(metrics.frechet_distance(X, X)) < 1e-8
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
