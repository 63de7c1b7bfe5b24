"""LAWA: the equal average of the k newest checkpoints of a run."""

import os
import re
from collections.abc import Sequence
from typing import Any

from jaxckpt.averaging.average import average, step_of
from jaxckpt.averaging.reading import open_path
from jaxckpt.checkpoint.source import OwnSource
from jaxckpt.core.errors import InvalidArgumentError, NotFoundError
from jaxckpt.format.orbax_metadata import COMMIT_MARKER
from jaxckpt.format.sidecar import FILE_NAME
from jaxckpt.manager.steps import ITEM, exists
from jaxckpt.storage.store import AbstractStore
from jaxckpt.storage.url import Location, StorageOptions, open_store

_STEP = re.compile(r"(?:.*[^0-9])?([0-9]+)$")


def lawa(
    root: Location, k: int = 6, *, step: int | None = None, options: StorageOptions | None = None, **how: Any
) -> Any:
    """Average the k newest committed steps under ``root`` (Kaddour 2022, arXiv 2209.14981, section 2: latest weight
    averaging; the paper saves once per epoch and finds k around 6 best for ResNet-50 and BERT).

    Args:
        root: the folder of a run: a manager's, or one with a checkpoint in each folder whose name ends in a number.
        k: how many; fewer where the run has fewer.
        step: count from this step backwards; the newest by default.
        options: endpoint, region and credentials of object stores.
        how: the other arguments of ``average``.

    Raises:
        NotFoundError: no committed step is there.

    Example:
        >>> import numpy as np
        >>> from jaxckpt.checkpoint.save import save
        >>> for step in (1, 2, 3):
        ...     save(f"memory://docs/lawa/{step}", {"w": np.full(2, float(step))})
        >>> lawa("memory://docs/lawa", k=2)["w"].tolist()
        [2.5, 2.5]
    """
    paths = [path for _, path in newest(root, k, step=step, options=options)]
    return average(paths, options=options, **how)


def newest(
    root: Location, k: int | None, *, step: int | None = None, options: StorageOptions | None = None
) -> list[tuple[int, Location]]:
    """(step, place) of the k newest committed checkpoints under ``root`` (None: of all), oldest first.

    They are those of a manager, of ours or Orbax's, or saved one by one into folders whose names end in a number.
    Averages that were saved beside them, as ``ema-0.9``, are none of them.
    """
    if k is not None and k < 1:
        raise InvalidArgumentError(f"k is {k}; it is at least 1.")
    store = open_store(root, options)
    steps = []
    for name in store.folders():
        found = _STEP.match(name)
        if found and (step is None or int(found[1]) <= step):
            steps.append((int(found[1]), name))
    chosen: list[tuple[int, Location]] = []
    for number, name in sorted(steps, reverse=True):
        if len(chosen) == k:
            break
        folder = _checkpoint_in(store, name)
        if folder is not None and (name.isdecimal() or not _is_average(store, folder)):
            is_path = isinstance(root, str | os.PathLike)
            chosen.append((number, f"{os.fspath(root).rstrip('/')}/{folder}" if is_path else store.child(folder)))
    if not chosen:
        raise NotFoundError(
            f"{store.url} has no committed step"
            + ("" if step is None else f" up to {step}")
            + f"; its folders are {store.folders()[:5]}. Name the folder that holds the steps of a run."
        )
    return chosen[::-1]


def recorded_steps(paths: Sequence[Location], options: StorageOptions | None = None) -> list[int]:
    """The step that each checkpoint was saved with; where it tells none, the number that its folder's name ends in."""
    found = []
    for path in paths:
        source = open_path(path, options)
        step = step_of(source)
        name = source.url.rstrip("/").removesuffix(f"/{ITEM}").rpartition("/")[2]  # of a manager's: the folder above
        named = _STEP.match(name)
        step = int(named[1]) if step is None and named else step
        if step is None:
            raise InvalidArgumentError(
                f"{source.url} tells no step: it was saved without one, and its name ends in no number. Give the "
                "weights themselves, or save it with step=."
            )
        found.append(step)
    return found


def _is_average(store: AbstractStore, folder: str) -> bool:
    source = open_path(store.child(folder), None)
    return isinstance(source, OwnSource) and "averaging" in source.sidecar.metadata


def _checkpoint_in(store: AbstractStore, folder: str) -> str | None:
    """Where the checkpoint of a step lies: in its folder, or, if a manager saved it, below; None: it does not exist."""
    if store.child(folder).exists(COMMIT_MARKER) and not store.exists(f"{folder}/{ITEM}/{FILE_NAME}"):
        return folder
    below = f"{folder}/{ITEM}"
    return below if exists(store, folder) and store.child(below).exists(COMMIT_MARKER) else None
