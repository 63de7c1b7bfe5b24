"""What a call that writes several chunks saves: the reason for docs/decisions/0007-large-writes.md.

One file of chunks that each have 64 bytes after them, written and synced with 1, 4, 16 or 64 chunks per call, beside
large chunks. In every round the cases come in another order, as what the one before left in memory matters:
python benchmarks/write_calls.py [--quick]
"""

from __future__ import annotations

import os
import resource
import time
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from _common import MIB, Report, Table, finish, parser, scratch, seconds, touch

if TYPE_CHECKING:
    from pathlib import Path

TAIL = bytes(64)


class Case(NamedTuple):
    chunk_mib: int
    per_call: int


CASES = (Case(1, 1), Case(1, 4), Case(1, 16), Case(1, 64), Case(12, 1), Case(96, 1))


def main() -> None:
    args = parser(__doc__).parse_args()
    size = (192 if args.tiny or args.quick else 768) * MIB
    rounds = args.rounds or (1 if args.tiny else 3 if args.quick else 7)
    rng = np.random.default_rng(0)
    data = rng.integers(0, 255, size, dtype=np.uint8)
    taken: dict[Case, list[tuple[float, float]]] = {case: [] for case in CASES}
    with scratch(args.root) as folder:
        for _ in range(rounds):
            for place in rng.permutation(len(CASES)):
                taken[CASES[place]].append(write(folder / "file", memoryview(data), CASES[place]))
    whole = median(wall for wall, _ in taken[CASES[-1]])
    report = Report("Chunks per call")
    report.add(
        Table(
            title=f"{size // MIB} MiB written and synced, chunks with 64 bytes after each",
            columns=("per call", "s, median (range)", "system time, s", "over 1 chunk of 96 MiB"),
            rows=[
                (
                    f"{case.per_call} x {case.chunk_mib} MiB",
                    seconds([wall for wall, _ in found]),
                    seconds([system for _, system in found]),
                    f"{median(wall for wall, _ in found) / whole:.2f}",
                )
                for case, found in taken.items()
            ],
        )
    )
    finish(report, args)


def write(path: Path, data: memoryview, case: Case) -> tuple[float, float]:
    """Seconds, and of them those of the system."""
    path.unlink(missing_ok=True)
    os.sync()
    touch(len(data))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_stime, time.perf_counter()
    step, at = case.chunk_mib * MIB, 0
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    for first in range(0, len(data), step * case.per_call):
        starts = range(first, min(first + step * case.per_call, len(data)), step)
        parts = [part for start in starts for part in (data[start : start + step], TAIL)]
        wrote = os.pwritev(fd, parts, at)
        assert wrote == sum(map(len, parts))
        at += wrote
    os.fsync(fd)
    os.close(fd)
    return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_stime - before


if __name__ == "__main__":
    main()
