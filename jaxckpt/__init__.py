"""jaxckpt: the checkpoint lifecycle for JAX and Flax. See README.md for the map."""

from jaxckpt.checkpoint.inspect import diff as diff
from jaxckpt.checkpoint.inspect import inspect as inspect
from jaxckpt.checkpoint.lineage import Lineage as Lineage
from jaxckpt.checkpoint.pending import PendingSave as PendingSave
from jaxckpt.checkpoint.restore import on_host as on_host
from jaxckpt.checkpoint.restore import restore as restore
from jaxckpt.checkpoint.save import save as save
from jaxckpt.checkpoint.save import save_async as save_async
from jaxckpt.checkpoint.verify import verify as verify
from jaxckpt.core.errors import AlreadyExistsError as AlreadyExistsError
from jaxckpt.core.errors import CheckpointError as CheckpointError
from jaxckpt.core.errors import CoordinationError as CoordinationError
from jaxckpt.core.errors import CorruptionError as CorruptionError
from jaxckpt.core.errors import MismatchError as MismatchError
from jaxckpt.core.errors import NotCommittedError as NotCommittedError
from jaxckpt.core.errors import NotFoundError as NotFoundError
from jaxckpt.manager.manager import CheckpointManager as CheckpointManager
from jaxckpt.manager.policies import at as at
from jaxckpt.manager.policies import best as best
from jaxckpt.manager.policies import every as every
from jaxckpt.manager.policies import latest as latest
from jaxckpt.manager.policies import newer_than as newer_than
from jaxckpt.manager.triggers import on_preemption as on_preemption
from jaxckpt.manager.triggers import on_signal as on_signal
from jaxckpt.manager.triggers import optimal as optimal
from jaxckpt.storage.url import StorageOptions as StorageOptions
from jaxckpt.transfer.in_step import with_capture as with_capture

__version__ = "0.1.0"

__all__ = [
    "AlreadyExistsError",
    "CheckpointError",
    "CheckpointManager",
    "CoordinationError",
    "CorruptionError",
    "Lineage",
    "MismatchError",
    "NotCommittedError",
    "NotFoundError",
    "PendingSave",
    "StorageOptions",
    "at",
    "best",
    "diff",
    "every",
    "inspect",
    "latest",
    "newer_than",
    "on_host",
    "on_preemption",
    "on_signal",
    "optimal",
    "restore",
    "save",
    "save_async",
    "verify",
    "with_capture",
]
