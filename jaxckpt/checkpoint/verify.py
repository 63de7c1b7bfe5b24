"""Verify a checkpoint: read every stored byte, without a device, and report leaf by leaf."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from jaxckpt.checkpoint.source import OwnSource, check_manifest, open_source
from jaxckpt.core.box import whole
from jaxckpt.core.checksum import crc32c
from jaxckpt.core.errors import CheckpointError, CorruptionError, UnsupportedFormatError
from jaxckpt.core.text import counted
from jaxckpt.core.tree import path_name, walk
from jaxckpt.format.ocdbt_reader import decode_database
from jaxckpt.format.sidecar import manifest_checksum
from jaxckpt.format.zarr3 import array_metadata, chunk_keys, metadata_key
from jaxckpt.storage.store import AbstractStore
from jaxckpt.storage.url import Location, StorageOptions, open_store


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The outcome: ``problems`` has a line per damaged leaf or file, ``leaves`` the names of those that are whole."""

    url: str
    leaves: tuple[str, ...]
    problems: tuple[str, ...]
    read_bytes: int
    checksums: bool  # False: the checkpoint carries none; all that is known is that everything can be read

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        proof = (
            "every chunk matches its checksum" if self.checksums else "everything can be read (no checksums of values)"
        )
        if self.ok:
            whole = counted(len(self.leaves), "leaf", "leaves")
            return f"{self.url}: {whole}, {counted(self.read_bytes, 'byte')}: {proof}"
        shown = "\n".join(f"  {line}" for line in self.problems)
        whole = counted(len(self.leaves), "leaf is whole", "leaves are whole")
        return f"{self.url}: {counted(len(self.problems), 'problem')}, {whole}\n{shown}"


def verify(path: Location, *, options: StorageOptions | None = None) -> VerifyReport:
    """Read all of a checkpoint and compare every chunk with its checksum, and the database with the chunk table.

    Damage is reported, not raised: a bad, truncated, missing, swapped or foreign chunk is named with its leaf and file.

    Raises:
        NotFoundError, NotCommittedError: there is no (finished) checkpoint.

    Example:
        >>> from jaxckpt.checkpoint.save import save
        >>> save("memory://docs/verify", {"w": np.ones(3)})
        >>> verify("memory://docs/verify").ok
        True
    """
    store = open_store(path, options)
    try:
        source = open_source(store)
    except CorruptionError as error:
        return VerifyReport(url=store.url, leaves=(), problems=(str(error),), read_bytes=0, checksums=True)
    return _verify_own(store, source) if isinstance(source, OwnSource) else _verify_foreign(source)


def _verify_own(store: AbstractStore, source: OwnSource) -> VerifyReport:
    names = _names(source)
    problems: list[str] = []
    try:
        check_manifest(store, source.sidecar)
        problems += _database_problems(store, source)
    except CheckpointError as error:
        problems.append(str(error))

    def check(leaf: int) -> tuple[list[str], int]:
        found, size = [], 0
        for index in range(int(source.first[leaf + 1] - source.first[leaf])):
            chunk = source.chunk_read(leaf, index)
            where = f'Leaf "{names[leaf]}", chunk {index} at {chunk.file}[{chunk.offset}:{chunk.offset + chunk.length}]'
            data = np.empty(chunk.length, np.uint8)
            try:
                store.read_into(chunk.file, chunk.offset, data)
            except CheckpointError as error:
                found.append(f"{where}: {error}")
                continue
            size += chunk.length
            crc = crc32c(data[:-4])
            if crc != chunk.crc32c or data[-4:].tobytes() != crc.to_bytes(4, "little"):
                found.append(
                    f"{where}: damaged or swapped (crc32c {crc:08x}, recorded {chunk.crc32c:08x} and, in the chunk, "
                    f"{int.from_bytes(data[-4:].tobytes(), 'little'):08x})"
                )
        return found, size

    with ThreadPoolExecutor(store.parallel_io, thread_name_prefix="jaxckpt-verify") as pool:
        results = list(pool.map(check, range(len(source.leaves))))
    for found, _ in results:
        problems += found
    whole_leaves = tuple(name for name, (found, _) in zip(names, results, strict=True) if not found)
    size = sum(size for _, size in results)
    return VerifyReport(url=store.url, leaves=whole_leaves, problems=tuple(problems), read_bytes=size, checksums=True)


def _database_problems(store: AbstractStore, source: OwnSource) -> list[str]:
    """Where the OCDBT database, which other readers go by, says something else than our chunk table."""
    if manifest_checksum(store.read("manifest.ocdbt")) in source.sidecar.supersedes:
        return [
            "manifest.ocdbt is that of the checkpoint before: an overwrite was interrupted; others see the old one."
        ]
    try:
        found = {
            value.key.decode(): (value.inline if value.inline is not None else (value.file, value.offset, value.length))
            for value in decode_database(
                store.read("manifest.ocdbt"), lambda name, a, b: store.read(name, start=a, stop=b)
            )
        }
    except UnsupportedFormatError as error:
        return [f"manifest.ocdbt was rewritten by another program: {error}"]
    wanted: dict[str, object] = {}
    for path, node in walk(source.structure):
        if node.kind != "leaf":
            continue
        entry, name = source.leaves[node.leaf], path_name(path)
        if not entry.stored:
            continue
        wanted[metadata_key(name)] = array_metadata(entry.shape, entry.dtype, entry.chunk, entry.zstd_level)
        for index, key in enumerate(chunk_keys(name, entry.grid)):
            if int(source.first[node.leaf + 1] - source.first[node.leaf]):
                chunk = source.chunk_read(node.leaf, index)
                wanted[key] = (chunk.file, chunk.offset, chunk.length)
    problems = [f"{key}: not in the database" for key in wanted if key not in found]
    return problems + [
        f"{key}: the database has another entry" for key in wanted if key in found and found[key] != wanted[key]
    ]


def _verify_foreign(source) -> VerifyReport:
    problems, good, size = [], [], 0
    for leaf in source.foreign.leaves:
        if leaf.kind != "string":
            try:
                size += source.foreign.read(leaf, whole(leaf.shape)).nbytes
            except CheckpointError as error:
                problems.append(str(error))
                continue
        good.append(leaf.name)
    return VerifyReport(url=source.url, leaves=tuple(good), problems=tuple(problems), read_bytes=size, checksums=False)


def _names(source: OwnSource) -> list[str]:
    return [entry.name for entry in source.leaves]
