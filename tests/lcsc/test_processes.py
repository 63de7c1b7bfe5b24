"""Searches by two processes whose checkpoints are sharded over both: the same coefficients as by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxckpt.testing.processes import run_processes
from tests.lcsc.programs import search

PROGRAMS = Path(__file__).parent / "programs.py"


@pytest.mark.parametrize(
    ("how", "spreads", "killed_at"),
    [
        ({"strategy": "cma_es"}, True, 0),
        ({"strategy": "evolution"}, False, 4),
        ({"strategy": "cma_es", "placement": "host"}, True, 3),
        ({"strategy": "snes", "placement": "stream"}, False, 0),
        ({"strategy": "gradient"}, False, 0),
        ({"strategy": "cma_es", "jit": False}, False, 0),
    ],
)
def test_two_processes_find_what_one_finds(tmp_path: Path, how: dict[str, Any], spreads: bool, killed_at: int) -> None:
    args = {"how": how, "spreads": spreads}
    told: list[Any] = run_processes(
        f"{PROGRAMS}:search",
        2,
        devices=4,
        args={"folder": str(tmp_path / "two"), "killed_at": killed_at, **args},
        timeout_s=100,
    )
    alone = search(str(tmp_path / "one"), how, spreads)
    assert told[0] == told[1] | {"wrong": told[0]["wrong"]}
    for one in told:
        assert one["wrong"] < 1e-6
        assert one["spec"] == "P('model',)"
        assert one["placement"] == alone["placement"]
        np.testing.assert_allclose(one["coefficients"], alone["coefficients"], atol=1e-5)
