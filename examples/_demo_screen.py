"""What the demo prints: rich where it is installed, the same words without colours where it is not."""

from __future__ import annotations

import re

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:
    Console = None

_console = Console(highlight=False, soft_wrap=True) if Console else None


def say(text: str = "") -> None:
    """A line; ``[bold]...[/]`` and the like are styles."""
    if _console:
        _console.print(text)
    else:
        print(re.sub(r"\[/?[a-z ]*\]", "", text), flush=True)


def title(text: str) -> None:
    say(f"\n[bold cyan]{text}[/]")


def verbatim(text: str, *, max_lines: int = 14) -> None:
    """Another program's output, indented, never taken for styles."""
    lines = text.rstrip().splitlines()
    for line in lines[:max_lines]:
        if _console:
            _console.print(f"    {line}", markup=False, style="dim")
        else:
            print(f"    {line}")
    if len(lines) > max_lines:
        say(f"    [dim]... {len(lines) - max_lines} more lines[/]")


def loss_line(step: int, loss: float, *, note: str = "") -> None:
    """A step with its loss as a bar, so that a person sees it fall."""
    say(f"  step {step:3d}  loss {loss:.4f}  [green]{'█' * round(loss * 8)}[/] {note}")


def table(heading: str, columns: list[str], rows: list[list[str]]) -> None:
    """First column to the left, the rest to the right."""
    if _console:
        drawn = Table(title=heading, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            drawn.add_column(column, justify="right" if i else "left")
        for row in rows:
            drawn.add_row(*row)
        _console.print(drawn, soft_wrap=False)
        return
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    print(heading)
    for row in [columns, ["-" * width for width in widths], *rows]:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *padded[1:]]))
