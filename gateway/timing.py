"""A schedule in JSON: what makes one, what shows it.

Pure. The keys leave the process: they are for ever.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, TypedDict

import msgspec

from gateway.fields import Field, body_schema, parse_time, read, text, texts, time_in_utc, whole
from gateway.snapshot import API, Time, rfc3339
from gateway.submission import FIELDS as RUN_FIELDS
from gateway.submission import MAX_METADATA, MAX_TAG, MAX_TAGS, Catalogue, Submission
from taskkit.errors import InvalidArguments
from taskkit.timetable import CATCH_UPS, MAX_CRON, MAX_EVERY, MAX_ZONE, OVERLAPS, TimingError, checked
from taskkit.wire.messages import ScheduleDefinition, ScheduleState

_NAME: Final = r"^[A-Za-z0-9_.:@/-]{1,200}$"

#: Bytes of metadata left to what each run is told of its schedule.
_OWN_METADATA: Final = 1024


def _one_of(values: tuple[str, ...]) -> Field:
    schema = {"type": "string", "enum": list(values)}
    return Field(lambda value: value in values, f"must be {', '.join(values)}", schema)


#: What a run is submitted with.
_OF_RUNS: Final = ("task", "args", "kwargs", "pool", "priority", "timeout", "max_attempts", "metadata")

#: Everything that a schedule may be made of; anything else is refused by name.
FIELDS: Final[Mapping[str, Field]] = {
    **{name: RUN_FIELDS[name] for name in _OF_RUNS},
    # Each run has one tag more, which finds the runs of its schedule.
    "tags": texts(MAX_TAGS - 1, MAX_TAG).about("What lists of its runs can be narrowed by."),
    "name": Field(
        lambda value: isinstance(value, str) and re.fullmatch(_NAME, value) is not None,
        "must be text of 1 to 200 letters, digits or _ . : @ / -",
        {"type": "string", "pattern": _NAME},
        "Unique; left out, it follows from the rest, so that the same schedule made twice is one.",
    ),
    "cron": text(1, MAX_CRON).about(
        "Five fields: minute hour day-of-month month day-of-week, as Debian's cron reads them."
    ),
    "every": whole(1, MAX_EVERY).about("Seconds from one run to the next, instead of `cron`."),
    "at": time_in_utc().about("The moment of its only run, instead of `cron`."),
    "tz": text(1, MAX_ZONE).about(
        "Time zone of `cron`, such as Europe/Berlin; by default the project's TIME_ZONE."
    ),
    "overlap": _one_of(OVERLAPS).about(
        "While an earlier run has not ended, the next one is left out, waits, or not."
    ),
    "catchup": _one_of(CATCH_UPS).about("What is made up for of what was due while no tree was there."),
    "enabled": Field(
        lambda value: isinstance(value, bool),
        "must be true or false",
        {"type": "boolean"},
        "Whether it is kept.",
    ),
}


def schedule_schema() -> dict[str, Any]:
    """Return the JSON Schema of what makes a schedule."""
    timings = [{"required": [name]} for name in ("cron", "every", "at")]
    return body_schema(FIELDS, ["task"]) | {"anyOf": timings}


def parse_schedule(
    body: Mapping[str, Any], check_run: Callable[[dict[str, Any]], Submission], catalogue: Catalogue
) -> tuple[ScheduleDefinition, bool]:
    """Return the schedule that `body` asks for, and whether it is to be enabled.

    Args:
      check_run: returns the submission in what of the body each run is submitted with.

    Raises:
      UnknownTask, Forbidden: as `check_run` does.
      InvalidArguments: everything else that is wrong, all at once, by field.
    """
    errors: dict[str, str] = {}
    values = read(body, FIELDS, errors)
    errors |= _timing_errors({name: value for name, value in values.items() if name not in errors})
    if "metadata" in values and len(msgspec.json.encode(values["metadata"])) > MAX_METADATA - _OWN_METADATA:
        errors["metadata"] = f"has more than {MAX_METADATA - _OWN_METADATA} bytes of JSON"
    submitted = {name: body[name] for name in (*_OF_RUNS, "tags") if body.get(name) is not None}
    try:
        submission = check_run(submitted)
    except InvalidArguments as error:
        if not _is_model(body, catalogue):
            raise InvalidArguments("the schedule is invalid", errors=error.errors | errors) from None
    if _is_model(body, catalogue):
        errors["task"] = "is a model: schedule a function that makes a row and submits it"
    if errors:
        raise InvalidArguments("the schedule is invalid", errors=errors)
    options = ("pool", "priority", "timeout", "max_attempts", "metadata", "tags")
    definition = ScheduleDefinition(
        task=submission.task.name,
        name=values.get("name", ""),
        cron=values.get("cron"),
        every=values.get("every"),
        at=parse_time(values["at"]) if "at" in values else None,
        tz=values.get("tz"),
        overlap=values.get("overlap", "skip"),
        catchup=values.get("catchup", "latest"),
        args=values.get("args", []),
        kwargs=values.get("kwargs", {}),
        options={name: values[name] for name in options if name in values},
    )
    return definition, values.get("enabled", True)


def _is_model(body: Mapping[str, Any], catalogue: Catalogue) -> bool:
    """Whether the task, which is known to be there and within reach, is a model."""
    return catalogue.find(body["task"]).kind == "model" if isinstance(body.get("task"), str) else False


def _timing_errors(values: Mapping[str, Any]) -> dict[str, str]:
    try:
        checked(
            cron=values.get("cron"),
            every=values.get("every"),
            at=parse_time(values["at"]) if "at" in values else None,
            tz=values.get("tz"),
            zone="UTC",  # the courier knows the project's
            anchor=time.time(),
        )
    except TimingError as error:
        return error.errors
    return {}


class ScheduleUrls(TypedDict):
    """Where a schedule can be found, as paths; its runs as well."""

    self: str
    enable: str
    disable: str
    runs: str


class Schedule(TypedDict):
    """A schedule; `origin` is "code" or "api", `error` says why it is not kept just now."""

    id: str
    name: str
    task: str
    cron: str | None
    every: int | None
    at: Time | None
    tz: str | None
    overlap: str
    catchup: str
    args: list[Any]
    kwargs: dict[str, Any]
    pool: str | None
    priority: int | None
    timeout: float | None
    max_attempts: int | None
    metadata: dict[str, Any]
    tags: list[str]
    enabled: bool
    origin: str
    next_at: Time | None
    last_at: Time | None
    created_at: Time | None
    error: str | None
    urls: ScheduleUrls


class SchedulePage(TypedDict):
    """A page of schedules, by name; `next` is the cursor of the page that follows.

    It may have fewer than were asked for: those that the token does not reach are left out.
    """

    schedules: list[Schedule]
    next: str | None


def show_schedule(state: ScheduleState) -> Schedule:
    """Return what the API shows of a schedule."""
    it, path = state.definition, f"{API}/schedules/{state.id}"
    return {
        "id": state.id,
        "name": it.name,
        "task": it.task,
        "cron": it.cron,
        "every": None if it.every is None else int(it.every),
        "at": rfc3339(it.at),
        "tz": it.tz if it.cron is not None else None,
        "overlap": it.overlap,
        "catchup": it.catchup,
        "args": it.args,
        "kwargs": it.kwargs,
        "pool": it.options.get("pool"),
        "priority": it.options.get("priority"),
        "timeout": it.options.get("timeout"),
        "max_attempts": it.options.get("max_attempts"),
        "metadata": it.options.get("metadata", {}),
        "tags": it.options.get("tags", []),
        "enabled": state.enabled,
        "origin": state.origin,
        "next_at": rfc3339(state.next_slot),
        "last_at": rfc3339(state.last_slot),
        "created_at": rfc3339(state.created_at),
        "error": state.error or None,
        "urls": {
            "self": path,
            "enable": f"{path}/enable",
            "disable": f"{path}/disable",
            "runs": f"{API}/runs?tag=schedule:{state.id}",
        },
    }
