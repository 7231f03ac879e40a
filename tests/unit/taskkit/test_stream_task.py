"""A task row: what its methods send, what they save, under asyncio as under trio."""

from __future__ import annotations

import asyncio
import copy
import datetime
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import trio
from asgiref.sync import sync_to_async

from taskkit import current


class Recorder:
    """A Speaker that keeps what it hears."""

    id = "0190b5a4-0000-7000-8000-000000000000"
    attempt = 1
    task = "proj.Row"

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []
        self.threads: set[int] = set()
        self.metadata: dict[str, Any] = {}

    def emit(self, type: str, data: Any = None) -> None:
        if isinstance(data, Exception):
            raise TypeError("JSON cannot express this")
        self.heard.append((type, data))
        self.threads.add(threading.get_ident())

    def progress(self, done: float, total: float | None = None, message: str = "") -> None:
        raise AssertionError("a StreamTask speaks by emit")


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    token = current.speaker.set(recorder)
    yield recorder
    current.speaker.reset(token)


@pytest.fixture
def row(django_project: object, recorder: Recorder) -> Any:
    from django.db import connections

    from tests.project.models import Row

    # asgiref's thread outlives a test, with its connection to that test's database
    asyncio.run(sync_to_async(connections.close_all)())
    return Row.objects.create(message="hello")


LOOPS = pytest.mark.parametrize("loop", ["asyncio", "trio"])


def run(loop: str, function: Any, *args: Any) -> Any:
    """Run an async function in a loop of its own, for at most 20 s."""
    if loop == "trio":

        async def bounded() -> Any:
            with trio.fail_after(20):
                return await function(*args)

        return trio.run(bounded)
    return asyncio.run(asyncio.wait_for(function(*args), 20))


async def turn(loop: str) -> None:
    """Let the loop turn once; a thread sets what we wait for."""
    if loop == "trio":
        await trio.lowlevel.checkpoint()
    else:
        await asyncio.sleep(0)


def fresh(row: Any) -> Any:
    return type(row).objects.get(pk=row.pk)


def test_the_fields_are_the_seeds(django_project: object) -> None:
    from tests.project.models import Row

    fields = {field.name: field for field in Row._meta.local_fields}
    assert list(fields)[1:5] == ["created_at", "updated_at", "completed_at", "final_value"]
    assert fields["created_at"].auto_now_add
    assert fields["updated_at"].auto_now
    assert fields["completed_at"].null
    assert fields["final_value"].null


@LOOPS
def test_events_arrive_in_order(row: Any, recorder: Recorder, loop: str) -> None:
    async def speak() -> None:
        await row.send_event("start", {"a": 1})
        row.send_event_sync("middle")
        await row.send_event(type="end", data=[2])

    run(loop, speak)
    assert recorder.heard == [("start", {"a": 1}), ("middle", None), ("end", [2])]


@LOOPS
def test_a_generators_values_are_progress_and_stay_untouched(row: Any, recorder: Recorder, loop: str) -> None:
    values = [{"i": i} for i in range(5)]
    before = copy.deepcopy(values)

    async def generate() -> AsyncIterator[dict[str, int]]:
        for value in values:
            yield value

    assert run(loop, row.process_generator, generate()) is values[-1]
    assert run(loop, row.process_sync_generator, iter(values)) is values[-1]
    assert recorder.heard == [("progress", value) for value in before] * 2
    assert values == before


@LOOPS
def test_an_empty_generator_gives_none(row: Any, recorder: Recorder, loop: str) -> None:
    async def nothing() -> AsyncIterator[int]:
        for number in ():
            yield number

    assert run(loop, row.process_generator, nothing()) is None
    assert run(loop, row.process_sync_generator, iter(())) is None
    assert recorder.heard == []


@LOOPS
def test_a_generator_is_closed_when_an_event_is_refused(row: Any, loop: str) -> None:
    closed = []

    async def async_values() -> AsyncIterator[Any]:
        try:
            yield ValueError()
        finally:
            closed.append("async")

    def values() -> Iterator[Any]:
        try:
            yield ValueError()
        finally:
            closed.append("sync")

    with pytest.raises(TypeError):
        run(loop, row.process_generator, async_values())
    with pytest.raises(TypeError):
        run(loop, row.process_sync_generator, values())
    assert closed == ["async", "sync"]


