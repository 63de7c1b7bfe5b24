"""A lost stage's own weights from a checkpoint: only the chunks that hold them are read."""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple, SupportsIndex

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from jaxckpt.checkpoint.match import Differences, Places, raise_on
from jaxckpt.checkpoint.place import want_like
from jaxckpt.checkpoint.source import open_source
from jaxckpt.core.box import Box, from_index, intersect, whole
from jaxckpt.core.dtypes import dtype_of, mover
from jaxckpt.core.events import Restored, emit
from jaxckpt.core.tree import NamedLeaf, PyTree, flatten
from jaxckpt.plan.shards import device_boxes
from jaxckpt.recovery.layout import Placement, StageLayout
from jaxckpt.storage.url import Location, StorageOptions, open_store
from jaxckpt.transfer.upload import Target


def read_stage(
    path: Location,
    layout: StageLayout,
    lost: SupportsIndex | Iterable[int],
    like: PyTree,
    *,
    options: StorageOptions | None = None,
) -> dict[Any, Any]:
    """The lost stages' leaves of a checkpoint, for ``recover_stage(..., copies=...)`` by ``checkpoint_stage``.

    Of stacked leaves only the chunks with the lost rows are read, of listed ones only the lost blocks; leaves outside
    the pipeline are not read. Every process reads what its own devices hold of the lost stages, so where stages lie
    on processes the others read nothing, and none waits for another. Chunks are those of the save; where one process
    saved several stages, those of small leaves (less than 512 KiB a stage) hold all of its stages.

    Args:
        path: a checkpoint of ours, or one that Orbax wrote.
        lost: physical stages.
        like: the state, or a part with its names (``{"params": state["params"]}``): arrays or
            ``jax.ShapeDtypeStruct`` with shardings.

    Returns:
        Nested dicts with the names of ``like``. Stacked leaves have their whole shape; rows of other stages are zero.

    Raises:
        InvalidArgumentError: a lost stage that the layout does not have.
        NotFoundError, NotCommittedError, CorruptionError: as ``restore``.
        MismatchError: leaves that the checkpoint lacks, or has with another shape or dtype.

    Example:
        >>> from jaxckpt.checkpoint.save import save
        >>> state = {"stages": jax.numpy.arange(4.0)}
        >>> save("memory://docs/read_stage", state)
        >>> read_stage("memory://docs/read_stage", StageLayout(stages=4), 2, state)["stages"].tolist()
        [0.0, 0.0, 2.0, 0.0]
    """
    began = time.perf_counter()
    gone = layout.lost_stages(lost)
    source = open_source(open_store(path, options))
    places, differences = Places(source.structure), Differences()
    jobs: list[_Job] = []
    wanted = flatten(like)[0]
    for leaf in wanted:
        boxes = _boxes(leaf, layout.placement(leaf.name), gone, layout)
        if not boxes:
            continue
        found = places.find(leaf.path)
        if found is None:
            differences.missing.append(leaf.name)
            continue
        index = places.leaves[found]
        _, wrong = want_like(source, index, leaf, cast=False, pad=False)
        if wrong:
            differences.wrong.append(wrong)
        elif source.leaves[index].stored:
            jobs.append(_job(leaf, index, boxes, dtype_of(source.leaves[index].dtype)))
    raise_on(differences, source.url, places, wanted)
    targets: dict[int, tuple[Target, ...]] = {}
    for job in jobs:
        views = (Target(box, _words(piece)) for box, piece in job.pieces.items())
        targets[job.index] = targets.get(job.index, ()) + tuple(views)
    read_bytes = source.fill({index: boxes for index, boxes in targets.items() if boxes})
    result: dict[Any, Any] = {}
    for job in jobs:
        below = result
        for key in job.leaf.path[:-1]:
            below = below.setdefault(key, {})
        below[job.leaf.path[-1]] = _assembled(job)
    seconds = time.perf_counter() - began
    emit(Restored(path=source.url, process=jax.process_index(), read_bytes=read_bytes, seconds=seconds))
    return result


class _Job(NamedTuple):
    leaf: NamedLeaf
    index: int  # in the checkpoint
    sharding: Sharding | None
    dtype: np.dtype
    pieces: dict[Box, np.ndarray]  # what this process needs of the lost rows


def _boxes(leaf: NamedLeaf, place: Placement, lost: tuple[int, ...], layout: StageLayout) -> list[Box]:
    """The parts of a leaf that the lost stages had."""
    shape = tuple(np.shape(leaf.value))
    if place.kind == "listed":
        return [whole(shape)] if place.block % layout.stages in lost else []
    if place.kind != "stacked":
        return []
    axis = place.stage_axis
    return [
        Box(
            tuple(stage if i == axis else 0 for i in range(len(shape))),
            tuple(1 if i == axis else n for i, n in enumerate(shape)),
        )
        for stage in lost
    ]


def _job(leaf: NamedLeaf, index: int, rows: list[Box], dtype: np.dtype) -> _Job:
    shape = tuple(np.shape(leaf.value))
    on_device = isinstance(leaf.value, jax.Array | jax.ShapeDtypeStruct)
    sharding = getattr(leaf.value, "sharding", None) if on_device else None
    if on_device and sharding is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    held = [whole(shape)] if sharding is None else list(device_boxes(sharding, shape).values())
    needed = {both for row in rows for box in held if (both := intersect(row, box)) is not None and both.size}
    return _Job(leaf, index, sharding, dtype, {box: np.empty(box.shape, dtype) for box in sorted(needed)})


def _assembled(job: _Job) -> Any:
    shape = tuple(np.shape(job.leaf.value))

    def filled(box: Box) -> np.ndarray:
        block = np.zeros(box.shape, job.dtype)
        for piece, data in job.pieces.items():
            both = intersect(piece, box)
            if both is not None:
                block[both.slices(box.start)] = data[both.slices(piece.start)]
        return block

    if job.sharding is None:
        return filled(whole(shape))
    return jax.make_array_from_callback(shape, job.sharding, lambda i: filled(from_index(i, shape)), dtype=job.dtype)


def _words(array: np.ndarray) -> np.ndarray:
    kind = mover(array.dtype)
    return array.view(kind) if array.shape else array.reshape(1).view(kind).reshape(())
