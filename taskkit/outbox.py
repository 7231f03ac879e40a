"""Submitting from Django: a row in the caller's own transaction, a poke when it commits.

A submission exists exactly if the caller's transaction commits. Whether Bulkhead is up does not matter: the
row waits until a courier finds it.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
from django.db import DEFAULT_DB_ALIAS, IntegrityError, router, transaction
from django.db.models.functions import Now
from django.utils import timezone
from django.utils.functional import Promise

from taskkit import conf, linux
from taskkit.conf import get_settings, key_file
from taskkit.errors import InvalidArguments, LocalWireError
from taskkit.identifiers import child_run_id, is_task_name, new_run_id, parse_run_id
from taskkit.models import OPEN, ROW_KEY_LENGTH, Node, Outbox, Run, StreamTask
from taskkit.rows import row_address, task_name
from taskkit.threads import in_thread
from taskkit.times import moment, unix_time
from taskkit.wire import codec
from taskkit.wire.messages import LIMITS, MAX_CONCURRENCY_KEY, Row, Submit

if TYPE_CHECKING:
    from taskkit.registry import TaskDefinition

#: Seconds after which a node that was not seen is no longer poked; the courier renews its row every 30, or sooner.
NODE_FRESH: Final = 90.0

#: Seconds for which a process keeps the addresses it pokes, so that a burst of submissions asks the database
#: once.
_ADDRESSES_FRESH: Final = 5.0

#: How often a start that lost the race for a row looks again. Each round needs a whole run to begin and end
#: between two statements; one is already rare.
_START_TRIES: Final = 5

#: What a submission says that has a column of its own in `Run`; the rest is in its `options`.
_COLUMNS: Final = frozenset({"task", "args", "kwargs", "metadata", "tags"})

PRIORITIES: Final = range(-100, 101)

_addresses: dict[str, tuple[float, list[str]]] = {}


@dataclass(frozen=True, slots=True)
class RunHandle:
    """A submission that was made.

    Attributes:
      id: of the run. With an uncommitted transaction around it, the run comes into being at its commit.
      using: alias of the database that has its outbox entry and its projection.
      new: False when the row was running already, and this is its run.
      parent: id of the run whose child it is, or "".
      pool: that performs it.
    """

    id: str
    using: str = DEFAULT_DB_ALIAS
    new: bool = True
    parent: str = ""
    pool: str = ""

    def __str__(self) -> str:
        return self.id

    def run(self) -> Run:
        """Return the run as Django knows it now.

        Raises:
          Run.DoesNotExist: the submission was rolled back, or the row turned out to be running as another
          run.
        """
        return Run.objects.using(self.using).get(id=self.id)

    @property
    def stream_url(self) -> str:
        """Absolute URL of the run's events: see `taskkit.models.Run.stream_url`."""
        return conf.stream_url(self.id)

    def token(self, *, actions: Iterable[str] = ("read",), ttl: float = 3600.0, subject: str = "") -> str:
        """Return a token for this run alone, which a page can follow it with.

        It is signed here, with the key of the tree that the settings name; the gateway is not asked.

        Args:
          actions: what it allows, of `taskkit.tokens.ACTIONS`.
          ttl: seconds from now; a stream ends with its token.
          subject: on whose behalf; shown in the gateway's log.

        Raises:
          SettingsError: there is no key yet, or this process may not read it; the message has the remedy.
          ValueError: an action does not exist, or `ttl` is not positive.
        """
        from taskkit import tokens  # PyJWT takes 40 ms, which a process that only submits need not spend

        key = tokens.load_key(key_file())
        return tokens.issue(key, actions=actions, runs=(self.id,), ttl=ttl, subject=subject)

    def ticket(
        self, *, actions: Iterable[str] = ("read",), session: float = 3600.0, subject: str = ""
    ) -> str:
        """Return a ticket for this run alone: `EventSource(url + "?ticket=" + ticket)` follows it.

        It is good for one request within a minute, which opens a session of `session` seconds; see
        `taskkit.tokens.issue_ticket`.

        Raises:
          SettingsError, ValueError: as `token`.
        """
        from taskkit import tokens

        key = tokens.load_key(key_file())
        return tokens.issue_ticket(key, actions=actions, runs=(self.id,), session=session, subject=subject)


