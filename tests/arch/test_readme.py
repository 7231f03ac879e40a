"""The README's table of settings against the code."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest

from taskkit.settings import (
    AsyncRequestSettings,
    BreakerSettings,
    LimitSettings,
    PoolSettings,
    RetentionSettings,
    Settings,
)
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()


def expected() -> dict[str, Any]:
    """Return every setting with its default as plain data: KEY, POOLS.<name>.key, LIMITS.key."""
    found: dict[str, Any] = {}
    nested = (
        ("", Settings),
        ("POOLS.<name>.", PoolSettings),
        ("LIMITS.", LimitSettings),
        ("RETENTION.", RetentionSettings),
        ("BREAKER.", BreakerSettings),
        ("ASYNC_REQUEST.", AsyncRequestSettings),
    )
    for prefix, struct in nested:
        defaults = msgspec.to_builtins(struct())
        for field in msgspec.structs.fields(struct):
            found[prefix + field.encode_name] = defaults[field.encode_name]
    del found["LIMITS"]  # its own rows say it
    del found["RETENTION"]
    del found["BREAKER"]
    del found["ASYNC_REQUEST"]
    return found


def rows() -> dict[str, str]:
    """Return second by first cell of all table rows whose first cell is a setting in backticks."""
    found: dict[str, str] = {}
    for line in README.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        match = re.fullmatch(
            r"`([A-Z][A-Z_]+|(?:POOLS\.<name>|LIMITS|RETENTION|BREAKER|ASYNC_REQUEST)\.[a-z_]+)`", cells[0]
        )
        if match and len(cells) >= 2:
            assert match[1] not in found, f"{match[1]} has two rows"
            found[match[1]] = cells[1].strip("`")
    return found


def plain(cell: str) -> Any:
    """Return a cell as data: JSON as it is written, text without quotes, a dash for nothing."""
    if cell in ("", "-", "–", "—", "none", "None"):  # noqa: RUF001 - people write any of these dashes
        return None
    try:
        return json.loads(cell.replace("_", "").replace("True", "true").replace("False", "false"))
    except ValueError:
        return cell


def test_the_table_has_exactly_the_settings() -> None:
    names = set(rows()) - {"LIMITS"}
    assert names == set(expected())


@pytest.mark.parametrize("name", expected())
def test_the_table_tells_the_default(name: str) -> None:
    default = expected()[name]
    cell = rows()[name]
    if default is None:
        return  # a sentence says what happens then
    assert plain(cell) == default, f"{name}: README {cell!r}, code {default!r}"
