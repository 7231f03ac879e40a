"""A request to run a task, checked against the catalogue.

Pure. Whatever passes here can be packed, sent and bound in a runner; what does not pass is named by its
field.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from gateway.arguments import MAX_ERRORS, Validator, argument_errors, compile_schema, unfit
from gateway.fields import (
    Field,
    array,
    listed,
    mapping,
    parse_time,
    read,
    some_seconds,
    text,
    texts,
    time_in_utc,
    uuid7,
    whole,
)
from gateway.flows import MOST_AFTER
from gateway.store.rows import RunRow
from gateway.throttle import Limit
from taskkit.errors import InvalidArguments, UnknownTask
from taskkit.identifiers import new_run_id, parse_run_id
from taskkit.rates import parse_rate
from taskkit.settings import LimitSettings, PoolSettings
from taskkit.wire.messages import LIMITS, MAX_CONCURRENCY_KEY, Row, Taken, TaskInfo

MAX_TAGS: Final = 20
MAX_TAG: Final = 100  # characters
MAX_METADATA: Final = 16 * 1024  # bytes of JSON; it travels with the run to every process that shows it
MAX_ATTEMPTS: Final = 100

#: Bytes of a submission that are checked on the spot. The schema's validator takes about 9 microseconds an item
#: (measured), so 1 KiB of `[1,1,1 …` holds the streams up for 5 ms; 1 MiB would for seconds. A larger body is
#: checked in a thread, which costs 0.1 ms and gives the loop its turn every 5 ms (sys.getswitchinterval).
ON_THE_SPOT: Final = 1024

_ID: Final = uuid7().about(
    "The `run` of a 503 answer: the same submission again.",
    "must be a UUIDv7, as a 503 answer gives it; leave it out for a new run",
)

#: Everything a submission may contain; anything else is refused by name.
FIELDS: Final[Mapping[str, Field]] = {
    "task": text().about("Name or dotted path of the task.", "must be the name of a task"),
    "args": array().about("Arguments of a function, by position."),
    "kwargs": mapping().about("Arguments of a function, by name."),
    "fields": mapping().about("Fields of a new row of a model task."),
    "pool": text().about("Pool of runners; default: the task's own.", "must be the name of a pool"),
    "priority": whole(-100, 100).about("The larger is performed first."),
    "run_after": time_in_utc().about("Not before this moment."),
    "timeout": some_seconds().about("Seconds per attempt; then it is ended."),
    "soft_timeout": some_seconds().about("Seconds per attempt; then it is asked to stop."),
    "cpu_timeout": some_seconds().about("Seconds of CPU per attempt."),
    "stall_timeout": some_seconds().about("Seconds without an event, at most."),
    "schedule_timeout": some_seconds().about("Seconds that the run may wait to be started."),
    "max_attempts": whole(1, MAX_ATTEMPTS).about("Attempts until the run has failed."),
    "metadata": mapping().about(f"Travels with the run; at most {MAX_METADATA} bytes of JSON."),
    "tags": texts(MAX_TAGS, MAX_TAG).about("What lists of runs can be narrowed by."),
    "concurrency_key": text(1, MAX_CONCURRENCY_KEY).about(
        "Who shares the `concurrency` and the `rate_limit` of the task: each key has them to itself."
    ),
    "parent": uuid7().about("Id of the run whose child it is."),
    "after": listed(uuid7(), MOST_AFTER).about(
        "Ids of runs: it waits until all of them have succeeded, and ends unstarted when one has not.",
        f"must be a list of at most {MOST_AFTER} ids of runs",
    ),
    "id": _ID,
}

#: What a replay may say.
REPLAY_FIELDS: Final[Mapping[str, Field]] = {"id": _ID}


@dataclass(slots=True, kw_only=True)
class Submission:
    """What becomes a run.

    Attributes:
      args, kwargs, metadata: JSON.
      row: the task row of a model task; None until it is created.
      run_after: Unix seconds.
      timeout, soft_timeout, cpu_timeout, stall_timeout, schedule_timeout: seconds; None: no limit.
      subject: who submits, the `sub` of a token.
      origin: "http" or "outbox".
      using: alias of the Django database that the run is projected to.
      key: the idempotency key; digest: of the body that came with it.
      replay_of: id of the ended run whose arguments it has.
      concurrency_key: who shares the limits of the task with it; "" with all that have none.
      parent, after: ids of the run whose child it is, and of those that it comes after.
      relatives: of these, the runs that have ended, by id; whoever submits looks them up.
      fence: of the node's claim, if Django knows of one; taken: what Django knows of it from another node.
    """

    id: str
    task: TaskInfo
    args: bytes
    kwargs: bytes
    row: Row | None
    pool: str
    priority: int
    run_after: float | None
    timeout: float | None
    max_attempts: int
    metadata: bytes
    tags: tuple[str, ...]
    subject: str
    origin: str
    using: str = "default"
    key: str | None = None
    digest: bytes = b""
    replay_of: str | None = None
    soft_timeout: float | None = None
    cpu_timeout: float | None = None
    stall_timeout: float | None = None
    schedule_timeout: float | None = None
    concurrency_key: str = ""
    parent: str | None = None
    after: tuple[str, ...] = ()
    relatives: Mapping[str, RunRow] = field(default_factory=dict)
    fence: str = ""
    taken: Taken | None = None


class Catalogue:
    """The tasks of the project, by name and by dotted path."""

    def __init__(self, tasks: Iterable[TaskInfo]) -> None:
        self._tasks = sorted(tasks, key=lambda task: task.name)
        self._found = {task.path: task for task in self._tasks} | {task.name: task for task in self._tasks}
        self._validators: dict[str, Validator] = {}

    def find(self, name: str) -> TaskInfo:
        """Return the task of that name or dotted path.

        Raises:
          UnknownTask: there is none; the caller's fault.
        """
        try:
            return self._found[name]
        except KeyError:
            # No guess at what was meant: it could name a task that the token does not reach.
            raise UnknownTask(f"there is no task {name[:200]!r}; GET /api/v1/tasks lists them") from None

    def all(self) -> list[TaskInfo]:
        """Return every task, by name."""
        return list(self._tasks)

    def limits(self) -> dict[str, Limit]:
        """Return the limits of the tasks that have any, by name."""
        return {
            task.name: Limit(
                task.concurrency, None if task.rate_limit is None else parse_rate(task.rate_limit)
            )
            for task in self._tasks
            if is_throttled(task)
        }

    def validator(self, task: TaskInfo) -> Validator:
        """Return the compiled schema of the task's parameters, compiled at its first use."""
        found = self._validators.get(task.name)
        if found is None:
            found = compile_schema(task.parameters)
            self._validators[task.name] = found
        return found


