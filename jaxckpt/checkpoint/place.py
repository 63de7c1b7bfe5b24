"""Where a restored leaf goes: as a leaf of ``like`` says, as it was saved, or onto this host's devices."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxckpt.checkpoint.leaves import plain_value
from jaxckpt.checkpoint.match import describe_entry
from jaxckpt.checkpoint.source import OwnSource, Source
from jaxckpt.core.dtypes import dtype_of
from jaxckpt.core.tree import NamedLeaf
from jaxckpt.format.sidecar import LeafEntry

_NUMBERS = {"bool": bool, "int": int, "float": float, "complex": complex}
_FAMILIES = {"b": "bool", "i": "int", "u": "int", "f": "float", "c": "complex"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """One value to restore: a leaf of the checkpoint and the form it takes. Equal wants are one value."""

    leaf: int
    sharding: Sharding | None = None  # None: on the host
    shape: tuple[int, ...] | None = None  # where it is not the stored one
    cast: np.dtype | None = None
    keep_array: bool = False  # a numpy scalar stays a 0-d array
    scalar: bool = False  # a 0-d array becomes a numpy scalar
    number: str = ""  # "int", "float", ...: a Python number; "bytes"
    array_dtype: np.dtype | None = None  # a Python number becomes a 0-d array of this dtype

    def convert(self, value: Any) -> Any:
        """The last step: Python numbers to arrays and back."""
        if self.number == "bytes":
            return value.tobytes()
        if self.number:
            return _NUMBERS[self.number](np.asarray(value)[()])
        if self.array_dtype is not None:
            array = np.asarray(value, self.array_dtype)
            if self.scalar:
                return array[()]
            return array if self.sharding is None else jax.device_put(array, self.sharding)
        return value


def want_like(source: Source, leaf: int, like: NamedLeaf, *, cast: bool, pad: bool) -> tuple[Want, str]:
    """What a leaf of ``like`` asks for, and a line about what does not fit ("" when all does)."""
    entry, value = source.leaves[leaf], like.value
    if isinstance(value, jax.Array | jax.ShapeDtypeStruct):
        return _want_array(entry, leaf, like, value, cast=cast, pad=pad)
    if isinstance(value, np.ndarray | np.generic):
        want, wrong = _want_array(entry, leaf, like, value, cast=cast, pad=pad)
        return want, wrong
    if (
        isinstance(value, bytes)
        and not isinstance(source, OwnSource)
        and (entry.dtype, len(entry.shape)) == ("uint8", 1)
    ):
        return Want(leaf=leaf, number="bytes"), ""  # Orbax knows bytes only as an array
    return _want_plain(entry, leaf, like)


def saved_sharding(record: dict, entry: LeafEntry) -> Sharding | None:
    """The sharding that was saved, if its devices exist here and this process has some of them."""
    devices = {d.id: d for d in jax.devices()}
    ids = record.get("devices", [])
    if not ids or not all(i in devices for i in ids):
        return None
    chosen = [devices[i] for i in ids]
    if record["type"] == "SingleDeviceSharding":
        found: Sharding = SingleDeviceSharding(chosen[0])
    elif record["type"] == "NamedSharding":
        types = tuple(getattr(AxisType, name, AxisType.Auto) for name in record["axis_types"]) or None
        grid = np.array(chosen, dtype=object).reshape(record["shape"])
        mesh = Mesh(grid, tuple(record["axes"]), axis_types=types) if types else Mesh(grid, tuple(record["axes"]))
        found = NamedSharding(mesh, PartitionSpec(*(tuple(p) if isinstance(p, list) else p for p in record["spec"])))
    else:
        return None
    if not any(d.process_index == jax.process_index() for d in chosen):
        return None
    kinds = {memory.kind for memory in chosen[0].addressable_memories()} if entry.memory_kind else set()
    return found.with_memory_kind(entry.memory_kind) if entry.memory_kind in kinds else found


def default_sharding(entry: LeafEntry) -> Sharding:
    """For a checkpoint whose mesh does not exist here: this host's devices, along the first dimension that divides."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return SingleDeviceSharding(devices[0])
    shape = entry.shape[:-1] if entry.kind == "prng_key" else entry.shape
    axis = next((d for d, n in enumerate(shape) if n and n % len(devices) == 0), None)
    spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "device")
    return NamedSharding(Mesh(np.array(devices), ("device",)), spec)


