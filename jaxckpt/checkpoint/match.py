"""Match the leaves of ``like`` with those of a checkpoint: strictly, and with a report of everything that differs."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from jaxckpt.core.errors import InvalidArgumentError, MismatchError
from jaxckpt.core.text import counted, nearest
from jaxckpt.core.tree import NamedLeaf, Node, Path, path_name, walk

SHOWN = 10
Only = str | Sequence[str] | Callable[[str], bool] | None


@dataclass(slots=True)
class Differences:
    """What differs between a checkpoint and ``like``; empty when they agree."""

    missing: list[str] = field(default_factory=list)  # in like, not in the checkpoint
    unexpected: list[str] = field(default_factory=list)  # in the checkpoint, not in like
    wrong: list[str] = field(default_factory=list)  # whole lines: shape, dtype or kind

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong)


class Places:
    """The leaves of a checkpoint by path: exactly, or by the text of their keys (Orbax keeps only text)."""

    def __init__(self, structure: Node, only: Only = None) -> None:
        chosen = selector(only)
        self.leaves: dict[Path, int] = {}
        for path, node in walk(structure):
            if node.kind == "leaf" and chosen(path_name(path)):
                self.leaves[path] = node.leaf
        self._texts: dict[tuple[str, ...], Path] = {}
        ambiguous = set()
        for path in self.leaves:
            text = _text(path)
            if text in self._texts:
                ambiguous.add(text)
            self._texts[text] = path
        for text in ambiguous:
            del self._texts[text]

    def find(self, path: Path) -> Path | None:
        """The checkpoint's path for a path of ``like``."""
        return path if path in self.leaves else self._texts.get(_text(path))


def selector(only: Only) -> Callable[[str], bool]:
    """A test of leaf names. A string is a name, a subtree or a glob: ``params``, ``params.*.kernel``."""
    if only is None:
        return lambda name: True
    if callable(only):
        return only
    patterns = [only] if isinstance(only, str) else list(only)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise InvalidArgumentError(f"only is {only!r}; it is a name, a glob, several of them, or a function of a name.")
    return lambda name: any(
        name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern) for pattern in patterns
    )


def prune(structure: Node, keep: Callable[[int, Path], bool], path: Path = ()) -> Node | None:
    """The structure of the chosen leaves alone: containers that hold none of them are dropped.

    A container whose leaves are all chosen stays as it is, with each None and empty container in it.
    """
    leaves = [keep(node.leaf, at) for at, node in walk(structure, path) if node.kind == "leaf"]
    if not any(leaves):
        return None
    if all(leaves):
        return structure
    kept = []
    for key, child in zip(structure.keys, structure.children, strict=True):
        found = prune(child, keep, (*path, key))
        if found is not None:
            kept.append((key, found))
    if not kept:
        return None
    keys, children = zip(*kept, strict=True)
    whole = len(keys) == len(structure.keys)
    # A list, tuple or namedtuple with holes keeps its indices and names as a dict.
    kind = structure.kind if whole or structure.kind == "dict" else "dict"
    return Node(kind=kind, type=structure.type if whole else "", keys=keys, children=children)


def raise_on(differences: Differences, url: str, places: Places, wanted: Sequence[NamedLeaf]) -> None:
    """Raise a MismatchError that tells every difference and what to do."""
    if not differences:
        return
    lines = [f"The checkpoint at {url} and `like` disagree:"]
    names = [path_name(path) for path in places.leaves]
    for one, other, found, others in (
        ("`like`", "the checkpoint", differences.missing, differences.unexpected or names),
        ("the checkpoint", "`like`", differences.unexpected, differences.missing),
    ):
        if found:
            title = counted(len(found), f"leaf of {one} is not in {other}", f"leaves of {one} are not in {other}")
            lines += [f"  {title}:", *(f"    {line}" for line in _grouped(found, others))]
    if differences.wrong:
        lines.append(f"  {counted(len(differences.wrong), 'leaf differs', 'leaves differ')} in shape, dtype or kind:")
        lines += [f"    {line}" for line in differences.wrong[:SHOWN]]
        if len(differences.wrong) > SHOWN:
            lines.append(f"    ... and {len(differences.wrong) - SHOWN} more")
    lines += _counts(places.leaves, [leaf.path for leaf in wanted])
    lines.append(
        "Nothing was restored. Build `like` as the checkpoint has it (jaxckpt inspect shows its leaves), or say what "
        "you accept: partial=True keeps the values of `like` where they differ and ignores what `like` has not, "
        "cast=True converts dtypes, pad=True cuts or zero-fills shapes, only=... restores chosen leaves."
    )
    raise MismatchError("\n".join(lines))


def _grouped(names: list[str], others: Iterable[str]) -> list[str]:
    """Ten lines at most: whole subtrees as one line, single leaves with the nearest name on the other side."""
    others = list(others)
    lines = []
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name), []).append(name)
    if len(names) <= SHOWN:
        groups = {name: [name] for name in names}
    for group, members in groups.items():
        if len(members) > 1:
            lines.append(f'{len(members)} leaves under "{group}", as "{members[0]}"')
            continue
        near = nearest(members[0], others)
        lines.append(f'"{members[0]}"' + (f' (the other side has "{near}")' if near else ""))
    return lines[:SHOWN] + ([f"... and {counted(len(lines) - SHOWN, 'more group')}"] if len(lines) > SHOWN else [])


def _group(name: str) -> str:
    """The subtree to report a leaf under: up to and including its first number, else its first key but one."""
    keys = name.split(".")
    for i, key in enumerate(keys[:-1]):
        if key.isdigit():
            return ".".join(keys[: i + 1])
    return ".".join(keys[:-1][:2]) or name


def _counts(saved: Mapping[Path, int], wanted: Sequence[Path]) -> list[str]:
    """Where the two sides have different numbers of numbered parts (12 layers, 16 layers), say so."""
    ours, theirs = _numbered(saved), _numbered(wanted)
    unequal = [prefix for prefix in sorted(set(ours) & set(theirs)) if ours[prefix] != theirs[prefix]]
    return [
        f'  Under "{prefix}" the checkpoint has {counted(ours[prefix], "numbered part")}, `like` has {theirs[prefix]}.'
        for prefix in unequal[:3]
    ]


def _numbered(paths: Iterable[Path]) -> dict[str, int]:
    parts: dict[str, set[Hashable]] = {}
    for path in paths:
        for i, key in enumerate(path):
            text = str(key)
            stem, digits = text.rstrip("0123456789"), text[len(text.rstrip("0123456789")) :]
            if digits:
                parts.setdefault(path_name((*path[:i], stem) if stem else path[:i]), set()).add(text)
    return Counter({prefix: len(found) for prefix, found in parts.items()})


def _text(path: Path) -> tuple[str, ...]:
    return tuple(str(key) for key in path)


def describe_entry(entry: Any) -> str:
    """An entry in a message: ``(4, 8) float32``."""
    if entry.kind == "prng_key":
        return f"a PRNG key array {entry.shape[:-1]} of {entry.prng_impl}"
    if entry.stored and entry.kind != "bytes":
        return f"{entry.shape} {entry.dtype}"
    return f"a Python {entry.kind}"
