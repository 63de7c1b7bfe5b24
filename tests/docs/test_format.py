"""The page on the format is enough to read a checkpoint: this reader was written from it and uses nothing of ours."""

from __future__ import annotations

import base64
import json
import re
from math import ceil, prod
from pathlib import Path
from typing import Any

import google_crc32c
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import zstandard

import jaxckpt as jc

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()
FOLDERS = re.compile(r"^(ocdbt\.process_\d+/d|d)/[0-9a-f]{32}$")


@pytest.fixture(scope="module")
def tree(mesh_4x2: jax.sharding.Mesh) -> Any:
    w = jax.device_put(jnp.arange(64 * 6, dtype=jnp.float32).reshape(64, 6), jax.NamedSharding(mesh_4x2, jax.P("data")))
    return {
        "w": w,
        "tied": [w, {7: np.arange(5, dtype=ml_dtypes.bfloat16)}],
        "odd": jnp.arange(9, dtype=jnp.uint4),
        "long": np.arange(700_001, dtype=np.int16),
        "zeros": np.zeros((0, 3)),
        "scalar": jnp.array(2.5),
        "numbers": (1, 2.5, True, 1 + 2j, "text", None),
    }


@pytest.fixture(scope="module", params=[None, 3], ids=["raw", "zstd"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tree: Any) -> Path:
    root = tmp_path_factory.mktemp("format") / "checkpoint"
    jc.save(root, tree, step=3, compression=request.param)
    return root


def test_a_reader_written_from_the_page_reads_every_leaf(saved: Path, tree: Any) -> None:
    found = read(saved)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        value = found
        for key in path:
            value = value[key.key if hasattr(key, "key") else key.idx]
        if isinstance(leaf, np.ndarray | jax.Array):
            assert value.dtype.name == leaf.dtype.name
            assert value.shape == leaf.shape
            assert value.tobytes() == np.asarray(leaf).tobytes()
        else:
            assert value == leaf
            assert type(value) is type(leaf)
    assert found["w"] is found["tied"][0]


def test_the_root_holds_only_what_the_page_lists(saved: Path) -> None:
    names = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    plain = {name for name in names if not FOLDERS.match(name)}
    assert len(names - plain) >= 2
    assert plain == {
        "manifest.ocdbt",
        "_METADATA",
        "_CHECKPOINT_METADATA",
        "_sharding",
        "array_metadatas/process_0",
        "_strings.json",
        "jaxckpt.json",
        "commit_success.txt",
    }
    assert all(name in PAGE for name in plain)


def test_members_of_the_sidecar_are_in_the_order_of_the_page(saved: Path) -> None:
    table = PAGE[PAGE.index("## 5.") : PAGE.index("**tree.**")]
    assert list(json.loads((saved / "jaxckpt.json").read_bytes())) == re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


def test_chunks_are_aligned_and_gaps_are_zero(saved: Path) -> None:
    record = json.loads((saved / "jaxckpt.json").read_bytes())
    file, offset, length, _ = columns(record)
    assert not (offset % 64).any()
    for i, name in enumerate(record["files"]):
        data = np.fromfile(saved / name, np.uint8)
        used = np.zeros(len(data), bool)
        for start, size in zip(offset[file == i].tolist(), length[file == i].tolist(), strict=True):
            used[start : start + size] = True
        assert not data[~used].any()


def columns(record: dict[str, Any]) -> tuple[np.ndarray, ...]:
    types = {"file": "<u4", "offset": "<u8", "length": "<u8", "crc32c": "<u4"}
    return tuple(np.frombuffer(base64.b64decode(record["chunks"][k]), t).astype(np.int64) for k, t in types.items())


def read(root: Path) -> Any:
    """Section 7, rules 2 to 5, then sections 2 and 5."""
    assert (root / "commit_success.txt").exists()
    text = (root / "jaxckpt.json").read_bytes()
    body, _, tail = text.rpartition(b',"crc32c":"')
    assert tail == b'%08x"}\n' % google_crc32c.value(body)
    record = json.loads(text)
    assert (record["format"], record["version"]) == ("jaxckpt", 1)
    assert google_crc32c.value((root / "manifest.ocdbt").read_bytes()[:-4]) == record["manifest_crc32c"]
    rows = iter(zip(*(column.tolist() for column in columns(record)), strict=True))
    leaves = [array(root, record, entry, rows) if "dtype" in entry else plain(entry) for entry in record["leaves"]]
    assert next(rows, None) is None
    return node(record["tree"], leaves)


def array(root: Path, record: dict[str, Any], entry: dict[str, Any], rows: Any) -> np.ndarray:
    dtype = np.dtype(getattr(ml_dtypes, entry["dtype"], entry["dtype"]))
    shape, chunk = entry.get("shape", []), entry.get("chunk", [])
    grid = [ceil(n / c) for n, c in zip(shape, chunk, strict=True)]
    out = np.empty([n * c for n, c in zip(grid, chunk, strict=True)], dtype)
    for place in np.ndindex(*grid):
        file, offset, length, crc = next(rows)
        stored = (root / record["files"][file]).read_bytes()[offset : offset + length]
        payload = stored[:-4]
        assert google_crc32c.value(payload) == crc == int.from_bytes(stored[-4:], "little")
        if "zstd_level" in entry:
            payload = zstandard.ZstdDecompressor().decompress(payload)
        assert len(payload) == prod(chunk) * dtype.itemsize
        where = tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, chunk, strict=True))
        out[where] = np.frombuffer(payload, dtype).reshape(chunk)
    return out[tuple(slice(n) for n in shape)]


def plain(entry: dict[str, Any]) -> Any:
    value = entry.get("value")
    if entry["kind"] == "float":
        return float.fromhex(value)
    return complex(*map(float.fromhex, value)) if entry["kind"] == "complex" else value


def node(record: Any, leaves: list[Any]) -> Any:
    if record is None or isinstance(record, int):
        return None if record is None else leaves[record]
    children = [node(child, leaves) for child in record[1]]
    if record[0] in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[record[0]](children)
    keys = [key if isinstance(key, str) else key["int"] for key in record[2]]
    return dict(zip(keys, children, strict=True))
