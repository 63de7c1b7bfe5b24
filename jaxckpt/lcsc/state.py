"""The state of a search, saved as a checkpoint of ours after each generation, while the next one runs.

A kill costs the generation that runs, and the one before it while that is still being saved: never two that had ended.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxckpt.checkpoint.inspect import inspect
from jaxckpt.checkpoint.restore import on_host, restore
from jaxckpt.checkpoint.save import save_async
from jaxckpt.core.errors import InvalidArgumentError, MismatchError, NotFoundError
from jaxckpt.core.text import counted
from jaxckpt.storage.url import StorageOptions

if TYPE_CHECKING:
    from jaxckpt.checkpoint.pending import PendingSave

PyTree = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that the next generation depends on, and what the report shows.

    ``centre`` float64 [G, K]; ``best`` float32 [m, size] and ``best_fitness`` float64 [m], lowest first; ``profiles``
    float64 [n], the scores of the profiles, then those of checkpoints alone and of soups; ``fitness`` float64 [T, P]
    and ``path`` float64 [T, G, K], NaN where not yet; ``strategy`` is the strategy's own tree of arrays.
    """

    generation: int
    centre: np.ndarray
    strategy: PyTree
    best: np.ndarray
    best_fitness: np.ndarray
    profiles: np.ndarray
    fitness: np.ndarray
    path: np.ndarray


_APART = ("budget", "seed")  # settings that may differ: the key that a seed makes is compared
_SAVED = ("centre", "best", "best_fitness", "profiles", "fitness", "path")


class Saver:
    """Saves states in the background, in two places in turn: one is whole, whatever happens to the other.

    While one is saved the next generation runs, and no more than that: a search waits for the save before it tells of
    that generation.
    """

    def __init__(self, path: str, settings: dict[str, Any], options: StorageOptions | None) -> None:
        self._path, self._settings, self._options = path, settings, options
        self._saving: PendingSave | None = None

    def save(self, state: State) -> None:
        """Begin to save, once the state before is on storage; raises what went wrong with that."""
        self.wait()
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.strategy)]
        self._saving = save_async(
            f"{self._path}/{state.generation % 2}",
            {"generation": state.generation, "strategy": leaves, **{name: getattr(state, name) for name in _SAVED}},
            overwrite=True,
            step=state.generation,
            metadata={"search": self._settings},
            options=self._options,
        )

    def wait(self) -> None:
        """Until the newest is on storage; raises what went wrong."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()


def read(
    path: str, empty: Callable[[], State], settings: dict[str, Any], options: StorageOptions | None
) -> State | None:
    """The newest state saved, in the form of an empty one, or None. ``budget`` may differ: it goes on for longer.

    Raises:
        MismatchError: it is of another search; names the settings that differ, or it is past the budget.
    """
    found: dict[int, str] = {}
    for place in (f"{path}/0", f"{path}/1"):
        try:
            info = inspect(place, options=options)
        except NotFoundError:  # NotCommittedError too: the save was killed
            continue
        saved = info.metadata.get("search", {})
        if "parameters" not in saved:
            raise MismatchError(
                f"{place} is the state of a search by an earlier version of jaxckpt, which did not record what it was "
                "over: whether this is the same search cannot be told. Give another path, or remove it."
            )
        names = [name for name in {**saved, **settings} if name not in _APART]
        if wrong := [_difference(name, saved.get(name), settings.get(name)) for name in names]:
            wrong = [one for one in wrong if one]
        if wrong:
            raise MismatchError(
                f"{place} is the state of another search: {'; '.join(wrong)}. Give the same arguments to go on with it "
                "(budget may be larger), or another path."
            )
        found[info.step or 0] = place
    if not found:
        return None
    newest, like = max(found), empty()
    if newest > len(like.fitness):
        raise MismatchError(
            f"{found[newest]} has {counted(newest, 'generation')}, and the budget of {settings['budget']} has room for "
            f"{len(like.fitness)}. Give as large a budget, or another path."
        )
    tree = restore(found[newest], on_host, options=options)
    leaves, structure = jax.tree.flatten(like.strategy)
    history, past = like.fitness.copy(), like.path.copy()
    history[:newest], past[:newest] = tree["fitness"][:newest], tree["path"][:newest]
    return replace(
        like,
        **{name: tree[name] for name in ("centre", "best", "best_fitness", "profiles")},
        fitness=history,
        path=past,
        generation=int(tree["generation"]),
        strategy=structure.unflatten(tree["strategy"][: len(leaves)]),
    )


def as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """As they come back from storage.

    Raises:
        InvalidArgumentError: ``record`` or ``options`` is no dict, or one of the settings is not JSON.
    """
    for name in ("options", "record"):
        if not isinstance(settings[name], Mapping):
            raise InvalidArgumentError(f"{name} is {settings[name]!r}; give a dict of JSON values.")
    found: dict[str, Any] = {}
    for name, value in settings.items():
        try:
            found[name] = json.loads(json.dumps(value, allow_nan=False, default=_listed))
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(
                f"{name} is {value!r}; give JSON values, and finite numbers: {error}."
            ) from error
    return found


def _listed(value: Any) -> Any:
    """An array as lists of numbers."""
    if not hasattr(value, "tolist"):
        raise TypeError(f"a {type(value).__name__} is no JSON value")
    return value.tolist()


def _difference(name: str, saved: Any, given: Any) -> str:
    """How a setting differs; of lists as long as each other the first place that does."""
    if saved == given:
        return ""
    if isinstance(saved, list) and isinstance(given, list) and len(saved) == len(given) > 1:
        place = next(i for i, (a, b) in enumerate(zip(saved, given, strict=True)) if a != b)
        return f"{name}[{place}] was {saved[place]!r} and is {given[place]!r}"
    return f"{name} was {saved!r} and is {given!r}"
