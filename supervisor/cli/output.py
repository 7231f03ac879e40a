"""Text for terminals, for pipes, for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any


def print_json(document: Any) -> None:
    """Print one JSON document on one line, at once: what `--json` promises."""
    print(json.dumps(document, ensure_ascii=False, separators=(",", ":")), flush=True)


def print_error(text: str) -> None:
    """Print a message to standard error."""
    print(f"bulkhead: {text}", file=sys.stderr, flush=True)


def clean(text: str) -> str:
    """Return `text` with control characters spelled out.

    Tasks write what they like; an escape sequence in it must not reprogram the terminal of whoever looks on.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def compact(value: Any) -> str:
    """Return a value as one clean line: text as it is, anything else as JSON."""
    return clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def seconds(value: float) -> str:
    """Return a duration for people: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min, 4 d 3 h."""
    if value < 10:
        return f"{value:.1f} s"
    whole = int(value)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    return f"{whole} s"


def between(start: str | None, end: str | None) -> str:
    """Return the duration between two RFC 3339 times, or "" when one is missing."""
    if not start or not end:
        return ""
    return seconds((datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds())


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under headings: a rich table on a terminal, aligned text that awk can read elsewhere."""
    cells = [["" if cell is None else clean(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(columns, cells)
        return
    widths = [max(len(row[i]) for row in (columns, *cells)) for i in range(len(columns))]
    for row in (columns, *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_rich(columns: Sequence[str], cells: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):  # the first column names the thing: people copy it, so it is never cut
        table.add_column(
            name, no_wrap=i == 0, min_width=max(len(row[0]) for row in (columns, *cells)) if i == 0 else 0
        )
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
