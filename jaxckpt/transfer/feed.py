"""Captured pieces between those who land them and those who write them: writing starts when the first leaf is there.

Bytes are held until all chunks of their leaf are written. Landing waits while the room of the save is full, except
where every writer that could free some waits for what has not landed: then it goes on, so that nothing hangs.
"""

import threading
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxckpt.core.box import Box
from jaxckpt.transfer.staging import Staging


class Piece(NamedTuple):
    """A box of an array and its bytes on the host."""

    box: Box
    data: np.ndarray


@dataclass(slots=True)
class _Lump:
    """Pieces that landed together; their memory is given back when the last of their leaves is written."""

    size_bytes: int
    buffer: np.ndarray
    leaves: int


class Feed:
    """Pieces of every array by index, as a list would give them; ``feed[i]`` waits until they have landed.

    Args:
        chunks: how many chunks of each array will be written.
        parts: how many pieces of each array will land.
        staging: what buffers and room are given back to.
        room_bytes: what may be staged at a time.
        reserved_bytes: what was admitted for this save, and is given back as it is written.
        coming_bytes: of all pieces that will land.
    """

    def __init__(
        self,
        chunks: Sequence[int],
        parts: Sequence[int],
        *,
        staging: Staging,
        room_bytes: int,
        reserved_bytes: int,
        coming_bytes: int,
    ) -> None:
        self._unwritten = list(chunks)
        self._missing = list(parts)
        self._pieces: list[list[Piece]] = [[] for _ in parts]
        self._lumps: list[list[_Lump]] = [[] for _ in parts]
        self._own_bytes = [0] * len(self._missing)
        self._staging, self._room, self._reserved = staging, room_bytes, reserved_bytes
        self._coming, self._staged = coming_bytes, 0
        # What a writer may hold at a time: where room is short, another holds as much, and the next pieces land.
        self.batch_bytes = coming_bytes if coming_bytes <= room_bytes else room_bytes // 4
        self._waiting: dict[int, int] = {}  # threads that wait for a leaf, and for which
        self._holding: set[int] = set()  # threads that will give something back
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()

    def __getitem__(self, leaf: int) -> list[Piece]:
        me = threading.get_ident()
        with self._changed:
            if self._missing[leaf] and self._error is None:
                self._waiting[me] = leaf
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._missing[leaf] or self._error is not None)
                del self._waiting[me]
            if self._error is not None:
                raise self._error
            self._holding.add(me)
            return self._pieces[leaf]

    def written(self, batch: Iterable[tuple[int, int]]) -> None:
        """The calling thread has written these (leaf, number of chunks), and holds no pieces any more."""
        with self._changed:
            self._holding.discard(threading.get_ident())
            for leaf, count in batch:
                self._unwritten[leaf] -= count
                if self._unwritten[leaf] == 0:
                    self._forget(leaf)
            self._shrink()

    def wait_for_room(self, size_bytes: int, leaves: Set[int]) -> bool:
        """Wait until pieces of these leaves may land; False when the save has ended and nobody wants them.

        Whoever lands pieces lands them by leaf, ascending, as they are written: the first that is waited for is the
        next that somebody lands.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._closed
                    or self._error is not None
                    or self._staged + size_bytes <= self._room
                    or (self._waiting.keys() >= self._holding and not leaves.isdisjoint(self._waiting.values()))
                )
            )
            return not self._closed and self._error is None

    def land(self, pieces: Sequence[tuple[int, Piece]], buffer: np.ndarray | None = None) -> None:
        """These (leaf, piece) are on the host; ``buffer`` holds their bytes and is free once they are written."""
        size = sum([piece.data.nbytes for _, piece in pieces])
        with self._changed:
            if self._closed:  # the save failed meanwhile
                if buffer is not None:
                    self._staging.take_back(buffer)
                return
            self._coming -= size
            self._staged += size
            if buffer is not None:
                leaves = {leaf for leaf, _ in pieces}
                lump = _Lump(size, buffer, len(leaves))
                for leaf in leaves:
                    self._lumps[leaf].append(lump)
            for leaf, piece in pieces:
                self._pieces[leaf].append(piece)
                self._missing[leaf] -= 1
                if buffer is None:  # memory of its own
                    self._own_bytes[leaf] += piece.data.nbytes
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """What was to land does not: writers raise this, and nothing more is landed."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def close(self) -> None:
        """The save has ended, well or not: give everything back."""
        with self._changed:
            self._closed = True
            for leaf in range(len(self._pieces)):
                self._forget(leaf)
            self._coming = self._staged = 0
            self._shrink()

    def _forget(self, leaf: int) -> None:
        self._staged -= self._own_bytes[leaf]
        self._own_bytes[leaf] = 0
        lumps, self._pieces[leaf], self._lumps[leaf] = self._lumps[leaf], [], []
        for lump in lumps:
            lump.leaves -= 1
            if lump.leaves == 0:
                self._staged -= lump.size_bytes
                self._staging.take_back(lump.buffer)

    def _shrink(self) -> None:
        """Give back the room that this save needs no more, so that the next one may begin."""
        needed = min(self._reserved, max(self._staged + self._coming, 0))
        if needed < self._reserved:
            self._staging.give_back(self._reserved - needed)
            self._reserved = needed
        self._changed.notify_all()
