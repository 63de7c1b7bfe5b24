"""What the processes of a job need to agree: a small key-value store that all of them see."""

import abc


class AbstractCoordinator(abc.ABC):
    """The store as one process sees it: process ``rank`` of ``size``.

    Keys are paths with ``/``. Values are bytes of any size. No method ever runs anything on a device, so a save can
    be agreed upon while the accelerators train. Where the store itself cannot be reached, methods raise
    CoordinationError.
    """

    rank: int
    size: int

    @abc.abstractmethod
    def put(self, key: str, value: bytes) -> None:
        """Publish ``value``, in place of an earlier one; readers see the old value or the new one, whole."""

    @abc.abstractmethod
    def get(self, key: str, *, timeout_s: float) -> bytes:
        """Wait until the key has a value; TimeoutError at the deadline."""

    @abc.abstractmethod
    def try_get(self, key: str) -> bytes | None:
        """The value now, or None."""

    @abc.abstractmethod
    def count(self, key: str) -> int:
        """Add one to the counter ``key`` and return its new value: every caller gets another number, from 1 on.

        Counters and values are kept under different keys: do not ``get`` a counter.
        """

    @abc.abstractmethod
    def delete(self, prefix: str) -> None:
        """Remove the key ``prefix`` and all below ``prefix/``; nothing there is no error."""
