"""The loop of a search: what one generation does to its state."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.lcsc.evaluate import Objective
from jaxckpt.lcsc.selection import Penalty
from jaxckpt.lcsc.space import Space
from jaxckpt.lcsc.state import State, settled
from jaxckpt.lcsc.strategies import Strategy

GRADIENT_COST = 3  # evaluations that one value and gradient counts as
_START, _ASK, _NOISE, _TELL, FINAL, _PROFILES = range(6)  # what a key is for


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """A generation ended: ``best`` and ``mean`` of its noisy fitness, ``evaluations`` so far, of ``budget``."""

    generation: int
    evaluations: int
    budget: int
    best: float
    mean: float
    seconds: float


@dataclass(slots=True)
class Clock:
    """Seconds spent in evaluation."""

    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What does not change during a search."""

    space: Space
    strategy: Strategy
    evaluate: Any
    objective: Objective
    penalty: Penalty
    key: jax.Array
    width: int
    cost: int
    is_fixed: bool
    kept: int
    first: np.ndarray  # the profiles [n, G, K]
    budget: int
    clock: Clock

    @property
    def generations(self) -> int:
        """How many the budget has room for."""
        left = self.budget - len(self.first)
        if left < self.cost:
            raise InvalidArgumentError(
                f"budget is {self.budget}: {len(self.first)} profiles and one generation of {self.cost} do not fit."
            )
        return left // self.cost

    def empty(self) -> State:
        """Nothing searched yet; also what a restored state is shaped like."""
        groups, count = len(self.space.groups), self.space.count
        return State(
            generation=0,
            centre=np.full((groups, count), 1 / count),
            strategy=settled(self.strategy.start(self.use(_START), jnp.zeros((self.width, self.space.size)))),
            best=np.zeros((self.kept, self.space.size), np.float32),
            best_fitness=np.full(self.kept, np.inf),
            fitness=np.full((self.generations, self.width), np.nan),
            path=np.full((self.generations, groups, count), np.nan),
        )

    def begin(self, state: State) -> State:
        """The best profile becomes the centre; the first population is the profiles, then points around the centre."""
        scores = self.measured(self.objective, self.first, self.use(_PROFILES)[None]) + self.penalty(self.first)
        order = np.argsort(np.where(np.isnan(scores), np.inf, scores), kind="stable")
        centre = self.first[order[0]]
        around = np.array(jax.random.normal(self.use(_START, 1), (self.width, self.space.size)))
        known = self.space.vector(self.first[order][: self.width], centre)
        around[: len(known)] = known
        return replace(
            state, centre=centre, strategy=settled(self.strategy.start(self.use(_START), jnp.asarray(around)))
        )

    def advance(self, state: State, progress: Callable[[Advance], None] | None, began: float) -> State:
        """One generation: ask, measure on shared noise, tell."""
        now = state.generation
        population, inner = self.strategy.ask(self.use(_ASK, now), state.strategy, now)
        keys = self.use(_NOISE, 0 if self.is_fixed else now)[None]
        slopes = None
        points = self.space.coefficients(np.asarray(population), state.centre)
        if self.strategy.uses_gradient:
            started = time.perf_counter()
            scores, slopes = self.evaluate.slopes(self.objective, population, state.centre, keys, self.penalty)
            fitness = np.asarray(scores, np.float64)
            self.clock.seconds += time.perf_counter() - started
        else:
            fitness = self.measured(self.objective, points, keys) + self.penalty(points)
        told = jnp.asarray(fitness, jnp.float32)
        inner = self.strategy.tell(self.use(_TELL, now), inner, population, told, slopes, now)

        ranked = np.where(np.isnan(fitness), np.inf, fitness)
        scores = np.concatenate([state.best_fitness, ranked])
        order = np.argsort(scores, kind="stable")[: self.kept]
        mean = self.strategy.mean(inner)
        shown = points[ranked.argmin()] if mean is None else self.space.coefficients(np.asarray(mean), state.centre)
        history, path = state.fitness.copy(), state.path.copy()
        history[now], path[now] = fitness, shown
        if progress is not None:
            done = len(self.first) + (now + 1) * self.cost
            seconds = time.perf_counter() - began
            best, average_of = float(ranked.min()), float(fitness.mean())
            progress(
                Advance(
                    generation=now + 1,
                    evaluations=done,
                    budget=self.budget,
                    best=best,
                    mean=average_of,
                    seconds=seconds,
                )
            )
        return replace(
            state,
            generation=now + 1,
            strategy=settled(inner),
            best=np.concatenate([state.best, np.asarray(population)])[order],
            best_fitness=scores[order],
            fitness=history,
            path=path,
        )

    def finalists(self, state: State, count: int) -> dict[str, np.ndarray]:
        """The best profile, the search mean, and ``count`` of the best seen."""
        found = {"profile": state.centre}
        mean = self.strategy.mean(state.strategy)
        if mean is not None and np.isfinite(np.asarray(mean)).all():
            found["mean"] = self.space.coefficients(np.asarray(mean), state.centre)
        for i in range(count):
            if math.isfinite(state.best_fitness[i]):
                found[f"seen {i + 1}"] = self.space.coefficients(state.best[i], state.centre)
        return found

    def measured(self, what: Objective, points: np.ndarray, keys: jax.Array) -> np.ndarray:
        """Scores [P], on the clock."""
        started = time.perf_counter()
        found = self.evaluate(what, points, keys)
        self.clock.seconds += time.perf_counter() - started
        return found

    def use(self, purpose: int, number: int = 0) -> jax.Array:
        """The key of this purpose and generation."""
        return jax.random.fold_in(jax.random.fold_in(self.key, purpose), number)
