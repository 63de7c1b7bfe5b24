"""The parts of a restore that averaging uses: opening, what a leaf is wanted as, reading, and where it goes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
from jax.sharding import Sharding

from jaxckpt.checkpoint import restore as _restore
from jaxckpt.checkpoint.commit import examine
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


def check_free(path: Location, options: StorageOptions | None, *, overwrite: bool) -> None:
    """AlreadyExistsError where a save there would be refused."""
    examine(open_store(path, options), overwrite=overwrite)


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


class Form(Protocol):
    """What the results of one leaf are."""

    @property
    def want(self) -> Want:
        """Where they go."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Their global shape."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Their dtype."""
        ...


def opener(forms: Sequence[Form], count: int) -> Callable[[Form], list[Destination]]:
    """A function that gives the memory of ``count`` results of one of these forms.

    What is filled in place is allocated here and for all at once, as a restore does it: in large pages. Staging memory
    is made when it is asked for.
    """
    allocation = upload.Allocation()

    def made(form: Form, sharding: Sharding, allocation: upload.Allocation) -> list[Destination]:
        return [
            upload.device_destination(form.shape, form.dtype, sharding, allocation=allocation) for _ in range(count)
        ]

    in_place = {
        id(form): made(form, form.want.sharding, allocation)
        for form in forms
        if form.want.sharding is not None and upload.is_filled_in_place(form.shape, form.dtype, form.want.sharding)
    }
    allocation.make()

    def opened(form: Form) -> list[Destination]:
        if id(form) in in_place:
            return in_place.pop(id(form))
        if form.want.sharding is None:
            return [host_destination(form.shape, form.dtype) for _ in range(count)]
        return made(form, form.want.sharding, upload.Allocation())

    return opened


def boxes_of(want: Want, shape: tuple[int, ...]) -> tuple[Box, ...]:
    """The distinct boxes of a result that this process holds."""
    if want.sharding is None:
        return (whole(shape),)
    return tuple(dict.fromkeys(device_boxes(want.sharding, shape).values()))


def finished(want: Want, entry: LeafEntry, array: Any) -> Any:
    """A summed array in the form wanted; it has the dtype wanted already."""
    return want.convert(_restore.finished(entry, array, replace(want, cast=None)))
