"""Step folders as Orbax's CheckpointManager has them: ``<step>/default/`` the tree, ``<step>/metrics/metrics`` JSON.

``<step>/_CHECKPOINT_METADATA`` is written last and removed first: a step exists while it does. In an object store
Orbax also wants ``<step>/commit_success.txt``, which comes before it.
"""

import json
import re
import time
from contextlib import suppress

from jaxckpt.core.errors import NotFoundError
from jaxckpt.format import orbax_metadata as om
from jaxckpt.manager.policies import StepRecord
from jaxckpt.storage.local import LocalStore
from jaxckpt.storage.store import AbstractStore

ITEM = "default"
METRICS = "metrics/metrics"
_JSON_HANDLER = "orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler"
_STEP = re.compile(r"(?:[^.]*_)?(\d+)")  # prefixes and zero padding, and none of Orbax's temporary folders


def find_steps(root: AbstractStore) -> dict[int, str]:
    """Steps that exist, ascending -> their folders."""
    found = {}
    for folder in root.folders():
        name = folder.strip("/")
        match = _STEP.fullmatch(name)
        if match and _exists(root, name):
            found[int(match[1])] = name
    return dict(sorted(found.items()))


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
    folder = root.child(str(step))
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


def remove(root: AbstractStore, folder: str) -> None:
    """Delete a step, the marker first: a half-deleted step is none."""
    root.delete(f"{folder}/{om.CHECKPOINT_METADATA}")
    root.delete_prefix(f"{folder}/")


def _exists(root: AbstractStore, folder: str) -> bool:
    committed = isinstance(root, LocalStore) or root.exists(f"{folder}/{om.COMMIT_MARKER}")
    return committed and root.exists(f"{folder}/{om.CHECKPOINT_METADATA}")