@LOOPS
def test_a_sync_generator_may_block_or_ask_the_database(row: Any, recorder: Recorder, loop: str) -> None:
    turns = threading.Event()

    def values() -> Iterator[int]:
        yield type(row).objects.count()
        assert turns.wait(10), "the event loop did not turn meanwhile"
        yield 2

    async def beside() -> Any:
        if loop == "trio":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tick)
                return await row.process_sync_generator(values())
        ticking = asyncio.create_task(tick())
        result = await row.process_sync_generator(values())
        await ticking
        return result

    async def tick() -> None:
        while not recorder.heard:
            await turn(loop)
        turns.set()

    assert run(loop, beside) == 2
    assert recorder.heard == [("progress", 1), ("progress", 2)]
    assert threading.get_ident() not in recorder.threads


@LOOPS
def test_a_cancelled_sync_generator_sends_nothing_more(row: Any, recorder: Recorder, loop: str) -> None:
    inside, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def values() -> Iterator[int]:
        try:
            inside.set()
            assert go_on.wait(10)
            yield 1
        finally:
            closed.set()

    async def cancel() -> None:
        if loop == "trio":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(row.process_sync_generator, values())
                while not inside.is_set():
                    await turn(loop)
                nursery.cancel_scope.cancel()
        else:
            task = asyncio.create_task(row.process_sync_generator(values()))
            while not inside.is_set():
                await turn(loop)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        go_on.set()  # the call has returned although the generator had not

    run(loop, cancel)
    assert closed.wait(10)
    assert recorder.heard == []


@LOOPS
def test_mark_completed_saves_its_three_columns_only(row: Any, loop: str) -> None:
    stale = fresh(row)
    row.message = "not to be saved"
    run(loop, row.mark_completed, {"answer": 42})
    saved = fresh(row)
    assert saved.final_value == {"answer": 42}
    assert saved.completed_at is not None
    assert saved.updated_at > stale.updated_at
    assert saved.message == "hello"


@LOOPS
def test_mark_completed_leaves_no_connection_behind(row: Any, loop: str) -> None:
    """Under trio the thread's connection is closed; under asyncio it is the one that `a*` methods use."""
    from django.db import connections

    opened: list[Any] = []

    class Noticing(type(row)):  # type: ignore[misc]
        class Meta:
            proxy = True
            app_label = "proj"

        def save(self, **kwargs: Any) -> None:
            super().save(**kwargs)
            opened.append((connections["default"], connections["default"].connection))

    from django.apps import apps

    try:
        seen = Noticing.objects.get(pk=row.pk)
        if loop == "trio":
            run(loop, seen.mark_completed, 1)
            (wrapper, raw), *_ = opened
            assert raw is not None
            assert wrapper.connection is None
        else:

            async def both() -> None:
                await seen.asave()
                await seen.mark_completed(1)

            run(loop, both)
            assert opened[0] == opened[1]
    finally:
        del apps.all_models["proj"]["noticing"]
        apps.clear_cache()


def test_mark_completed_from_synchronous_code(row: Any) -> None:
    row.mark_completed_sync("done")
    assert fresh(row).final_value == "done"


def test_a_final_value_may_hold_what_events_may(row: Any) -> None:
    when = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    id = uuid.UUID(int=7)
    row.mark_completed_sync({"when": when, "id": id, 1: (1, 2)})
    assert fresh(row).final_value == {"when": "2026-01-02T00:00:00Z", "id": str(id), "1": [1, 2]}


def test_a_failed_save_does_not_make_the_object_look_completed(row: Any) -> None:
    from django.db import DatabaseError

    type(row).objects.all().delete()
    with pytest.raises(DatabaseError):
        row.mark_completed_sync("done")
    assert (row.completed_at, row.final_value) == (None, None)


def test_what_json_cannot_express_is_refused_before_saving(row: Any) -> None:
    with pytest.raises(TypeError):
        row.mark_completed_sync(object())
    assert fresh(row).completed_at is None
    assert row.completed_at is None


def test_a_task_without_process_says_so() -> None:
    from taskkit.stream_task import StreamTask

    with pytest.raises(NotImplementedError, match=r"Missing needs a method process\(self\)"):
        StreamTask.process(type("Missing", (), {})())  # type: ignore[arg-type]
