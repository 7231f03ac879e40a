"""Options that several commands share, the parsing of what people type into them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
SettingsModule = Annotated[
    str | None,
    typer.Option(
        "--settings",
        metavar="MODULE",
        help="Django settings; default: DJANGO_SETTINGS_MODULE, else the demo.",
    ),
]
StateDir = Annotated[
    Path | None,
    typer.Option("--state-dir", metavar="DIR", help="Where the tree keeps its state; default: by settings."),
]
Pairs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Arguments; a value is JSON if it parses, else text."),
]

_PAIR = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d)?")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def parse_value(text: str) -> Any:
    """Return `text` as JSON if it is some, else as it is. NaN and Infinity are text: RFC 8259 has none."""
    try:
        return json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return text


def parse_pairs(pairs: list[str] | None) -> dict[str, Any]:
    """Return the arguments in `KEY=VALUE` words.

    Raises:
      typer.BadParameter: a word has another form, or a key comes twice.
    """
    found: dict[str, Any] = {}
    for word in pairs or ():
        match = _PAIR.fullmatch(word)
        if match is None:
            raise typer.BadParameter(f"{word!r}: write arguments as KEY=VALUE, for example n=10")
        if match[1] in found:
            raise typer.BadParameter(f"{match[1]!r} is given twice")
        found[match[1]] = parse_value(match[2])
    return found


def parse_duration(text: str) -> float:
    """Return the seconds in `90`, `90s`, `15m`, `12h`, `7d`.

    Raises:
      typer.BadParameter: it has another form, or is zero.
    """
    match = _DURATION.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise typer.BadParameter(f"{text!r}: write a duration as 90s, 15m, 12h or 7d")
    return float(match[1]) * _UNITS[match[2] or "s"]


def split_words(text: str) -> list[str]:
    """Return the words of a comma-separated list."""
    return [word for part in text.split(",") if (word := part.strip())]
