"""What requests about runs can ask for: parameters of the query, headers."""

from __future__ import annotations

from typing import Any, Final

from gateway import sse
from gateway.describing import Header, Query, choice, moment, number, wait, word
from gateway.reading import MAX_WAIT, Parameters, parse_page_cursor
from gateway.selection import MAX_TYPES, split_types
from taskkit.lifecycle import RunStatus


def _page_cursor(query: Parameters) -> int | None:
    text = query.text("cursor")
    number = None if text is None else parse_page_cursor(text)
    if text is not None and number is None:
        raise query.refusal("cursor", "must be the `next` of the page before")
    return number


def _types(query: Parameters) -> frozenset[str] | None:
    try:
        return split_types(query.texts("types"))
    except ValueError as error:
        raise query.refusal("types", str(error)) from error


def _several(most: int) -> dict[str, Any]:
    """Return the schema of a parameter that may be repeated."""
    return {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": most}


STATUS: Final = choice("status", [status.value for status in RunStatus], "Only runs in this state.")
TASK: Final = word("task", "Only runs of this task, by its name or dotted path.")
TAG: Final = word("tag", "Only runs with this tag.")
PARENT: Final = word("parent", "Only children of this run.")
SINCE: Final = moment("since", "Only runs submitted at this moment or later.")
UNTIL: Final = moment("until", "Only runs submitted before this moment.")
CURSOR: Final = Query(
    "cursor", "The `next` of the page before.", {"type": "string", "minLength": 1}, _page_cursor
)
LIMIT: Final = number("limit", 1, 200, 50, "Most runs on a page.")

#: What a list of runs takes.
LIST: Final[tuple[Query[Any], ...]] = (STATUS, TASK, TAG, PARENT, SINCE, UNTIL, CURSOR, LIMIT)

INCLUDE: Final = choice("include", ["log"], "`log` adds what the run printed; needs the action `logs`.")
EVENTS: Final = number("limit", 1, 1000, 100, "Most events on a page; JSON only.")
WAIT: Final = wait("wait", "Seconds to wait for the first event; JSON only.")

#: Where a stream begins. Read by gateway.sse, as the header stands over the parameters, and they over one another.
BEGIN: Final[tuple[Query[Any], ...]] = tuple(
    word(name, "Where to begin: an id, `latest` or `now`.", f"^(latest|now|{sse.ID_PATTERN})$")
    for name in sse.CURSOR_PARAMETERS
)

TYPES: Final = Query(
    "types",
    "Only events of these types, repeated or with commas; `stream.*` always.",
    _several(MAX_TYPES),
    _types,
)

#: What a stream takes.
STREAM: Final[tuple[Query[Any], ...]] = (*BEGIN, INCLUDE, TYPES)

#: What a page of a stream takes.
PAGE: Final[tuple[Query[Any], ...]] = (*STREAM, EVENTS, WAIT)

RUNS: Final = Query(
    "run", "Id of a run; repeated for several.", _several(1_000), lambda query: query.texts("run")
)
TAGS: Final = Query(
    "tag",
    "Every run with this tag, now or later; repeated for several.",
    _several(1_000),
    lambda query: query.texts("tag"),
)
DONE: Final = choice("until", ["done"], "`done` ends the stream when all runs in `run` have ended.")

#: Where a stream of many runs begins; see BEGIN.
BEGIN_AT_POSITION: Final[tuple[Query[Any], ...]] = tuple(
    word(name, "Where to begin: an id of this stream, `latest` or `now`.", "^(latest|now|[0-9]{1,18})$")
    for name in sse.CURSOR_PARAMETERS
)

#: What a stream of many runs takes.
MANY: Final[tuple[Query[Any], ...]] = (RUNS, TAGS, TYPES, *BEGIN_AT_POSITION, DONE)

LAST_EVENT_ID: Final = Header(
    "Last-Event-ID", "The id of the newest event that was seen.", {"type": "string"}
)
PREFER: Final = Header(
    "Prefer", f"`wait=N` waits up to N seconds, at most {MAX_WAIT:g} (RFC 7240).", {"type": "string"}
)
