"""Shardings -> the distinct boxes that processes hold, and which processes hold each.

JAX shardings are global, so every process computes the same answer alone. The work is split in two so that plans for
thousands of leaves stay cheap: a *pattern* (mesh and partition spec, in units of blocks, vectorised over all devices,
computed once and cached) and a *layout* (the pattern scaled to the shape of one array).
"""

from dataclasses import dataclass
from functools import lru_cache

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxckpt.core.box import Box, from_index


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """How one array lies on the processes.

    ``lo`` and ``hi`` are int64 arrays [boxes, ndim] in elements: the distinct process boxes, without overlaps.
    ``holders`` is int32 [boxes, replicas]; short rows are padded with -1. ``block`` is the extent of one device's
    part per dimension and ``cell`` divides every box edge except the array's own, so a regular grid with a cell size
    dividing ``cell`` never crosses a process boundary.
    """

    shape: tuple[int, ...]
    block: tuple[int, ...]
    cell: tuple[int, ...]
    lo: np.ndarray
    hi: np.ndarray
    holders: np.ndarray

    def boxes_of(self, process: int) -> list[Box]:
        """The boxes that one process holds."""
        rows = np.nonzero((self.holders == process).any(axis=1))[0]
        return [Box(tuple(self.lo[r].tolist()), tuple((self.hi[r] - self.lo[r]).tolist())) for r in rows]


