"""Averages over one and four processes: the same values, and every byte read once over all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxckpt.testing.processes import run_processes

PROGRAMS = Path(__file__).parent / "programs.py"


@pytest.mark.parametrize("processes", [1, 4])
def test_processes_average_onto_another_mesh(tmp_path: Path, processes: int) -> None:
    told: list[Any] = run_processes(
        f"{PROGRAMS}:save_and_average",
        processes,
        devices=8 // processes,
        args={"folder": str(tmp_path)},
        timeout_s=110,
    )
    for one in told:
        assert max([*one["P"], one["mixed"], one["saved"]]) <= 1
        assert one["mapped"] <= 1
        assert one["host"] == [1.5, 3]
    stored = sum(f.stat().st_size for k in range(4) for f in (tmp_path / f"{k}").rglob("*") if f.is_file())
    assert sum(one["read"] for one in told) <= 1.02 * stored


def test_all_processes_hear_of_one_that_cannot_see_a_source(tmp_path: Path) -> None:
    told: list[Any] = run_processes(
        f"{PROGRAMS}:one_process_cannot_see", 2, devices=2, args={"folder": str(tmp_path)}, timeout_s=60
    )
    assert "missing" in told[1]
    assert "1" in told[0]
    assert told[0] != told[1]
