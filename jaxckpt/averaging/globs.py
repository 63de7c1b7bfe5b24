"""Names of leaves by glob, as in weights and policies; a glob that matches none is a mistake."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from jaxckpt.core.errors import InvalidArgumentError
from jaxckpt.core.text import nearest

SHOWN = 5


def matches(name: str, glob: str) -> bool:
    """Whether this is the name, a subtree that has it, or a glob of it.

    Example:
        >>> matches("a.b.w", "a.b.w"), matches("a.b.w", "a"), matches("a.b.w", "*.w"), matches("ab.w", "a")
        (True, True, True, False)
    """
    return name == glob or name.startswith(glob + ".") or fnmatchcase(name, glob)


def check_globs(globs: Iterable[str], names: Iterable[str], argument: str) -> None:
    """Raise where one of the globs of an argument matches no leaf; tells the nearest name.

    Example:
        >>> check_globs(["encoder", "*.w"], ["encoder.w", "head.w"], "weights")  # all is well
    """
    names = list(dict.fromkeys(names))
    for glob in globs:
        if any(matches(name, glob) for name in names):
            continue
        parts = dict.fromkeys(".".join(keys[:n]) for keys in (name.split(".") for name in names) for n in range(1, 9))
        near = nearest(glob.replace("*", ""), [*names, *parts], cutoff=0.5)
        some = ", ".join(f'"{name}"' for name in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        told = f'the nearest name is "{near}"' if near else f"the leaves are {some or 'none'}"
        raise InvalidArgumentError(
            f'{argument}: "{glob}" matches no leaf; {told}. Correct it, or leave it out (jaxckpt inspect shows all '
            "leaves)."
        )