def layout_of(sharding: Sharding | None, shape: tuple[int, ...], *, devices_per_process: int = 1) -> Layout:
    """The layout of an array of this sharding and shape.

    ``None`` means host memory: one box, held by process 0 alone. ``devices_per_process`` is used only for abstract
    meshes, whose device ``i`` is taken to belong to process ``i // devices_per_process``.
    """
    if sharding is None or isinstance(sharding, SingleDeviceSharding):
        holder = 0 if sharding is None else next(iter(sharding.device_set)).process_index
        start, stop = np.zeros((1, len(shape)), np.int64), np.array([shape], np.int64)
        return Layout(shape=shape, block=shape, cell=shape, lo=start, hi=stop, holders=np.array([[holder]], np.int32))
    if isinstance(sharding, NamedSharding):
        spec = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
        pattern = _named_pattern(sharding.mesh, PartitionSpec(*spec), len(shape), devices_per_process)
        # Uneven shards leave some devices with nothing, which the pattern cannot know.
        if all(n % k == 0 for n, k in zip(shape, pattern.blocks, strict=True)):
            block = np.array([n // k for n, k in zip(shape, pattern.blocks, strict=True)], np.int64)
            return Layout(
                shape=shape,
                block=tuple(block.tolist()),
                cell=tuple((block * np.array(pattern.unit, np.int64)).tolist()),
                lo=pattern.lo * block,
                hi=pattern.hi * block,
                holders=pattern.holders,
            )
    return _from_devices(sharding, shape)


@lru_cache(maxsize=4096)
def device_boxes(sharding: Sharding, shape: tuple[int, ...]) -> dict[jax.Device, Box]:
    """The box of each device of this process."""
    return {d: from_index(i, shape) for d, i in sharding.addressable_devices_indices_map(shape).items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pattern:
    blocks: tuple[int, ...]  # number of blocks per dimension
    unit: tuple[int, ...]  # gcd of all box edges, in blocks
    lo: np.ndarray  # [boxes, ndim] in blocks
    hi: np.ndarray
    holders: np.ndarray


@lru_cache(maxsize=4096)
def _named_pattern(mesh: Mesh | AbstractMesh, spec: PartitionSpec, ndim: int, devices_per_process: int) -> _Pattern:
    sizes = dict(mesh.shape)
    names = tuple(sizes)
    coords = np.indices(tuple(sizes.values())).reshape(len(names), -1)
    axis = dict(zip(names, coords, strict=True))
    blocks, index = [], []
    for entry in spec:
        axes = (
            ()
            if entry is None or entry is PartitionSpec.UNCONSTRAINED
            else (entry if isinstance(entry, tuple) else (entry,))
        )
        place = np.zeros(coords.shape[1], np.int64)
        for name in axes:
            place = place * sizes[name] + axis[name]
        blocks.append(int(np.prod([sizes[name] for name in axes], dtype=np.int64)))
        index.append(place)
    where = np.stack(index, axis=1) if index else np.zeros((coords.shape[1], 0), np.int64)
    if isinstance(mesh, AbstractMesh):
        process = np.arange(coords.shape[1]) // devices_per_process
    else:
        process = np.array([d.process_index for d in mesh.devices.flat])
    return _pattern(tuple(blocks), where, process)


def _pattern(blocks: tuple[int, ...], where: np.ndarray, process: np.ndarray) -> _Pattern:
    """Merge each process's blocks into one box where they fill one, then find the holders of each distinct box."""
    flat = np.ravel_multi_index(where.T, blocks) if blocks else np.zeros(len(process), np.int64)
    total = int(np.prod(blocks, dtype=np.int64))
    pairs = np.unique(process * total + flat)
    owner, block = pairs // total, pairs % total
    place = np.stack(np.unravel_index(block, blocks), axis=1) if blocks else np.zeros((len(block), 0), np.int64)
    starts = np.nonzero(np.r_[True, owner[1:] != owner[:-1]])[0]
    lo = np.minimum.reduceat(place, starts, axis=0)
    hi = np.maximum.reduceat(place, starts, axis=0) + 1
    count = np.diff(np.r_[starts, len(owner)])
    merged = bool((np.prod(hi - lo, axis=1, dtype=np.int64) == count).all())
    if merged:
        distinct = np.unique(np.concatenate([lo, hi], axis=1), axis=0)
        # Boxes of different processes may overlap without being equal: then blocks are the only common pieces.
        merged = int(
            np.prod(distinct[:, len(blocks) :] - distinct[:, : len(blocks)], axis=1, dtype=np.int64).sum()
        ) == len(np.unique(block))
    if not merged:
        lo, hi, starts = place, place + 1, np.arange(len(owner))
    return _group(blocks, lo, hi, owner[starts])


def _group(blocks: tuple[int, ...], lo: np.ndarray, hi: np.ndarray, owner: np.ndarray) -> _Pattern:
    ndim = len(blocks)
    boxes, inverse = np.unique(np.concatenate([lo, hi], axis=1), axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    order = np.lexsort((owner, inverse))
    counts = np.bincount(inverse, minlength=len(boxes))
    holders = np.full((len(boxes), int(counts.max())), -1, np.int32)
    column = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    holders[inverse[order], column] = owner[order]
    edges = [np.gcd.reduce(np.r_[boxes[:, d], boxes[:, ndim + d]]) for d in range(ndim)]
    return _Pattern(
        blocks=blocks,
        unit=tuple(int(e) for e in edges),
        lo=boxes[:, :ndim],
        hi=boxes[:, ndim:],
        holders=holders,
    )


def _from_devices(sharding: Sharding, shape: tuple[int, ...]) -> Layout:
    """Any sharding, by asking JAX for every device's indices (uneven and non-mesh shardings)."""
    lo, hi, owner = [], [], []
    for device, index in sharding.devices_indices_map(shape).items():
        box = from_index(index, shape)
        if box.size or not all(shape):
            lo.append(box.start)
            hi.append(box.stop)
            owner.append(device.process_index)
    low = np.array(lo, np.int64).reshape(len(owner), len(shape))
    high = np.array(hi, np.int64).reshape(len(owner), len(shape))
    pairs = np.unique(np.concatenate([low, high, np.array(owner)[:, None]], axis=1), axis=0)
    ndim = len(shape)
    found = _group(shape, pairs[:, :ndim], pairs[:, ndim : 2 * ndim], pairs[:, -1])
    # The array's own edge need not be on the grid.
    cell = tuple(
        int(
            np.gcd.reduce(
                [e for e in np.r_[found.lo[:, d], found.hi[:, d]].tolist() if e not in (0, shape[d])] or [shape[d]]
            )
        )
        for d in range(ndim)
    )
    extent = tuple(int(x) for x in (found.hi - found.lo).max(axis=0)) if len(owner) else shape
    block = tuple(b if c and b % c == 0 else c for b, c in zip(extent, cell, strict=True))
    return Layout(shape=shape, block=block, cell=cell, lo=found.lo, hi=found.hi, holders=found.holders)
