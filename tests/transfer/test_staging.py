"""Room on the host: within the budget, in turn, given back as it is written; and nothing hangs."""

import threading

import numpy as np
import pytest

from jaxckpt.core.box import whole
from jaxckpt.transfer.feed import Feed, Piece
from jaxckpt.transfer.staging import Staging


def piece(size_bytes: int, buffer: np.ndarray | None = None) -> Piece:
    data = np.zeros(size_bytes, np.uint8) if buffer is None else buffer[:size_bytes]
    return Piece(whole((size_bytes,)), data)


def feed(staging: Staging, leaves: int, *, room: int, each: int) -> Feed:
    return Feed(
        [1] * leaves,
        [1] * leaves,
        staging=staging,
        room_bytes=room,
        reserved_bytes=staging.admit(leaves * each, room, wait=True) or 0,
        coming_bytes=leaves * each,
    )


def test_saves_are_admitted_until_the_budget_is_used_up() -> None:
    staging = Staging()
    assert staging.admit(60, 100, wait=False) == 60
    assert staging.admit(60, 100, wait=False) is None
    assert staging.admit(40, 100, wait=False) == 40
    staging.give_back(60)
    assert staging.admit(60, 100, wait=False) == 60


def test_a_save_above_the_budget_is_admitted_alone() -> None:
    staging = Staging()
    assert staging.admit(1, 100, wait=False) == 1
    assert staging.admit(1000, 100, wait=False) is None
    staging.give_back(1)
    assert staging.admit(1000, 100, wait=False) == 100


def test_who_waits_is_served_in_turn_and_not_overtaken() -> None:
    staging, order = Staging(), []
    staging.admit(90, 100, wait=True)

    def ask(name: str, size: int) -> None:
        staging.admit(size, 100, wait=True)
        order.append(name)

    first = threading.Thread(target=ask, args=("large", 80))
    first.start()
    while not staging._waiting:
        first.join(0.001)
    assert staging.admit(5, 100, wait=False) is None  # there is room, but another one waits
    staging.give_back(90)
    first.join(10)
    assert order == ["large"]
    assert staging.admitted_bytes == 80


def test_buffers_are_reused_and_bounded() -> None:
    staging = Staging()
    budget = 4 * 2**20
    first = staging.lend(2**20, budget)
    staging.take_back(first)
    assert staging.lend(2**20 - 5, budget) is first
    staging.take_back(first)
    for size in (3, 2, 3, 2, 1):
        staging.take_back(staging.lend(size * 2**20, budget))
        assert staging.buffer_bytes <= budget
    assert first.ctypes.data % 64 == 0


def test_writers_get_a_leaf_when_it_has_landed_and_room_comes_back_when_it_is_written() -> None:
    staging = Staging()
    one = feed(staging, 2, room=1000, each=100)
    got = []
    writer = threading.Thread(target=lambda: got.append(len(one[1])))
    writer.start()
    one.land([(0, piece(100))])
    assert not got
    buffer = staging.lend(100, 1000)
    one.land([(1, piece(100, buffer))], buffer)
    writer.join(10)
    assert got == [1]
    one[0]
    one.written([(0, 1)])
    assert staging.admitted_bytes == 100
    one.close()
    assert staging.admitted_bytes == 0
    assert staging.lend(100, 1000) is buffer


def test_landing_waits_for_room_but_not_for_writers_who_wait_for_it() -> None:
    staging = Staging()
    one = feed(staging, 3, room=100, each=100)
    assert one.wait_for_room(100, {0})
    one.land([(0, piece(100))])
    room: list[bool] = []
    lander = threading.Thread(target=lambda: room.append(one.wait_for_room(100, {1})))
    another = threading.Thread(target=lambda: one.wait_for_room(100, {2}))
    lander.start()
    another.start()
    lander.join(0.05)
    assert lander.is_alive()  # full, and nobody waits
    writer = threading.Thread(target=lambda: (one[0], one[1], one.written([(0, 1), (1, 1)])))
    writer.start()  # holds leaf 0 until leaf 1 is there as well
    lander.join(10)
    assert room == [True]
    another.join(0.05)
    assert another.is_alive()  # nobody waits for what it brings
    one.land([(1, piece(100))])
    writer.join(10)
    assert not writer.is_alive()
    another.join(10)
    assert not another.is_alive()


@pytest.mark.parametrize("end", ["fail", "close"])
def test_a_save_that_ends_early_wakes_everybody(end: str) -> None:
    staging = Staging()
    one = feed(staging, 2, room=100, each=100)
    one.land([(0, piece(100))])
    room: list[bool] = []
    lander = threading.Thread(target=lambda: room.append(one.wait_for_room(100, {1})))
    lander.start()
    if end == "fail":
        one.fail(OSError("gone"))
        with pytest.raises(OSError, match="gone"):
            one[1]
    else:
        one.close()
    lander.join(10)
    assert room == [False]
    buffer = staging.lend(100, 1000)
    one.close()
    one.land([(1, piece(100, buffer))], buffer)  # too late: nothing is kept
    assert staging.lend(100, 1000) is buffer
    assert staging.admitted_bytes == 0
