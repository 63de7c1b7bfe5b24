"""Two and four processes: what Orbax saves together we restore together and alone, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxckpt as jc
from jaxckpt.testing.processes import run_processes
from tests.interop.orbax_programs import READERS, WRITERS, values

PROGRAMS = Path(__file__).parent / "orbax_programs.py"
pytestmark = pytest.mark.filterwarnings("ignore")  # Orbax's own deprecations


def run(name: str, n: int = 2, **args: str) -> list[Any]:
    return run_processes(f"{PROGRAMS}:{name}", n, devices=2, args=args)


def assert_values(found: Any, seed: int = 0) -> None:
    wanted = values(seed)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def told(folder: Path) -> list[dict[str, list[str]]]:
    """What each of two processes found wrong, by who wrote and who read."""
    run("ours_saves", 4, folder=str(folder))
    return run("both", folder=str(folder))


def test_both_directions_are_bit_equal_on_two_processes(told: list[dict[str, list[str]]]) -> None:
    for wrong in told:
        assert len(wrong) == 3 * len(WRITERS) + 2 * 2 * len(READERS)
        assert not {what: names for what, names in wrong.items() if names}


@pytest.mark.parametrize("writer", WRITERS)
def test_one_process_restores_what_two_saved_with_orbax(folder: Path, told: Any, writer: str) -> None:
    assert_values(jc.restore(folder / writer, jc.on_host))
    assert jc.verify(folder / writer).ok


@pytest.mark.parametrize("n", [2, 4])
def test_orbax_alone_restores_what_several_saved_with_us(folder: Path, told: Any, n: int) -> None:
    like = jax.tree.map(lambda x: np.zeros_like(x) if isinstance(x, np.ndarray) else x, values())
    for read in READERS.values():
        assert_values(read(str(folder / f"ours by {n}"), like))


def test_orbax_managers_of_two_processes_work_with_our_handler(tmp_path: Path) -> None:
    for seen in run("managers", root=str(tmp_path / "run")):
        assert seen == {
            "steps": [1, 2],
            "ours": [],
            "untold": [],
            "by orbax": [],
            "of orbax": [],
            "steps then": [2, 3],
            "our manager": [3, []],
        }


def test_a_write_that_one_process_is_refused_fails_the_step_of_orbax_on_both(tmp_path: Path) -> None:
    first, second = run("one_cannot_write", root=str(tmp_path / "run"))
    for seen in (first, second):
        assert seen["finished"] == ["1"]
        assert seen["after_s"] < 30
        assert "File too large" in seen["message"]
    assert "Process 1 of 2 failed" in first["message"]


def test_what_one_process_cannot_read_of_orbax_raises_on_both_at_once(tmp_path: Path) -> None:
    first, second = run("one_cannot_read", folder=str(tmp_path))
    for what, (kind, message, after_s) in ((w, h) for w, h in first.items() if not w.startswith("then")):
        assert kind == second[what][0] == ("NotFoundError" if what.startswith("nothing") else "CorruptionError")
        assert "Process 1 of 2 could not read its part" in message
        assert after_s < 30
    for heard in (first, second):
        assert [wrong for what, wrong in heard.items() if what.startswith("then")] == [[], []]
