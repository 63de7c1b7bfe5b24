"""Several processes capture in every mode, each only what it writes, and skip together or not at all."""

from pathlib import Path

import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt.testing.processes import run_processes

PROGRAMS = Path(__file__).parent / "programs.py"


@pytest.mark.slow
def test_processes_give_the_same_bytes_in_all_modes(tmp_path: Path) -> None:
    results = run_processes(f"{PROGRAMS}:save_in_all_modes", 2, args={"path": str(tmp_path)})
    assert results == [["durable"] * 5] * 2
    want = np.arange(1_500_000, dtype=np.float32).reshape(3000, 500)
    for mode in ("auto", "pinned", "clone", "split", "in_step"):
        found = jc.restore(tmp_path / mode, jc.on_host)
        assert (found["replicated"] == want).all()
        assert (found["sharded"] == want[:2048]).all()
        assert all((found[f"s{k}"] == np.full((7, k + 1), k)).all() for k in range(10))


@pytest.mark.slow
def test_processes_skip_together(tmp_path: Path) -> None:
    results = run_processes(f"{PROGRAMS}:skip_when_one_is_busy", 2, args={"path": str(tmp_path)})
    assert results == [["skipped", "durable"]] * 2
    assert not (tmp_path / "a").exists()
    assert jc.verify(tmp_path / "b").ok
