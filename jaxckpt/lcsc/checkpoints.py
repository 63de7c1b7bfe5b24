"""Which checkpoints a search is over: paths, trees, or all steps of a run; and what identifies each."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import google_crc32c

from jaxckpt.averaging.lawa import newest
from jaxckpt.checkpoint.source import OwnSource, Source
from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.storage.store import AbstractStore
from jaxckpt.storage.url import StorageOptions


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


def origin(source: Source) -> str:
    """What identifies the content of a checkpoint, wherever it lies: a digest of its checksums.

    That of another library's is its place; that of a tree in memory says no more than that it is one.
    """
    inner = getattr(source, "source", source)
    if isinstance(inner, OwnSource):
        return f"crc32c {google_crc32c.value(inner.sidecar.table.crc32c.tobytes()):08x}"
    return inner.url if getattr(inner, "arrays", None) is None else "tree"


def _short(one: Any) -> str:
    return str(one) if isinstance(one, str | os.PathLike) else type(one).__name__
