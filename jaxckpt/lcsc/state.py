"""The state of a search, saved each generation as a checkpoint of ours: a kill costs one generation at most."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt.checkpoint.inspect import inspect
from jaxckpt.checkpoint.restore import restore
from jaxckpt.checkpoint.save import save
from jaxckpt.core.errors import MismatchError, NotFoundError
from jaxckpt.storage.url import StorageOptions

PyTree = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that the next generation depends on, and what the report shows.

    ``centre`` float64 [G, K]; ``best`` float32 [m, size] and ``best_fitness`` float64 [m], lowest first; ``fitness``
    float64 [T, P] and ``path`` float64 [T, G, K], NaN where not yet; ``strategy`` is the strategy's own tree of arrays.
    """

    generation: int
    centre: np.ndarray
    strategy: PyTree
    best: np.ndarray
    best_fitness: np.ndarray
    fitness: np.ndarray
    path: np.ndarray


def settled(tree: PyTree) -> PyTree:
    """Arrays exactly as a restore gives them: the interrupted and the uninterrupted search go on from the same."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), tree)


def write(path: str, state: State, settings: dict[str, Any], options: StorageOptions | None) -> None:
    """Save into one of two places in turn: the other is whole, whatever happens to this one."""
    structure = jax.tree.leaves(state.strategy)
    save(
        f"{path}/{state.generation % 2}",
        {
            "generation": state.generation,
            "centre": state.centre,
            "strategy": [np.asarray(leaf) for leaf in structure],
            "best": state.best,
            "best_fitness": state.best_fitness,
            "fitness": state.fitness,
            "path": state.path,
        },
        overwrite=True,
        step=state.generation,
        metadata={"search": settings},
        options=options,
    )


def read(path: str, like: State, settings: dict[str, Any], options: StorageOptions | None) -> State | None:
    """The newest state saved, or None.

    Raises:
        MismatchError: it is of another search; names the settings that differ.
    """
    found: dict[int, str] = {}
    for place in (f"{path}/0", f"{path}/1"):
        try:
            info = inspect(place, options=options)
        except NotFoundError:  # NotCommittedError too: the save was killed
            continue
        saved = info.metadata.get("search", {})
        if wrong := [name for name in {**saved, **settings} if saved.get(name) != settings.get(name)]:
            raise MismatchError(
                f"{place} is the state of another search: "
                + "; ".join(f"{n} was {saved.get(n)!r} and is {settings.get(n)!r}" for n in wrong)
                + ". Give the same arguments, or another path."
            )
        found[info.step or 0] = place
    if not found:
        return None
    tree = restore(found[max(found)], options=options)
    leaves, structure = jax.tree.flatten(like.strategy)
    return replace(
        like,
        **{name: tree[name] for name in ("centre", "best", "best_fitness", "fitness", "path")},
        generation=int(tree["generation"]),
        strategy=structure.unflatten([jnp.asarray(leaf) for leaf in tree["strategy"][: len(leaves)]]),
    )