def is_throttled(task: TaskInfo) -> bool:
    """Whether a task has limits that a key can share."""
    return task.concurrency is not None or task.rate_limit is not None


def body_digest(body: Mapping[str, Any]) -> bytes:
    """Return the digest that tells whether two bodies ask for the same; neither key order nor `id` count."""
    asked = {key: value for key, value in body.items() if key != "id"}
    return hashlib.sha256(msgspec.json.encode(asked, order="sorted")).digest()


def parse_submission(
    body: Mapping[str, Any],
    catalogue: Catalogue,
    limits: LimitSettings,
    *,
    subject: str,
    pools: Mapping[str, PoolSettings],
    origin: str = "http",
) -> Submission:
    """Return the submission that `body`, plain data from JSON, asks for.

    `row` is None. From "http", the fields of a model task are checked, and the caller creates the row; from
    "outbox" the row exists, and the caller sets it.

    Raises:
      UnknownTask: no such task.
      InvalidArguments: everything else that is wrong, all at once, by field; arguments by parameter name.
    """
    name = body.get("task")
    if not isinstance(name, str):
        raise InvalidArguments("the submission names no task", errors={"task": "must be the name of a task"})
    task = catalogue.find(name)
    errors = _unknown(body)
    read = _Reader(body, errors, row_exists=origin == "outbox")
    submission = Submission(
        id=read.id(),
        task=task,
        args=b"[]",
        kwargs=b"{}",
        row=None,
        pool=read.pool(task, pools),
        priority=read.priority(task),
        run_after=read.run_after(),
        timeout=None,
        max_attempts=read.max_attempts(task),
        metadata=read.metadata(task),
        tags=read.tags(),
        subject=subject,
        origin=origin,
        concurrency_key=read.concurrency_key(task),
        parent=read.parent(),
        after=read.after(),
    )
    read.limits(submission, task, pools.get(submission.pool))
    submission.args, submission.kwargs = read.arguments(task, catalogue, limits)
    if errors:
        shown = "; ".join(f"{field}: {text}" for field, text in itertools.islice(errors.items(), 5))
        raise InvalidArguments(f"{task.name}: {shown}", errors=errors)
    return submission


