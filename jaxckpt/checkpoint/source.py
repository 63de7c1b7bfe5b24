"""An opened checkpoint to read from: ours, through the sidecar, or another library's, through TensorStore."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol, final

import jax
import numpy as np

from jaxckpt.checkpoint.codecs import decoder
from jaxckpt.checkpoint.commit import MANIFEST, is_unfinished
from jaxckpt.checkpoint.foreign import ForeignCheckpoint, ForeignLeaf, open_foreign
from jaxckpt.core.box import Box, intersect, whole
from jaxckpt.core.dtypes import dtype_of, mover
from jaxckpt.core.errors import CorruptionError, NotCommittedError, NotFoundError
from jaxckpt.core.events import Progress, emit, is_heard
from jaxckpt.core.tree import Node
from jaxckpt.format import sidecar as sc
from jaxckpt.format.orbax_metadata import COMMIT_MARKER
from jaxckpt.plan.save import chunks_of_box
from jaxckpt.storage.store import AbstractStore
from jaxckpt.transfer.read import ChunkRead, LeafRead, read_chunks
from jaxckpt.transfer.upload import Target

LOCAL_RUN_BYTES = 1024 * 1024
REMOTE_RUN_BYTES = 8 * 1024 * 1024


class Source(Protocol):
    """What a restore reads from."""

    url: str
    structure: Node

    @property
    def leaves(self) -> Sequence[sc.LeafEntry]:
        """All distinct leaves."""
        ...

    @property
    def shardings(self) -> Sequence[dict[str, Any]]:
        """Records of shardings, which entries refer to."""
        ...

    def fill(self, targets: Mapping[int, tuple[Target, ...]]) -> int:
        """Read the wanted boxes of each leaf (by index); returns the bytes read."""
        ...


def open_source(store: AbstractStore) -> Source:
    """Open the checkpoint at the root of a store.

    Raises:
        NotFoundError: nothing is there.
        NotCommittedError: a save began there and never finished.
        CorruptionError: the sidecar or the manifest is not what was committed.
    """
    if not store.exists(sc.FILE_NAME):
        if is_unfinished(store, store.names()):
            raise NotCommittedError(_unfinished(store.url))
        return ForeignSource(open_foreign(store), store.parallel_io)
    if not store.exists(COMMIT_MARKER):
        raise NotCommittedError(_unfinished(store.url))
    sidecar = sc.decode_sidecar(store.read(sc.FILE_NAME), where=f"{store.url}{sc.FILE_NAME}")
    check_manifest(store, sidecar)
    return OwnSource(store, sidecar)


def check_manifest(store: AbstractStore, sidecar: sc.Sidecar) -> None:
    """Raise unless the database's manifest is the one that the sidecar was written with."""
    try:
        found = sc.manifest_checksum(store.read(MANIFEST))
    except NotFoundError as error:
        if sc.NO_MANIFEST in sidecar.supersedes:
            return  # an overwrite of zarr folders was interrupted right after it took effect
        raise CorruptionError(f"{store.url}{MANIFEST} is missing: the checkpoint is damaged.") from error
    if found != sidecar.manifest_crc32c and found not in sidecar.supersedes:
        raise CorruptionError(
            f"{store.url}{MANIFEST} is not the one that {sc.FILE_NAME} was committed with (crc32c "
            f"{sidecar.manifest_crc32c:08x}): it is damaged, or another program changed the database. "
            f"To restore what the database holds now, move {sc.FILE_NAME} away."
        )


@final
class OwnSource:
    """A checkpoint of ours: chunks by file and offset, each checked against the table."""

    def __init__(self, store: AbstractStore, sidecar: sc.Sidecar) -> None:
        self.store, self.sidecar = store, sidecar
        self.url, self.structure, self.leaves = store.url, sidecar.structure, sidecar.leaves
        self.shardings = sidecar.shardings
        self.first = sidecar.first_chunks()
        self._columns = [
            c.tolist() for c in (sidecar.table.file, sidecar.table.offset, sidecar.table.length, sidecar.table.crc32c)
        ]

    def fill(self, targets: Mapping[int, tuple[Target, ...]]) -> int:
        """Read the wanted boxes of each leaf, checking every chunk."""
        reads = {leaf: self.leaf_read(leaf, boxes) for leaf, boxes in targets.items()}
        chunks = [
            self.chunk_read(leaf, index) for leaf in reads for index in needed_chunks(self.leaves[leaf], targets[leaf])
        ]
        return self.read(chunks, reads)

    def read(
        self,
        chunks: list[ChunkRead],
        reads: dict[int, LeafRead],
        sink: Callable[[ChunkRead, np.ndarray], None] | None = None,
    ) -> int:
        """Read these chunks into the targets of their leaves, or hand their stored bytes to ``sink``."""
        chunks.sort(key=lambda chunk: (chunk.file, chunk.offset))
        size = sum(chunk.length for chunk in chunks)
        local = self.store.data_file_bytes is None
        threads = self.store.parallel_io if size > 2 * LOCAL_RUN_BYTES or not local else 1
        run_bytes = LOCAL_RUN_BYTES if local else REMOTE_RUN_BYTES
        tell = self._tell if is_heard() else None
        return read_chunks(
            self.store, chunks, reads, threads=threads, run_bytes=run_bytes, cheap_reads=local, sink=sink, tell=tell
        )

    def _tell(self, moved: int) -> None:
        emit(Progress(operation="read", path=self.url, process=jax.process_index(), moved_bytes=moved))

    def leaf_read(self, leaf: int, targets: tuple[Target, ...]) -> LeafRead:
        """What the reader needs to know of a leaf."""
        entry = self.leaves[leaf]
        return LeafRead(
            name=entry.name,
            shape=entry.shape,
            chunk=entry.chunk,
            dtype=mover(dtype_of(entry.dtype)),
            decode=decoder(entry.zstd_level is not None),
            targets=targets,
        )

    def chunk_read(self, leaf: int, index: int) -> ChunkRead:
        """Where a chunk is stored."""
        file, offset, length, crc = self._columns
        row = int(self.first[leaf]) + index
        return ChunkRead(leaf, index, self.sidecar.files[file[row]], offset[row], length[row], crc[row])


