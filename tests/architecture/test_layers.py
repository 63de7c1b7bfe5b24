"""The architecture as a test: imports go downward only, private names stay in one place, the public face is pinned."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "jaxckpt"

# From the top downward; packages in one row are siblings and do not import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("lcsc", "integrations"),
    ("averaging", "recovery", "lifecycle", "interop", "telemetry"),
    ("manager",),
    ("checkpoint", "snapshot"),
    ("transfer",),
    ("plan",),
    ("format", "storage", "coordination"),
    ("core",),
)
LEVEL = {package: len(LAYERS) - row for row, packages in enumerate(LAYERS) for package in packages}
OUTSIDE_LAYERS = {"testing"}  # may import anything, is imported by none
EXTRAS = ("flax", "optax", "orbax", "evosax", "grain", "rich")
PRIVATE_JAX = PACKAGE / "coordination" / "jax_client.py"
MAX_LINES = 400

PUBLIC_NAMES = [
    "AlreadyExistsError",
    "CheckpointError",
    "CheckpointManager",
    "CoordinationError",
    "CorruptionError",
    "Lineage",
    "MismatchError",
    "NotCommittedError",
    "NotFoundError",
    "PendingSave",
    "StorageOptions",
    "at",
    "best",
    "diff",
    "every",
    "inspect",
    "latest",
    "newer_than",
    "on_host",
    "on_preemption",
    "on_signal",
    "optimal",
    "restore",
    "save",
    "save_async",
    "verify",
    "with_capture",
]


class Import(NamedTuple):
    """One import of a module of ours, wherever in the file it stands."""

    source: Path
    line: int
    target: str  # "jaxckpt.core.box"

    def __str__(self) -> str:
        return f"{self.source.relative_to(ROOT)}:{self.line} imports {self.target}"


MODULES = sorted(PACKAGE.rglob("*.py"))
INNER = [path for path in MODULES if path.parent != PACKAGE]  # what stands in jaxckpt/ itself is the facade


def test_every_package_has_a_layer() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert packages <= LEVEL.keys() | OUTSIDE_LAYERS


def test_imports_go_downward_only() -> None:
    wrong = [
        found
        for found in _imports()
        if _package(found.source) in LEVEL
        and _target_package(found) in LEVEL
        and _package(found.source) != _target_package(found)
        and LEVEL[_package(found.source)] <= LEVEL[_target_package(found)]
    ]
    assert not wrong, _lines(wrong)


def test_testing_is_imported_by_no_layer() -> None:
    wrong = [
        found
        for found in _imports()
        if _target_package(found) in OUTSIDE_LAYERS and _package(found.source) not in OUTSIDE_LAYERS
    ]
    assert not wrong, _lines(wrong)


def test_facades_are_not_imported_from_inside() -> None:
    """Neither ``jaxckpt`` nor a package's ``__init__``: that is what ties modules into cycles."""
    wrong = [found for found in _imports() if not _is_module(found.target)]
    assert not wrong, _lines(wrong)


def test_no_import_cycles() -> None:
    graph = {_name(path): {found.target for found in _imports() if found.source == path} for path in INNER}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_private_jax_names_live_in_one_file() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} uses {name}"
        for path in MODULES
        if path != PRIVATE_JAX
        for node, name in _private_names(_tree(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_pickle() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in MODULES
        for line, module in _imported_modules(_tree(path))
        if module.partition(".")[0] in ("pickle", "cloudpickle", "dill", "shelve", "marshal")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_is_too_long() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert not {name: lines for name, lines in long.items() if lines > MAX_LINES}


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT)) for path in INNER if path.stat().st_size and not ast.get_docstring(_tree(path))
    ]
    assert not silent


def test_models_know_nothing_of_the_library() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / "models").rglob("*.py"))
        for line, module in _imported_modules(_tree(path))
        if module.partition(".")[0] == "jaxckpt"
    ]
    assert not wrong


def test_import_loads_no_extra() -> None:
    code = f"import sys, jaxckpt; print([name for name in {EXTRAS!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_public_names_are_pinned() -> None:
    """A new name at the top is a decision: write it here, in the docs and in the changelog."""
    import jaxckpt

    assert sorted(jaxckpt.__all__) == PUBLIC_NAMES
    assert [name for name in PUBLIC_NAMES if not hasattr(jaxckpt, name)] == []


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def _imports() -> tuple[Import, ...]:
    """All runtime imports of ours by inner modules, those inside functions too."""
    return tuple(
        Import(path, line, target)
        for path in INNER
        for line, target in _imported_modules(_tree(path))
        if target.partition(".")[0] == "jaxckpt"
    )


def _imported_modules(tree: ast.Module) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write the full path"
            # `from jaxckpt.core import box` imports the module jaxckpt.core.box.
            modules = {
                full if _is_module(full := f"{node.module}.{alias.name}") else str(node.module) for alias in node.names
            }
            found.extend((node.lineno, module) for module in sorted(modules))
        waiting.extend(ast.iter_child_nodes(node))
    return found


def _private_names(tree: ast.Module) -> list[tuple[ast.AST, str]]:
    found: list[tuple[ast.AST, str]] = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        found.extend(
            (node, name)
            for name in names
            if name.partition(".")[0] in ("jax", "jaxlib")
            and (
                any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
                or name.startswith("jax.interpreters")
            )
        )
    return found


def _is_module(name: str) -> bool:
    return (ROOT / Path(*name.split("."))).with_suffix(".py").is_file()


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _package(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def _target_package(found: Import) -> str:
    return (found.target.split(".") + [""])[1]


def _lines(found: list[Import]) -> str:
    return "\n" + "\n".join(map(str, found))
