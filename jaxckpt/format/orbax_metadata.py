"""The metadata files by which Orbax v0 and v1 restore what we write, and the records in those that Orbax wrote.

One checkpoint is what Orbax calls a flat PyTree checkpoint: arrays (zarr3) in one OCDBT database at its root, and

====================================  ===========================================================================
``_METADATA``                         every leaf and empty container: keys, value type; both readers need it
``_CHECKPOINT_METADATA``              which handler reads the folder, times, custom metadata; v1 needs it
``_sharding``                         sharding per jax.Array: restores without a target tree
``array_metadatas/process_0``         chunk shapes, and the implementation of typed PRNG keys
``_strings.json``                     str leaves; only where there are any
``commit_success.txt``                commit marker
====================================  ===========================================================================

A folder of Orbax's CheckpointManager holds such a folder as the item ``default``, beside a ``_CHECKPOINT_METADATA``
whose ``item_handlers`` maps the item to the handler. The file ``orbax.checkpoint`` must *not* be written: it claims
the v1 layout, in which the root has items only.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from jaxckpt.core.errors import CorruptionError
from jaxckpt.core.tree import Node, Path, path_name

TREE_METADATA = "_METADATA"
CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"
SHARDING = "_sharding"
ARRAY_METADATAS = "array_metadatas/process_0"
STRINGS = "_strings.json"
COMMIT_MARKER = "commit_success.txt"

PYTREE_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"

# What Orbax writes for each kind of leaf of ours. It would refuse the last three, or change them (numpy scalars to
# Python's); as numpy arrays they come back with their dtype. All but "str" need an array in the database, Python's
# numbers a 0-d one (int64, float64, bool).
VALUE_TYPES = {
    "array": "jax.Array",
    "prng_key": "jax.Array",
    "numpy": "np.ndarray",
    "int": "scalar",
    "float": "scalar",
    "bool": "scalar",
    "str": "string",
    "numpy_scalar": "np.ndarray",
    "complex": "np.ndarray",
    "bytes": "np.ndarray",
}

# Written as entries without data: Orbax keeps their place in the tree.
EMPTY_TYPES = frozenset({"None", "Dict", "List", "Tuple", "NamedTuple"})

# `_sharding` repeats the device list for every leaf. Above this size it is left out where the mesh is all devices:
# Orbax then takes them in their own order, which changes where the bytes land and not what they are.
_LISTED_DEVICES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class OrbaxLeaf:
    """One entry of a tree as Orbax sees it: a leaf with data, or an empty container or None."""

    name: str  # name of the parameter in the database: "params.dense.kernel"
    path: Path
    sequence: tuple[bool, ...]  # per key: True where its container is a list or tuple
    value_type: str  # "jax.Array", "np.ndarray", "scalar", "string", or one of EMPTY_TYPES
    write_shape: tuple[int, ...] | None = None  # what one process writes at once; of jax.Array
    chunk_shape: tuple[int, ...] | None = None
    prng_impl: str | None = None  # implementation of a typed PRNG key, whose uint32 data is what is stored
    sharding: Sharding | None = None
    text: str | None = None  # of a string


class Place(NamedTuple):
    """Where something is in a tree, with what Orbax wants to know about the way there."""

    path: Path
    sequence: tuple[bool, ...]
    leaf: int  # index of the leaf, -1 for an empty container or None
    value_type: str  # of EMPTY_TYPES, "" for leaves

    @property
    def name(self) -> str:
        """The parameter name that Orbax derives from the path."""
        return path_name(self.path)


def places(structure: Node, path: Path = (), sequence: tuple[bool, ...] = ()) -> Iterator[Place]:
    """Every leaf and every empty container of a tree, in order; a tied leaf comes once per place."""
    if structure.kind == "leaf":
        yield Place(path, sequence, structure.leaf, "")
    elif structure.children:
        inner = (*sequence, structure.kind in ("list", "tuple"))
        for key, child in zip(structure.keys, structure.children, strict=True):
            yield from places(child, (*path, key), inner)
    else:
        yield Place(path, sequence, -1, _EMPTY_OF_KIND.get(structure.kind, "None"))


def encode_tree_metadata(
    leaves: Iterable[OrbaxLeaf],
    *,
    custom_metadata: object = None,
    use_ocdbt: bool = True,
    use_zarr3: bool = True,
) -> bytes:
    """``_METADATA``.

    Orbax derives the name of a parameter from its keys. Where ours is another one (``a.b~2``: two paths would get one
    name), the last key is changed to match, so that Orbax reads the right array under a telling key, never another.
    """
    entries = {}
    for leaf in leaves:
        keys = _orbax_keys(leaf)
        value: dict[str, object] = {"value_type": leaf.value_type, "skip_deserialize": leaf.value_type in EMPTY_TYPES}
        if leaf.write_shape is not None:
            value["write_shape"] = leaf.write_shape
        entries[str(keys)] = {"key_metadata": tuple(map(_key_entry, keys, leaf.sequence)), "value_metadata": value}
    record = {
        "tree_metadata": entries,
        "use_ocdbt": use_ocdbt,
        "use_zarr3": use_zarr3,
        # True makes Orbax refuse an array that lacks a chunk. With False it would fill in zeros.
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": custom_metadata,
    }
    return json.dumps(record).encode()


def encode_checkpoint_metadata(
    *,
    init_timestamp_ns: int,
    commit_timestamp_ns: int,
    item_handlers: str | Mapping[str, str] = PYTREE_HANDLER,
    metrics: Mapping[str, object] | None = None,
    custom_metadata: Mapping[str, object] | None = None,
) -> bytes:
    """``_CHECKPOINT_METADATA``. For a step folder with items, ``item_handlers`` maps each item to its handler."""
    record = {
        "item_handlers": item_handlers if isinstance(item_handlers, str) else dict(item_handlers),
        "metrics": dict(metrics or {}),
        "performance_metrics": {},
        "init_timestamp_nsecs": init_timestamp_ns,
        "commit_timestamp_nsecs": commit_timestamp_ns,
        "custom_metadata": dict(custom_metadata or {}),
    }
    return json.dumps(record).encode()


def encode_sharding(leaves: Iterable[OrbaxLeaf]) -> bytes:
    """``_sharding``: a JSON string per ``jax.Array``, under the base64 of its name."""
    done: dict[Sharding, str] = {}
    meshes: dict[object, dict[str, object]] = {}
    parts = []
    for leaf in leaves:
        sharding = leaf.sharding
        if sharding is None:
            continue
        text = done.get(sharding)
        if text is None:
            # Twice: the value is a string that holds JSON.
            text = done[sharding] = json.dumps(json.dumps(_sharding_record(sharding, meshes)))
        parts.append(f'"{base64.urlsafe_b64encode(leaf.name.encode()).decode()}":{text}')
    return f"{{{','.join(parts)}}}".encode()


def encode_array_metadatas(leaves: Iterable[OrbaxLeaf]) -> bytes:
    """``array_metadatas/process_0``: one entry per ``jax.Array``."""
    entries = [
        {
            "array_metadata": {
                "param_name": leaf.name,
                "write_shape": leaf.write_shape,
                "chunk_shape": leaf.chunk_shape,
                "ext_metadata": None if leaf.prng_impl is None else {"random_key_impl": leaf.prng_impl},
            }
        }
        for leaf in leaves
        if leaf.value_type == "jax.Array"
    ]
    return json.dumps({"array_metadatas": entries}).encode()


def encode_strings(leaves: Iterable[OrbaxLeaf]) -> bytes | None:
    """``_strings.json``, or None where no leaf is a string.

    Orbax takes ``"/" + name`` as a JSON pointer, so a slash in a name is one more level, and ``~0`` and ``~1`` stand
    for a tilde and a slash. A name with any other tilde is no pointer: Orbax cannot read that string, in its own
    checkpoints neither.
    """
    found: dict[str, object] = {}
    any_text = False
    for leaf in leaves:
        if leaf.value_type != "string":
            continue
        any_text = True
        *outer, last = [part.replace("~1", "/").replace("~0", "~") for part in leaf.name.split("/")]
        level = found
        for part in outer:
            below = level.setdefault(part, {})
            # Names like "a" and "a/b" cannot both be reached by pointers; the first one stays.
            level = below if isinstance(below, dict) else {}
        level.setdefault(last, leaf.text)
    return json.dumps(found).encode() if any_text else None


class TreeEntry(NamedTuple):
    """One entry of ``_METADATA``."""

    keys: tuple[str, ...]
    sequence: tuple[bool, ...]
    value_type: str
    skip: bool  # no data of its own: an empty container, None, or a value in an old aggregate file


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeMetadata:
    """What ``_METADATA`` says."""

    entries: tuple[TreeEntry, ...]
    use_ocdbt: bool | None  # None: written before there was a choice to record
    use_zarr3: bool
    missing_is_fill: bool  # chunks that only hold the fill value were not stored
    custom_metadata: object


def decode_tree_metadata(data: bytes, source: str) -> TreeMetadata:
    """The inverse of ``encode_tree_metadata``, for files of any Orbax. ``source`` names the file in errors.

    Raises:
        CorruptionError: the file is not what Orbax writes.
    """
    record = decode_json(data, source)
    try:
        entries = tuple(
            TreeEntry(
                tuple(str(key["key"]) for key in entry["key_metadata"]),
                tuple(key["key_type"] == 1 for key in entry["key_metadata"]),
                entry["value_metadata"]["value_type"],
                bool(entry["value_metadata"].get("skip_deserialize", False)),
            )
            for entry in record["tree_metadata"].values()
        )
        # A container that a partial save filled later keeps the entry from when it was empty.
        inner = {entry.keys[:depth] for entry in entries for depth in range(len(entry.keys))}
        return TreeMetadata(
            entries=tuple(entry for entry in entries if entry.keys not in inner),
            use_ocdbt=record.get("use_ocdbt"),
            use_zarr3=bool(record.get("use_zarr3", False)),
            missing_is_fill=not record.get("store_array_data_equal_to_fill_value", False),
            custom_metadata=record.get("custom_metadata"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"{source}: not a tree of Orbax: {type(error).__name__} at {error}.") from error


def nested(places: list[tuple[TreeEntry, Node]], depth: int = 0) -> Node:
    """The structure of entries that agree in their first ``depth`` keys."""
    if not places:
        return Node(kind="dict")
    if len(places[0][0].keys) == depth:
        return places[0][1]
    groups: dict[str, list[tuple[TreeEntry, Node]]] = {}
    for place in places:
        groups.setdefault(place[0].keys[depth], []).append(place)
    if places[0][0].sequence[depth]:
        order = sorted(groups, key=int)
        children = tuple(nested(groups[key], depth + 1) for key in order)
        return Node(kind="list", keys=tuple(map(int, order)), children=children)
    return Node(kind="dict", keys=tuple(groups), children=tuple(nested(g, depth + 1) for g in groups.values()))


def decode_sharding(data: bytes, source: str) -> dict[str, dict[str, object]]:
    """The inverse of ``encode_sharding``: the JSON record of each sharding by parameter name."""
    known: dict[str, dict[str, object]] = {}
    found = {}
    for name, text in decode_json(data, source).items():
        if text not in known:
            known[text] = decode_json(text, source)
        found[base64.urlsafe_b64decode(name).decode()] = known[text]
    return found


def decode_prng_impls(data: bytes, source: str) -> dict[str, str]:
    """The implementation of every typed PRNG key that a file of ``array_metadatas/`` tells of."""
    found = {}
    for entry in decode_json(data, source).get("array_metadatas", ()):
        record = entry.get("array_metadata", {})
        impl = (record.get("ext_metadata") or {}).get("random_key_impl")
        if impl:
            found[record["param_name"]] = impl
    return found


def string_at(strings: object, name: str) -> str | None:
    """The string of a leaf in decoded ``_strings.json``."""
    for part in name.split("/"):
        if not isinstance(strings, dict):
            return None
        strings = strings.get(part.replace("~1", "/").replace("~0", "~"))
    return None if strings is None else str(strings)


def decode_json(data: bytes | str, source: str) -> dict:
    """A JSON object, or CorruptionError that names ``source``."""
    try:
        record = json.loads(data)
    except ValueError as error:
        raise CorruptionError(f"{source}: not JSON ({error}); {len(data)} bytes were read.") from error
    if not isinstance(record, dict):
        raise CorruptionError(f"{source}: expected a JSON object, found a {type(record).__name__}.")
    return record


def commit_text(url: str) -> bytes:
    """The content of the commit marker."""
    return f"Checkpoint commit was successful to {url}".encode()


# Orbax itself, without "rich types", writes an empty namedtuple or custom node as None, and compares it so.
_EMPTY_OF_KIND = {"none": "None", "dict": "Dict", "list": "List", "tuple": "Tuple"}


def _orbax_keys(leaf: OrbaxLeaf) -> tuple[str, ...]:
    keys = tuple(map(str, leaf.path))
    name = ".".join(keys)
    if name == leaf.name or not keys:
        return keys
    if leaf.name.startswith(name):
        return (*keys[:-1], keys[-1] + leaf.name[len(name) :])
    return (leaf.name,)


@lru_cache(maxsize=65536)
def _key_entry(key: str, sequence: bool) -> dict[str, object]:
    return {"key": key, "key_type": 1 if sequence and key.isdecimal() else 2}


def _sharding_record(sharding: Sharding, meshes: dict[object, dict[str, object]]) -> dict[str, object]:
    if isinstance(sharding, NamedSharding):
        mesh = sharding.mesh
        known = meshes.get(mesh)
        if known is None:
            types = [f"AxisType.{kind.name}" for kind in mesh.axis_types]
            known = meshes[mesh] = _mesh_record(
                list(mesh.shape.values()), list(mesh.axis_names), types, np.asarray(mesh.devices)
            )
        shown = {"sharding_type": "NamedSharding", **known}
        return {
            **shown,
            "partition_spec": [
                list(p) if isinstance(p, tuple) else p if isinstance(p, str) else None for p in sharding.spec
            ],
        }
    if isinstance(sharding, SingleDeviceSharding):
        return {"sharding_type": "SingleDeviceSharding", "device_str": str(next(iter(sharding.device_set)))}
    # Orbax knows no other kind. Replicated over the same devices restores the same values everywhere.
    devices = np.array(sorted(sharding.device_set, key=lambda device: device.id))
    shown = {"sharding_type": "NamedSharding", **_mesh_record([len(devices)], ["devices"], ["AxisType.Auto"], devices)}
    return {**shown, "partition_spec": []}


def _mesh_record(
    shape: Sequence[int], axes: Sequence[str], types: Sequence[str], devices: np.ndarray
) -> dict[str, object]:
    ids = [device.id for device in devices.flat]
    record: dict[str, object] = {"shape": shape, "axis_names": axes, "axis_types": types}
    if len(ids) <= _LISTED_DEVICES or sorted(ids) != list(range(len(ids))):
        record["device_mesh"] = {"mesh": _nest([{"id": index} for index in ids], devices.shape)}
    return record


def _nest(flat: list[dict[str, int]], shape: Sequence[int]) -> object:
    nested: list = flat
    for extent in reversed(shape[1:]):
        nested = [nested[i : i + extent] for i in range(0, len(nested), extent)]
    return nested if shape else nested[0]