def submit(
    task: str | Callable[..., Any] | type[StreamTask] | StreamTask,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    row: StreamTask | None = None,
    using: str | None = None,
    pool: str | None = None,
    priority: int | None = None,
    run_after: datetime | timedelta | None = None,
    timeout: float | timedelta | None = None,
    soft_timeout: float | timedelta | None = None,
    cpu_timeout: float | timedelta | None = None,
    stall_timeout: float | timedelta | None = None,
    schedule_timeout: float | timedelta | None = None,
    max_attempts: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
    concurrency_key: str = "",
    parent: Any = None,
    key: str = "",
    after: Iterable[Any] = (),
    subject: str = "",
    backend: str = "",
    queue: str = "",
) -> RunHandle:
    """Ask for a run of `task`, in the transaction that is open on `using`, or in one of its own.

    `task` is a registered function, its name or dotted path, or a saved row of a task model (`row` is the
    longer way to say that). A row that has an open run gets no second one: the handle is that run's.
    Arguments become JSON here, so later changes to them have no effect. The runs of one `concurrency_key` share the
    `concurrency` and the `rate_limit` of their task, which each key has to itself. `subject` is on whose behalf: a user
    who has a token of this `sub` that reaches his own runs sees it (`taskkit.views`). `backend` and `queue` are what
    Django's own Tasks interface calls the way it came; they are kept with the run.

    `parent` is the run whose child this one is, `after` are runs that it waits for: a handle, a `Run`, or an id each.
    The parent's stream tells of the child, and when the parent is cancelled, so is the child. A run begins when all
    have succeeded that it comes after, whose results it finds in `current_run().after`; if one does not, it ends with
    the code `dependency_failed`. A child with a `key` is submitted once: another attempt of the parent that submits the
    same key again gets the run that there is.

    Name and arguments are checked here, by the tasks that this process knows; its first submission imports
    every app's `tasks` module. What only the gateway can know (its pools, its queue) it says in `RunHandle.run`.

    Raises:
      UnknownTask: no installed app has this task; the message has the nearest name.
      InvalidArguments: the arguments do not fit the task's signature; `errors` has a message per parameter.
      TypeError: an argument cannot be expressed in JSON, `task` is no task, or is a model without its row.
      ValueError: an option is out of range, or the row is not saved.
      DatabaseError: the database does not take it. In every case nothing was submitted.
    """
    if isinstance(task, StreamTask):
        row = task
    definition = _find(name_of(task, row), row)
    name = definition.info.name
    alias = using or alias_of(row)
    address = None if row is None else _address_of(row, name, alias)
    plain_args = as_json(list(args), f"args of {name}")
    plain_kwargs = as_json(dict(kwargs or {}), f"kwargs of {name}")
    _check_arguments(definition, plain_args, plain_kwargs)
    submission = Submit(
        id=_child_id(parent, key) if key else new_run_id(),
        task=name,
        args=plain_args,
        kwargs=plain_kwargs,
        row=address,
        pool=pool,
        priority=priority,
        run_after=None if run_after is None else unix_time(run_after, "run_after"),
        timeout=_seconds(timeout),
        soft_timeout=_seconds(soft_timeout),
        cpu_timeout=_seconds(cpu_timeout),
        stall_timeout=_seconds(stall_timeout),
        schedule_timeout=_seconds(schedule_timeout),
        max_attempts=max_attempts,
        metadata=as_json(dict(metadata or {}), "metadata"),
        tags=list(tags),
        concurrency_key=concurrency_key,
        parent=None if parent is None else _id_of(parent),
        after=[_id_of(one) for one in after],
        subject=subject,
        using=alias,
    )
    check(submission)
    if concurrency_key and definition.info.concurrency is None and definition.info.rate_limit is None:
        raise ValueError(
            f"concurrency_key = {concurrency_key!r}: {name} has neither `concurrency` nor `rate_limit`, which it could "
            "share"
        )
    insert = _insert_once if key else _insert
    handle = insert(submission, priority=definition.info.priority, backend=backend, queue=queue)
    parent_id = submission.parent or "" if handle.id == submission.id else ""
    return replace(handle, pool=pool or definition.info.pool, parent=parent_id)


def _child_id(parent: Any, key: str) -> str:
    if parent is None:
        raise ValueError(f"key = {key!r}: it tells the children of one parent apart, and there is no parent")
    return child_run_id(_id_of(parent), key)


def _id_of(run: Any) -> str:
    """Return the id of a run by its handle, its row, its result in Django's interface, or itself."""
    id = parse_run_id(str(getattr(run, "id", run)))
    if id is None:
        raise ValueError(f"{run!r} is no run: give its handle or its id")
    return id


def _seconds(given: float | timedelta | None) -> float | None:
    return given.total_seconds() if isinstance(given, timedelta) else given


async def asubmit(*args: Any, **kwargs: Any) -> RunHandle:
    """Do what `submit` does, from asyncio or trio, without blocking the loop.

    Under asyncio it uses Django's thread-sensitive thread, hence the same connection as Django's own async
    ORM. Cancelled in the middle, the submission may or may not have been made.
    """
    return await in_thread(submit, *args, **kwargs)


