"""Run all benchmarks, one process each, and write docs/benchmarks.md: python -m benchmarks [--quick]."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the scripts find their helpers beside them

from _common import Table, as_markdown, facts  # noqa: E402

SCRIPTS = (
    "save_restore",
    "reshard",
    "memory",
    "planning",
    "trace_save",
    "stall",
    "averaging",
    "lcsc_overhead",
    "recovery_time",
)
INTRODUCTION = """\
# Benchmarks

Written by `make bench` (`python -m benchmarks`); [how it measures](../benchmarks/README.md). Times are wall seconds:
the median and, in brackets, the range of all rounds. Contenders run interleaved.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="smaller sizes; these figures are no verdict")
    size.add_argument("--tiny", action="store_true", help="the smallest sizes that run all code")
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    parser.add_argument("--root", type=Path, help="folder on the file system to measure")
    args = parser.parse_args()
    options = ["--quick"] if args.quick else ["--tiny"] if args.tiny else []
    options += ["--root", str(args.root)] if args.root else []
    reports, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for script in SCRIPTS:
            print(f"\n==== {script} ====", flush=True)
            found = Path(folder, f"{script}.json")
            command = [sys.executable, str(HERE / f"{script}.py"), *options, "--json", str(found)]
            if subprocess.run(command, check=False).returncode:
                failed.append(script)
            else:
                reports.append(json.loads(found.read_text()))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(document(reports, failed, reduced="".join(options[:1]) if args.quick or args.tiny else ""))
    print(f"\nWritten: {args.output}")
    return 1 if failed else 0


def document(reports: list[dict[str, Any]], failed: list[str], *, reduced: str) -> str:
    about = "\n".join(f"- {name}: {value}" for name, value in facts().items())
    parts = [INTRODUCTION, about]
    if reduced:
        parts.append(f"**Run with `{reduced}`: sizes are reduced, and the figures are no verdict.**")
    if failed:
        parts.append(f"**Did not run to the end: {', '.join(failed)}.**")
    rows = sorted((row for report in reports for row in report["acceptance"]), key=lambda row: row["number"])
    summary = Table(
        title="Summary",
        columns=("#", "measured", "value", "must be", "met"),
        rows=[(str(r["number"]), r["what"], r["measured"], r["must"], "yes" if r["ok"] else "**no**") for r in rows],
        note="Numbers are those of the acceptance table; the rows that are missing here are tests.",
    )
    parts.append(as_markdown(summary).replace("### ", "## ", 1))
    for report in reports:
        parts.append(f"## {report['title']}")
        parts += [as_markdown(Table(**table)) for table in report["tables"]]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
