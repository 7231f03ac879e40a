"""Turns kept measurements into the README's table, its picture.

python -m tests.bench.report FILE        prints the table, writes the picture beside the README's others
"""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.bench.queues import OURS

#: Pixels of the picture: its width, those of the names, of the longest bar, the height of a bar's line.
WIDTH, NAMES, BAR, LINE = 860, 200, 480, 20

_STYLE: Final = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 13px } .unit { fill: #59636e }
.theirs { fill: #b6bdc6 } .ours { fill: #0a7d5a }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .unit { fill: #9aa4af } .theirs { fill: #4b535d } .ours { fill: #2fbf8f }
}
"""


def table(record: Mapping[str, Any]) -> str:
    """Return every figure that has a goal as lines of a Markdown table, with its median and its spread."""
    lines = ["| measured | median (min … max) | goal | |", "|---|---|---|---|"]
    for measured in record["benchmarks"].values():
        for one in measured["figures"]:
            for goal in one["goals"]:
                share = re.match(r"p(\d+)", goal["goal"])
                at = one.get(f"p{share[1]}", one["p50"]) if share else one["p50"]
                shown = f"p{share[1]} " if share and share[1] != "50" else ""
                spread = f"{number(one['min'])} … {number(one['max'])}"
                said = goal["goal"].removeprefix("p50 ")
                reached = "reached" if goal["reached"] else f"**missed by {goal['miss']:.0%}**"
                lines.append(
                    f"| {one['name']} | {shown}{number(at)} {one['unit']} ({spread}) | {said} | {reached} |"
                )
    return "\n".join(lines)


def machine(record: Mapping[str, Any]) -> str:
    """Return the machine's description in one line."""
    return ", ".join(f"{key} {value}" for key, value in record["machine"].items())


def number(value: float) -> str:
    """Return a number with three figures, more only before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def panels(record: Mapping[str, Any]) -> Iterator[tuple[str, str, list[tuple[str, float]]]]:
    """Yield (title, unit, [(contestant, median)]) of each measure that ours has with others in the same run."""
    for measured in record["benchmarks"].values():
        groups: dict[str, list[tuple[str, float]]] = {}
        units: dict[str, str] = {}
        for one in measured["figures"]:
            measure, _, who = one["name"].rpartition(", ")
            if measure and one["unit"] != "x":
                groups.setdefault(measure, []).append((who, one["p50"]))
                units[measure] = one["unit"]
        for measure, bars in groups.items():
            if len(bars) > 1 and any(who == OURS for who, _ in bars):
                yield measure, units[measure], bars


def picture(record: Mapping[str, Any]) -> str:
    """Return the panels as an SVG: a bar each, ours in colour, from zero."""
    parts: list[str] = []
    y = 10
    for title, unit, bars in panels(record):
        y += 22
        parts.append(
            f'<text class="title" x="10" y="{y}">{html.escape(title)}'
            f'<tspan class="unit"> ({html.escape(unit)}, median)</tspan></text>'
        )
        longest = max(value for _, value in bars) or 1.0
        for who, value in bars:
            y += LINE
            kind = "ours" if who == OURS else "theirs"
            length = max(1.0, BAR * value / longest)
            parts += [
                f'<text x="{NAMES - 8}" y="{y}" text-anchor="end">{html.escape(who)}</text>',
                f'<rect class="{kind}" x="{NAMES}" y="{y - 11}" width="{length:.1f}" height="14" rx="2"/>',
                f'<text x="{NAMES + length + 6:.1f}" y="{y}">{number(value)}</text>',
            ]
        y += 14
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 10}" role="img" '
        f'aria-label="Bulkhead beside its peers, medians of one run"><style>{_STYLE}</style>\n{body}\n</svg>\n'
    )


def main(arguments: Sequence[str]) -> int:
    """Print the table, write the picture if a place for it is given."""
    if len(arguments) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    record = json.loads(Path(arguments[0]).read_text())
    print(f"{table(record)}\n\nMachine: {machine(record)}.")
    if len(arguments) == 2:
        Path(arguments[1]).write_text(picture(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