def row_submission(
    task: TaskInfo, row: Row, *, subject: str, pools: Mapping[str, PoolSettings], origin: str = "http"
) -> Submission:
    """Return a submission of an existing task row with the task's own options."""
    pool = pools.get(task.pool)
    return Submission(
        id=new_run_id(),
        task=task,
        args=b"[]",
        kwargs=b"{}",
        row=row,
        pool=task.pool,
        priority=task.priority,
        run_after=None,
        timeout=task.timeout if task.timeout is not None or pool is None else pool.timeout,
        max_attempts=task.max_attempts,
        metadata=msgspec.json.encode(task.metadata),
        tags=(),
        subject=subject,
        origin=origin,
        using=row.using,
        **_limits(task),
    )


def _limits(given: TaskInfo | RunRow) -> dict[str, Any]:
    return {name: getattr(given, name) for name in LIMITS}


def replay_of(
    run: RunRow,
    body: Mapping[str, Any],
    task: TaskInfo,
    *,
    subject: str,
    pools: Mapping[str, PoolSettings],
) -> Submission:
    """Return the submission that has an ended run performed again: same arguments, options, row.

    Only its time to wait for has passed; and when its pool is gone, it goes where the task belongs now. `body` may
    have an `id`, that of a 503 answer.

    Raises:
      InvalidArguments: the body has something else.
    """
    errors: dict[str, str] = {}
    read(body, REPLAY_FIELDS, errors)
    id = _Reader(body, errors, row_exists=True).id()
    if errors:
        raise InvalidArguments("the replay is invalid", errors=errors)
    return Submission(
        id=id,
        task=task,
        args=run.args,
        kwargs=run.kwargs,
        row=None if run.row is None else msgspec.json.decode(run.row, type=Row),
        pool=run.pool if run.pool in pools else task.pool,
        priority=run.priority,
        run_after=None,
        timeout=run.timeout,
        max_attempts=run.max_attempts,
        metadata=run.metadata,
        tags=run.tags,
        subject=subject,
        origin=run.origin,
        using=run.using,
        replay_of=run.id,
        concurrency_key=run.concurrency_key,
        **_limits(run),
    )


def _unknown(body: Mapping[str, Any]) -> dict[str, str]:
    unknown = itertools.islice((key for key in body if key not in FIELDS), MAX_ERRORS)
    return {key[:100]: f"is no field of a submission; there are {', '.join(FIELDS)}" for key in unknown}


