"""Words of messages that depend on a number, and names that are nearly right."""

import difflib
from collections.abc import Iterable

_MANY = 20_000  # names among which the nearest is not searched: comparing takes time


def counted(n: int, one: str, many: str = "") -> str:
    """A number and its noun, with the verb if there is one.

    Example:
        >>> counted(1, "file"), counted(2, "file"), counted(1, "leaf differs", "leaves differ")
        ('1 file', '2 files', '1 leaf differs')
    """
    return f"{n} {one if n == 1 else many or one + 's'}"


def nearest(name: str, others: Iterable[str], cutoff: float = 0.75) -> str | None:
    """The name among others that is most like this one; None where none is like it, or there are too many.

    Example:
        >>> nearest("kernle", ["kernel", "bias"]), nearest("kernel", ["bias"])
        ('kernel', None)
    """
    names = list(others)
    found = difflib.get_close_matches(name, names, n=1, cutoff=cutoff) if len(names) <= _MANY else []
    return found[0] if found else None
