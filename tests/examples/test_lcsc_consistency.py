"""The example of LCSC runs in its short form: the searched model is better than the last one, and is on disk."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxckpt as jc

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


# Most of the time is XLA's.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@pytest.mark.timeout(400)
def test_the_searched_model_is_better_than_the_last_and_is_saved(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "lcsc_consistency.py"), str(tmp_path), "--smoke"],
        capture_output=True,
        text=True,
        check=False,
        timeout=380,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "XLA_FLAGS": FLAGS},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if re.search(r"\d\.\d{4} +\d+\.\d\d$", line)]
    assert [row.split(",")[0].split()[0] for row in rows] == ["last", "best", "EMA", "uniform", "greedy", "LCSC"]
    for name in ("grid.png", "search.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(jc.inspect(tmp_path / "best").parents) == 8
