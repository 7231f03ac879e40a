"""Turns kept measurements into the README's table, its picture, a record of all of them.

python -m tests.bench.report FILE... [--picture SVG] [--keep JSON]

prints the table of what FILEs have, which `python -m tests.bench --out` wrote.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.bench.queues import OURS

#: In the name of a contestant that did not come to an end; its figure is how long was waited.
NEVER: Final = "never within"

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


def joined(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one record of several, by the same machine; of a benchmark that several have, the last counts."""
    found: dict[str, Any] = {"machine": dict(records[0]["machine"]), "benchmarks": {}, "failed": {}}
    for record in records:
        found["benchmarks"] |= record["benchmarks"]
        found["failed"] |= record.get("failed", {})
    return found


def panels(record: Mapping[str, Any]) -> Iterator[tuple[str, str, list[tuple[str, float]]]]:
    """Yield (title, unit, [(contestant, median)]) of each measure that ours has with others in the same run.

    A figure's name is `measure, contestant`, or `contestant: measure`.
    """
    for name, measured in record["benchmarks"].items():
        groups: dict[str, list[tuple[str, float]]] = {}
        units: dict[str, str] = {}
        begins = any(one["name"].startswith(f"{OURS.lower()}: ") for one in measured["figures"])
        for one in measured["figures"]:
            if begins:
                who, colon, measure = one["name"].partition(": ")
                measure = f"{name}: {measure}" if colon else ""
            else:
                measure, _, who = one["name"].rpartition(", ")
            if measure and one["unit"] != "x":
                who = OURS if who == OURS.lower() else who
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
        # What has not come within the longest wait has a whole line, and does not make the others' invisible.
        longest = max((value for who, value in bars if NEVER not in who), default=0.0) or 1.0
        for who, value in bars:
            y += LINE
            kind = "ours" if who == OURS else "theirs"
            length = min(float(BAR), max(1.0, BAR * value / longest))
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


def shortened(value: Any) -> Any:
    """Return data with numbers of five figures: a record is kept for people, and the machine is noisier than that."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    return [shortened(item) for item in value] if isinstance(value, list) else value


def main(arguments: Sequence[str]) -> int:
    """Print the table; write picture and record if a place for them is given."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.report", description="Show what was measured."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what --out of a benchmark wrote")
    parser.add_argument("--picture", type=Path, metavar="SVG", help="draw ours beside the others there")
    parser.add_argument("--keep", type=Path, metavar="JSON", help="keep all of it there")
    options = parser.parse_args(arguments)
    record = joined([json.loads(file.read_text()) for file in options.files])
    print(f"{table(record)}\n\nMachine: {machine(record)}.")
    if options.picture is not None:
        options.picture.write_text(picture(record))
    if options.keep is not None:
        options.keep.write_text(json.dumps(shortened(record), separators=(",", ":")) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