def needed_chunks(entry: sc.LeafEntry, targets: Sequence[Target]) -> Sequence[int]:
    """Grid indices of the chunks that the targets touch, ascending."""
    if 0 in entry.shape:
        return []
    return _needed(tuple(target.box for target in targets), entry.chunk, entry.shape)


@final
class ForeignSource:
    """A checkpoint that another library wrote. Its values carry no checksums of ours."""

    def __init__(self, foreign: ForeignCheckpoint, parallel_io: int) -> None:
        self.foreign, self.url, self.structure = foreign, foreign.url, foreign.structure
        self.leaves = tuple(_entry(foreign, leaf, place) for place, leaf in enumerate(foreign.leaves))
        self.shardings: tuple[dict, ...] = tuple(_sharding(leaf) for leaf in foreign.leaves)
        self._threads = parallel_io

    def fill(self, targets: Mapping[int, tuple[Target, ...]]) -> int:
        """Read the wanted boxes of each leaf through TensorStore."""

        def read(job: tuple[int, Target]) -> int:
            leaf, target = job
            data = self.foreign.read(self.foreign.leaves[leaf], target.box)
            target.data[...] = data.view(target.data.dtype)
            return data.nbytes

        jobs = [(leaf, clip(target, self.leaves[leaf].shape)) for leaf, boxes in targets.items() for target in boxes]
        with ThreadPoolExecutor(self._threads, thread_name_prefix="jaxckpt-read") as pool:
            return sum(pool.map(read, [job for job in jobs if job[1].box.size]))


def clip(target: Target, shape: tuple[int, ...]) -> Target:
    """The part of a target that lies within an array of this shape."""
    both = intersect(target.box, whole(shape))
    if both is None:
        return Target(target.box._replace(shape=(0,) * len(shape)), target.data)
    return target if both == target.box else Target(both, target.data[both.slices(target.box.start)])


def _unfinished(url: str) -> str:
    return (
        f"{url} is not a committed checkpoint: a save began there and never finished ({COMMIT_MARKER} is missing). "
        "Restore an earlier step, or save here again. If the folder was copied without that file, copy it too."
    )


@lru_cache(maxsize=4096)
def _needed(boxes: tuple[Box, ...], chunk: tuple[int, ...], shape: tuple[int, ...]) -> Sequence[int]:
    return sorted({index for box in boxes for index in _touched(box, chunk, shape)})


def _touched(box: Box, chunk: tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
    grid = tuple(-(-n // c) for n, c in zip(shape, chunk, strict=True))
    inside = Box(
        box.start, tuple(max(min(a + n, s) - a, 0) for a, n, s in zip(box.start, box.shape, shape, strict=True))
    )
    return chunks_of_box(inside, chunk, grid).tolist()


def _entry(foreign: ForeignCheckpoint, leaf: ForeignLeaf, place: int) -> sc.LeafEntry:
    if leaf.kind == "string":
        return sc.LeafEntry(name=leaf.name, kind="str", value=leaf.value)
    if leaf.kind == "scalar":
        number = foreign.read(leaf, whole(leaf.shape))[()]
        kind = {"b": "bool", "i": "int", "u": "int", "f": "float"}.get(number.dtype.kind, "numpy_scalar")
        if kind != "numpy_scalar" and number.dtype.name in ("int64", "float64", "bool"):
            value = number.item().hex() if kind == "float" else number.item()
            return sc.LeafEntry(name=leaf.name, kind=kind, value=value)
        return sc.LeafEntry(name=leaf.name, kind="numpy_scalar", dtype=leaf.dtype, shape=leaf.shape, chunk=leaf.shape)
    return sc.LeafEntry(
        name=leaf.name,
        kind=leaf.kind,
        dtype=leaf.dtype,
        shape=leaf.shape,
        chunk=tuple(max(n, 1) for n in foreign.chunk_shape(leaf)),
        sharding=place,
        prng_impl=leaf.prng_impl or "",
    )


def _sharding(leaf: ForeignLeaf) -> dict:
    """Orbax's record of a sharding in the words of ours."""
    record: Any = leaf.sharding
    if not record or record.get("sharding_type") != "NamedSharding":
        return {"type": "unknown"}
    mesh = record.get("device_mesh") or {}
    ids = [d["id"] for d in np.asarray(mesh.get("mesh", []), dtype=object).reshape(-1)]
    return {
        "type": "NamedSharding",
        "axes": record["axis_names"],
        "shape": record["shape"],
        "axis_types": [str(t).rsplit(".", 1)[-1] for t in record.get("axis_types") or []],
        "devices": ids or list(range(int(np.prod(record["shape"])))),
        "spec": record["partition_spec"],
    }
