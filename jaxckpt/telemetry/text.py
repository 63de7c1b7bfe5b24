"""Bytes, times and rates as people read them."""


def size(n: float) -> str:
    """Bytes in binary units.

    Example:
        >>> size(1536), size(12)
        ('1.5 KiB', '12 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.4g} TiB"


def seconds(time_s: float) -> str:
    """A time, with three digits.

    Example:
        >>> seconds(0.0123), seconds(2.0), seconds(90.0)
        ('12.3 ms', '2 s', '90 s')
    """
    return f"{time_s:.3g} s" if time_s >= 1 else f"{1e3 * time_s:.3g} ms"


def rate(n: float, time_s: float) -> str:
    """Bytes per second.

    Example:
        >>> rate(1 << 30, 0.5)
        '2 GiB/s'
    """
    return f"{size(n / time_s)}/s" if time_s > 0 else "at once"
