"""Leaves of a live tree -> entries of a checkpoint: what each is, and the array whose bytes are stored."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from jaxckpt.core.dtypes import is_storable, name_of
from jaxckpt.core.errors import InvalidArgumentError, UnsupportedLeafError
from jaxckpt.core.text import counted
from jaxckpt.core.tree import NamedLeaf, Node, flatten, map_leaves
from jaxckpt.format.sidecar import LeafEntry
from jaxckpt.plan.save import ArraySpec

_NOTHING = ArraySpec(shape=(0,), itemsize=1, sharding=None)  # a value that lives in the sidecar
Compression = int | dict[str, int | None] | Callable[[str, Any], int | None] | None
LARGEST_INT_BITS = 14_000  # Python converts no more than 4,300 digits to text and back


class Described(NamedTuple):
    """A tree ready to be planned: an entry, an array (None for values in the sidecar) and a spec per distinct leaf."""

    structure: Node
    leaves: list[NamedLeaf]  # every place, tied ones included
    index: list[int]  # entry of each place
    entries: list[LeafEntry]
    arrays: list[Any]
    specs: list[ArraySpec]


def describe(tree: Any, compression: Compression = None) -> Described:
    """Classify every leaf. Arrays that appear in several places of the tree become one entry.

    Raises:
        UnsupportedLeafError: lists all leaves that cannot be saved, with their types.
    """
    leaves, structure = flatten(tree)
    seen: dict[int, int] = {}
    index: list[int] = []
    entries: list[LeafEntry] = []
    arrays: list[Any] = []
    specs: list[ArraySpec] = []
    refused: list[str] = []
    for leaf in leaves:
        shared = isinstance(leaf.value, jax.Array | np.ndarray)
        if shared and id(leaf.value) in seen:
            index.append(seen[id(leaf.value)])
            continue
        try:
            entry, array = _classify(leaf, compression)
        except UnsupportedLeafError as error:
            refused.append(str(error))
            continue
        if shared:
            seen[id(leaf.value)] = len(entries)
        index.append(len(entries))
        entries.append(entry)
        arrays.append(array)
        if array is None:
            specs.append(_NOTHING)
        else:
            sharding = array.sharding if isinstance(array, jax.Array) else None
            specs.append(ArraySpec(shape=tuple(array.shape), itemsize=array.dtype.itemsize, sharding=sharding))
    if not "".join([leaf.name for leaf in leaves]).isascii():
        refused += _unwritable_names(leaves)
    if refused:
        raise UnsupportedLeafError(_refusal(refused))
    if len(entries) < len(leaves):
        structure = map_leaves(structure, index.__getitem__)
    return Described(structure, leaves, index, entries, arrays, specs)


def sharding_record(sharding: Sharding) -> dict[str, Any]:
    """A sharding as JSON: enough to rebuild it where its mesh exists."""
    if isinstance(sharding, NamedSharding):
        mesh = sharding.mesh
        return {
            "type": "NamedSharding",
            "axes": list(mesh.axis_names),
            "shape": [mesh.shape[name] for name in mesh.axis_names],
            "axis_types": [t.name for t in mesh.axis_types],
            "devices": [d.id for d in np.asarray(mesh.devices).flat],
            "spec": [
                list(p) if isinstance(p, tuple) else p if p is None or isinstance(p, str) else None
                for p in sharding.spec
            ],
        }
    if isinstance(sharding, SingleDeviceSharding):
        return {"type": "SingleDeviceSharding", "devices": [d.id for d in sharding.device_set]}
    return {
        "type": type(sharding).__name__,
        "devices": sorted(d.id for d in sharding.device_set),
        "text": str(sharding),
    }


def _classify(leaf: NamedLeaf, compression: Compression) -> tuple[LeafEntry, Any]:
    value = leaf.value
    if isinstance(value, Tracer):
        raise UnsupportedLeafError(f'"{leaf.name}" is a tracer: save outside of jit')
    if isinstance(value, jax.Array):
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            data = jax.random.key_data(value)
            return _array_entry(leaf, "prng_key", data, compression, impl=str(jax.random.key_impl(value))), data
        return _array_entry(leaf, "array", value, compression), value
    if isinstance(value, np.ndarray | np.generic):
        if not is_storable(value.dtype):
            raise UnsupportedLeafError(f'"{leaf.name}" is a numpy array of dtype {value.dtype}')
        array = np.asarray(value)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        kind = "numpy" if isinstance(value, np.ndarray) else "numpy_scalar"
        return _array_entry(leaf, kind, array, compression), array
    if isinstance(value, bytes):
        array = np.frombuffer(value, np.uint8)
        return _array_entry(leaf, "bytes", array, compression), array
    if isinstance(value, int) and value.bit_length() > LARGEST_INT_BITS:
        raise UnsupportedLeafError(f'"{leaf.name}" is an int of {value.bit_length()} bits: at most {LARGEST_INT_BITS}')
    if isinstance(value, bool | int | str):
        plain = {bool: "bool", str: "str"}.get(type(value), "int" if isinstance(value, int) else "str")
        return LeafEntry(name=leaf.name, kind=plain, value=value), None
    if isinstance(value, float):
        return LeafEntry(name=leaf.name, kind="float", value=value.hex()), None
    if isinstance(value, complex):
        return LeafEntry(name=leaf.name, kind="complex", value=[value.real.hex(), value.imag.hex()]), None
    if isinstance(value, jax.ShapeDtypeStruct):
        raise UnsupportedLeafError(f'"{leaf.name}" is abstract ({value}): it has no values to save')
    raise UnsupportedLeafError(f'"{leaf.name}" is a {type(value).__module__}.{type(value).__qualname__}')


def plain_value(entry: LeafEntry) -> Any:
    """The Python value of an entry without an array."""
    if entry.kind == "float":
        return float.fromhex(entry.value)
    if entry.kind == "complex":
        return complex(*(float.fromhex(part) for part in entry.value))
    return entry.value


def _array_entry(leaf: NamedLeaf, kind: str, array: Any, compression: Compression, impl: str = "") -> LeafEntry:
    memory = array.sharding.memory_kind if isinstance(array, jax.Array) else None
    return LeafEntry(
        name=leaf.name,
        kind=kind,
        dtype=name_of(array.dtype),
        shape=tuple(array.shape),
        zstd_level=None if compression is None else _level(compression, leaf.name, array),
        memory_kind=memory or "",
        prng_impl=impl,
    )


def _level(compression: Compression, name: str, array: Any) -> int | None:
    if isinstance(compression, int):
        level = compression
    elif isinstance(compression, dict):
        level = next((level for pattern, level in compression.items() if fnmatchcase(name, pattern)), None)
    elif compression is None:
        return None
    else:
        level = compression(name, jax.ShapeDtypeStruct(array.shape, array.dtype))
    if level is not None and (isinstance(level, bool) or not isinstance(level, int) or not -7 <= level <= 22):
        raise InvalidArgumentError(
            f'compression of leaf "{name}" is {level!r}; a zstd level is an int from -7 to 22, or None.'
        )
    return level


def _unwritable_names(leaves: Sequence[NamedLeaf]) -> list[str]:
    try:
        "".join([leaf.name for leaf in leaves]).encode()
    except UnicodeEncodeError:
        bad = [leaf.name for leaf in leaves if any("\ud800" <= char <= "\udfff" for char in leaf.name)]
        return [f"{name!a} has a lone surrogate in its name" for name in bad]
    return []


def _refusal(refused: Sequence[str]) -> str:
    shown = "\n  ".join(refused[:10]) + (f"\n  ... and {len(refused) - 10} more" if len(refused) > 10 else "")
    return (
        f"{counted(len(refused), 'leaf', 'leaves')} cannot be saved:\n  {shown}\n"
        "Leaves may be jax and numpy arrays of any numeric dtype, typed PRNG keys, and Python int, float, bool, "
        "complex, str, bytes and None. Remove the others from the tree, or convert them first."
    )
