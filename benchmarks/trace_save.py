"""How much code runs: functions entered in one save of three leaves, and the time of the import.

python benchmarks/trace_save.py [--quick]
"""

# ruff: noqa: TC003 - scripts are read from the top: one block of imports
from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from statistics import median
from types import CodeType, FrameType
from typing import Any

from _common import Report, Row, Table, finish, parser, scratch, seconds

IMPORTS = {
    "jaxckpt": "import jaxckpt",
    "Orbax v0 and v1": "import orbax.checkpoint",
}
TRACED = {"jaxckpt": "jaxckpt", "Orbax v0 (StandardCheckpointer)": "orbax/checkpoint", "Orbax v1": "orbax/checkpoint"}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--child", nargs=2, metavar=("CONTENDER", "PATH"), help=argparse.SUPPRESS)
    options.add_argument("--names", action="store_true", help="list our functions that a save enters")
    args = options.parse_args()
    if args.child:
        print(json.dumps(traced_save(args.child[0], Path(args.child[1]))))
        return
    report = Report("Code that runs")
    with scratch(args.root) as folder:
        counted = {name: _json([__file__, "--child", name, str(folder / str(i))]) for i, name in enumerate(TRACED)}
    report.add(
        Table(
            title="One save of three leaves (a sharded and a replicated array, a number)",
            columns=("", "files", "functions", "lines"),
            rows=[
                (name, str(len({f["file"] for f in found})), str(len(found)), f"{sum(f['lines'] for f in found):,}")
                for name, found in counted.items()
            ],
            note="Functions of the library entered in the first save of a process, in any thread, until committed; "
            "those inside others count with them. Lines without docstrings, comments and blank ones.",
        )
    )
    if args.names:
        print("\n".join(f"{f['file']}: {f['name']} ({f['lines']})" for f in counted["jaxckpt"]), end="\n\n")
    ours = len(counted["jaxckpt"])
    report.judge(
        Row(
            number=10,
            what="functions entered in one save of three leaves",
            measured=str(ours),
            must="<= 100",
            ok=ours <= 100,
        )
    )
    imports(report, rounds=args.rounds or (1 if args.tiny else 3 if args.quick else 7))
    finish(report, args)


def imports(report: Report, *, rounds: int) -> None:
    taken: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for turn in range(-1, rounds):  # the first round writes and caches what Python compiles
        for name, statement in IMPORTS.items():
            code = f"import jax, time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
            found = _json(["-c", code])
            if turn >= 0:
                taken[name].append(found)
    report.add(
        Table(
            title="Import, beyond `import jax`",
            columns=("", "s, median (range)"),
            rows=[(name, seconds(times)) for name, times in taken.items()],
            note=f"{rounds} fresh processes each.",
        )
    )
    ours = median(taken["jaxckpt"])
    report.judge(
        Row(
            number=11,
            what="import jaxckpt beyond import jax",
            measured=f"{ours:.2f} s",
            must="<= 0.3 s",
            ok=ours <= 0.3,
        )
    )


def _json(arguments: list[str]) -> Any:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    found = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=env)
    if found.returncode:
        raise RuntimeError(found.stderr)
    return json.loads(found.stdout.splitlines()[-1])


def traced_save(name: str, path: Path) -> list[dict[str, Any]]:
    """File, name and lines of every function of the library that a save enters."""
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import jaxckpt as jc

    mesh = jax.make_mesh((4, 2), ("d", "m"))
    tree = {
        "w": jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, P("d", "m"))),
        "b": jax.device_put(jnp.ones((64,)), NamedSharding(mesh, P())),
        "step": 7,
    }
    seen: set[CodeType] = set()

    def enter(frame: FrameType, event: str, arg: object) -> None:
        if event == "call":
            seen.add(frame.f_code)

    def save() -> None:
        if name == "jaxckpt":
            jc.save(path, tree)
        elif name == "Orbax v1":
            ocp.v1.save(path, tree)
        else:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, tree)
                checkpointer.wait_until_finished()

    threading.setprofile(enter)
    sys.setprofile(enter)
    try:
        save()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert any(path.rglob("commit_success.txt")), "the save did not commit"
    return described(seen, TRACED[name])


def described(seen: set[CodeType], package: str) -> list[dict[str, Any]]:
    roots = {Path(entry, package).resolve() for entry in [*sys.path, Path(__file__).parents[1]]}
    root = next(root for root in roots if (root / "__init__.py").exists())
    found: dict[tuple[str, str], int] = {}
    lines: dict[str, dict[str, int]] = {}
    for code in seen:
        # Modules and class bodies run when they are imported, not when something is saved.
        if not code.co_flags & inspect.CO_OPTIMIZED or not Path(code.co_filename).is_relative_to(root):
            continue
        sizes = lines.setdefault(code.co_filename, function_lines(Path(code.co_filename)))
        outermost = code.co_qualname.partition(".<locals>")[0]
        found[str(Path(code.co_filename).relative_to(root)), outermost] = sizes.get(outermost, 1)
    return [{"file": file, "name": name, "lines": size} for (file, name), size in sorted(found.items())]


def function_lines(path: Path) -> dict[str, int]:
    """Lines of code of every function of a file."""
    text = path.read_text()
    source = text.splitlines()
    sizes: dict[str, int] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                skipped: set[int] = set()
                for inner in ast.walk(child):
                    if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(
                        inner
                    ):
                        skipped |= set(range(inner.body[0].lineno, (inner.body[0].end_lineno or 0) + 1))
                span = range(child.lineno, (child.end_lineno or child.lineno) + 1)
                code = [source[k - 1].strip() for k in span if k not in skipped]
                sizes[prefix + child.name] = sum(bool(line) and not line.startswith("#") for line in code)
            elif isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")
            else:
                visit(child, prefix)

    visit(ast.parse(text), "")
    return sizes


if __name__ == "__main__":
    main()