def _want_array(entry: LeafEntry, leaf: int, like: NamedLeaf, value: Any, *, cast: bool, pad: bool) -> tuple[Want, str]:
    on_device = isinstance(value, jax.Array | jax.ShapeDtypeStruct)
    sharding = (getattr(value, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])) if on_device else None
    if on_device and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return _want_key(entry, leaf, like, value, sharding)
    shape, dtype = tuple(value.shape), np.dtype(value.dtype)
    text = f'"{like.name}": checkpoint has {describe_entry(entry)}, `like` wants {shape} {dtype.name}'
    if on_device and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return Want(leaf=leaf), f"{text}; JAX arrays of {dtype.name} need jax_enable_x64, numpy arrays do not"
    if entry.kind in _NUMBERS:
        fits = shape == () and (_FAMILIES.get(_kind(dtype)) == entry.kind or cast)
        exact = fits and (cast or _is_exact(plain_value(entry), dtype))
        scalar = isinstance(value, np.generic)
        return Want(leaf=leaf, sharding=sharding, array_dtype=dtype, scalar=scalar), "" if exact else text
    if not entry.stored or entry.kind in ("prng_key", "bytes"):
        return Want(leaf=leaf), text
    if dtype.name != entry.dtype and not cast:
        return Want(leaf=leaf), f"{text} (cast=True converts)"
    if shape != entry.shape and not (pad and len(shape) == len(entry.shape)):
        return Want(leaf=leaf), text
    return Want(
        leaf=leaf,
        sharding=sharding,
        shape=None if shape == entry.shape else shape,
        cast=None if dtype.name == entry.dtype else dtype,
        keep_array=isinstance(value, np.ndarray),
        scalar=isinstance(value, np.generic),
    ), ""


def _want_key(entry: LeafEntry, leaf: int, like: NamedLeaf, value: Any, sharding: Sharding | None) -> tuple[Want, str]:
    impl = str(jax.random.key_impl(value)) if isinstance(value, jax.Array) else str(value.dtype)
    same_impl = impl == entry.prng_impl or impl == _key_dtype_text(entry)
    if entry.kind != "prng_key" or not same_impl or tuple(value.shape) != entry.shape[:-1]:
        return Want(leaf=leaf), (
            f'"{like.name}": checkpoint has {describe_entry(entry)}, '
            f"`like` wants a PRNG key array {tuple(value.shape)} of {impl}"
        )
    return Want(leaf=leaf, sharding=sharding), ""


def _key_dtype_text(entry: LeafEntry) -> str:
    if entry.kind != "prng_key":
        return ""
    return str(
        jax.eval_shape(
            lambda: jax.random.wrap_key_data(jax.numpy.zeros(entry.shape, np.uint32), impl=entry.prng_impl)
        ).dtype
    )


def _want_plain(entry: LeafEntry, leaf: int, like: NamedLeaf) -> tuple[Want, str]:
    kind = type(like.value).__name__
    if entry.kind == kind:
        return Want(leaf=leaf), ""
    # A counter that began as a Python number and became an array while training, or the other way.
    if kind in _NUMBERS and entry.stored and entry.shape == () and _FAMILIES.get(_kind(dtype_of(entry.dtype))) == kind:
        return Want(leaf=leaf, number=kind), ""
    return Want(leaf=leaf), f'"{like.name}": checkpoint has {describe_entry(entry)}, `like` wants a Python {kind}'


def _kind(dtype: np.dtype) -> str:
    return "f" if dtype.kind == "V" and "float" in dtype.name else "i" if dtype.kind == "V" else dtype.kind


def _is_exact(value: Any, dtype: np.dtype) -> bool:
    try:
        stored = np.asarray(value).astype(dtype)
    except (OverflowError, ValueError):
        return False
    return bool(stored.item() == value) or value != value  # a numpy scalar would round the value first
