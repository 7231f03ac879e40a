"""One attempt without a process around it: what it says, how it calls, how it ends."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
import trio

from taskkit import current
from taskkit.errors import RunCancelled
from taskkit.wire.messages import Event, Finished, Progress, Row, RunnerSpec, Start

if TYPE_CHECKING:
    from taskkit.runner.attempt import Attempt

pytestmark = pytest.mark.usefixtures("django_project")


class Ears:
    """Stands for the emitter: keeps what was said."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, dict[str, Any]]] = []

    def event(self, token: str, type: str, data: bytes) -> None:
        self.heard.append((token, type, json.loads(data)))

    def send_progress(self, message: Progress) -> None:
        self.heard.append((message.token, "run.progress", json.loads(message.data)))

    def names(self) -> list[str]:
        return [name for _, name, _ in self.heard]


@pytest.fixture
def ears() -> Iterator[Ears]:
    yield Ears()
    current.speaker.set(None)


def _attempt(
    func: Callable[..., Any], ears: Ears, *args: Any, row: Row | None = None, **spec: Any
) -> Attempt:
    from taskkit.runner.attempt import Attempt
    from taskkit.runner.inbox import Mail
    from tests.unit.taskkit.runner.life import definition

    start = Start(
        run="r1",
        attempt=2,
        token="tok",
        task="t.f",
        args=json.dumps(args).encode(),
        row=row,
        metadata=b'{"m":1}',
    )
    return Attempt(start, definition(func), ears, RunnerSpec(id="u", **spec), Mail())  # type: ignore[arg-type]


def _perform(func: Callable[..., Any], ears: Ears, *args: Any) -> Finished:
    from taskkit.runner.attempt import perform_sync

    return perform_sync(_attempt(func, ears, *args))


async def _perform_async(func: Callable[..., Any], ears: Ears) -> Finished:
    from taskkit.runner.attempt import perform_async

    with trio.fail_after(20):
        return await perform_async(_attempt(func, ears), anyio.CancelScope())


def _nothing() -> None:
    """Do nothing."""


def test_every_event_says_whose_it_is(ears: Ears) -> None:
    attempt = _attempt(_nothing, ears, row=Row(app="a", model="M", pk=7))
    attempt.emit("tick", {"n": 1})
    ((token, name, data),) = ears.heard
    assert (token, name) == ("tok", "tick")
    assert data.pop("_timestamp")
    assert data == {"n": 1, "_run": "r1", "_attempt": 2, "_task_id": 7, "_app": "a", "_model": "M"}


def test_an_event_without_data_has_ours(ears: Ears) -> None:
    _attempt(_nothing, ears).emit("tick")
    assert set(ears.heard[0][2]) == {"_run", "_attempt", "_timestamp"}


def test_the_run_as_its_task_sees_it(ears: Ears) -> None:
    attempt = _attempt(_nothing, ears)
    assert (attempt.id, attempt.attempt, attempt.task, attempt.metadata) == ("r1", 2, "t.f", {"m": 1})


def test_progress_is_short_whatever_the_message(ears: Ears) -> None:
    _attempt(_nothing, ears).progress(1, 2, "é" * 100_000)
    data = ears.heard[0][2]
    assert (data["done"], data["total"]) == (1, 2)
    assert 0 < len(data["message"]) <= 1_000


def test_an_event_that_cannot_be_sent_says_nothing(ears: Ears) -> None:
    attempt = _attempt(_nothing, ears, event_limit=300)
    for name, data, kind in (
        ("tick", object(), TypeError),
        ("tick", "x" * 300, ValueError),
        ("open", 1, ValueError),
    ):
        with pytest.raises(kind):
            attempt.emit(name, data)
    assert ears.heard == []


def test_a_function_returns(ears: Ears) -> None:
    finished = _perform(lambda a, b: {"sum": a + b}, ears, 1, 2)
    assert finished == Finished(token="tok", ending="returned", result=b'{"sum":3}')


def test_a_generator_that_raises_has_said_what_it_yielded(ears: Ears) -> None:
    def steps() -> Iterator[int]:
        yield 1
        raise ValueError("no")

    finished = _perform(steps, ears)
    assert finished.ending == "raised"
    assert ears.names() == ["progress"]


def test_a_yield_that_cannot_be_sent_raises_and_the_generator_is_closed(ears: Ears) -> None:
    closed = []

    def steps() -> Iterator[object]:
        try:
            yield object()
        finally:
            closed.append(True)

    finished = _perform(steps, ears)
    assert finished.failure is not None
    assert finished.failure.exception == "builtins.TypeError"
    assert closed


def test_a_task_that_gives_in_is_cancelled_and_one_that_raises_then_has_failed(ears: Ears) -> None:
    def gives_in() -> None:
        raise RunCancelled

    def stumbles() -> None:
        try:
            raise RunCancelled
        finally:
            raise OSError("while cleaning up")

    assert _perform(gives_in, ears).ending == "cancelled"
    assert _perform(stumbles, ears).ending == "raised"


async def test_a_coroutine_returns_and_raises(ears: Ears) -> None:
    async def returns() -> int:
        await anyio.lowlevel.checkpoint()
        return 5

    async def raises() -> None:
        await anyio.lowlevel.checkpoint()
        raise ValueError("no")

    assert (await _perform_async(returns, ears)).result == b"5"
    failed = await _perform_async(raises, ears)
    assert failed.failure is not None
    assert failed.failure.message == "no"


async def test_an_async_generator_that_raises_is_closed(ears: Ears) -> None:
    closed = []

    async def steps() -> AsyncIterator[int]:
        try:
            yield 1
            raise ValueError("no")
        finally:
            closed.append(True)

    assert (await _perform_async(steps, ears)).ending == "raised"
    assert closed
    assert ears.names() == ["progress"]


async def test_a_closing_generator_that_waits_for_ever_is_given_up(
    ears: Ears, autojump_clock: trio.testing.MockClock
) -> None:
    async def clings() -> AsyncIterator[object]:
        try:
            yield object()
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(60):
                await anyio.sleep_forever()

    from taskkit.runner.attempt import perform_async

    finished = await perform_async(_attempt(clings, ears), anyio.CancelScope())
    assert finished.ending == "raised"
    assert trio.current_time() < 61


async def test_a_group_of_exceptions_is_told_as_one_failure(ears: Ears) -> None:
    async def several() -> None:
        async with anyio.create_task_group() as group:
            for number in range(2):
                group.start_soon(_raise, number)

    finished = await _perform_async(several, ears)
    assert finished.failure is not None
    assert "ExceptionGroup" in finished.failure.exception
    assert "ValueError" in finished.failure.traceback


async def _raise(number: int) -> None:
    raise ValueError(f"number {number}")


def test_messages_are_what_the_wire_takes() -> None:
    assert Event(token="t", type="x").data == b""