def open_run(row_key: str, using: str) -> str | None:
    """Return the id of the open run of a row, as far as the database `using` knows."""
    found = Run.objects.using(using).filter(row_key=row_key, status__in=OPEN).values_list("id", flat=True)[:1]
    return next((str(run) for run in found), None)


def as_json(value: Any, what: str) -> Any:
    """Return `value` as the plain data of its JSON: dates, UUIDs and decimals become text.

    Raises:
      TypeError: it holds something that JSON cannot express; the message begins with `what`.
    """
    try:
        return json.loads(
            json.dumps(msgspec.to_builtins(value, str_keys=True, enc_hook=_lazy), allow_nan=False)
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{what}: JSON cannot express this: {error}") from error


def _lazy(value: Any) -> Any:
    """Resolve Django's lazily translated strings for `msgspec`."""
    if isinstance(value, Promise):
        return str(value)
    raise TypeError(f"an object of type {type(value).__qualname__}")


def poke(using: str = DEFAULT_DB_ALIAS) -> None:
    """Tell every tree that serves the database `using` that its outbox has something new.

    One datagram each, without waiting. Never raises: a poke that is lost costs at most the second until the
    courier polls.
    """
    with contextlib.suppress(
        Exception
    ):  # the submission is committed; nothing that happens here may hide that
        for address in _poke_addresses(using):
            _send_poke(address)


def _send_poke(address: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            if address.startswith("@"):
                sender.sendto(b"\0", socket.MSG_DONTWAIT, b"\0" + address[1:].encode())
                return
            with linux.short_socket_path(Path(address)) as path:
                sender.sendto(b"\0", socket.MSG_DONTWAIT, path)
        except OSError:  # its tree is gone (ECONNREFUSED, ENOENT), or pokes enough wait there (EAGAIN)
            return


def _poke_addresses(using: str) -> list[str]:
    at, found = _addresses.get(using, (-math.inf, []))
    now = time.monotonic()
    if now - at > _ADDRESSES_FRESH:
        nodes = Node.objects.using(using).filter(seen_at__gte=Now() - timedelta(seconds=NODE_FRESH))
        found = list(nodes.values_list("poke_address", flat=True))
        _addresses[using] = now, found
    return found


def name_of(task: Any, row: StreamTask | None) -> str:
    """Return the name or dotted path of what a caller calls a task.

    Raises:
      TypeError: it is none, or a model without its row.
      ValueError: it is text that cannot name one.
    """
    model = type(task) if isinstance(task, StreamTask) else task
    if isinstance(model, type) and issubclass(model, StreamTask):
        if row is None:
            raise TypeError(f"{model.__name__} is a task model: give a saved row of it")
        return task_name(model)
    if isinstance(task, str):
        if not is_task_name(task):
            raise ValueError(f"{task!r} is no task's name; write <app label>.<function or model>")
        return task
    if isinstance(path := getattr(task, "module_path", None), str):  # a Task of django.tasks
        return path
    path = f"{getattr(task, '__module__', '')}.{getattr(task, '__qualname__', '')}"
    if not callable(task) or not is_task_name(path):
        raise TypeError(
            f"{task!r} is no task: give a function of a tasks module, its name, or a StreamTask row"
        )
    return path


def _find(name: str, row: StreamTask | None) -> TaskDefinition:
    from taskkit import registry  # it wants every app's models, which may be importing this module just now

    definition = registry.find(name)
    if definition.model is not None and row is None:
        raise TypeError(f"{name} is a task model: give a saved row of it")
    return definition


def _check_arguments(definition: TaskDefinition, args: list[Any], kwargs: dict[str, Any]) -> None:
    try:
        definition.bind(args, kwargs)
    except InvalidArguments as error:
        raise InvalidArguments(f"{definition.info.name}: {error}", errors=error.errors) from None


def alias_of(row: StreamTask | None) -> str:
    """Return where a submission belongs: beside its row, if the routers let our tables live there."""
    hints = {} if row is None else {"instance": row}
    alias = router.db_for_write(Outbox, **hints)
    return alias if router.allow_migrate_model(alias, Outbox) else DEFAULT_DB_ALIAS


def _address_of(row: StreamTask, name: str, alias: str) -> Row:
    if row.pk is None or row._state.adding:
        raise ValueError(
            f"save this {type(row).__name__} before starting it: a runner reads it from the database"
        )
    if task_name(type(row)) != name:
        raise ValueError(f"the row is a {task_name(type(row))}, not a {name}")
    address = row_address(type(row), row.pk, row._state.db or alias)
    if len(address.key) > ROW_KEY_LENGTH:
        raise ValueError(
            f"the row's key may have {ROW_KEY_LENGTH} characters, {address.key[:60]!r}… has more"
        )
    return address


def check(submission: Submit) -> None:
    """Refuse what the gateway would refuse, where the caller still sees it.

    Raises:
      ValueError, TypeError: an option is out of range.
    """
    if submission.priority is not None and submission.priority not in PRIORITIES:
        raise ValueError(f"priority = {submission.priority!r}: it goes from -100 to 100")
    for name in ("timeout", *LIMITS):
        seconds = getattr(submission, name)
        if seconds is not None and not 0 < seconds < math.inf:
            raise ValueError(f"{name} = {seconds!r}: it must be a number of seconds above 0")
    if len(submission.concurrency_key) > MAX_CONCURRENCY_KEY:
        raise ValueError(
            f"concurrency_key = {submission.concurrency_key[:60]!r}…: it has at most {MAX_CONCURRENCY_KEY} characters"
        )
    if submission.max_attempts is not None and submission.max_attempts < 1:
        raise ValueError(f"max_attempts = {submission.max_attempts!r}: it must be at least 1")
    if not all(isinstance(tag, str) for tag in submission.tags):
        raise TypeError(f"tags = {submission.tags!r}: they must be strings")
    try:
        size = len(codec.pack(submission))
    except LocalWireError as error:
        raise TypeError(f"{submission.task}: {error}") from error
    limit = get_settings().limits.body_bytes
    if size > limit:
        raise ValueError(
            f"{submission.task}: {size} bytes of arguments, LIMITS.body_bytes = {limit}; pass a reference"
        )


def _insert(submission: Submit, **shown: Any) -> RunHandle:
    """Insert the submission, or find the run that its row has already; `shown` goes to its projection only."""
    clash: IntegrityError | None = None
    for _ in range(_START_TRIES):
        # Outside of the transaction below: on SQLite, reading first in a deferred transaction would turn the
        # wait for another writer into an immediate "database is locked" (SQLITE_BUSY_SNAPSHOT).
        if submission.row and (running := open_run(submission.row.key, submission.using)):
            return RunHandle(running, submission.using, new=False)
        try:
            with transaction.atomic(using=submission.using):
                insert_rows(submission, **shown)
        except IntegrityError as error:
            if submission.row is None:
                raise
            clash = error  # somebody else started the row since; the next round finds the run
            continue
        transaction.on_commit(partial(poke, submission.using), using=submission.using, robust=True)
        return RunHandle(submission.id, submission.using)
    raise RuntimeError(
        f"{submission.task}: the row's run is taken and not to be seen; repeat in a new transaction"
    ) from clash


def _insert_once(submission: Submit, **shown: Any) -> RunHandle:
    """Insert a submission whose id is known before, or find what was inserted."""
    clash: IntegrityError | None = None
    for _ in range(2):
        found = Run.objects.using(submission.using).filter(id=submission.id).first()
        if found is not None:
            if (found.task, found.args, found.kwargs) != (
                submission.task,
                submission.args,
                submission.kwargs,
            ):
                raise ValueError(
                    f"the child with this key is run {found.id} of {found.task}, with other arguments"
                )
            return RunHandle(submission.id, submission.using, new=False)
        try:
            return _insert(submission, **shown)
        except IntegrityError as error:
            clash = error  # another thread of the parent was faster
    raise RuntimeError(
        f"run {submission.id} is taken and not to be seen; repeat in a new transaction"
    ) from clash


def insert_rows(submission: Submit, *, priority: int = 0, backend: str = "", queue: str = "") -> None:
    """Insert the outbox entry of `submission` with its projection, in the transaction that is open.

    `priority` is that of its task, which counts when the submission has none.

    Raises:
      IntegrityError: its id is taken, or another open run has its row.
      DatabaseError: the database is away.
    """
    key = submission.row.key if submission.row else None
    now = timezone.now()
    payload = msgspec.to_builtins(submission)
    for name in ("message", "id", "using", "node", "fence"):
        payload.pop(name, None)
    options = {name: value for name, value in payload.items() if name not in _COLUMNS}
    entry = Outbox(id=submission.id, payload=payload, row_key=key, created_at=now)
    run = Run(
        id=submission.id,
        task=submission.task,
        args=submission.args,
        kwargs=submission.kwargs,
        row_key=key,
        metadata=submission.metadata,
        tags=submission.tags,
        priority=priority if submission.priority is None else submission.priority,
        run_after=None if submission.run_after is None else moment(submission.run_after),
        backend=backend,
        queue=queue,
        options=options,
        node=submission.node,
        fence=submission.fence,
        created_at=now,
    )
    # Unlike create(): one statement each, no signal. The courier submits as well, and runs no user code.
    Run.objects.using(submission.using).bulk_create([run])
    Outbox.objects.using(submission.using).bulk_create([entry])
