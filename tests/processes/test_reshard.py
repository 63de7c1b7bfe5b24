"""Trees saved by one, two and four processes come back on one, two and four, whole, and read once."""

from pathlib import Path

import pytest

import jaxckpt as jc
from jaxckpt.testing.processes import load_target, run_processes
from tests.processes.trees import COMPRESSION, make_tree, mesh_of

PROGRAMS = Path(__file__).parent / "programs.py"
WAYS = [
    "same",
    "turned",
    "devices in reverse",
    "one axis, turned",
    "concrete",
    "function",
    "without like",
    "on host",
    "only",
    "cast",
]
READ_AT_MOST = {
    "same": 1.03,
    "transposed": 1.05,
    "columns": 1.05,
    "rows": 1.05,
    "replicated over data": 1.05,
    "fully replicated": 1.05,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    jc.save(folder / "by 1", make_tree(mesh_of(4)), compression=COMPRESSION)
    return folder


@pytest.fixture(scope="module")
def on_2(folder: Path) -> list[dict]:
    args = {"save_to": f"{folder}/by 2", "restore": [f"{folder}/by 1"]}
    return run_processes(f"{PROGRAMS}:save_and_restore", 2, devices=4, args=args)


@pytest.fixture(scope="module")
def on_4(folder: Path, on_2: list[dict]) -> list[dict]:
    args = {"save_to": f"{folder}/by 4", "restore": [f"{folder}/by 1", f"{folder}/by 2"]}
    return run_processes(f"{PROGRAMS}:save_and_restore", 4, devices=2, args=args)


@pytest.fixture(scope="module")
def on_2_later(folder: Path, on_4: list[dict]) -> list[dict]:
    args = {"save_to": f"{folder}/by 2, later", "restore": [f"{folder}/by 4"]}
    return run_processes(f"{PROGRAMS}:save_and_restore", 2, devices=4, args=args)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("saved", ["by 1", "by 2"])
def test_every_leaf_comes_back_on_2_processes(on_2: list[dict], folder: Path, saved: str, way: str):
    assert [result[f"{folder}/{saved}"][way] for result in on_2] == [[], []]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("saved", ["by 1", "by 2", "by 4"])
def test_every_leaf_comes_back_on_4_processes(on_4: list[dict], folder: Path, saved: str, way: str):
    assert [result[f"{folder}/{saved}"][way] for result in on_4] == [[], [], [], []]


@pytest.mark.parametrize("way", WAYS)
def test_every_leaf_saved_by_4_comes_back_on_2_processes(on_2_later: list[dict], folder: Path, way: str):
    assert [result[f"{folder}/by 4"][way] for result in on_2_later] == [[], []]


@pytest.mark.parametrize("saved", ["by 1", "by 2", "by 4"])
def test_every_leaf_comes_back_on_1_process(on_4: list[dict], folder: Path, saved: str):
    programs = load_target(f"{PROGRAMS}:restore_in_every_way")
    wrong = programs(f"{folder}/{saved}", make_tree(mesh_of(4)))
    assert wrong == dict.fromkeys([*WAYS, "on host, process 0 alone"], [])
    assert jc.verify(f"{folder}/{saved}").ok


def test_process_0_alone_restores_to_the_host(on_4: list[dict], folder: Path):
    assert on_4[0][f"{folder}/by 2"]["on host, process 0 alone"] == []


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_processes(f"{PROGRAMS}:count_all", 4, args={"folder": str(tmp_path_factory.mktemp("bytes"))})


@pytest.mark.parametrize("tree", ["large", "small and odd", "compressed"])
@pytest.mark.parametrize("target", READ_AT_MOST)
def test_every_stored_byte_is_read_once_over_all_processes(counted: list[dict], tree: str, target: str):
    results = [result["read"][tree] for result in counted]
    assert [result["wrong"] for result in results] == [[]] * 4
    stored = sum(result["stored"] for result in results)
    read = sum(result["read"][target] for result in results)
    # Chunks are aligned, and a chunk that is read alone is read without what follows it.
    assert sum(result["written"] for result in results) <= read <= READ_AT_MOST[target] * stored


@pytest.mark.parametrize("tree", ["large and small", "few small", "one", "many odd", "with sharded"])
def test_replicated_leaves_are_written_by_all_alike(counted: list[dict], tree: str):
    written = [result["written"][tree] for result in counted]
    assert max(written) / (sum(written) / 4) <= 1.05


def test_all_processes_make_the_same_plan(counted: list[dict]):
    plans = [result["plans"] for result in counted]
    assert plans[1:] == plans[:1] * 3


def test_saves_in_the_background_and_over_one_another(tmp_path: Path):
    assert run_processes(f"{PROGRAMS}:save_in_a_row", 2, devices=4, args={"folder": str(tmp_path)}) == [[], []]
