"""The paper's evolutionary search over coefficients, as far as it is known, as pure functions.

Liu et al., "Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better", arXiv 2404.02241,
section on the search (Algorithm 1). The authors' code has no search, and constants of the algorithm are not public:
the values below are re-derived from the description (a population of EMA vectors, two parents among the best,
crossover, Gaussian noise on every coordinate, the best survive), not the authors' own.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxckpt.core.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class Evolution:
    """Hyper-parameters, all re-derived.

    Attributes:
        parents: how many of the best may be parents.
        survivors: size of the standing population.
        crossover_rate: probability that two parents are crossed; else the first is copied.
        gene_rate: probability that a coordinate of the child is the first parent's.
        mutation_rate: probability that a coordinate is changed.
        sigma: standard deviation of the change, in units of the space's step.
    """

    parents: int = 10
    survivors: int = 50
    crossover_rate: float = 1.0
    gene_rate: float = 0.5
    mutation_rate: float = 1.0
    sigma: float = 0.67  # 0.02 for 40 checkpoints

    def __post_init__(self) -> None:
        rates = (self.crossover_rate, self.gene_rate, self.mutation_rate)
        if self.parents < 1 or self.survivors < self.parents or self.sigma <= 0 or not all(0 <= r <= 1 for r in rates):
            raise InvalidArgumentError(f"{self}: 1 <= parents <= survivors, rates in [0, 1], sigma above 0.")


class EvolutionState(NamedTuple):
    """``population`` float32 [survivors, size], best first; ``fitness`` inf where nothing stands yet."""

    population: jax.Array
    fitness: jax.Array


def start(how: Evolution, size: int) -> EvolutionState:
    """Nobody yet: the first ``tell`` brings the EMA vectors."""
    return EvolutionState(jnp.zeros((how.survivors, size)), jnp.full((how.survivors,), jnp.inf))


def ask(how: Evolution, key: jax.Array, state: EvolutionState, count: int) -> jax.Array:
    """float32 [count, size]: children."""
    standing = jnp.isfinite(state.fitness).sum()
    pick, cross, gene, where, noise = jax.random.split(key, 5)
    chosen = jax.random.randint(pick, (2, count), 0, jnp.clip(standing, 1, how.parents))
    first, second = state.population[chosen[0]], state.population[chosen[1]]
    is_crossed = jax.random.bernoulli(cross, how.crossover_rate, (count, 1))
    from_first = jax.random.bernoulli(gene, how.gene_rate, first.shape)
    child = jnp.where(is_crossed & ~from_first, second, first)
    is_changed = jax.random.bernoulli(where, how.mutation_rate, child.shape)
    return child + jnp.where(is_changed, how.sigma * jax.random.normal(noise, child.shape), 0.0)


def tell(how: Evolution, state: EvolutionState, population: jax.Array, fitness: jax.Array) -> EvolutionState:
    """The best of those standing and the new ones; what is not a number never stands."""
    everyone = jnp.concatenate([state.population, population])
    scores = jnp.concatenate([state.fitness, jnp.where(jnp.isnan(fitness), jnp.inf, fitness)])
    best = jnp.argsort(scores, stable=True)[: how.survivors]
    return EvolutionState(everyone[best], scores[best])
