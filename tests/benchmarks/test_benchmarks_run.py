"""The benchmarks run: at the smallest sizes each script ends well and judges its rows of the acceptance table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
ROWS = {
    "save_restore": [1, 2, 3],
    "reshard": [4, 5],
    "memory": [7],
    "planning": [9],
    "trace_save": [10, 11],
    "stall": [1, 2, 3, 4, 9],
    "averaging": [1, 2, 5, 3, 4],
    "recovery_time": [9, 10],
    "recovery_fork": [5, 6],
    "recovery_runs": [],
    "write_calls": [],
    "lcsc_study": [6, 7],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(ROWS))
def test_a_script_judges_its_rows_of_the_acceptance_table(script: str, tmp_path: Path) -> None:
    report = run(script, tmp_path)
    assert [row["number"] for row in report["acceptance"]] == ROWS[script]
    assert all(len(row) == len(table["columns"]) for table in report["tables"] for row in table["rows"])
    assert report["tables"]


def test_counting_functions_sees_the_whole_save(tmp_path: Path) -> None:
    found = run("trace_save", tmp_path, "--names")
    files, functions, lines = (int(cell.replace(",", "")) for cell in found["tables"][0]["rows"][0][1:])
    assert files > 5
    assert functions > 20
    assert lines > functions


def run(script: str, folder: Path, *options: str) -> dict:
    found = folder / "found.json"
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [
        sys.executable,
        str(FOLDER / f"{script}.py"),
        "--tiny",
        "--json",
        str(found),
        "--root",
        str(folder),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(found.read_text())
