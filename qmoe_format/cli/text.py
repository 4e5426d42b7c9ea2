"""Plain text for people: tables with aligned columns, sizes and times with units."""

from __future__ import annotations

from collections.abc import Sequence


def size(nbytes: float) -> str:
    """A number of bytes with three digits and a decimal unit: 1234567 is ``1.23 MB``."""
    units = iter(("kB", "MB", "GB", "TB"))
    unit = "B"
    while nbytes >= 999.5 and (larger := next(units, None)):
        nbytes, unit = nbytes / 1000, larger
    digits = 0 if unit == "B" or nbytes >= 99.95 else 1 if nbytes >= 9.995 else 2
    return f"{nbytes:.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """A time with two digits and the unit that suits it: 5400 is ``1.5 hours``."""
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * length:
            number = seconds / length
            return f"{number:.0f} {unit}" if number >= 9.95 else f"{number:.1f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 9.95 else f"{seconds:.1f} seconds"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, the first to the left, the others to the right; a line under the header."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    texts = [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in pairs)
        for pairs in (enumerate(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join([texts[0].rstrip(), "─" * len(texts[0]), *(text.rstrip() for text in texts[1:])])