class _Reader:
    """Reads the fields of one body one by one and notes what is wrong; null is as good as absent."""

    def __init__(self, body: Mapping[str, Any], errors: dict[str, str], *, row_exists: bool) -> None:
        self._body = body
        self._errors = errors
        self._row_exists = row_exists

    def _get(self, key: str) -> Any:
        value = self._body.get(key)
        if value is None or FIELDS[key].check(value):
            return value
        self._errors[key] = FIELDS[key].complaint
        return None

    def id(self) -> str:
        text = self._get("id")
        return new_run_id() if text is None else parse_run_id(text) or ""

    def pool(self, task: TaskInfo, pools: Mapping[str, PoolSettings]) -> str:
        name = self._get("pool") or task.pool
        if name not in pools:
            self._errors["pool"] = f"there is no pool {name[:100]!r}; there are {', '.join(sorted(pools))}"
        return str(name)

    def priority(self, task: TaskInfo) -> int:
        value = self._get("priority")
        return task.priority if value is None else int(value)

    def concurrency_key(self, task: TaskInfo) -> str:
        key = self._get("concurrency_key") or ""
        if key and not is_throttled(task):
            self._errors["concurrency_key"] = (
                f"{task.name} has neither `concurrency` nor `rate_limit`, which the key could share"
            )
        return str(key)

    def parent(self) -> str | None:
        text = self._get("parent")
        return None if text is None else parse_run_id(text)

    def after(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(parse_run_id(text) or "" for text in self._get("after") or ()))

    def run_after(self) -> float | None:
        text = self._get("run_after")
        return None if text is None else parse_time(text)

    def limits(self, submission: Submission, task: TaskInfo, pool: PoolSettings | None) -> None:
        """Set the submission's limits of time: its own, else the task's, else the pool's."""
        for name in ("timeout", *LIMITS):
            value = self._get(name)
            setattr(submission, name, getattr(task, name) if value is None else float(value))
        if submission.timeout is None and pool is not None:
            submission.timeout = pool.timeout
        soft, hard = submission.soft_timeout, submission.timeout
        if soft is not None and hard is not None and soft >= hard:
            self._errors["soft_timeout"] = f"must be shorter than the timeout, {hard:g} s"
        if submission.cpu_timeout is not None and pool is not None and pool.concurrency > 1:
            self._errors["cpu_timeout"] = (
                f"the pool {submission.pool!r} performs several runs in one process, whose CPU time is not known by run"
            )

    def max_attempts(self, task: TaskInfo) -> int:
        value = self._get("max_attempts")
        return task.max_attempts if value is None else int(value)

    def metadata(self, task: TaskInfo) -> bytes:
        value = self._get("metadata") or {}
        packed = msgspec.json.encode(value)
        if len(packed) > MAX_METADATA:
            self._errors["metadata"] = f"has {len(packed)} bytes of JSON; {MAX_METADATA} are allowed"
        elif (complaint := unfit(value)) is not None:
            self._errors["metadata"] = complaint
        return msgspec.json.encode({**task.metadata, **value})

    def tags(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._get("tags") or ()))

    def arguments(self, task: TaskInfo, catalogue: Catalogue, limits: LimitSettings) -> tuple[bytes, bytes]:
        """Return args and kwargs as JSON; for a model task both are empty and `fields` is checked instead."""
        if task.kind == "model" and self._row_exists:
            return b"[]", b"{}"
        named = self._model_fields() if task.kind == "model" else self._function_arguments(task)
        if named is None:
            return b"[]", b"{}"
        where = "fields" if task.kind == "model" else "kwargs"
        if len(msgspec.json.encode(named)) > limits.body_bytes:
            self._errors[where] = f"LIMITS.body_bytes allows {limits.body_bytes} bytes of JSON"
        elif (complaint := unfit(named)) is not None:
            self._errors[where] = complaint
        else:
            self._errors.update(argument_errors(catalogue.validator(task), named))
        if task.kind == "model":
            return b"[]", b"{}"
        return (
            msgspec.json.encode(self._body.get("args") or []),
            msgspec.json.encode(self._body.get("kwargs") or {}),
        )

    def _model_fields(self) -> dict[str, Any] | None:
        for key in ("args", "kwargs"):
            if self._body.get(key):
                self._errors[key] = "this task is a model: give `fields`"
        fields = self._get("fields")
        return None if "fields" in self._errors else fields or {}

    def _function_arguments(self, task: TaskInfo) -> dict[str, Any] | None:
        if self._body.get("fields") is not None:
            self._errors["fields"] = "this task is a function: give `kwargs` or `args`"
        args = self._get("args") or []
        kwargs = self._get("kwargs") or {}
        if "args" in self._errors or "kwargs" in self._errors:
            return None
        named = dict(zip(task.positional, args, strict=False))
        rest = args[len(task.positional) :]
        if rest and (name := _rest_name(task)) is not None:
            named[name] = rest
        elif rest:
            self._errors["args"] = f"at most {len(task.positional)} by position, {len(args)} were given"
            return None
        for name in sorted(named.keys() & kwargs.keys()):
            self._errors[name] = "is given twice: in `args` and in `kwargs`"
        return {**named, **kwargs}


def _rest_name(task: TaskInfo) -> str | None:
    """Return the parameter that takes further arguments by position, as `*rest` does in Python.

    Its schema is that of a list which cannot be given by position and is empty by default.
    """
    properties = task.parameters.get("properties", {})
    lists = [
        name
        for name, schema in properties.items()
        if name not in task.positional and schema.get("type") == "array" and schema.get("default") == []
    ]
    return lists[0] if len(lists) == 1 else None
