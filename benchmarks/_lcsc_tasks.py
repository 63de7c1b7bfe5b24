"""What the study of LCSC searches over: short training runs on real images, their checkpoints, and metrics."""

# ruff: noqa: TC003 - scripts are read from the top: one block of imports
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt import averaging
from jaxckpt.averaging import ema
from jaxckpt.lcsc.metrics import energy_distance, frechet_distance, moments
from models import classifier, consistency, diffusion, images

PyTree = Any
Metric = Callable[[PyTree, jax.Array], jax.Array]
GRID = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # EMA over stored checkpoints
ONLINE = (0.99, 0.995, 0.998, 0.999, 0.9995)  # EMA in training, of every update
MIDDLES = (0.2, 0.4, 0.8)  # noise levels before a consistency model's second evaluation
_TOGETHER = 10  # updates of one program; the online EMA takes the last of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model trained at a constant rate; ``count`` checkpoints, ``every`` updates apart, from ``begin`` on."""

    name: str
    kind: Literal["consistency", "diffusion"]
    images: str
    width: int
    begin: int = 1000
    every: int = 50
    count: int = 40
    batch: int = 64
    learning_rate: float = 1e-3
    nfe: int = 1  # evaluations that make an image; more: of the model without LCSC, which it is compared with
    more: int = 2
    solver: diffusion.Solver = "ddim"
    samples: int = 512  # that the search sees in one evaluation
    many: int = 4096  # on held-out data; half as many choose

    @property
    def end(self) -> int:
        return self.begin + self.every * self.count


class Measures(NamedTuple):
    """All ``(params, key) -> scalar``: what is searched, what chooses, what is reported."""

    objective: Metric  # few samples, validation images
    chooses: Metric  # many samples, validation images
    held_out: Metric  # many samples, test images
    guard: Metric  # energy distance of pixels, test images
    slower: dict[
        float, tuple[Metric, Metric, Metric]
    ]  # chooses, held_out and guard, with more evaluations for an image
    floor: tuple[float, float]  # both, of the validation images to the test images
    accuracy: float


class State(NamedTuple):
    train: diffusion.TrainState
    averages: tuple[ema.EmaState, ...]


def measures(task: Task, seed: int) -> Measures:
    data = images.load(task.images, seed=seed)
    params = classifier.train(data.train, seed=seed)
    features = classifier.features(data.side, params)
    config = _config(task, data.side)
    validation, test = (moments(jnp.asarray(part.pixels), features) for part in (data.validation, data.test))
    pixels = jnp.asarray(data.test.pixels)

    def sample(params: PyTree, key: jax.Array, count: int, how: Any) -> jax.Array:
        if task.kind == "diffusion":
            return diffusion.sample(config, params, key, count=count, nfe=how, solver=task.solver)
        return consistency.sample(config, params, key, count=count, middle=how)

    def distance(to: Any, count: int, how: Any, params: PyTree, key: jax.Array) -> jax.Array:
        return frechet_distance(sample(params, key, count, how), to, features)

    def guard(how: Any, params: PyTree, key: jax.Array) -> jax.Array:
        return energy_distance(sample(params, key, min(1024, task.many), how), pixels)

    def three(how: Any) -> tuple[Metric, Metric, Metric]:
        chooses, held_out = (
            partial(distance, to, n, how) for to, n in ((validation, task.many // 2), (test, task.many))
        )
        return chooses, held_out, partial(guard, how)

    if task.kind == "diffusion":
        few, slower = task.nfe, {float(task.more): three(task.more)}
    else:
        few, slower = (), {level: three((level,)) for level in MIDDLES}
    chooses, held_out, guarded = three(few)
    real = jnp.asarray(data.validation.pixels)
    return Measures(
        objective=partial(distance, validation, task.samples, few),
        chooses=chooses,
        held_out=held_out,
        guard=guarded,
        slower=slower,
        floor=(float(frechet_distance(real, test, features)), float(energy_distance(real, pixels))),
        accuracy=classifier.accuracy(params, data.test),
    )


class Run:
    """A training run that can go on: the state, its online EMAs and the checkpoints that it left."""

    def __init__(self, task: Task, seed: int) -> None:
        data = images.load(task.images, seed=seed)
        config = _config(task, data.side)
        self.task, self._images = task, jnp.asarray(data.train.pixels)
        how = {"batch": task.batch, "learning_rate": task.learning_rate, "steps": _TOGETHER}
        few: Any = diffusion.train(config, **how) if task.kind == "diffusion" else consistency.train(config, **how)
        others = () if task.kind == "diffusion" else (None,)

        def more(state: State, pixels: jax.Array, times: int) -> State:
            def one(now: State, _: None) -> tuple[State, None]:
                train, _ = few(now.train, pixels, *others)
                averages = tuple(
                    ema.update(old, train.params, decay=decay**_TOGETHER, warm_up=True)
                    for old, decay in zip(now.averages, ONLINE, strict=True)
                )
                return State(train, averages), None

            return jax.lax.scan(one, state, length=times)[0]

        self._more = jax.jit(more, static_argnums=2)
        train = diffusion.new_state(config, seed=seed, learning_rate=task.learning_rate)
        self.state = State(train, tuple(ema.init(train.params) for _ in ONLINE))

    def advance(self, steps: int) -> None:
        self.state = self._more(self.state, self._images, steps // _TOGETHER)

    def checkpoints(self) -> list[PyTree]:
        """Train to the end of the task, from the beginning; the checkpoints, oldest first."""
        self.advance(self.task.begin)
        found = []
        for _ in range(self.task.count):
            self.advance(self.task.every)
            found.append(self.state.train.params)
        return found

    def online(self) -> list[PyTree]:
        return [ema.value(one) for one in self.state.averages]


def score(metric: Metric, trees: Sequence[PyTree], key: jax.Array) -> np.ndarray:
    """float64 of each tree, all on the same noise."""
    call = jax.jit(metric)
    return np.array([float(call(tree, key)) for tree in trees])


def baselines(checkpoints: Sequence[PyTree], chooses: Metric, key: jax.Array) -> dict[str, np.ndarray]:
    """Coefficients of what LCSC is compared with; whatever is chosen is chosen by ``chooses``."""
    count, call = len(checkpoints), jax.jit(chooses)
    single, grid = np.eye(count), np.stack([averaging.ema_weights(count, decay) for decay in GRID])
    stacked = averaging.stack(list(checkpoints))

    def scored(weights: np.ndarray) -> list[float]:
        return [float(call(averaging.combine(stacked, one), key)) for one in weights]

    alone = scored(single)
    greedy = averaging.greedy_soup(checkpoints, lambda tree: float(call(tree, key)), mode="min", scores=alone)
    return {
        "last": single[-1],
        "best single": single[np.argmin(alone)],
        "uniform": np.full(count, 1 / count),
        "EMA grid": grid[np.argmin(scored(grid))],
        "greedy soup": greedy.weights,
    }


def _config(task: Task, side: int) -> diffusion.DenoiserConfig:
    return diffusion.DenoiserConfig(side=side, width=task.width)
