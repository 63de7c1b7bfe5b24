"""Which checkpoints a search is over: paths, trees, or all steps of a run; and what identifies each."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from jaxckpt.averaging.average import step_of
from jaxckpt.averaging.lawa import newest, recorded_steps
from jaxckpt.averaging.sources import LiveSource, MappedSource, digest, identity
from jaxckpt.checkpoint.source import Source
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.text import counted
from jaxckpt.lcsc.merge import names_of
from jaxckpt.storage.store import AbstractStore
from jaxckpt.storage.url import StorageOptions

PyTree = Any


def located(checkpoints: Any, options: StorageOptions | None) -> Sequence[Any]:
    """Paths and trees as they are; of the folder of a run all steps, oldest first."""
    if isinstance(checkpoints, str | os.PathLike | AbstractStore):
        checkpoints = [place for _, place in newest(checkpoints, None, options=options)]
    if isinstance(checkpoints, Mapping) or not isinstance(checkpoints, Sequence):
        raise InvalidArgumentError(
            f"checkpoints is a {type(checkpoints).__name__}; it is a list of paths or trees, or the folder of a run."
        )
    if len(checkpoints) < 2:
        raise InvalidArgumentError(
            f"checkpoints has {len(checkpoints)}: {[_short(one) for one in checkpoints]}; a search needs two at least."
        )
    return checkpoints


def origin(source: Source, *, reads_trees: bool) -> str:
    """What identifies a checkpoint, wherever it lies: a digest of its content; of another library's, its place.

    That of a tree in memory, which must be computed, is made if ``reads_trees``: all processes of sharded trees call it
    together.
    """
    inner = source.source if isinstance(source, MappedSource) else source
    return "tree" if isinstance(inner, LiveSource) and not reads_trees else identity(source)


def parameters_of(trees: Iterable[PyTree], *, reads_values: bool) -> str:
    """What identifies the parameters that were loaded: names, and a digest of the form of leaves, or of their content.

    Where parameters are leaves of the checkpoints as they are, which are identified apart, form is enough.
    """
    names: list[str] = []
    found: list[str] = []
    for tree in trees:
        names, values = names_of(tree), jax.tree.leaves(tree)
        told = values if reads_values else [_form(leaf) for leaf in values]
        found.append(digest(list(zip(names, told, strict=True))))
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{counted(len(names), 'leaf', 'leaves')} ({shown}), {' '.join(found)}"


def _form(leaf: Any) -> Any:
    return (str(leaf.dtype), leaf.shape) if hasattr(leaf, "dtype") else leaf


def steps_of(places: Sequence[Any], sources: Sequence[Source], options: StorageOptions | None) -> list[int | None]:
    """The training step of each checkpoint: that it was saved with, else the number of its folder; None: unknown."""
    return [_step(place, source, options) for place, source in zip(places, sources, strict=True)]


def _step(place: Any, source: Source, options: StorageOptions | None) -> int | None:
    step = step_of(source)
    if step is not None or not isinstance(place, str | os.PathLike | AbstractStore):
        return step
    try:
        return recorded_steps([place], options)[0]
    except InvalidArgumentError:
        return None


def _short(one: Any) -> str:
    return str(one) if isinstance(one, str | os.PathLike) else type(one).__name__
