"""What the documentation shows runs, and what it names exists."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import warnings
from pathlib import Path

import pytest

import jaxckpt

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")
HEADINGS = ["What it does that Orbax does not", "Methods and their papers", "Layers"]

MODULES = sorted((ROOT / "jaxckpt").rglob("*.py"))
WITH_EXAMPLES = [path for path in MODULES if ">>> " in path.read_text()]
FUNCTIONS = ["diff", "inspect", "restore", "save", "save_async", "verify"]


def blocks() -> list[pytest.ParameterSet]:
    found = [(path, i, code) for path in DOCUMENTS for i, code in enumerate(CODE.findall(path.read_text()))]
    return [pytest.param(code, id=f"{path.relative_to(ROOT)}-{i}") for path, i, code in found]


@pytest.mark.parametrize("code", blocks())
def test_code_in_the_documents_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        # Orbax warns of its own deprecations where it is shown.
        warnings.simplefilter("ignore")
        exec(compile(code, "document", "exec"), {"__name__": "document"})


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_in_docstrings_run(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed


@pytest.mark.parametrize("name", jaxckpt.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    public = getattr(jaxckpt, name)
    assert inspect.getdoc(public)
    if inspect.isfunction(public):
        assert ">>> " in (public.__doc__ or ""), f"{name} has no example"
    assert f"`{name}" in (ROOT / "docs" / "guides" / "api.md").read_text()


def test_the_readme_begins_with_a_sentence_ten_lines_and_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    first, second = text.index("```python"), text.index("```sh")
    assert first < second < text.index(f"## {HEADINGS[0]}")
    (code, *_) = CODE.findall(text)
    assert len([line for line in code.splitlines() if line.strip()]) == 10
    assert re.findall(r"^make (\w+)", text[second:], re.MULTILINE)[:2] == ["demo", "test"]
    assert [h for h in re.findall(r"^## (.*)$", text, re.MULTILINE) if h in HEADINGS] == HEADINGS


def test_links_lead_somewhere() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {link}"
        for path in DOCUMENTS
        for link in LINK.findall(path.read_text())
        if not (path.parent / link).exists()
    ]
    assert not broken


def test_architecture_tells_of_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    inner = [path.relative_to(ROOT / "jaxckpt").as_posix() for path in MODULES if path.parent.name != "jaxckpt"]
    assert not [name for name in inner if not name.endswith("__init__.py") and f"`{name}`" not in text]


def test_format_tells_of_every_member_of_the_sidecar() -> None:
    from jaxckpt.format import sidecar

    text = (ROOT / "docs" / "format.md").read_text()
    fields = {"manifest_crc32c", *sidecar.Sidecar.__dataclass_fields__, *sidecar.LeafEntry.__dataclass_fields__}
    renamed = {"structure": "tree", "table": "chunks"}  # as the members of the JSON are called
    assert not [name for name in sorted(fields) if f"`{renamed.get(name, name)}`" not in text]
