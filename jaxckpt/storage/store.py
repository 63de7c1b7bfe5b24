"""The interface of a store: named objects under one root. Names are relative paths joined by '/'."""

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxckpt.core.errors import InvalidArgumentError

if TYPE_CHECKING:
    import tensorstore as ts


class AbstractDataWriter(abc.ABC):
    """A new data object that grows by appending; used by one thread."""

    name: str

    @abc.abstractmethod
    def append(self, data: np.ndarray) -> int:
        """Append a 1-D uint8 array; returns the offset of its first byte. ``data`` may be reused at once."""

    def append_all(self, parts: Sequence[np.ndarray]) -> int:
        """Append these one after the other; returns the offset of the first."""
        return [self.append(part) for part in parts][0]

    @abc.abstractmethod
    def close(self) -> int:
        """Make the object durable; returns its size in bytes."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Give the object up and remove what is there, as far as possible."""


class AbstractStore(abc.ABC):
    """Objects under one root: a checkpoint folder, or a prefix of a bucket.

    A name that leads out of the root is an InvalidArgumentError: names come out of files that anyone may have written.
    Failures of the storage are ``StorageError`` with the object, the root and the cause, ``errno`` kept.
    """

    url: str  # for messages; ends with '/'
    data_file_bytes: int | None  # size at which a writer should start another data object; None: one is fine
    parallel_io: int  # useful number of concurrent reads and writes

    @property
    def background_io(self) -> int:
        """Concurrent writes that are quick enough where nobody waits for them, and leave the processor to others."""
        return self.parallel_io

    @abc.abstractmethod
    def read(self, name: str, *, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes of an object, or a range. NotFoundError; CorruptionError when the object ends before ``stop``."""

    @abc.abstractmethod
    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill a 1-D contiguous uint8 array from an object; errors as of ``read``."""

    @abc.abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is an object of this name."""

    @abc.abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Replace a whole object: a reader sees the old bytes or the new ones. Durable when it returns."""

    @abc.abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Create an object if there is none; False if there was. Durable when it returns.

        An object store may lose its answer and be asked again, and then finds our own bytes. Bytes that nobody else
        would write should say so by the words ``write-id`` in them: they count as created when they are what is there.
        """

    @abc.abstractmethod
    def open_data(self, name: str) -> AbstractDataWriter:
        """A writer of a new object. AlreadyExistsError if there is one of that name."""

    @abc.abstractmethod
    def names(self, prefix: str = "") -> list[str]:
        """Names of all objects that start with ``prefix``, sorted."""

    @abc.abstractmethod
    def folders(self) -> list[str]:
        """Names of the folders right under the root, sorted."""

    @abc.abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; no error where there is none."""

    @abc.abstractmethod
    def delete_prefix(self, prefix: str) -> None:
        """Remove all objects whose names start with ``prefix``, and the folders whose names do."""

    @abc.abstractmethod
    def sync(self) -> None:
        """Make durable the names of all objects written through this store so far; after a failure, what is left."""

    @abc.abstractmethod
    def child(self, name: str) -> "AbstractStore":
        """The store of a folder below."""

    @abc.abstractmethod
    def kvstore_spec(self) -> dict[str, object]:
        """The root as a TensorStore key-value store specification; its path ends with '/'. Open it in ``context``."""

    @property
    def context(self) -> "ts.Context | None":
        """The TensorStore context of ``kvstore_spec``, or the parent of the one to open it in; None where any will do.

        Example: ``ts.open({"driver": "zarr3", "kvstore": store.kvstore_spec()}, context=store.context)``.
        """
        return None

    def write_all(self, objects: dict[str, bytes]) -> None:
        """Replace several objects, in order; durable when it returns."""
        for name, data in objects.items():
            self.write(name, data)


def check_name(url: str, name: str) -> None:
    """InvalidArgumentError if a name or prefix leads out of the root at ``url``."""
    if name.startswith("/") or (".." in name and ".." in name.split("/")):
        raise InvalidArgumentError(
            f"{name!r} is no name of an object in {url}: names are relative and lead to no folder above the root."
        )
