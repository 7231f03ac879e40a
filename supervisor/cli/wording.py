"""Events as people read them: a line for each, a failure with its traceback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from supervisor.cli.output import clean, compact, seconds
from taskkit.following import StreamEvent

#: Most characters of a result that a terminal shows: some ten lines. `--json` shows all of it.
SUMMARY_LIMIT: Final = 800

#: What a result lists under this name is shown as a table below it.
_TABLE: Final = "worst"


def own_data(data: Any) -> Any:
    """Return what the task itself sent: without the fields that the gateway adds, which begin with `_`."""
    if not isinstance(data, dict):
        return data
    return {key: value for key, value in data.items() if not key.startswith("_")}


def exception_line(error: Mapping[str, Any]) -> str:
    """Return type and message of a failure as one clean line, as Python ends a traceback with them."""
    kind = str(error.get("exception") or "").removeprefix("builtins.")
    message = str(error.get("message") or error.get("detail") or "")
    if message in (kind, str(error.get("exception"))):  # the gateway puts the type where there is no message
        message = ""
    return clean(": ".join(filter(None, (kind, message)))) or compact(dict(error))


def traceback_lines(error: Mapping[str, Any]) -> list[str]:
    """Return the lines of a failure's traceback: Python's, or what faulthandler wrote at a fatal signal."""
    cause = error.get("cause")
    text = error.get("traceback") or (cause.get("traceback") if isinstance(cause, dict) else None)
    return [clean(line.expandtabs()) for line in text.splitlines()] if isinstance(text, str) else []


def error_of(end: StreamEvent) -> dict[str, Any]:
    """Return the error that `stream.end` tells; empty without one."""
    error = end.data.get("error") if isinstance(end.data, dict) else None
    return error if isinstance(error, dict) else {}


def summary(end: StreamEvent) -> str:
    """Return the outcome that `stream.end` tells, as one clean line; what `table_of` shows is left out."""
    data = end.data if isinstance(end.data, dict) else {}
    status = clean(str(data.get("status", "ended")))
    if error := error_of(end):
        return f"{status}: {exception_line(error)}"
    result = data.get("result")
    if isinstance(result, dict) and table_of(end):
        result = {key: value for key, value in result.items() if key != _TABLE}
    return f"{status}: {compact(result)}" if result is not None else status


def table_of(end: StreamEvent) -> list[dict[str, Any]]:
    """Return the rows that a result has under `worst`, all with the same keys; empty when there are none."""
    result = end.data.get("result") if isinstance(end.data, dict) else None
    rows = result.get(_TABLE) if isinstance(result, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row for row in rows):
        return []
    return rows if all(row.keys() == rows[0].keys() for row in rows) else []


def shortened(text: str) -> str:
    """Return `text` in at most SUMMARY_LIMIT characters, cut between words where there are any."""
    if len(text) <= SUMMARY_LIMIT:
        return text
    head, _, _ = text[:SUMMARY_LIMIT].rpartition(" ")
    return (head or text[:SUMMARY_LIMIT]) + " …"


def describe(event: StreamEvent) -> str:
    """Return what an event says, as one clean line: known ones in words, all others as JSON."""
    if event.type == "stream.end":
        return summary(event)
    data = own_data(event.data)
    if isinstance(data, dict):
        if event.type == "run.retrying":
            return _retrying(data)
        if event.type == "finding" and data.keys() >= {"complexity", "file", "line", "name"}:
            return clean(f"complexity {data['complexity']:<4} {data['file']}:{data['line']} {data['name']}")
    return compact(data)


def _retrying(data: Mapping[str, Any]) -> str:
    attempt, ending = data.get("attempt", "?"), str(data.get("ending", "ended"))
    error, delay = data.get("error"), data.get("delay")
    again = f"again in {_delay(delay)}" if isinstance(delay, int | float) and delay > 0 else "it runs again"
    cause = error.get("cause") if isinstance(error, dict) else None
    if ending == "lost" and (cause or {}).get("kind", "lost") in ("lost", "stopped"):
        return f"attempt {attempt} lost (the tree was stopped or died); {again}"
    reason = f" {exception_line(error)}" if isinstance(error, dict) else ""
    separator = "" if ending == "raised" or not reason else ":"
    return clean(f"attempt {attempt} {ending.replace('_', ' ')}{separator}{reason}; {again}")


def _delay(value: float) -> str:
    return f"{value:.0f} s" if value < 10 and value == int(value) else seconds(value)
