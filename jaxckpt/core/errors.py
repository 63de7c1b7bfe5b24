"""The errors of jaxckpt, grouped by what the caller would do about them."""


class CheckpointError(Exception):
    """Base of every error that jaxckpt raises on purpose.

    ``kind`` is a stable, append-only code for handlers and dashboards.
    """

    kind = "checkpoint"


# Fix the call.


class InvalidArgumentError(CheckpointError, ValueError):
    """An argument is wrong in itself: fix the call."""

    kind = "invalid_argument"


class UnsupportedLeafError(CheckpointError, TypeError):
    """A leaf of the tree is of a type that cannot be saved."""

    kind = "unsupported_leaf"


class MismatchError(CheckpointError, ValueError):
    """The checkpoint and ``like`` disagree; the message lists every leaf that does."""

    kind = "mismatch"


class AlreadyExistsError(CheckpointError, FileExistsError):
    """Something is at the destination already; nothing was changed."""

    kind = "already_exists"


# Look elsewhere: this is not, or not yet, a checkpoint.


class NotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint, step, leaf or stored object is there."""

    kind = "not_found"


class NotCommittedError(NotFoundError):
    """Files of a checkpoint are there but its commit marker is not: the save never finished."""

    kind = "not_committed"


class UnsupportedFormatError(CheckpointError, ValueError):
    """A checkpoint of a format or version that this library cannot read."""

    kind = "unsupported_format"


# Give this checkpoint up, or repair it.


class CorruptionError(CheckpointError, ValueError):
    """Stored bytes are not the bytes that were saved."""

    kind = "corruption"


# Retry, or look at the machines.


class StorageError(CheckpointError, OSError):
    """The storage refused or failed: disk full, permission, network."""

    kind = "storage"


class CoordinationError(CheckpointError, RuntimeError):
    """Processes did not agree in time, or one of them failed; names the processes and their stages."""

    kind = "coordination"
