"""Lineage: what a checkpoint was made by, when, on what, and from which others."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from jaxckpt.core.errors import InvalidArgumentError

_LIBRARIES = ("jaxckpt", "jax", "jaxlib", "tensorstore", "numpy")
_version = lru_cache(version)  # each look-up reads a file


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """A parent of a checkpoint: another checkpoint, its step, its weight in a combination, and by which method."""

    path: str
    step: int | None = None
    weight: float | None = None
    method: str = ""


def lineage_record(
    step: int | None, metadata: dict[str, Any] | None, parents: Sequence[Lineage], *, processes: int
) -> dict[str, Any]:
    """The fields of the sidecar that tell where a checkpoint comes from."""
    if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
        raise InvalidArgumentError(f"step is {step!r}; it is an int or None.")
    try:
        json.dumps(metadata or {}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"metadata must be JSON values: {error}. Put arrays into the tree instead."
        ) from error
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = _version(name)
        except PackageNotFoundError:
            continue
    fields = ("path", "step", "weight", "method")
    return {
        "step": step,
        "metadata": dict(metadata or {}),
        "parents": tuple([{name: getattr(parent, name) for name in fields} for parent in parents]),
        "processes": processes,
        "versions": versions,
    }
