"""Restore over several processes: read every chunk once, and let XLA carry it to the others that need it.

Chunks that one process alone needs go straight to their places. A chunk that several need is read by one of them; the
bytes read by all members of a group are exchanged by one jitted identity whose output is replicated within the group
(an all-gather over the interconnect), in rounds of bounded size. Before each round all processes tell each other
whether they could read: a damaged chunk raises on all of them, and none is left waiting.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxckpt.checkpoint.place import Want
from jaxckpt.checkpoint.source import OwnSource, needed_chunks
from jaxckpt.core.errors import CheckpointError, CorruptionError
from jaxckpt.plan.restore import Groups, Sharing, rounds, sharing
from jaxckpt.transfer.read import ChunkRead, LeafRead, deliver
from jaxckpt.transfer.upload import Target

ROUND_BYTES = 16 * 1024 * 1024  # read and sent by one process in one round
_STATUS_BYTES = 1024
_SMALLEST = 4096


def fill_together(source: OwnSource, targets: Mapping[int, tuple[Target, ...]], wants: Sequence[Want]) -> int:
    """Fill the targets of one batch; all processes call it with equal ``wants``. Returns the bytes this one read.

    Raises:
        CheckpointError: on all processes, when one of them could not read; names it.
    """
    rank = jax.process_index()
    shared, alone = _split(wants)
    reads = {leaf: source.leaf_read(leaf, boxes) for leaf, boxes in targets.items()}
    own = [source.chunk_read(leaf, i) for leaf in alone for i in needed_chunks(source.leaves[leaf], targets[leaf])]
    streams: dict[Groups, list[list[ChunkRead]]] = {}
    for leaf, forms in shared.items():
        entry = source.leaves[leaf]
        if 0 in entry.shape:
            continue
        forms = tuple((want.sharding, want.shape or entry.shape) for want in forms)
        plan = sharing(forms, entry.shape, entry.chunk, jax.process_count())
        own += [source.chunk_read(leaf, i) for i in _exclusive(plan, rank)]
        readers = plan.readers(leaf)
        lists = streams.setdefault(plan.groups, [[] for _ in range(jax.process_count())])
        for index in np.nonzero(plan.needs.sum(axis=1) > 1)[0].tolist():
            lists[int(readers[index])].append(source.chunk_read(leaf, index))

    error, read_bytes = None, 0
    try:
        read_bytes = source.read(own, reads) if own else 0
    except CheckpointError as failure:
        error = failure
    if not shared:
        if error is not None:
            raise error
        return read_bytes
    _agree(source.url, error)
    for groups, lists in sorted(streams.items()):
        for cut in rounds([[chunk.length for chunk in chunks] for chunks in lists], ROUND_BYTES):
            parts = [chunks[first:stop] for chunks, (first, stop) in zip(lists, cut, strict=True)]
            read_bytes += _round(source, parts, groups, reads, rank)
    return read_bytes


def _split(wants: Sequence[Want]) -> tuple[dict[int, list[Want]], list[int]]:
    """Leaves that live on several processes, with the forms wanted of them; and leaves that this one reads alone."""
    shared: dict[int, list[Want]] = {}
    alone: dict[int, None] = {}
    for want in wants:
        spans = want.sharding is not None and len({d.process_index for d in want.sharding.device_set}) > 1
        if spans:
            shared.setdefault(want.leaf, []).append(want)
        else:
            alone[want.leaf] = None
    # A leaf wanted both ways is read alone as well: rare, and right.
    return shared, list(alone)


def _exclusive(plan: Sharing, rank: int) -> list[int]:
    return np.nonzero(plan.needs[:, rank] & (plan.needs.sum(axis=1) == 1))[0].tolist()


def _round(
    source: OwnSource, parts: list[list[ChunkRead]], groups: Groups, reads: Mapping[int, LeafRead], rank: int
) -> int:
    """Read this process's part of one round, exchange it within the group, deliver what the group read."""
    sizes = [sum(chunk.length - 4 for chunk in chunks) for chunks in parts]
    width = _SMALLEST
    while width < max(sizes):
        width *= 2  # few sizes, so few compilations
    stream = np.zeros(width, np.uint8)
    places = dict(
        zip(parts[rank], np.cumsum([0, *(chunk.length - 4 for chunk in parts[rank])])[:-1].tolist(), strict=True)
    )
    leaves = {chunk.leaf: source.leaf_read(chunk.leaf, ()) for chunk in parts[rank]}

    def keep(chunk: ChunkRead, data: np.ndarray) -> None:
        stream[places[chunk] : places[chunk] + len(data)] = data

    error, read_bytes = None, 0
    try:
        read_bytes = source.read(list(parts[rank]), leaves, sink=keep) if parts[rank] else 0
    except CheckpointError as failure:
        error = failure
    _agree(source.url, error)
    group = next(group for group in groups if rank in group)
    received = _gather(stream, groups)
    for row, process in enumerate(group):
        start = 0
        for chunk in parts[process]:
            size = chunk.length - 4
            leaf = reads.get(chunk.leaf)
            if leaf is not None:
                deliver(leaf, chunk.index, received[row, start : start + size])
            start += size
    return read_bytes


def _agree(url: str, error: CheckpointError | None) -> None:
    """Raise on every process if one has an error."""
    text = b"" if error is None else f"{type(error).__name__}: {error}".encode()[: _STATUS_BYTES - 1] or b"?"
    status = np.zeros(_STATUS_BYTES, np.uint8)
    status[: len(text)] = np.frombuffer(text, np.uint8)
    everyone = (tuple(range(jax.process_count())),)
    told = _gather(status, everyone)
    if error is not None:
        raise error
    failed = [process for process in range(len(told)) if told[process].any()]
    if failed:
        words = told[failed[0]].tobytes().rstrip(b"\0").decode(errors="replace")
        raise CorruptionError(f"Process {failed[0]} could not read its part of {url}: {words}")


def _gather(mine: np.ndarray, groups: Groups) -> np.ndarray:
    """uint8 [members, bytes]: what each member of this process's group brought."""
    sharding, gather = _program(groups)
    lead = next(d for d in sharding.mesh.devices.flat if d.process_index == jax.process_index())
    local = jax.device_put(mine[None, None], lead)
    shape = (len(groups), len(groups[0]), len(mine))
    spread = jax.make_array_from_single_device_arrays(shape, sharding, [local])
    return np.asarray(gather(spread).addressable_data(0))[0]


@lru_cache(maxsize=64)
def _program(groups: Groups):
    """The sharding of the bytes to exchange, one lead device per process, and the identity that replicates them."""
    leads: dict[int, jax.Device] = {}
    for device in sorted(jax.devices(), key=lambda d: d.id):
        leads.setdefault(device.process_index, device)
    mesh = Mesh(np.array([[leads[p] for p in group] for group in groups]), ("group", "member"))
    out = NamedSharding(mesh, PartitionSpec("group"))
    return NamedSharding(mesh, PartitionSpec("group", "member")), jax.jit(lambda x: x, out_shardings=out)
