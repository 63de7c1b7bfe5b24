"""The parts of a restore that averaging uses: opening, what a leaf is wanted as, reading, and where it goes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from jaxckpt.checkpoint import restore as _restore
from jaxckpt.checkpoint.place import Want as Want
from jaxckpt.checkpoint.source import Source, open_source
from jaxckpt.core.box import Box, whole
from jaxckpt.format.sidecar import LeafEntry
from jaxckpt.plan.shards import device_boxes
from jaxckpt.storage.url import Location, StorageOptions, open_store
from jaxckpt.transfer import upload
from jaxckpt.transfer.upload import Destination as Destination
from jaxckpt.transfer.upload import host_destination

Made = TypeVar("Made")


def open_path(path: Location, options: StorageOptions | None) -> Source:
    """The checkpoint there."""
    return open_source(open_store(path, options))


def fetch(source: Source, wants: list[Want]) -> tuple[list[Any], int]:
    """The values of these leaves, and the bytes read."""
    return _restore.fetch(source, wants)


def want_saved(source: Source, leaf: int, choose: Any) -> Want:
    """A leaf as it was saved, or as ``choose(name, spec)`` places it; never narrowed to 32 bits unsaid."""
    want = _restore.want_saved(source, leaf, choose)
    _restore.refuse_narrowing(source, [want])
    return want


def is_tree(like: Any) -> bool:
    """Whether this is a tree to restore into, and not None or a function that places leaves."""
    return _restore.is_tree(like)


def made_together(like: Any, make: Callable[[], Made]) -> Made:
    """What ``make`` gives on this process; where ``like`` is global, an error on all if one of them has none."""
    if is_tree(like) and _restore.is_global(like):
        return _restore.made_together("the sources", make)
    return make()


def destinations(want: Want, shape: tuple[int, ...], dtype: np.dtype, count: int) -> list[Destination]:
    """Memory of ``count`` results of one form."""
    if want.sharding is None:
        return [host_destination(shape, dtype) for _ in range(count)]
    allocation = upload.Allocation()
    found = [upload.device_destination(shape, dtype, want.sharding, allocation=allocation) for _ in range(count)]
    allocation.make()
    return found


def boxes_of(want: Want, shape: tuple[int, ...]) -> tuple[Box, ...]:
    """The distinct boxes of a result that this process holds."""
    if want.sharding is None:
        return (whole(shape),)
    return tuple(dict.fromkeys(device_boxes(want.sharding, shape).values()))


def finished(want: Want, entry: LeafEntry, array: Any) -> Any:
    """A summed array in the form wanted; it has the dtype wanted already."""
    return want.convert(_restore.finished(entry, array, replace(want, cast=None)))
