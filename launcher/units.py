"""The only place where bytes become GiB, and seconds become words."""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def format_bytes(num_bytes: int) -> str:
    """Formats a byte count in binary units with four significant digits, e.g. ``24.85 GiB``."""
    sign, size = ("-" if num_bytes < 0 else ""), abs(num_bytes)
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= scale:
            value = size / scale
            digits = 2 if value < 100 else 1
            return f"{sign}{value:.{digits}f} {unit}"
    return f"{sign}{size} B"


def format_change(num_bytes: int) -> str:
    """Formats a difference in bytes with its sign, e.g. ``+24.85 GiB``; nothing is ``0 B``."""
    return f"{'+' if num_bytes > 0 else ''}{format_bytes(num_bytes)}"


def format_gib(num_bytes: int) -> str:
    """Formats a byte count in GiB with three decimals, without the unit: for aligned table columns."""
    return f"{num_bytes / GIB:.3f}"


def format_seconds(seconds: float) -> str:
    """Formats a duration as ``42.3 s`` or ``3 min 05 s``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def format_step(seconds: float) -> str:
    """Formats the time of an optimizer step with three significant digits, e.g. ``0.0421 s``."""
    return f"{seconds:.3g} s" if seconds < 100 else format_seconds(seconds)


def signed_percent(predicted: float, measured: float) -> float:
    """Signed error of a prediction in percent of the measurement; negative means under-predicted."""
    return 100.0 * (predicted - measured) / measured
