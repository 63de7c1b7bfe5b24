"""A small diffusion model of images, and fast samplers of its ODE with any number of function evaluations.

The denoiser of Karras et al. (EDM, arXiv 2206.00364), section 5: a network wrapped so that its input, output and target
have unit variance at every noise level. It is the DDPM of Ho et al. (arXiv 2006.11239) in another parameterization, and
the one that consistency models build on. Shapes in comments: b batch, s side of an image, d = s * s, w width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

if TYPE_CHECKING:
    from collections.abc import Callable

PyTree = Any
Solver = Literal["ddim", "dpm++"]
SOLVERS = ("ddim", "dpm++")
_FREQUENCIES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserConfig:
    """Sizes of the network, and the noise levels from ``lowest`` to ``highest`` (in units of the pixels)."""

    side: int
    width: int = 256
    blocks: int = 3
    data_std: float = 0.7
    lowest: float = 0.01
    highest: float = 40.0
    rho: float = 7.0

    @property
    def pixels(self) -> int:
        return self.side * self.side


class Denoiser(nnx.Module):
    """Noisy images (b, s, s) and their noise levels (b,) to clean images (b, s, s); residual blocks of dense layers.

    ``boundary`` is the level at which the output is the input: 0 for diffusion, the lowest level for consistency models
    (arXiv 2303.01469, appendix C), which share all parameters with it.
    """

    def __init__(self, config: DenoiserConfig, *, rngs: nnx.Rngs) -> None:
        width = config.width
        self.config = config
        self.inward = nnx.Linear(config.pixels, width, rngs=rngs)
        self.level = nnx.Linear(2 * _FREQUENCIES, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs=rngs) for _ in range(config.blocks)])
        self.outward = nnx.Linear(width, config.pixels, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, noisy: jax.Array, sigma: jax.Array, *, boundary: float = 0.0) -> jax.Array:
        scale = scales(self.config, sigma, boundary)
        flat = noisy.reshape(len(noisy), -1)
        known = nnx.silu(self.level(_waves(jnp.log(sigma) / 4)))
        hidden = self.inward(flat * scale.inward[:, None])
        for block in self.blocks:
            hidden = block(hidden, known)
        found = scale.skip[:, None] * flat + scale.outward[:, None] * self.outward(nnx.silu(hidden))
        return found.reshape(noisy.shape)


class Block(nnx.Module):
    """One residual block, which the noise level shifts."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.first = nnx.Linear(width, width, rngs=rngs)
        self.level = nnx.Linear(width, width, rngs=rngs)
        self.second = nnx.Linear(width, width, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, hidden: jax.Array, known: jax.Array) -> jax.Array:
        return hidden + self.second(nnx.silu(self.first(self.norm(hidden)) + self.level(known)))


class Scales(NamedTuple):
    """What surrounds the network at a noise level, each (b,)."""

    skip: jax.Array
    outward: jax.Array
    inward: jax.Array


class TrainState(NamedTuple):
    """All that training needs to go on as if it had never stopped."""

    params: nnx.State
    opt_state: PyTree
    step: jax.Array  # int32, the number of updates done
    key: jax.Array


def new_state(config: DenoiserConfig, *, seed: int = 0, learning_rate: float = 2e-3) -> TrainState:
    """A fresh state."""
    params = nnx.state(Denoiser(config, rngs=nnx.Rngs(params=seed)), nnx.Param)
    return start(params, seed=seed, learning_rate=learning_rate)


def start(params: nnx.State, *, seed: int, learning_rate: float) -> TrainState:
    """A state that begins with these parameters."""
    opt_state = optax.adam(learning_rate).init(cast("Any", params))
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), jax.random.key(seed + 1_000))


def denoise(
    config: DenoiserConfig, params: nnx.State, noisy: jax.Array, sigma: jax.Array, *, boundary: float = 0.0
) -> jax.Array:
    """``Denoiser`` as a function of its parameters; ``sigma`` is (b,), or one level for all."""
    level = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), (len(noisy),))
    return nnx.merge(_graph(config), params)(noisy, level, boundary=boundary)


def train(
    config: DenoiserConfig, *, batch: int = 128, learning_rate: float = 2e-3, steps: int = 1
) -> Callable[[TrainState, jax.Array], tuple[TrainState, jax.Array]]:
    """A jitted ``(state, images) -> (state, loss)``: ``steps`` updates at a constant rate; donates the state."""
    return _train(config, batch, learning_rate, steps)


