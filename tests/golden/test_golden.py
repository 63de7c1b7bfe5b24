"""The checkpoints of every format version, as releases wrote them, restore bit for bit. See make.py."""

import shutil
from pathlib import Path

import jax
import pytest

import jaxckpt as jc
from jaxckpt.format.sidecar import FORMAT_VERSION
from tests.checkpoint.bits import assert_same_tree, raw
from tests.golden.make import METADATA, STEP, tree

FOLDERS = sorted(Path(__file__).parent.glob("v*"))


def test_there_is_a_folder_of_every_version() -> None:
    beginnings = [(folder / "jaxckpt.json").read_text()[:40] for folder in FOLDERS]
    wanted = [f'{{"format":"jaxckpt","version":{version},' for version in range(1, FORMAT_VERSION + 1)]
    assert [text[: len(start)] for text, start in zip(beginnings, wanted, strict=True)] == wanted


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
class TestFolder:
    def test_restores_bit_for_bit_onto_the_tree_it_came_from(self, folder: Path) -> None:
        wanted = tree()
        found = jc.restore(folder, wanted)
        assert found.pop("mixed") == wanted.pop("mixed")  # jax cannot sort these keys
        assert_same_tree(found, wanted)
        assert found["tied"]["embedding"] is found["tied"]["head"]

    def test_restores_bit_for_bit_without_like(self, folder: Path) -> None:
        found, wanted = jc.restore(folder), tree()
        assert [type(key) for key in found["by_number"]] == [int] * 3
        mixed = wanted.pop("mixed")
        assert [(type(key), key, value) for key, value in found.pop("mixed").items()] == [
            (type(key), key, value) for key, value in mixed.items()
        ]
        del found["moments"], wanted["moments"]  # a type of this module: needs `like`
        assert_same_tree(found, wanted)

    def test_restores_onto_one_device(self, folder: Path) -> None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
        found = jc.restore(folder, lambda name, spec: one, only="sharded*")
        for name in ("sharded", "sharded_on_two_axes"):
            assert found[name].sharding == one
            assert raw(found[name]) == raw(tree()[name])

    def test_verifies(self, folder: Path) -> None:
        report = jc.verify(folder)
        assert report.ok, report.problems
        assert report.checksums

    def test_tells_its_step_and_metadata(self, folder: Path) -> None:
        found = jc.inspect(folder)
        assert (found.step, found.metadata) == (STEP, METADATA)

    def test_a_damaged_copy_does_not_verify(self, folder: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        data = max((copy / "ocdbt.process_0" / "d").iterdir(), key=lambda file: file.stat().st_size)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
        assert not jc.verify(copy).ok
