"""Device -> host: the parts of each array that this process writes, in bytes that training cannot change.

Modes, all giving the same bytes (docs/decisions/0005-capture-on-cpu.md tells how each is safe from donation):

========  =============================================================================  ======================
mode      how                                                                            the caller waits for
========  =============================================================================  ======================
auto      CPU: views, no copy; XLA copies a donated buffer instead of reusing it while   the arrays themselves
          a view of it lives, which is tried out before it is relied on; else "pinned"
pinned    buckets to ``pinned_host``, and from there to warm host memory                 all transfers
clone     copies on the device within a budget, moved in the background                  what exceeds the budget
split     all transfers queued; XLA makes an update that donates wait for them           nothing
in_step   the step itself returned the old state in ``pinned_host``                      nothing
========  =============================================================================  ======================

Numpy arrays may be written by their owner at any time, so all modes copy them to host memory of their own.

Source of "split": DataStates-LLM (HPDC 2024), section 4.2, lazy copies that overlap with forward and backward passes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from jaxckpt.core.box import Box, intersect
from jaxckpt.core.dtypes import mover
from jaxckpt.plan.save import SavePlan
from jaxckpt.plan.shards import device_boxes
from jaxckpt.transfer.feed import Feed, Piece
from jaxckpt.transfer.send import Part, Sent, gather, is_on_host, pieces_of, pinned
from jaxckpt.transfer.staging import STAGING

Mode = Literal["auto", "pinned", "clone", "split", "in_step"]
MODES = ("auto", "pinned", "clone", "split", "in_step")
BUCKET_BYTES = 64 * 1024 * 1024
_SMALLEST_BUCKET_BYTES = 1024 * 1024
_ALIGNMENT = 64


class Landing(NamedTuple):
    """``pieces[i]`` are those of array ``i``. ``now`` runs before the caller may go on, ``later`` while it does."""

    pieces: Feed | list[list[Piece]]
    now: Callable[[], None] | None = None
    later: Callable[[], None] | None = None


def capture_tree(
    arrays: Sequence[Any],
    plan: SavePlan,
    *,
    mode: Mode,
    room_bytes: int,
    budget_bytes: int,
    device_budget_bytes: int | None = None,
) -> Landing:
    """Make the parts that this process writes safe from donation and from changes.

    Args:
        arrays: jax or numpy arrays, in the order of the plan.
        plan: what this process writes.
        mode: see the module.
        room_bytes: host memory that this save was admitted with, see ``Staging.admit``.
        budget_bytes: host memory of all saves.
        device_budget_bytes: device memory that "clone" may use per device; None: half of what is free there.
    """
    parts = parts_to_write(arrays, plan)
    feed = _feed(plan, parts, room_bytes=room_bytes, reserved_bytes=room_bytes)
    flat = [part for of_leaf in parts for part in of_leaf]
    cpu = jax.default_backend() == "cpu"
    if mode == "auto" and views_are_safe():
        kept = [p for p in flat if isinstance(p.source, jax.Array) and (cpu or _platform(p.source) == "cpu")]
        feed.land([(part.leaf, Piece(part.box, np.asarray(part.source))) for part in kept])
        if len(kept) == len(flat):
            return Landing(feed)
        kept_ids = {id(part) for part in kept}
        flat = [part for part in flat if id(part) not in kept_ids]
    # Several fit into the budget, so that some are written while others land.
    bucket_bytes = max(min(BUCKET_BYTES, budget_bytes // 4), _SMALLEST_BUCKET_BYTES)
    here = [part for part in flat if is_on_host(part.source)]
    device = [part for part in flat if not is_on_host(part.source)]
    if mode == "in_step":
        arrived = [Sent(p.source, (p,), whole=True) for p in here if isinstance(p.source, jax.Array)]
        copied = [p for p in here if not isinstance(p.source, jax.Array)] + device
        later = _landing_views(feed, arrived)
    elif mode == "split":
        copied = here
        later = _landing_views(
            feed, [one for bucket in _buckets(device, bucket_bytes, copies=False) for one in pinned(bucket)]
        )
    elif mode == "clone":
        cloned, beyond = _within(device, device_budget_bytes)
        copied = here + beyond
        later = _landing_copies(feed, _emptying(list(_buckets(cloned, bucket_bytes, copies=True))), budget_bytes)
    else:
        copied, later = here + device, None
    copied.sort(key=lambda part: part.leaf)  # as they are written: see Feed.wait_for_room
    return Landing(
        feed, now=_landing_copies(feed, _buckets(copied, bucket_bytes, copies=False), budget_bytes), later=later
    )


def capture_waiting(arrays: Sequence[Any], plan: SavePlan) -> Landing:
    """The same for a caller that waits until all is written: nothing is copied but what must leave its device."""
    parts = parts_to_write(arrays, plan)
    if jax.default_backend() == "cpu":
        return Landing([[Piece(p.box, np.asarray(p.source)) for p in these] for these in parts])
    flat = [part for these in parts for part in these]
    feed = _feed(plan, parts, room_bytes=4 * BUCKET_BYTES, reserved_bytes=0)
    host = [part for part in flat if isinstance(part.source, np.ndarray)]
    feed.land([(p.leaf, Piece(p.box, p.source)) for p in host])
    device = [part for part in flat if not isinstance(part.source, np.ndarray)]
    return Landing(feed, later=_landing_copies(feed, _buckets(device, BUCKET_BYTES, copies=False), 6 * BUCKET_BYTES))


def parts_to_write(arrays: Sequence[Any], plan: SavePlan) -> list[list[Part]]:
    """Of every array, the distinct local shards that this process's chunks touch, each from one of its holders."""
    found: list[list[Part]] = []
    for leaf, array in enumerate(arrays):
        mine = plan.mine[leaf]
        if not len(mine):
            found.append([])
        elif isinstance(array, jax.Array):
            shards = _touched(array.sharding, array.shape, plan.chunks[leaf], plan.grids[leaf], mine.tobytes())
            # addressable_data gives new objects: JAX may keep a host copy on what np.asarray was asked of.
            # Copies of a shard lie on several devices: leaves take them in turn, so that each link carries its share.
            found.append([Part(leaf, box, array.addressable_data(ks[leaf % len(ks)]), cut) for ks, box, cut in shards])
        else:
            whole = Box((0,) * array.ndim, array.shape)
            found.append([Part(leaf, whole, array, whole)])
    return found


