"""Peak memory above the state while saving, and beside the restored bytes while restoring, in fresh processes.

The kernel's high-water mark is reset before each measured call: python benchmarks/memory.py [--quick]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from _common import MIB, Report, Row, Table, emptied, finish, parser, scratch

SLACK_BYTES = 64 * MIB


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--child", nargs=4, metavar=("CONTENDER", "ACTION", "PATH", "BYTES"), help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.child:
        print(json.dumps(measure(args.child[0], args.child[1], Path(args.child[2]), int(args.child[3]))))
        return
    size = (8 if args.tiny else 128 if args.quick else 1024) * MIB
    rounds = args.rounds or (1 if args.tiny or args.quick else 2)
    names = ("jaxckpt",) if args.tiny else ("jaxckpt", "Orbax v0", "Orbax v0 uncompressed", "Orbax v1")
    report = Report("Memory")
    taken: dict[tuple[str, str], list[dict[str, int]]] = {}
    with scratch(args.root) as folder:
        for _ in range(rounds):
            for name in names:
                path = emptied(folder / name)
                for action in ("save", "restore"):
                    taken.setdefault((name, action), []).append(in_child(name, action, path, size))
                emptied(path)
    peak = {key: int(median(run["peak_bytes"] for run in runs)) for key, runs in taken.items()}
    rows = [
        (name, f"+{peak[name, 'save'] / MIB:.0f} MiB", f"+{peak[name, 'restore'] / MIB:.0f} MiB",
         f"{peak[name, 'restore'] / size:.2f}x")
        for name in names
    ]  # fmt: skip
    report.add(
        Table(
            title=f"Peak memory, {size // MIB} MiB in 92 leaves on 8 devices",
            columns=("", "save, above the state", "restore, above what was there", "of the restored bytes"),
            rows=rows,
            note=f"Medians of {rounds} runs in fresh processes; a small tree was saved and restored first.",
        )
    )
    budget = taken["jaxckpt", "save"][0]["budget_bytes"]
    limit = budget + SLACK_BYTES
    report.judge(
        Row(
            number=7,
            what=f"peak RSS above the state, saving / restoring {size // MIB} MiB (arena: {budget // MIB} MiB)",
            measured=f"+{peak['jaxckpt', 'save'] / MIB:.0f} MiB / {peak['jaxckpt', 'restore'] / size:.2f}x",
            must=f"<= {limit // MIB} MiB / <= 1.15x",
            ok=peak["jaxckpt", "save"] <= limit and peak["jaxckpt", "restore"] <= 1.15 * size,
        )
    )
    finish(report, args)


def in_child(name: str, action: str, path: Path, size: int) -> dict[str, int]:
    command = [sys.executable, __file__, "--child", name, action, str(path), str(size)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"{name}, {action}: {found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


def measure(name: str, action: str, path: Path, size: int) -> dict[str, int]:
    os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="8")
    import jax
    from _contenders import MAKERS, abstract
    from jax.sharding import AxisType
    from save_restore import large_state

    from jaxckpt.transfer.arena import BUFFER_BYTES, KEEP

    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    contender = MAKERS[name]()
    small = large_state(mesh, 2 * MIB)
    warm = emptied(path.with_name(f"{path.name} warm {action}"))
    contender.save(warm, small)
    contender.restore(warm, abstract(small))
    state = large_state(mesh, size)
    like: Any = abstract(state)
    if action == "restore":
        del state
    gc.collect()
    trim()
    before = reset_peak()
    if action == "save":
        contender.save(path, state)
    else:
        kept = contender.restore(path, like)
        assert len(kept) == len(like)
    return {"peak_bytes": status_bytes("VmHWM") - before, "budget_bytes": BUFFER_BYTES * KEEP}


def trim() -> None:
    """Give free heap back, so that what was freed before does not hide what is allocated now."""
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> int:
    """Set the high-water mark of resident memory to what is resident now, and return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


if __name__ == "__main__":
    main()
