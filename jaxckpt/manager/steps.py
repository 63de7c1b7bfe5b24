"""Step folders as Orbax's CheckpointManager has them: ``<step>/default/`` the tree, ``<step>/metrics/metrics`` JSON.

``<step>/_CHECKPOINT_METADATA`` is written last and removed first: a step exists while it does. In an object store
Orbax also wants ``<step>/commit_success.txt``, which comes before it. On local disks and shared folders Orbax's manager
takes every folder with a number for a step, whatever is in it: there a step is written and deleted under another name,
``<step>.jaxckpt-tmp``, which Orbax passes over.
"""

import json
import re
import time
from contextlib import suppress

from jaxckpt.checkpoint.commit import is_unfinished
from jaxckpt.core.errors import NotFoundError
from jaxckpt.format import orbax_metadata as om
from jaxckpt.manager.policies import StepRecord
from jaxckpt.storage.local import LocalStore
from jaxckpt.storage.store import AbstractStore

ITEM = "default"
METRICS = "metrics/metrics"
EXTRAS = "extras/"
_JSON_HANDLER = "orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler"
TMP = ".jaxckpt-tmp"
_STEP = re.compile(r"(?:[^.]*_)?(\d+)")  # prefixes and zero padding, and none of Orbax's temporary folders


def find_steps(root: AbstractStore) -> dict[int, str]:
    """Steps that exist, ascending -> their folders."""
    if isinstance(root, LocalStore):
        found = {name for name in root.folders() if _STEP.fullmatch(name) and exists(root, name)}
    else:  # one listing tells all
        names = set(root.names())
        marked = {name.partition("/")[0] for name in names if name.endswith(f"/{om.CHECKPOINT_METADATA}")}
        needed = (om.CHECKPOINT_METADATA, om.COMMIT_MARKER)
        found = {one for one in marked if _STEP.fullmatch(one) and all(f"{one}/{name}" in names for name in needed)}
    return dict(sorted((_number(name), name) for name in found))


def exists(root: AbstractStore, folder: str) -> bool:
    """Whether there is a step in this folder."""
    committed = isinstance(root, LocalStore) or root.exists(f"{folder}/{om.COMMIT_MARKER}")
    return committed and root.exists(f"{folder}/{om.CHECKPOINT_METADATA}")


def writing_folder(root: AbstractStore, step: int) -> str:
    """Where a step is written until it exists."""
    return f"{step}{TMP}" if isinstance(root, LocalStore) else str(step)


def unfinished(root: AbstractStore) -> list[tuple[int, str]]:
    """Folders that are no step and that only we name so, or a number alone, each with its step."""
    there = set(find_steps(root).values())
    found = []
    for name in root.folders():
        plain = name.removesuffix(TMP)
        if name not in there and (name.isdecimal() or (plain != name and _STEP.fullmatch(plain))):
            found.append((_number(plain), name))
    return sorted(found)


def is_leftover(root: AbstractStore, folder: str) -> bool:
    """Whether this is what a step of ours leaves that was never finished or half deleted, and nothing else."""
    if folder.endswith(TMP):
        return True
    names = root.child(folder).names()
    rest = [name for name in names if not name.startswith((f"{ITEM}/", METRICS, EXTRAS)) and name != om.COMMIT_MARKER]
    if rest:
        return False
    tree = [name.removeprefix(f"{ITEM}/") for name in names if name.startswith(f"{ITEM}/")]
    return not tree or is_unfinished(root.child(f"{folder}/{ITEM}"), tree)


def read_record(root: AbstractStore, step: int, folder: str) -> StepRecord:
    """The time and metrics of a step."""
    source = f"{folder}/{om.CHECKPOINT_METADATA}"
    metadata = om.decode_json(root.read(source), f"{root.url}{source}")
    metrics = dict(metadata.get("metrics") or {})
    with suppress(NotFoundError):  # saved without metrics
        metrics |= om.decode_json(root.read(f"{folder}/{METRICS}"), f"{root.url}{folder}/{METRICS}")
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    return StepRecord(step=step, time_s=(metadata.get("commit_timestamp_nsecs") or 0) / 1e9, metrics=numbers)


def seal(
    root: AbstractStore, step: int, metrics: dict[str, float] | None, start_ns: int, *, extras: bool = False
) -> None:
    """Make a step exist, once its tree is committed. ``extras``: there are some, which Orbax then sees as JSON."""
    name = writing_folder(root, step)
    folder = root.child(name)
    handlers = {ITEM: om.PYTREE_HANDLER}
    if metrics is not None:
        handlers["metrics"] = _JSON_HANDLER
        folder.write(METRICS, json.dumps(metrics).encode())
    if extras:
        handlers["extras"] = _JSON_HANDLER
    if not isinstance(root, LocalStore):
        folder.write(om.COMMIT_MARKER, om.commit_text(folder.url))
    marker = om.encode_checkpoint_metadata(
        init_timestamp_ns=start_ns, commit_timestamp_ns=time.time_ns(), item_handlers=handlers, metrics=metrics
    )
    folder.write_all({om.CHECKPOINT_METADATA: marker})
    folder.sync()
    if isinstance(root, LocalStore):
        root.move_folder(name, str(step))


def remove(root: AbstractStore, folder: str) -> None:
    """Delete a step, the markers first: a half-deleted step is none, and its tree is no checkpoint."""
    if isinstance(root, LocalStore):
        hidden = f"{folder.removesuffix(TMP)}{TMP}"
        if folder != hidden and folder in root.folders():
            root.delete_prefix(f"{hidden}/")
            root.move_folder(folder, hidden)
        root.delete_prefix(f"{hidden}/")
        return
    root.delete(f"{folder}/{om.CHECKPOINT_METADATA}")
    root.delete(f"{folder}/{ITEM}/{om.COMMIT_MARKER}")
    root.delete_prefix(f"{folder}/")


def _number(folder: str) -> int:
    match = _STEP.fullmatch(folder)
    assert match is not None
    return int(match[1])