@lru_cache(maxsize=1)
def views_are_safe() -> bool:
    """Whether XLA leaves the buffer of a donated CPU array alone while a numpy view of it lives.

    Tried on this very runtime: one array of a page is viewed, donated and computed over.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        step = jax.jit(lambda x: x ^ np.uint32(0xFFFFFFFF), donate_argnums=0)
        array = step(np.arange(1024, dtype=np.uint32))  # memory of XLA's own, which it could reuse
        view = np.asarray(array)
        before = view.copy()
        step(array).block_until_ready()
    return bool((view == before).all())


@lru_cache(maxsize=4096)
def _touched(
    sharding: Sharding, shape: tuple[int, ...], chunk: tuple[int, ...], grid: tuple[int, ...], mine: bytes
) -> list[tuple[tuple[int, ...], Box, Box]]:
    """(indices of the local shards, their box, what these chunks touch of it) for every distinct local box.

    What is touched is taken from the smallest box around all chunks. Leaves of one shape share the answer.
    """
    places = np.unravel_index(np.frombuffer(mine, np.int64), grid) if grid else ()
    start = tuple([int(p.min()) * c for p, c in zip(places, chunk, strict=True)])
    stop = [min((int(p.max()) + 1) * c, n) for p, c, n in zip(places, chunk, shape, strict=True)]
    wanted = Box(start, tuple([b - a for a, b in zip(start, stop, strict=True)]))
    holders: dict[Box, list[int]] = {}
    for k, box in enumerate(device_boxes(sharding, shape).values()):
        holders.setdefault(box, []).append(k)
    touched = {box: intersect(box, wanted) for box in holders}
    return [(tuple(ks), box, both) for box, ks in holders.items() if (both := touched[box]) is not None]


def _feed(plan: SavePlan, parts: list[list[Part]], *, room_bytes: int, reserved_bytes: int) -> Feed:
    return Feed(
        [len(mine) for mine in plan.mine],
        [len(these) for these in parts],
        staging=STAGING,
        room_bytes=room_bytes,
        reserved_bytes=reserved_bytes,
        coming_bytes=sum([part.size_bytes for these in parts for part in these]),
    )


def _buckets(parts: Sequence[Part], most_bytes: int, *, copies: bool) -> Iterator[list[Sent]]:
    """Parts in order, gathered in buckets of about this size when they are asked for."""
    bucket: list[Part] = []
    size = 0
    for part in parts:
        bucket.append(part)
        size += part.size_bytes
        if size >= most_bytes:
            yield gather(bucket, copies=copies)
            bucket, size = [], 0
    if bucket:
        yield gather(bucket, copies=copies)


def _emptying(buckets: list[list[Sent]]) -> Iterator[list[Sent]]:
    """Buckets that nobody holds once they are taken: copies on a device are freed one by one."""
    while buckets:
        yield buckets.pop(0)


def _within(parts: Sequence[Part], budget_bytes: int | None) -> tuple[list[Part], list[Part]]:
    """The parts whose copies fit on their devices, and the others."""
    left: dict[jax.Device, float] = {}
    fitting: list[Part] = []
    beyond: list[Part] = []
    for part in parts:
        device = next(iter(part.source.devices()))
        if device not in left:
            left[device] = _free_bytes(device) / 2 if budget_bytes is None else budget_bytes
        size = part.size_bytes
        (fitting if size <= left[device] else beyond).append(part)
        if size <= left[device]:
            left[device] -= size
    return fitting, beyond


def _free_bytes(device: jax.Device) -> float:
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", float("inf")) - stats.get("bytes_in_use", 0)


def _landing_views(feed: Feed, sent: Iterable[Sent]) -> Callable[[], None]:
    """What lands these, as they are, once their transfers have ended."""
    coming = list(sent)

    def land() -> None:
        while coming:
            one = coming.pop(0)
            feed.land(pieces_of(one, np.asarray(one.data)))

    return partial(_telling, feed, land)


def _landing_copies(feed: Feed, buckets: Iterator[list[Sent]], budget_bytes: int) -> Callable[[], None]:
    """What moves these to the host and lands copies in warm memory: one bucket is copied while the next one moves."""

    def land() -> None:
        moving: list[Sent] | None = None
        for bucket in buckets:
            following = pinned(bucket)
            bucket.clear()
            if moving is not None and not _land_copy(feed, moving, budget_bytes):
                return
            moving = following
        if moving is not None:
            _land_copy(feed, moving, budget_bytes)

    return partial(_telling, feed, land)


def _telling(feed: Feed, land: Callable[[], None]) -> None:
    """Land; what goes wrong reaches whoever waits for the bytes."""
    try:
        land()
    except BaseException as error:  # noqa: BLE001 raised by the writers, and with that by the save
        feed.fail(error)


def _land_copy(feed: Feed, sent: list[Sent], budget_bytes: int) -> bool:
    size = sum([part.size_bytes for one in sent for part in one.parts])
    if not feed.wait_for_room(size, {part.leaf for one in sent for part in one.parts}):
        return False
    buffer = STAGING.lend(size + _ALIGNMENT * len(sent), budget_bytes)
    pieces: list[tuple[int, Piece]] = []
    start = 0
    while sent:
        one = sent.pop(0)  # what was moved is dropped as soon as it is copied
        data = np.asarray(one.data)
        copy = buffer[start : start + data.nbytes].view(data.dtype).reshape(data.shape)
        np.copyto(copy.view(mover(data.dtype)), data.view(mover(data.dtype)))
        pieces += pieces_of(one, copy)
        start += -(-data.nbytes // _ALIGNMENT) * _ALIGNMENT
    feed.land(pieces, buffer)
    return True


def _platform(array: jax.Array) -> str:
    return next(iter(array.devices())).platform
