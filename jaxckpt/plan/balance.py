"""Split replicated boxes among their holders by bytes, largest first.

Source: ByteCheckpoint (NSDI 2025), section 4.1, "worst-fit" balancing: largest pieces first, each to the holder with
the least so far. Here pieces are chunks inside a tensor, not whole tensors, so one large leaf is shared as well.
"""

import numpy as np

MOST_ROUNDS = 64


def share(loads: np.ndarray, holders: np.ndarray, counts: np.ndarray, chunk_bytes: int) -> np.ndarray:
    """Give the chunks of each box to its holders; returns how many each gets and adds their bytes to ``loads``.

    Args:
        loads: int64 [processes], bytes so far; updated in place.
        holders: int32 [boxes, replicas], -1 where a row is shorter.
        counts: int64 [boxes], chunks in each box.
        chunk_bytes: size of a chunk.

    Returns:
        int64 [boxes, replicas]: chunks for each holder; rows sum to ``counts``.
    """
    given = np.zeros(holders.shape, np.int64)
    if holders.shape[1] == 1:
        given[:, 0] = counts
        np.add.at(loads, holders[:, 0], counts * chunk_bytes)
        return given
    rows = np.arange(len(holders))
    left = counts.copy()
    while left.any():
        # Whole rounds first where there are many chunks, then one by one.
        batch = np.maximum(left // MOST_ROUNDS, 1) * (left > 0)
        level = np.where(holders >= 0, loads[holders], np.iinfo(np.int64).max)
        pick = level.argmin(axis=1)
        given[rows, pick] += batch
        np.add.at(loads, holders[rows, pick], batch * chunk_bytes)
        left -= batch
    return given
