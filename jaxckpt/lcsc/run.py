"""The loop of a search: what one generation does to its state."""

import math
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.lcsc.evaluate import Keys, Objective, Resident
from jaxckpt.lcsc.evosax_link import quick_options
from jaxckpt.lcsc.progress import Advance, Watch
from jaxckpt.lcsc.selection import Penalty
from jaxckpt.lcsc.space import Space
from jaxckpt.lcsc.state import State
from jaxckpt.lcsc.strategies import Strategy

PyTree = Any

SOUPS = (2, 4, 8, 16)  # how many of the best checkpoints alone make the soups that are tried first
L1_SHARE = 0.1  # of the best score before the search: what a sum of magnitudes of one above one costs, unless given
GRADIENT_COST = 3  # evaluations that one value and gradient counts as
_STARTING, _ASKING, _NOISE, _TELLING, _FINAL, _PROFILES = range(6)  # what a key is for


@dataclass(slots=True)
class Clock:
    """Seconds spent in evaluation."""

    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What does not change during a search."""

    space: Space
    making: Callable[[], Strategy]  # waits until the strategy is made: that goes on beside the first evaluations
    evaluate: Any
    objective: Objective
    l1_penalty: float | None
    negative_penalty: float
    key: jax.Array
    width: int
    cost: int
    is_fixed: bool
    kept: int
    first: np.ndarray  # the profiles [n, G, K]
    alone: np.ndarray  # checkpoints by themselves [m, G, K], of which soups are made
    budget: int
    clock: Clock
    not_finite: Callable[[], list[str]]  # checkpoints that hold NaN or infinity; reads them all

    @property
    def strategy(self) -> Strategy:
        """What asks and is told."""
        return self.making()

    @property
    def generations(self) -> int:
        """How many the budget has room for."""
        return (self.budget - self.begun) // self.cost

    @property
    def begun(self) -> int:
        """Evaluations before the first generation."""
        return len(self.first) + len(self.alone) + len(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        return [size for size in SOUPS if size < len(self.alone)]

    def empty(self) -> State:
        """Nothing searched yet; also what a restored state is shaped like."""
        groups, count = len(self.space.groups), self.space.count
        return State(
            generation=0,
            centre=np.full((groups, count), 1 / count),
            strategy=_start(self.strategy, self.key, np.zeros((self.width, self.space.size), np.float32)),
            best=np.zeros((self.kept, self.space.size), np.float32),
            best_fitness=np.full(self.kept, np.inf),
            profiles=np.full(self.begun, np.nan),
            fitness=np.full((self.generations, self.width), np.nan),
            path=np.full((self.generations, groups, count), np.nan),
        )

    def begin(self) -> State:
        """The best of profiles, checkpoints alone and soups of the best of these becomes the centre.

        The first population is the best of them, then points around the centre.
        """
        tried = np.concatenate([self.first, self.alone])
        scores = self._tried(tried)
        if not np.isfinite(scores).any() and (wrong := self.not_finite()):
            raise InvalidArgumentError(
                f"The objective is not finite for any average, and these checkpoints hold NaN or infinity: "
                f"{'; '.join(wrong[:5])}. Leave them out of checkpoints."
            )
        if not np.isfinite(scores).any():
            raise InvalidArgumentError(
                f"The objective is not finite for any of the {len(scores)} averages it was tried on first: "
                f"{scores.tolist()}. Try it on one checkpoint: objective(params, jax.random.key(0))."
            )
        if self._sizes:
            best = self.alone[np.argsort(scores[len(self.first) :], kind="stable")]
            soups = np.stack([best[:size].mean(0) for size in self._sizes])
            tried, scores = np.concatenate([tried, soups]), np.concatenate([scores, self._tried(soups)])
        order = np.argsort(scores, kind="stable")
        centre = tried[order[0]]
        seed = self.use(_STARTING, number=1).data.ravel().tolist()
        around = np.random.default_rng(seed).standard_normal((self.width, self.space.size), np.float32)
        known = self.space.vector(tried[order][: self.width], centre)
        around[: len(known)] = known
        strategy = _start(self.strategy, self.key, around)
        return replace(self.empty(), centre=centre, profiles=scores, strategy=strategy)

    def _tried(self, points: np.ndarray) -> np.ndarray:
        found = self.measured(self.objective, points, self.use(_PROFILES))
        found = found + Penalty(self.l1_penalty or 0.0, self.negative_penalty)(points)
        return np.where(np.isnan(found), np.inf, found)

    def advance(self, state: State, progress: Watch | None, began: float) -> State:
        """One generation: ask, measure on shared noise, tell."""
        now = state.generation
        later = 0 if now == 0 and self.strategy.is_first_apart else 1
        population, inner = _ask(self.strategy, later, self.key, now, state.strategy)
        candidates = np.asarray(population)
        points = self.space.coefficients(candidates, state.centre)
        keys = self.use(_NOISE, number=0 if self.is_fixed else now)
        penalty, slopes = self.penalty(state), None
        if self.strategy.uses_gradient:
            started = time.perf_counter()
            scores, slopes = self.evaluate.slopes(self.objective, self.space, population, state.centre, keys, penalty)
            fitness = np.asarray(scores, np.float64)
            self.clock.seconds += time.perf_counter() - started
        else:
            fitness = self.measured(self.objective, points, keys) + penalty(points)
        told = fitness.astype(np.float32)
        inner = jax.device_get(_tell(self.strategy, later, self.key, now, inner, candidates, told, slopes))

        ranked = np.where(np.isfinite(fitness), fitness, np.inf)
        scores = np.concatenate([state.best_fitness, ranked])
        order = np.argsort(scores, kind="stable")[: self.kept]
        mean = self.mean(inner)
        shown = points[ranked.argmin()] if mean is None else self.space.coefficients(mean, state.centre)
        history, path = state.fitness.copy(), state.path.copy()
        history[now], path[now] = fitness, shown
        if progress is not None:
            finite = fitness[np.isfinite(fitness)]
            progress(
                Advance(
                    generation=now + 1,
                    evaluations=len(state.profiles) + (now + 1) * self.cost,
                    budget=self.budget,
                    best=float(ranked.min()),
                    mean=float(finite.mean()) if len(finite) else math.nan,
                    seconds=time.perf_counter() - began,
                    objective_seconds=self.clock.seconds,
                )
            )
        return replace(
            state,
            generation=now + 1,
            strategy=inner,
            best=np.concatenate([state.best, candidates])[order],
            best_fitness=scores[order],
            fitness=history,
            path=path,
        )

    def penalty(self, state: State) -> Penalty:
        """Of large coefficients; unsaid, in proportion to the objective, as what was tried first shows it.

        A best score that is not above zero is no distance from it, and tells no scale: the spread of the scores does.
        """
        l1 = self.l1_penalty
        if l1 is None:
            first = state.profiles[np.isfinite(state.profiles)]
            best = float(first.min())
            l1 = L1_SHARE * (best if best > 0 else float(np.median(first)) - best)
        return Penalty(l1, self.negative_penalty)

    def mean(self, inner: PyTree) -> np.ndarray | None:
        """The point that the strategy searches around."""
        found = _mean(self.strategy, inner)
        return None if found is None else np.asarray(found)

    def finalists(self, state: State, count: int) -> dict[str, np.ndarray]:
        """The best profile, the start of the search, its mean, and ``count`` of the best seen."""
        found = {"profile": self.first[state.profiles[: len(self.first)].argmin()], "start": state.centre}
        mean = self.mean(state.strategy)
        if mean is not None and np.isfinite(mean).all():
            found["mean"] = self.space.coefficients(mean, state.centre)
        for i in range(count):
            if math.isfinite(state.best_fitness[i]):
                found[f"seen {i + 1}"] = self.space.coefficients(state.best[i], state.centre)
        return found

    def measured(self, what: Objective, points: np.ndarray, keys: Keys) -> np.ndarray:
        """Scores [P], on the clock."""
        started = time.perf_counter()
        found = self.evaluate(what, points, keys)
        self.clock.seconds += time.perf_counter() - started
        return found

    def check(self, name: str, metric: Objective | None) -> None:
        """Raise, before the search, what a metric that is used after it raises: it is traced, or else called once."""
        if metric is None:
            return
        keys, point = self.final_keys(1)[0], self.first[:1]
        started = time.perf_counter()
        try:
            if isinstance(self.evaluate, Resident):
                self.evaluate.check(metric, point, keys)
            else:
                self.evaluate(metric, point, keys)
        except Exception as error:
            error.add_note(f"This is {name} of the search, tried on one average before the search begins.")
            raise
        self.clock.seconds += time.perf_counter() - started

    def use(self, purpose: int, count: int = 1, number: int = 0) -> Keys:
        """Keys for this purpose: ``count`` of them, numbered from ``number``."""
        data = [np.asarray(_key_data(self.key, purpose, number + i)) for i in range(count)]
        return Keys(np.stack(data), jax.random.key_impl(self.key))

    def final_keys(self, draws: int) -> tuple[Keys, Keys, Keys]:
        """Keys of the final scores: for the objective, the guard and the held-out metric."""
        first, second, third = (self.use(_FINAL, draws, i * draws) for i in range(3))
        return first, second, third

    def warm(self) -> None:
        """Make the strategy and compile its programs, on nothing."""
        if self.strategy.uses_gradient:
            return
        none = np.zeros((self.width, self.space.size), np.float32)
        state = _start(self.strategy, self.key, none)
        for later in (0, 1) if self.strategy.is_first_apart else (1,):
            population, inner = _ask(self.strategy, later, self.key, 0, state)
            state = _tell(self.strategy, later, self.key, 0, inner, np.asarray(population), none[:, 0], None)
            self.mean(jax.device_get(state))


def root_key(key: Any) -> tuple[jax.Array, int | None]:
    """The typed key of a search, and the seed it was made from, where a seed was given."""
    try:
        if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            found, seed = key, None
        elif isinstance(key, jax.Array | np.ndarray) and key.ndim:
            found, seed = jax.random.wrap_key_data(jnp.asarray(key)), None
        else:
            seed = operator.index(key)
            found = jax.random.key(seed)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(_no_key(key)) from error
    if found.ndim or isinstance(key, bool):
        raise InvalidArgumentError(_no_key(key))
    return found, seed


def _no_key(key: Any) -> str:
    told = f"{key.dtype}{list(key.shape)}" if isinstance(key, jax.Array | np.ndarray) else repr(key)
    return f"key is {told}; give one key, such as jax.random.key(0), or an integer seed of at most 64 bits."


def warm_keys(key: jax.Array) -> None:
    """Compile the program that makes keys."""
    _key_data(key, _PROFILES, 0)


def _use(key: jax.Array, purpose: Any, number: Any) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, purpose), number)


@jax.jit
def _key_data(key: jax.Array, purpose: Any, number: Any) -> jax.Array:
    return jax.random.key_data(_use(key, purpose, number))


# Each step of a strategy is one program: op by op, small ones take longer to start than to run. Results go to the host
# and come back, as from a saved state: the interrupted and the uninterrupted search go on from the same.
def _start(strategy: Strategy, key: jax.Array, first: np.ndarray) -> PyTree:
    return jax.device_get(_program(_started, 1, jax.default_backend())(strategy, key, first))


def _ask(strategy: Strategy, later: int, key: jax.Array, now: int, state: PyTree) -> tuple[jax.Array, PyTree]:
    return _program(_asked, 2, jax.default_backend())(strategy, later, key, now, state)


def _tell(
    strategy: Strategy, later: int, key: jax.Array, now: int, state: PyTree, population: Any, fitness: Any, slopes: Any
) -> PyTree:
    program = _program(_told, 2, jax.default_backend())
    return program(strategy, later, key, now, state, population, fitness, slopes)


@lru_cache(maxsize=16)
def _program(step: Callable[..., Any], static: int, platform: str) -> Callable[..., Any]:
    """Jitted for this backend, its first arguments static."""
    del platform
    return jax.jit(step, static_argnums=tuple(range(static)), compiler_options=quick_options())


def _started(strategy: Strategy, key: jax.Array, first: Any) -> PyTree:
    return strategy.start(_use(key, _STARTING, 0), first)


def _asked(strategy: Strategy, later: int, key: jax.Array, now: Any, state: PyTree) -> tuple[jax.Array, PyTree]:
    return strategy.ask(_use(key, _ASKING, now), state, later)


def _told(
    strategy: Strategy, later: int, key: jax.Array, now: Any, state: PyTree, population: Any, fitness: Any, slopes: Any
) -> PyTree:
    return strategy.tell(_use(key, _TELLING, now), state, population, fitness, slopes, later)


@partial(jax.jit, static_argnums=0)
def _mean(strategy: Strategy, state: PyTree) -> jax.Array | None:
    return strategy.mean(state)