def loss(config: DenoiserConfig, params: nnx.State, images: jax.Array, key: jax.Array) -> jax.Array:
    """The denoising loss at levels drawn by the key; weighted so that the network's own error counts alike at all."""
    level_key, noise_key = jax.random.split(key)
    sigma = jnp.exp(1.2 * jax.random.normal(level_key, (len(images),)) - 1.0)
    noisy = images + sigma[:, None, None] * jax.random.normal(noise_key, images.shape)
    error = (denoise(config, params, noisy, sigma) - images) / scales(config, sigma).outward[:, None, None]
    return (error**2).mean()


def sample(
    config: DenoiserConfig, params: nnx.State, key: jax.Array, *, count: int, nfe: int, solver: Solver = "dpm++"
) -> jax.Array:
    """Images (count, s, s) from noise, with ``nfe`` evaluations of the network.

    "ddim" is the first order solver (arXiv 2010.02502), "dpm++" the multistep one of second order, DPM-Solver++(2M)
    (arXiv 2211.01095); the last step of both goes to noise zero and is of first order.
    """
    if solver not in SOLVERS or nfe < 1:
        raise ValueError(f"solver is {solver!r}, one of {SOLVERS}; nfe is {nfe}, 1 or more.")
    sigmas = [*levels(config, nfe).tolist(), 0.0] if nfe > 1 else [config.highest, 0.0]
    x = config.highest * jax.random.normal(key, (count, config.side, config.side))
    before: jax.Array | None = None
    for k, (now, then) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        clean = denoise(config, params, x, jnp.float32(now))
        toward = clean
        if solver == "dpm++" and before is not None and then > 0:
            ratio = np.log(sigmas[k - 1] / now) / np.log(now / then)  # of the steps in the logarithm of the level
            toward = clean + (clean - before) * float(1 / (2 * ratio))
        x = x * (then / now) + toward * (1 - then / now)
        before = clean
    return x


def levels(config: DenoiserConfig, count: int) -> np.ndarray:
    """float64 (count,): noise levels from the highest to the lowest, dense where noise is low (EDM, equation 5)."""
    ends = np.array([config.highest, config.lowest]) ** (1 / config.rho)
    return (ends[0] + np.linspace(0, 1, count) * (ends[1] - ends[0])) ** config.rho


def scales(config: DenoiserConfig, sigma: jax.Array, boundary: float = 0.0) -> Scales:
    """Equations of EDM, table 1; with a boundary those of consistency models, appendix C."""
    total = sigma**2 + config.data_std**2
    above = sigma - boundary
    return Scales(
        skip=config.data_std**2 / (above**2 + config.data_std**2),
        outward=config.data_std * above / jnp.sqrt(total),
        inward=1 / jnp.sqrt(total),
    )


def updates(
    loss_of: Callable[..., jax.Array], *, batch: int, learning_rate: float, steps: int
) -> Callable[..., tuple[TrainState, jax.Array]]:
    """``steps`` Adam updates of ``loss_of(params, images, key, *others)`` on random batches, as one program."""
    optimizer = optax.adam(learning_rate)

    def one(state: TrainState, images: jax.Array, others: tuple[PyTree, ...]) -> tuple[TrainState, jax.Array]:
        key, rows_key, loss_key = jax.random.split(state.key, 3)
        some = images[jax.random.randint(rows_key, (batch,), 0, len(images))]
        value, slopes = jax.value_and_grad(loss_of)(state.params, some, loss_key, *others)
        # Optax counts on standard promotion (int32 steps times weak floats).
        with jax.numpy_dtype_promotion("standard"):
            change, opt_state = optimizer.update(slopes, state.opt_state, cast("Any", state.params))
            params = cast("nnx.State", optax.apply_updates(cast("Any", state.params), change))
        return TrainState(params, opt_state, state.step + 1, key), value

    def all_of_them(state: TrainState, images: jax.Array, *others: PyTree) -> tuple[TrainState, jax.Array]:
        state, values = jax.lax.scan(lambda now, _: one(now, images, others), state, length=steps)
        return state, values.mean()

    return jax.jit(all_of_them, donate_argnums=0)


def _waves(x: jax.Array) -> jax.Array:
    """Sines and cosines (b, 2 * frequencies) of numbers (b,)."""
    angles = x[:, None] * jnp.asarray(np.geomspace(0.5, 32.0, _FREQUENCIES), jnp.float32)[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


@lru_cache(maxsize=8)
def _train(config: DenoiserConfig, batch: int, learning_rate: float, steps: int) -> Any:
    return updates(partial(loss, config), batch=batch, learning_rate=learning_rate, steps=steps)


@lru_cache(maxsize=8)
def _graph(config: DenoiserConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Denoiser(config, rngs=nnx.Rngs(params=0))))
