"""LAWA: the equal average of the k newest checkpoints of a run."""

import os
import re
from typing import Any

from jaxckpt.averaging.average import average
from jaxckpt.core.errors import InvalidArgumentError, NotFoundError
from jaxckpt.format.orbax_metadata import COMMIT_MARKER
from jaxckpt.storage.url import Location, StorageOptions, open_store

_STEP = re.compile(r"(?:.*[^0-9])?([0-9]+)$")


def lawa(
    root: Location, k: int = 6, *, step: int | None = None, options: StorageOptions | None = None, **how: Any
) -> Any:
    """Average the k newest committed steps under ``root`` (Kaddour 2022, arXiv 2209.14981, section 2: latest weight
    averaging; the paper saves once per epoch and finds k around 6 best for ResNet-50 and BERT).

    Args:
        root: the folder of a run; its steps are the folders whose names end in a number.
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
    root: Location, k: int, *, step: int | None = None, options: StorageOptions | None = None
) -> list[tuple[int, Location]]:
    """(step, path) of the k newest committed checkpoints under ``root``, oldest first."""
    if k < 1:
        raise InvalidArgumentError(f"k is {k}; it is at least 1.")
    store = open_store(root, options)
    steps = []
    for name in store.folders():
        found = _STEP.match(name)
        if found and (step is None or int(found[1]) <= step):
            steps.append((int(found[1]), name))
    chosen: list[tuple[int, Location]] = []
    for number, name in sorted(steps, reverse=True):
        if len(chosen) < k and store.child(name).exists(COMMIT_MARKER):
            is_path = isinstance(root, str | os.PathLike)
            chosen.append((number, f"{os.fspath(root).rstrip('/')}/{name}" if is_path else store.child(name)))
    if not chosen:
        raise NotFoundError(
            f"{store.url} has no committed step"
            + ("" if step is None else f" up to {step}")
            + f"; its folders are {store.folders()[:5]}. Name the folder that holds the steps of a run."
        )
    return chosen[::-1]
