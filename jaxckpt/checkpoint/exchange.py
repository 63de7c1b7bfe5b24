"""Restore over several processes: read every chunk once, and let XLA carry it to the others that need it.

Chunks that one process alone needs go straight to their places. A chunk that several need is read by one of them; the
bytes read by all members of a group are exchanged by one jitted identity whose output is replicated within the group
(one all-gather over the interconnect, in which every device carries its part), in rounds of bounded size. Before each
round, and at the end, all processes tell each other whether they could read (``together.py``): a damaged chunk raises
on all of them, and none is left waiting.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxckpt.checkpoint.place import Want
from jaxckpt.checkpoint.source import OwnSource, needed_chunks
from jaxckpt.checkpoint.together import Together
from jaxckpt.plan.restore import Groups, rounds, sharing, split_evenly
from jaxckpt.transfer.read import ChunkRead, LeafRead, deliver
from jaxckpt.transfer.upload import Target

ROUND_BYTES = 16 * 1024 * 1024  # read and sent by one process in one round
_RECEIVED_BYTES = 512 * 1024 * 1024  # that one process gets in one round: with many processes, each sends less
_SMALLEST = 4096


def is_shared(want: Want) -> bool:
    """Whether several processes have a part in this value: then all of them take part in its restore."""
    return want.sharding is not None and spans_processes(want.sharding)


@lru_cache(maxsize=1024)
def spans_processes(sharding: Sharding) -> bool:
    """Whether the devices of a sharding belong to several processes."""
    return len({device.process_index for device in sharding.device_set}) > 1


def fill_together(
    source: OwnSource, targets: Mapping[int, tuple[Target, ...]], wants: Sequence[Want], together: Together
) -> int:
    """Fill the targets of one batch; all processes call it with equal ``wants``. Returns the bytes this one read.

    Raises:
        CheckpointError: on all processes, when one of them could not read or did not come in time; names it.
    """
    rank = jax.process_index()
    shared, alone = _split(wants)
    reads = {leaf: source.leaf_read(leaf, boxes) for leaf, boxes in targets.items()}
    own = [source.chunk_read(leaf, i) for leaf in alone for i in needed_chunks(source.leaves[leaf], targets[leaf])]
    chunks: dict[tuple[Groups, tuple[int, ...]], list[ChunkRead]] = {}  # by the processes that need them
    for leaf, forms in shared.items():
        entry = source.leaves[leaf]
        if 0 in entry.shape:
            continue
        forms = tuple((want.sharding, want.shape or entry.shape) for want in forms)
        plan = sharing(forms, entry.shape, entry.chunk, jax.process_count())
        own += [source.chunk_read(leaf, i) for i in plan.alone(rank)]
        for index, needed_by in plan.shared():
            chunks.setdefault((plan.groups, needed_by), []).append(source.chunk_read(leaf, index))
    streams = _streams(chunks)

    error, read_bytes = None, 0
    try:
        read_bytes = source.read(own, reads) if own else 0
    except Exception as failure:  # of any kind: the others must hear of it before they wait for this process
        error = failure
    for groups, lists in sorted(streams.items()):
        limit = min(ROUND_BYTES, _RECEIVED_BYTES // len(groups[0]))
        for cut in rounds([[chunk.length for chunk in chunks] for chunks in lists], limit):
            parts = [chunks[first:stop] for chunks, (first, stop) in zip(lists, cut, strict=True)]
            more, error = _round(source, parts, groups, reads, rank, error, together)
            read_bytes += more
    together.agree(error)
    return read_bytes


def _streams(chunks: Mapping[tuple[Groups, tuple[int, ...]], list[ChunkRead]]) -> dict[Groups, list[list[ChunkRead]]]:
    """What each process reads for others; neighbours in a file go to one process."""
    streams: dict[Groups, list[list[ChunkRead]]] = {}
    for (groups, needed_by), found in sorted(chunks.items()):
        lists = streams.setdefault(groups, [[] for _ in range(jax.process_count())])
        found.sort(key=_place)
        for chunk, part in zip(found, split_evenly([chunk.length for chunk in found], len(needed_by)), strict=True):
            lists[needed_by[part]].append(chunk)
    for lists in streams.values():
        for own in lists:
            own.sort(key=_place)
    return streams


def _place(chunk: ChunkRead) -> tuple[str, int]:
    return chunk.file, chunk.offset


def _split(wants: Sequence[Want]) -> tuple[dict[int, list[Want]], list[int]]:
    """Leaves that live on several processes, with the forms wanted of them; and leaves that this one reads alone."""
    shared: dict[int, list[Want]] = {}
    alone: dict[int, None] = {}
    for want in wants:
        if is_shared(want):
            shared.setdefault(want.leaf, []).append(want)
        else:
            alone[want.leaf] = None
    # A leaf wanted both ways is read alone as well: rare, and right.
    return shared, list(alone)


def _round(
    source: OwnSource,
    parts: list[list[ChunkRead]],
    groups: Groups,
    reads: Mapping[int, LeafRead],
    rank: int,
    error: Exception | None,
    together: Together,
) -> tuple[int, Exception | None]:
    """Read this process's part of one round, exchange it within the group, deliver what the group read.

    ``error`` is what has gone wrong here so far: all hear of it before they exchange anything. Returns the bytes read,
    and what went wrong after the exchange.
    """
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

    read_bytes = 0
    if error is None and parts[rank]:
        try:
            read_bytes = source.read(list(parts[rank]), leaves, sink=keep)
        except Exception as failure:
            error = failure
    together.agree(error)
    group = next(group for group in groups if rank in group)
    received = together.exchange(lambda: _gather(stream, groups))
    try:
        _deliver(received, [parts[process] for process in group], reads)
    except Exception as failure:
        return read_bytes, failure
    return read_bytes, None


def _deliver(received: np.ndarray, parts: list[list[ChunkRead]], reads: Mapping[int, LeafRead]) -> None:
    for row, chunks in enumerate(parts):
        start = 0
        for chunk in chunks:
            size = chunk.length - 4
            leaf = reads.get(chunk.leaf)
            if leaf is not None:
                deliver(leaf, chunk.index, received[row, start : start + size])
            start += size


def _gather(mine: np.ndarray, groups: Groups) -> np.ndarray:
    """uint8 [members, bytes]: what each member of this process's group brought. All bring equally many bytes."""
    sharding, gather = exchange_program(tuple(sorted(jax.devices(), key=lambda d: d.id)), groups)
    own = _own_devices(sharding)
    words = -(-len(mine) // (4 * len(own)))  # per device
    padded = np.zeros(4 * words * len(own), np.uint8)
    padded[: len(mine)] = mine
    parts = padded.view(np.uint32).reshape(len(own), words)
    shards = [jax.device_put(part, device) for part, device in zip(parts, own, strict=True)]
    spread = jax.make_array_from_single_device_arrays((words * sharding.mesh.size,), sharding, shards)
    gathered = {shard.device: shard.data for shard in gather(spread).addressable_shards}
    received = np.stack([np.asarray(gathered[device]).reshape(-1, words) for device in own], axis=1)
    return received.reshape(len(received), -1).view(np.uint8)[:, : len(mine)]


@lru_cache(maxsize=64)
def exchange_program(devices: tuple[jax.Device, ...], groups: Groups) -> tuple[NamedSharding, jax.stages.Wrapped]:
    """How the bytes to exchange lie on these devices, and the jitted identity that replicates them in each group.

    The array is uint32, of one dimension: by group, then by place in the process, then by member. Each device brings
    its part of what its process read and gets that part of what the others of its group read, so that the devices of
    a process hold everything once between them: one all-gather, and no byte goes to a process twice.

    All devices take part: programs on a part of a TPU v5e or v6e slice do not compile ("limited ICI routing"). Only
    where processes have unequally many does one per process stand for the rest.
    """
    by_process: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    places = len(by_process[0]) if len({len(own) for own in by_process.values()}) == 1 else 1
    grid = [[[by_process[p][place] for p in group] for place in range(places)] for group in groups]
    mesh = Mesh(np.array(grid), ("group", "place", "member"))
    out = NamedSharding(mesh, PartitionSpec(("group", "place")))
    return NamedSharding(mesh, PartitionSpec(("group", "place", "member"))), jax.jit(lambda x: x, out_shardings=out)


def _own_devices(sharding: NamedSharding) -> list[jax.Device]:
    """The devices of this process, by their place."""
    return [d for d in np.asarray(sharding.mesh.devices).flat if d.process_index == jax.process_index()]
