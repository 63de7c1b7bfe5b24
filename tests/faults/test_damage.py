"""No flipped bit, torn file or swapped chunk loads silently (D5)."""

import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

import jaxckpt as jc
from jaxckpt.checkpoint.source import OwnSource, open_source
from jaxckpt.core.errors import CheckpointError
from jaxckpt.storage.url import open_store
from tests.faults.cases import files_of, outcome, same, tree

SAVED = 3


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damage") / "checkpoint"
    jc.save(path, tree(SAVED), step=SAVED, compression={"zipped": 3})
    return path


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


def flips(path: Path, every: int = 1) -> Iterator[bytes]:
    """The file with one bit flipped, at every byte (or every ``every``-th): which bit rotates."""
    data = path.read_bytes()
    for place in range(0, len(data), every):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        yield bytes(changed)


def test_no_flipped_bit_of_any_file_loads_silently(checkpoint: Path) -> None:
    wanted, silent, caught = tree(SAVED), [], 0
    for file in files_of(checkpoint):
        data = file.read_bytes()
        for place, changed in enumerate(flips(file)):
            file.write_bytes(changed)
            found = outcome(checkpoint)
            if isinstance(found, CheckpointError):
                caught += 1
            elif not same(found, wanted):
                silent.append(f"{file.name}[{place}]")
        file.write_bytes(data)
    assert silent == []
    assert caught > 1000
    assert same(jc.restore(checkpoint), wanted)


def test_no_flipped_bit_of_array_data_loads_silently_without_the_sidecar(checkpoint: Path) -> None:
    (checkpoint / "jaxckpt.json").unlink()
    wanted = jc.restore(checkpoint, jc.on_host)
    assert np.array_equal(wanted["sharded"], tree(SAVED)["sharded"])
    for file in files_of(checkpoint):
        if "/ocdbt.process_0/d/" not in str(file):
            continue
        data = file.read_bytes()
        for changed in flips(file, every=7):
            file.write_bytes(changed)
            try:
                found = jc.restore(checkpoint, jc.on_host)
            except CheckpointError:
                continue
            assert same(found, wanted)
        file.write_bytes(data)


# In a process of its own: what Orbax leaves running after an error warns much later.
_ORBAX_READS = """
import sys
import orbax.checkpoint as ocp
tree = ocp.PyTreeCheckpointer().restore(sys.argv[1])
print("restored", float(tree["sharded"].sum()))
"""


def test_orbax_sees_flipped_bits_of_our_array_data(checkpoint: Path) -> None:
    def orbax_reads() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", _ORBAX_READS, str(checkpoint)], capture_output=True, text=True)

    assert "restored" in orbax_reads().stdout
    (file,) = [f for f in files_of(checkpoint) if "/ocdbt.process_0/d/" in str(f)]
    source = open_source(open_store(checkpoint))
    assert isinstance(source, OwnSource)
    changed = bytearray(file.read_bytes())
    changed[source.chunk_read(0, 0).offset + 100] ^= 4  # within the first leaf, 16 x 8 float32
    file.write_bytes(changed)
    result = orbax_reads()
    assert result.returncode != 0
    assert "restored" not in result.stdout


@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
def test_truncated_files_are_caught(checkpoint: Path, share: float) -> None:
    wanted = tree(SAVED)
    for file in files_of(checkpoint):
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * share)])
        found = outcome(checkpoint)
        assert isinstance(found, CheckpointError) or same(found, wanted), file
        file.write_bytes(data)


def test_each_missing_file_is_an_error_or_no_loss(checkpoint: Path) -> None:
    wanted = tree(SAVED)
    for file in files_of(checkpoint):
        data = file.read_bytes()
        file.unlink()
        found = outcome(checkpoint)
        if file.name == "jaxckpt.json":  # types of nodes are lost with it, no tensor is
            assert np.array_equal(found["sharded"], wanted["sharded"])
        else:
            assert isinstance(found, CheckpointError) or same(found, wanted), file
        file.write_bytes(data)


def swapped(path: Path, a: slice, b: slice) -> None:
    data = bytearray(path.read_bytes())
    data[a], data[b] = data[b], data[a]
    path.write_bytes(data)


def test_swapped_chunks_are_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    jc.save(path, {"a": np.arange(100.0), "b": -np.arange(100.0)})
    source = open_source(open_store(path))
    assert isinstance(source, OwnSource)
    a, b = source.chunk_read(0, 0), source.chunk_read(1, 0)
    swapped(path / a.file, slice(a.offset, a.offset + a.length), slice(b.offset, b.offset + b.length))
    with pytest.raises(jc.CorruptionError, match='Leaf "a"'):
        jc.restore(path)
    report = jc.verify(path)
    assert not report.ok
    assert {line.split('"')[1] for line in report.problems} == {"a", "b"}


def test_chunks_swapped_through_tensorstore_are_caught(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    jc.save(path, {"a": np.arange(100.0), "b": -np.arange(100.0)})
    database = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result()
    a, b = database["a/c/0"], database["b/c/0"]
    database["a/c/0"], database["b/c/0"] = b, a
    with pytest.raises(jc.CorruptionError, match=r"manifest\.ocdbt"):
        jc.restore(path)
    assert not jc.verify(path).ok


def test_a_chunk_of_another_checkpoint_is_caught(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        jc.save(tmp_path / name, {"w": np.full(1000, value)})
    mine, theirs = (next(f for f in files_of(tmp_path / n) if "/ocdbt.process_0/" in str(f)) for n in ("one", "two"))
    mine.write_bytes(theirs.read_bytes())
    with pytest.raises(jc.CorruptionError, match='Leaf "w", chunk 0'):
        jc.restore(tmp_path / "one")
    assert 'Leaf "w"' in jc.verify(tmp_path / "one").problems[0]


def test_the_manifest_of_another_checkpoint_is_caught(tmp_path: Path) -> None:
    for name in ("one", "two"):
        jc.save(tmp_path / name, {"w": np.ones(10)})
    shutil.copy(tmp_path / "two" / "manifest.ocdbt", tmp_path / "one" / "manifest.ocdbt")
    with pytest.raises(jc.CorruptionError, match=r"manifest\.ocdbt"):
        jc.restore(tmp_path / "one")


def test_verify_names_the_leaf_and_the_file_of_any_flip_in_array_data(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    jc.save(path, {"first": np.arange(5000.0), "second": np.arange(300)})
    assert jc.verify(path).ok
    source = open_source(open_store(path))
    assert isinstance(source, OwnSource)
    rng = random.Random(0)
    for _ in range(20):
        leaf = rng.randrange(2)
        chunk = source.chunk_read(leaf, 0)
        file = path / chunk.file
        data = file.read_bytes()
        changed = bytearray(data)
        changed[chunk.offset + rng.randrange(chunk.length)] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        (problem,) = jc.verify(path).problems
        assert f'"{("first", "second")[leaf]}"' in problem
        assert chunk.file in problem
        file.write_bytes(data)


def test_zeroed_regions_are_caught(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    jc.save(path, {"w": np.random.default_rng(0).standard_normal(100_000)})
    (file,) = [f for f in files_of(path) if "/ocdbt.process_0/" in str(f)]
    data = bytearray(file.read_bytes())
    data[65536:131072] = bytes(65536)
    file.write_bytes(data)
    with pytest.raises(jc.CorruptionError, match='Leaf "w"'):
        jc.restore(path)


def test_without_the_marker_it_is_no_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "commit_success.txt").unlink()
    for look in (jc.restore, jc.inspect, jc.verify):
        with pytest.raises(jc.NotCommittedError, match=r"commit_success\.txt"):
            look(checkpoint)
