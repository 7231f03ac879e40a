"""The seed's names for starting a task row, for asking about one: right from any process.

`from taskkit import coordinator` gives this module and `from taskkit.coordinator import coordinator` the
object; both have the same functions. Importing it needs no configured Django; calling does.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from taskkit.outbox import RunHandle
    from taskkit.stream_task import StreamTask

__all__ = [
    "Coordinator",
    "coordinator",
    "get_task_instance",
    "get_task_instance_sync",
    "is_task_running",
    "start_task",
    "start_task_sync",
]

#: Longest wait of `is_task_running` inside a running asyncio loop, seconds: SQLite's own lock timeout is 5.
_QUERY_DEADLINE: Final = 10.0


class Coordinator:
    """Starts task rows and knows which of them run. It has no state: the project's database has it."""

    def start_task_sync(
        self, row: StreamTask, app_name: str | None = None, model_name: str | None = None
    ) -> RunHandle:
        """Start `row`, or return its open run; returns once the submission is in the database.

        The names are the seed's and only compared with the row: with one of them it is the model's.

        Raises:
          TypeError: `row` is no StreamTask.
          ValueError: the row is not saved, or the names mean another model.
        """
        from taskkit.outbox import submit
        from taskkit.stream_task import StreamTask

        if not isinstance(row, StreamTask):
            raise TypeError(f"{row!r} is no StreamTask")
        _check_names(row, *((app_name, model_name) if model_name else (None, app_name)))
        return submit(row)

    async def start_task(
        self, row: StreamTask, app_name: str | None = None, model_name: str | None = None
    ) -> RunHandle:
        """Do what `start_task_sync` does, from asyncio or trio.

        Cancelled in the middle, the row may or may not have been started; starting it again is safe.
        """
        from taskkit.threads import in_thread

        return await in_thread(self.start_task_sync, row, app_name, model_name)

    def get_task_instance_sync(self, *names: Any) -> StreamTask | None:
        """Return the row that (app, model, pk) or (model, pk) name, or None; starts nothing.

        Raises:
          LookupError: several apps have such a model; name the app.
        """
        from taskkit.rows import UnknownModel, find_model, parse_pk

        app, name, pk = _three(names)
        try:
            model = find_model(app, name)
            return model._base_manager.filter(pk=parse_pk(model, pk)).first()
        except (UnknownModel, ValueError):
            return None

    async def get_task_instance(self, *names: Any) -> StreamTask | None:
        """Do what `get_task_instance_sync` does, from asyncio or trio."""
        from taskkit.threads import in_thread

        return await in_thread(self.get_task_instance_sync, *names)

    def is_task_running(self, *names: Any) -> bool:
        """Whether the row that (app, model, pk) or (model, pk) name has an open run; a waiting one counts.

        Synchronous like the seed's, yet usable in a coroutine: it blocks for one indexed query there.

        Raises:
          LookupError: several apps have such a model; name the app.
          TimeoutError: inside a running asyncio loop, the database did not answer in 10 s.
        """
        from taskkit.threads import under_asyncio, with_own_connections

        ask = partial(_is_running, *_three(names))
        if not under_asyncio():
            return ask()
        # Django refuses the ORM in a thread with a running asyncio loop, so another thread asks.
        helper = ThreadPoolExecutor(1, thread_name_prefix="bulkhead-ask")
        try:
            return helper.submit(with_own_connections, ask).result(_QUERY_DEADLINE)
        finally:
            helper.shutdown(wait=False)


def _is_running(app: str, name: str, pk: Any) -> bool:
    from django.db import router

    from taskkit.outbox import alias_of, open_run
    from taskkit.rows import UnknownModel, find_model, parse_pk, row_address

    try:
        model = find_model(app, name)
        row = model()  # not read: only the routers want to see it
        row.pk = parse_pk(model, pk)
    except (UnknownModel, ValueError):
        return False
    row._state.db = router.db_for_read(model)
    return open_run(row_address(model, row.pk, row._state.db).key, alias_of(row)) is not None


def _three(names: tuple[Any, ...]) -> tuple[str, str, Any]:
    """Return (app or empty, model, pk) of the seed's two argument forms."""
    if len(names) == 2:
        return "", str(names[0]), names[1]
    if len(names) == 3:
        return str(names[0]), str(names[1]), names[2]
    raise TypeError(f"give (app, model, pk) or (model, pk), not {len(names)} arguments")


def _check_names(row: StreamTask, app: str | None, model: str | None) -> None:
    meta = row._meta
    given = (app or meta.app_label).lower(), (model or meta.model_name or "").lower()
    if given != (meta.app_label.lower(), meta.model_name):
        raise ValueError(f"the row is a {meta.label}, not {'.'.join(filter(None, (app, model)))!r}")


coordinator = Coordinator()

start_task = coordinator.start_task
start_task_sync = coordinator.start_task_sync
get_task_instance = coordinator.get_task_instance
get_task_instance_sync = coordinator.get_task_instance_sync
is_task_running = coordinator.is_task_running
