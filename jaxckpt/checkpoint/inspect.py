"""Look at a checkpoint without reading its arrays: leaves, sizes, mesh, lineage; and compare two."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxckpt.checkpoint.leaves import plain_value
from jaxckpt.checkpoint.match import describe_entry
from jaxckpt.checkpoint.source import OwnSource, Source, open_source
from jaxckpt.core.dtypes import dtype_of
from jaxckpt.core.text import counted
from jaxckpt.core.tree import path_name, walk
from jaxckpt.format.sidecar import LeafEntry
from jaxckpt.storage.url import Location, StorageOptions, open_store

_SHOWN = 20  # lines of one member of the metadata
_WIDE = 100  # characters of one value


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafInfo:
    """One leaf: ``kind`` as in ``docs/format.md``; sizes in bytes; ``value`` of plain Python leaves."""

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    size_bytes: int = 0
    stored_bytes: int = 0
    chunk: tuple[int, ...] = ()
    sharding: str = ""
    tied_to: str = ""
    value: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint at a glance; ``str()`` of it is what ``jaxckpt inspect`` prints."""

    url: str
    written_by: str  # "jaxckpt" or "orbax"
    leaves: tuple[LeafInfo, ...]
    step: int | None = None
    time_ns: int = 0
    processes: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    parents: tuple[dict[str, Any], ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all distinct arrays."""
        return sum(leaf.size_bytes for leaf in self.leaves if not leaf.tied_to)

    def __str__(self) -> str:
        return _render(self)


def inspect(path: Location, *, options: StorageOptions | None = None) -> CheckpointInfo:
    """Read what a checkpoint says of itself; no array is read.

    Raises:
        NotFoundError, NotCommittedError: there is no (finished) checkpoint.

    Example:
        >>> from jaxckpt.checkpoint.save import save
        >>> save("memory://docs/inspect", {"w": np.ones((2, 3), np.float32)}, step=5)
        >>> info = inspect("memory://docs/inspect")
        >>> info.step, info.leaves[0].name, info.leaves[0].shape
        (5, 'w', (2, 3))
    """
    source = open_source(open_store(path, options))
    leaves = tuple(_leaf_infos(source))
    if not isinstance(source, OwnSource):
        return CheckpointInfo(url=source.url, written_by="orbax", leaves=leaves)
    sidecar = source.sidecar
    return CheckpointInfo(
        url=source.url,
        written_by="jaxckpt",
        leaves=leaves,
        step=sidecar.step,
        time_ns=sidecar.time_ns,
        processes=sidecar.processes,
        versions=sidecar.versions,
        metadata=sidecar.metadata,
        parents=sidecar.parents,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """How two checkpoints differ; empty (and false) when they hold the same values."""

    only_in_a: tuple[str, ...] = ()
    only_in_b: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()  # a line per leaf: shape, dtype, kind, or the largest difference of values

    def __bool__(self) -> bool:
        return bool(self.only_in_a or self.only_in_b or self.differing)

    def __str__(self) -> str:
        lines = [f"- {name}" for name in self.only_in_a] + [f"+ {name}" for name in self.only_in_b]
        return "\n".join([*lines, *(f"~ {line}" for line in self.differing)]) or "the checkpoints hold the same values"


def diff(a: Location, b: Location, *, options: StorageOptions | None = None) -> Diff:
    """Compare two checkpoints leaf by leaf: names, kinds, shapes, dtypes and values (on the host, one leaf at a time).

    Example:
        >>> from jaxckpt.checkpoint.save import save
        >>> save("memory://docs/a", {"w": np.zeros(3)})
        >>> save("memory://docs/b", {"w": np.ones(3), "b": 1})
        >>> print(diff("memory://docs/a", "memory://docs/b"))
        + b
        ~ w: 3 of 3 elements differ, by at most 1
    """
    from jaxckpt.checkpoint.restore import read_leaf

    first, second = open_source(open_store(a, options)), open_source(open_store(b, options))
    left, right = _by_name(first), _by_name(second)
    differing = []
    for name in left:
        if name in right:
            x, y = first.leaves[left[name]], second.leaves[right[name]]
            form = _own_form if isinstance(first, OwnSource) == isinstance(second, OwnSource) else _orbax_form
            if form(x) != form(y):
                differing.append(f"{name}: {describe_entry(x)} and {describe_entry(y)}")
            elif line := _compare(x, read_leaf(first, left[name]), read_leaf(second, right[name])):
                differing.append(f"{name}: {line}")
    return Diff(
        only_in_a=tuple(name for name in left if name not in right),
        only_in_b=tuple(name for name in right if name not in left),
        differing=tuple(differing),
    )


def _by_name(source: Source) -> dict[str, int]:
    return {path_name(path): node.leaf for path, node in walk(source.structure) if node.kind == "leaf"}


def _own_form(entry: LeafEntry) -> tuple[str, tuple[int, ...], str]:
    return entry.kind, entry.shape, entry.dtype


def _orbax_form(entry: LeafEntry) -> tuple[str, tuple[int, ...], str]:
    """Orbax keeps numpy scalars, complex numbers and bytes as numpy arrays."""
    if entry.kind == "complex":
        return "numpy", (), "complex128"
    return "numpy" if entry.kind in ("numpy_scalar", "bytes") else entry.kind, entry.shape, entry.dtype


def _compare(entry: LeafEntry, x: Any, y: Any) -> str:
    if isinstance(x, bytes) != isinstance(y, bytes):
        x, y = (np.frombuffer(z, np.uint8) if isinstance(z, bytes) else z for z in (x, y))
    elif not entry.stored or entry.kind == "bytes":
        return "" if x == y or x != x and y != y else f"{x!r} and {y!r}"[:200]
    x, y = np.asarray(x), np.asarray(y)
    size = x.dtype.itemsize
    unequal = (x.reshape(-1).view(np.uint8).reshape(-1, size) != y.reshape(-1).view(np.uint8).reshape(-1, size)).any(1)
    if not unequal.any():
        return ""
    wide = np.complex128 if x.dtype.kind == "c" else np.float64
    gap = np.abs(x.astype(wide) - y.astype(wide))
    largest = float(np.fmax.reduce(gap.reshape(-1), initial=0))
    return f"{int(unequal.sum())} of {counted(x.size, 'element differs', 'elements differ')}, by at most {largest:.6g}"


def _leaf_infos(source: Source) -> list[LeafInfo]:
    seen: dict[int, str] = {}
    found = []
    own = isinstance(source, OwnSource)
    for path, node in walk(source.structure):
        if node.kind != "leaf":
            continue
        entry, name = source.leaves[node.leaf], path_name(path)
        if not entry.stored:
            found.append(LeafInfo(name=name, kind=entry.kind, value=plain_value(entry)))
            continue
        size = int(np.prod(entry.shape, dtype=np.int64)) * dtype_of(entry.dtype).itemsize
        stored = 0
        if own:
            stored = int(source.sidecar.table.length[source.first[node.leaf] : source.first[node.leaf + 1]].sum())
        record = source.shardings[entry.sharding] if entry.sharding >= 0 else {}
        found.append(
            LeafInfo(
                name=name,
                kind=entry.kind,
                shape=entry.shape,
                dtype=entry.dtype,
                size_bytes=size,
                stored_bytes=stored,
                chunk=entry.chunk,
                sharding=_sharding_text(record, entry),
                tied_to=seen.get(node.leaf, ""),
            )
        )
        seen.setdefault(node.leaf, name)
    return found


def _sharding_text(record: dict[str, Any], entry: LeafEntry) -> str:
    if record.get("type") == "NamedSharding":
        mesh = " x ".join(f"{axis}={size}" for axis, size in zip(record["axes"], record["shape"], strict=True))
        spec = ", ".join(repr(tuple(p)) if isinstance(p, list) else repr(p) for p in record["spec"])
        text = f"mesh {mesh}, P({spec})"
    else:
        text = {"SingleDeviceSharding": "one device"}.get(record.get("type", ""), "")
    return text + (f" in {entry.memory_kind}" if entry.memory_kind not in ("", "device") else "")


def _render(info: CheckpointInfo) -> str:
    arrays = [leaf for leaf in info.leaves if leaf.dtype]
    head = [f"{info.url}  (written by {info.written_by})"]
    if info.step is not None:
        head.append(f"step        {info.step}")
    if info.time_ns:
        head.append(f"saved       {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(info.time_ns / 1e9))}")
    if info.processes:
        head.append(f"processes   {info.processes}")
    head.append(f"leaves      {len(info.leaves)}, of which {counted(len(arrays), 'array')}")
    head.append(f"size        {human_bytes(info.size_bytes)}")
    if info.versions:
        head.append("versions    " + ", ".join(f"{name} {version}" for name, version in info.versions.items()))
    for name, value in info.metadata.items():
        lines = _values(name, value)
        head += [f"metadata    {line}" for line in lines[:_SHOWN]]
        if len(lines) > _SHOWN:
            head.append(f"metadata    {name}: {counted(len(lines) - _SHOWN, 'more value')}")
    head += [f"parent      {_parent(parent)}" for parent in info.parents]
    width = min(max((len(leaf.name) for leaf in info.leaves), default=0), 60)
    return "\n".join([*head, "", *(_line(leaf, width) for leaf in info.leaves)])


def _line(leaf: LeafInfo, width: int) -> str:
    if not leaf.dtype:
        return f"{leaf.name:<{width}}  {leaf.kind} {str(leaf.value)[:60]!r}"
    kind = "" if leaf.kind in ("array", "numpy") else f" ({leaf.kind})"
    shape = "x".join(map(str, leaf.shape)) or "scalar"
    tie = f"  = {leaf.tied_to}" if leaf.tied_to else ""
    size = human_bytes(leaf.size_bytes)
    return f"{leaf.name:<{width}}  {leaf.dtype:<9} {shape:<18} {size:>10}  {leaf.sharding}{kind}{tie}"


def _values(name: str, value: Any) -> list[str]:
    """A line per value: members and elements by their path, lists of plain values in one line."""
    if isinstance(value, dict) and value:
        return [line for key, one in value.items() for line in _values(f"{name}.{key}", one)]
    if isinstance(value, list) and any(isinstance(one, dict | list) for one in value):
        return [line for i, one in enumerate(value) for line in _values(f"{name}[{i}]", one)]
    if isinstance(value, list | dict):
        text = ", ".join(map(_plain_text, value)) or "(empty)"
    else:
        text = _plain_text(value)
    return [f"{name} = {text if len(text) <= _WIDE else text[: _WIDE - 3] + '...'}"]


def _plain_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _parent(record: dict[str, Any]) -> str:
    """``runs/a, step 3, weight 0.25, by ema``: what is known of it."""
    words = {"step": "step", "weight": "weight", "method": "by"}
    told = [
        f"{words.get(key, key)} {value}" for key, value in record.items() if key != "path" and value not in (None, "")
    ]
    return ", ".join([str(record.get("path", "unknown")), *told])


def human_bytes(size: float) -> str:
    """Bytes as people read them: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
