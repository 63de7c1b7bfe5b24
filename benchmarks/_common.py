"""What the benchmarks share: interleaved timing, samples, tables, the facts of the machine, and the report."""

# ruff: noqa: TC003 - scripts are read from the top: one block of imports
from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import mmap
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the acceptance table."""

    number: int
    what: str
    measured: str
    must: str
    ok: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(slots=True)
class Report:
    """What one script found."""

    title: str
    tables: list[Table] = field(default_factory=list)
    acceptance: list[Row] = field(default_factory=list)

    def add(self, table: Table) -> None:
        self.tables.append(table)
        print(as_text(table), end="\n\n", flush=True)

    def judge(self, row: Row) -> None:
        self.acceptance.append(row)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all scripts know."""
    found = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    size = found.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="smaller sizes and fewer repetitions: minutes become seconds"
    )
    size.add_argument("--tiny", action="store_true", help="the smallest sizes that run all code; figures mean nothing")
    found.add_argument("--rounds", type=int, help="repetitions that count (one more is run first and dropped)")
    found.add_argument("--json", type=Path, help="also write the tables here")
    found.add_argument("--root", type=Path, help="folder on the file system to measure (default: the temporary one)")
    return found


def finish(report: Report, args: argparse.Namespace) -> None:
    """Print the verdicts, and write the tables where asked to."""
    rows = [(str(r.number), r.what, r.measured, r.must, "yes" if r.ok else "NO") for r in report.acceptance]
    print(
        as_text(Table(title="Acceptance", columns=("#", "measured", "value", "must be", "met"), rows=rows)), flush=True
    )
    print("; ".join(f"{name}: {value}" for name, value in facts().items()), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(asdict(report)))


@contextlib.contextmanager
def scratch(root: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="jaxckpt-benchmark-", dir=root) as folder:
        yield Path(folder)


Samples = dict[str, dict[str, list[float]]]  # contender -> quantity -> one value per round


def interleave(
    contenders: Mapping[str, Callable[[int], Mapping[str, float]]], *, rounds: int, warm_up: int = 1
) -> Samples:
    """Run all contenders in every round, each first in turn; the first rounds only warm up and are dropped.

    So a busy moment of the machine, or a disk that slows down, favours none, and the first touch of fresh memory, which
    costs both sides far more than a warm copy, is paid before the clock runs.
    """
    taken: Samples = {name: {} for name in contenders}
    names = list(contenders)
    for turn in range(-warm_up, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            for what, value in contenders[name](turn).items():
                if turn >= 0:
                    taken[name].setdefault(what, []).append(value)
    return taken


@contextlib.contextmanager
def stopwatch(into: dict[str, float], name: str, *, memory_bytes: int = 0) -> Iterator[None]:
    """Time the body, with what others left to write out of the way and this much free memory warm.

    On virtual machines the first touch of memory that the host has taken back costs many times a copy, and would fall
    on whoever happens to come after a pause.
    """
    os.sync()
    touch(memory_bytes)
    started = time.perf_counter()
    yield
    into[name] = time.perf_counter() - started


def touch(size_bytes: int) -> None:
    """As numpy allocates it: in huge pages, where the system has them."""
    np.empty(size_bytes, np.uint8)[:: mmap.PAGESIZE] = 0


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def seconds(values: Sequence[float]) -> str:
    """Median, and the range."""
    digits = 3 if median(values) < 1 else 2
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over rounds of one time over the other, both taken in the same round."""
    return median(a / b for a, b in zip(above, below, strict=True))


def as_text(table: Table) -> str:
    cells = [list(table.columns), *[list(row) for row in table.rows]]
    widths = [max(len(row[k]) for row in cells) for k in range(len(table.columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([f"== {table.title}", lines[0], rule, *lines[1:], *([table.note] if table.note else [])])


def as_markdown(table: Table) -> str:
    lines = [f"| {' | '.join(row)} |" for row in [table.columns, ["---"] * len(table.columns), *table.rows]]
    return "\n".join([f"### {table.title}", "", *lines, *(["", table.note] if table.note else [])])


def facts() -> dict[str, str]:
    """Date, machine and versions."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ("jaxckpt", "jax", "jaxlib", "orbax-checkpoint", "tensorstore", "numpy")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, local disk",
        "devices": "simulated CPU devices",
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{p} {_version(p)}" for p in packages)]),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
