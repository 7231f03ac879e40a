"""A real runner at real ends: every shape of task, every way to end, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

from taskkit import RunCancelled, current_run, emit, progress
from taskkit.identifiers import new_run_id
from taskkit.wire.messages import Cancel, Create, Created, Finished, Retire, Row, Started, Submit
from tests.conftest import DjangoProject
from tests.unit.taskkit.runner.life import definition, living, named

if TYPE_CHECKING:
    from taskkit.registry import TaskDefinition

pytestmark = pytest.mark.usefixtures("django_project")


@pytest.fixture
def tasks(django_project: DjangoProject) -> dict[str, TaskDefinition]:
    """Give the tasks of the tests' project."""
    from taskkit import registry

    return registry.load()


def _result(finished: Finished) -> Any:
    assert finished.ending == "returned", finished
    return json.loads(finished.result)


# --- every shape of task


def test_a_function_is_performed_between_started_and_finished(tasks: dict[str, TaskDefinition]) -> None:
    with living(tasks) as life:
        life.start("proj.count", 3)
        assert _result(life.finished()) == 3
        assert life.order_of_kinds() == ["Hello", "Started", "Event", "Event", "Event", "Finished"]
        assert life.told() == [("progress", {"step": n, "total": 3}) for n in (1, 2, 3)]
        assert life.exit() == 0


def test_a_task_knows_its_run(tasks: dict[str, TaskDefinition]) -> None:
    with living(tasks) as life:
        life.start("proj.whoami", attempt=2, max_attempts=3, metadata={"m": 1})
        found = _result(life.finished())
        assert (found["id"], found["attempt"], found["task"]) == ("run-tok", 2, "proj.whoami")
        assert found["metadata"] == {"m": 1}
        assert (found["pid"], found["ppid"]) == (life.pid, os.getpid())


@pytest.mark.parametrize("name", ["proj.gen", "proj.agen"])
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_generators_yields_are_events(tasks: dict[str, TaskDefinition], name: str, loop: str) -> None:
    with living(tasks, loop=loop) as life:
        life.start(name, 4)
        assert _result(life.finished()) is None
        assert life.told() == [("progress", {"step": n}) for n in (1, 2, 3, 4)]


def test_a_generators_return_is_the_result() -> None:
    def stepwise() -> Generator[int, None, str]:
        yield 1
        return "done"

    with living(named([definition(stepwise)])) as life:
        life.start("t.stepwise")
        assert _result(life.finished()) == "done"
        assert life.told() == [("progress", {"value": 1})]


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_coroutine_runs_in_the_loop_it_asks_for(loop: str) -> None:
    async def which() -> str:
        await anyio.lowlevel.checkpoint()
        import sniffio

        emit("hello")
        return str(sniffio.current_async_library())

    with living(named([definition(which, loop=loop)])) as life:
        life.start("t.which")
        assert _result(life.finished()) == loop


def test_the_pools_loop_is_taken_when_the_task_does_not_care() -> None:
    async def which() -> str:
        import sniffio

        return str(sniffio.current_async_library())

    with living(named([definition(which)]), loop="trio") as life:
        life.start("t.which")
        assert _result(life.finished()) == "trio"


def test_a_synchronous_task_starts_no_event_loop() -> None:
    def loops() -> list[str]:
        import asyncio

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return []
        return ["asyncio"]

    with living(named([definition(loops)])) as life:
        life.start("t.loops")
        assert _result(life.finished()) == []


@pytest.mark.parametrize("model", ["Row", "ARow", "GenRow", "AGenRow"])
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_model_task_is_performed_and_marked_completed(
    tasks: dict[str, TaskDefinition], model: str, loop: str
) -> None:
    from tests.project import models

    fields = {"message": "hi"} if model in ("Row", "ARow") else {}
    row = getattr(models, model).objects.create(steps=2, **fields)
    with living(tasks, loop=loop) as life:
        life.start(f"proj.{model}", row=Row(app="proj", model=model, pk=row.pk))
        result = _result(life.finished())
        steps = [data["step"] for name, data in life.told() if name == "progress"]
        data = life.wait_event("progress")
    assert steps == [1, 2]
    assert result == ("hi" if fields else None)
    assert (data["_task_id"], data["_app"], data["_model"]) == (row.pk, "proj", model)
    row.refresh_from_db()
    assert row.completed_at is not None
    assert row.final_value == result


def test_a_row_that_is_gone_fails_the_attempt(tasks: dict[str, TaskDefinition]) -> None:
    with living(tasks) as life:
        life.start("proj.Row", row=Row(app="proj", model="Row", pk=404))
        failure = life.finished().failure
        assert failure is not None
        assert failure.exception.endswith("Row.DoesNotExist")


def test_a_model_task_without_a_row_is_named(tasks: dict[str, TaskDefinition]) -> None:
    with living(tasks) as life:
        life.start("proj.Row")
        failure = life.finished().failure
        assert failure is not None
        assert failure.exception == "taskkit.errors.InvalidArguments"


# --- bad ends


def test_an_exception_is_told_with_the_tasks_own_traceback(tasks: dict[str, TaskDefinition]) -> None:
    with living(tasks) as life:
        life.start("proj.boom", "kaput")
        finished = life.finished()
        assert finished.ending == "raised"
        assert finished.failure is not None
        assert (finished.failure.exception, finished.failure.message) == ("builtins.ValueError", "kaput")
        assert "in boom" in finished.failure.traceback
        assert "taskkit/runner" not in finished.failure.traceback
        assert finished.retry_in is None
        assert life.exit() == 0, "an exception is no crash"


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_whatever_a_task_raises_ends_only_its_attempt(kind: type[BaseException], asynchronous: bool) -> None:
    def sync() -> None:
        raise kind("out")

    async def coroutine() -> None:
        raise kind("out")

    func: Callable[..., Any] = coroutine if asynchronous else sync
    with living(named([definition(func), definition(_fine)]), runs=2) as life:
        life.start(f"t.{func.__name__}", token="one")
        failure = life.finished("one").failure
        assert failure is not None
        assert failure.exception == f"builtins.{kind.__name__}"
        life.start("t._fine", token="two")
        assert _result(life.finished("two")) == "fine"


def _fine() -> str:
    return "fine"


def test_unknown_tasks_and_wrong_arguments_are_the_attempts_end(tasks: dict[str, TaskDefinition]) -> None:
    with living(tasks, runs=2) as life:
        life.start("proj.no_such", token="one")
        failure = life.finished("one").failure
        assert failure is not None
        assert "no task 'proj.no_such'" in failure.message
        life.start("proj.add", 1, token="two")
        failure = life.finished("two").failure
        assert failure is not None
        assert failure.exception == "taskkit.errors.InvalidArguments"


class _Rude:
    def __repr__(self) -> str:
        raise ZeroDivisionError("no repr")


@pytest.mark.parametrize(
    "value", [object(), {"a": {1j}}, _Rude(), "\ud800", {(1, 2): 3}, (n for n in range(3)), [[lambda: 1]]]
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_result_that_json_cannot_express_fails_the_attempt(value: Any, asynchronous: bool) -> None:
    def sync() -> Any:
        return iter([value]) if hasattr(value, "__next__") else value

    async def coroutine() -> Any:
        return sync()

    func: Callable[..., Any] = coroutine if asynchronous else sync
    with living(named([definition(func)])) as life:
        life.start(f"t.{func.__name__}")
        finished = life.finished()
        assert finished.ending == "raised"
        assert finished.failure is not None
        assert "cannot be stored" in finished.failure.message
        assert life.exit() == 0


def test_a_result_whose_rendering_fails_in_any_way_is_the_attempts_failure() -> None:
    """A lazy translation may raise whatever it likes; a huge value may meet the memory limit."""
    from django.utils.functional import lazy

    def explode() -> str:
        raise LookupError("the translation is broken")

    def task() -> Any:
        return {"text": lazy(explode, str)()}

    with living(named([definition(task)])) as life:
        life.start("t.task")
        failure = life.finished().failure
        assert failure is not None
        assert "the translation is broken" in failure.message
        assert life.exit() == 0


def test_a_result_above_the_limit_fails_the_attempt() -> None:
    def big() -> str:
        return "x" * 2_000

    with living(named([definition(big)]), result_limit=1_000) as life:
        life.start("t.big")
        failure = life.finished().failure
        assert failure is not None
        assert "LIMITS.result_bytes" in failure.message


def test_a_large_result_is_told_by_its_blob() -> None:
    def big() -> str:
        return "x" * 200_000

    with living(named([definition(big)])) as life:
        life.start("t.big")
        finished = life.finished()
        assert finished.blob is not None
        assert (life.blobs / finished.blob).read_bytes() == b'"' + b"x" * 200_000 + b'"'


def test_an_event_above_the_limit_raises_in_the_task_and_is_not_sent() -> None:
    def loud() -> list[str]:
        found = []
        for size in (500, 2_000):
            try:
                emit("note", "x" * size)
            except ValueError as error:
                found.append(str(error))
        return found

    with living(named([definition(loud)]), event_limit=1_000) as life:
        life.start("t.loud")
        (message,) = _result(life.finished())
        assert "LIMITS.event_bytes" in message
        assert len(life.told()) == 1


@pytest.mark.parametrize("name", ["", "open", "run.started", "stream.end", "a\nb", "x" * 201, "\ud800"])
def test_reserved_and_unsafe_names_raise_in_the_task(name: str) -> None:
    def speak() -> str:
        try:
            emit(name)
        except ValueError as error:
            return type(error).__name__
        return "sent"

    with living(named([definition(speak)])) as life:
        life.start("t.speak")
        assert _result(life.finished()) == "ValueError"
        assert life.told() == []


def test_an_error_whose_text_is_longer_than_a_frame_is_told() -> None:
    def verbose() -> None:
        raise ValueError("漢" * 200_000)

    with living(named([definition(verbose)])) as life:
        life.start("t.verbose")
        failure = life.finished().failure
        assert failure is not None
        assert failure.exception == "builtins.ValueError"
        assert life.exit() == 0


# --- another attempt


def _backoff_runs(backoff: Any, **start: Any) -> Finished:
    def fails() -> None:
        raise ValueError("no")

    with living(named([definition(fails, backoff=backoff)])) as life:
        life.start("t.fails", **{"max_attempts": 3} | start)
        return life.finished()


def test_a_backoff_says_when() -> None:
    seen = _backoff_runs(lambda error, run: 7 if run.attempt == 2 and "no" in str(error) else None, attempt=2)
    assert seen.retry_in == 7.0


def test_a_backoff_may_give_up() -> None:
    assert _backoff_runs(lambda error, run: None).retry_in is None


def test_without_a_backoff_the_waits_double() -> None:
    waits = [_backoff_runs(None, attempt=n, max_attempts=99).retry_in for n in (1, 2, 3, 9, 98)]
    assert waits == [2.0, 4.0, 8.0, 300.0, 300.0]


def test_the_last_attempt_asks_nobody() -> None:
    assert _backoff_runs(lambda error, run: 1 / 0, attempt=3).retry_in is None


@pytest.mark.parametrize(
    ("backoff", "complaint"),
    [
        (lambda error, run: 1 / 0, "ZeroDivisionError"),
        (lambda error, run: "soon", "ValueError"),
        (lambda error, run: float("nan"), "ValueError"),
        (lambda error, run: float("inf"), "ValueError"),
        (lambda error, run: 1e300, "ValueError"),
        (lambda: 1, "TypeError"),
    ],
)
def test_a_backoff_that_is_broken_ends_the_run(backoff: Any, complaint: str) -> None:
    finished = _backoff_runs(backoff)
    assert finished.ending == "raised"
    assert finished.retry_in is None
    assert finished.failure is not None
    assert complaint in finished.failure.exception


def test_a_result_that_cannot_be_stored_meets_a_broken_backoff() -> None:
    def bad() -> object:
        return object()

    with living(named([definition(bad, backoff=lambda error, run: 1 / 0)])) as life:
        life.start("t.bad", max_attempts=3)
        assert life.finished().ending == "raised"
        assert life.exit() == 0


# --- cancelling


@pytest.mark.parametrize("name", ["t.patient", "t.apatient"])
def test_a_waiting_task_is_interrupted_and_cleans_up(name: str) -> None:
    # `ready` is said inside `try`: the pipe has the event before emit() returns, and the interruption may be there.
    def patient() -> None:
        try:
            emit("ready")
            time.sleep(60)
        finally:
            emit("cleaned_up")

    async def apatient() -> None:
        try:
            emit("ready")
            await anyio.sleep(60)
        finally:
            emit("cleaned_up")

    with living(named([definition(patient), definition(apatient)])) as life:
        life.start(name)
        life.wait_event("ready")
        life.cancel()
        assert life.finished().ending == "cancelled"
        assert [event for event, _ in life.told()] == ["ready", "cleaned_up"]
        assert life.exit() == 0


def test_a_task_that_burns_a_core_is_interrupted(tasks: dict[str, TaskDefinition]) -> None:
    with living(tasks) as life:
        life.start("proj.spin", 60.0)
        life.wait_for(Started)
        life.cancel()
        assert life.finished().ending == "cancelled"


def test_a_task_that_floods_is_interrupted_between_two_events() -> None:
    def flood() -> None:
        number = 0
        while True:
            number += 1
            emit("tick", {"n": number, "x": "y" * 3_000})

    with living(named([definition(flood)])) as life:
        life.start("t.flood")
        life.wait_event("tick")
        life.cancel()
        assert life.finished().ending == "cancelled"
        numbers = [data["n"] for _, data in life.told()]
        assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_an_async_generator_is_cancelled_and_closed(loop: str) -> None:
    async def endless() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            emit("closed")

    with living(named([definition(endless, loop=loop)])) as life:
        life.start("t.endless")
        life.wait_event("progress")
        life.cancel()
        assert life.finished().ending == "cancelled"
        assert life.told()[-1][0] == "closed"


def test_a_generator_is_closed_when_it_is_cancelled() -> None:
    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            emit("closed")

    with living(named([definition(endless)])) as life:
        life.start("t.endless")
        life.wait_event("progress")
        life.cancel()
        assert life.finished().ending == "cancelled"
        assert life.told()[-1][0] == "closed"


def test_a_task_may_return_in_spite_of_a_cancellation() -> None:
    def finishes() -> str:
        try:
            emit("ready")
            time.sleep(60)
        except RunCancelled:
            pass
        return "all the same"

    with living(named([definition(finishes)])) as life:
        life.start("t.finishes")
        life.wait_event("ready")
        life.cancel()
        assert _result(life.finished()) == "all the same"


def test_cleaning_up_is_not_interrupted_again() -> None:
    def slow_cleaner() -> None:
        try:
            emit("ready")
            time.sleep(60)
        finally:
            time.sleep(0.2)
            emit("clean")

    with living(named([definition(slow_cleaner)])) as life:
        life.start("t.slow_cleaner")
        life.wait_event("ready")
        for _ in range(50):
            life.cancel()
        assert life.finished().ending == "cancelled"
        assert life.told()[-1][0] == "clean"


@pytest.mark.parametrize("name", ["proj.sleepy", "proj.asleepy", "proj.spin"])
def test_a_cancellation_before_the_start_is_remembered(tasks: dict[str, TaskDefinition], name: str) -> None:
    with living(tasks) as life:
        life.cancel()
        life.start(name, 60.0)
        assert life.finished().ending == "cancelled"


def test_a_cancellation_of_another_attempt_changes_nothing(tasks: dict[str, TaskDefinition]) -> None:
    with living(tasks) as life:
        life.start("proj.sleepy", 0.3)
        life.wait_for(Started)
        life.cancel("another")
        assert _result(life.finished()) == "slept"


def test_a_cancellation_while_another_thread_emits_is_not_lost() -> None:
    def busy() -> None:
        stop = threading.Event()

        def speak() -> None:
            run.emit("other", "x")
            while not stop.is_set():
                run.emit("other", "x" * 2_000)

        run = current_run()
        thread = threading.Thread(target=speak)
        thread.start()
        try:
            emit("ready")
            time.sleep(60)
        finally:
            stop.set()
            thread.join()

    with living(named([definition(busy)])) as life:
        life.start("t.busy")
        life.wait_event("ready")
        life.cancel()
        assert life.finished().ending == "cancelled"


# --- orders


def test_a_start_that_is_repeated_is_performed_once(tasks: dict[str, TaskDefinition]) -> None:
    with living(tasks, runs=2) as life:
        life.start("proj.echo", 1)
        life.start("proj.echo", 1)
        life.finished()
        life.start("proj.echo", 1)
        life.start("proj.echo", 2, token="two")
        assert _result(life.finished("two")) == 2
        assert life.order_of_kinds().count("Started") == 2


def test_an_idle_runner_leaves_when_it_is_told_to(tasks: dict[str, TaskDefinition]) -> None:
    with living(tasks, runs=5) as life:
        life.order(Retire())
        assert life.exit() == 0


def test_a_busy_runner_finishes_what_it_was_given_before_it_leaves(tasks: dict[str, TaskDefinition]) -> None:
    with living(tasks, runs=5) as life:
        life.start("proj.sleepy", 0.2, token="one")
        life.start("proj.echo", 2, token="two")
        life.order(Retire())
        assert life.exit() == 0
        assert _result(life.finished("one")) == "slept"
        assert _result(life.finished("two")) == 2


def test_a_runner_leaves_after_the_runs_of_its_life(tasks: dict[str, TaskDefinition]) -> None:
    with living(tasks, runs=2) as life:
        for token in ("one", "two"):
            life.start("proj.echo", token, token=token)
            life.finished(token)
        assert life.exit() == 0


def test_arguments_of_any_size_arrive(tasks: dict[str, TaskDefinition]) -> None:
    text = "é" * 600_000
    with living(tasks) as life:
        life.start("proj.echo", text)
        blob = life.finished().blob
        assert blob is not None
        assert json.loads((life.blobs / blob).read_bytes()) == text


def test_an_order_of_a_newer_gateway_is_passed_over(tasks: dict[str, TaskDefinition]) -> None:
    from taskkit import seqpacket

    with living(tasks) as life:
        seqpacket.send(life._orders, b"\x81\xa7message\xa5Later")
        seqpacket.send(life._orders, b"garbage")
        life.start("proj.echo", 1)
        assert _result(life.finished()) == 1


def test_a_shared_pool_performs_several_attempts_at_once() -> None:
    async def meet(number: int) -> int:
        emit("here", {"number": number})
        if number:
            await anyio.sleep_forever()
        return number

    with living(named([definition(meet)]), concurrency=4, runs=10, pool="shared") as life:
        for number in range(1, 5):
            life.start("t.meet", number, token=f"t{number}")
        for number in range(1, 5):
            life.wait_event("here", f"t{number}")  # all four are there, none has ended
        life.start("t.meet", 0, token="t0")
        assert _result(life.finished("t0")) == 0
        for number in (3, 1, 4, 2):
            life.cancel(f"t{number}")
            assert life.finished(f"t{number}").ending == "cancelled"
        life.order(Retire())
        assert life.exit() == 0


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_shared_pool_keeps_attempts_apart(loop: str) -> None:
    async def speak(name: str) -> str:
        for n in range(20):
            print(f"{name} {n}")
            progress(n, 20, name)
            await anyio.lowlevel.checkpoint()
        return current_run().id

    with living(named([definition(speak)]), concurrency=3, runs=3, loop=loop) as life:
        for name in "abc":
            life.start("t.speak", name, token=name)
        for name in "abc":
            assert _result(life.finished(name)) == f"run-{name}"
            assert {data["message"] for _, data in life.told(name)} == {name}
        assert life.exit() == 0
        for name in "abc":
            assert life.lines(name) == [f"{name} {n}" for n in range(20)]


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_shared_pool_hears_a_cancellation_that_came_with_the_start(loop: str) -> None:
    async def forever() -> None:
        await anyio.sleep_forever()

    with living(named([definition(forever)]), concurrency=4, runs=9, loop=loop) as life:
        os.kill(life.pid, signal.SIGSTOP)  # so that all of it is there when the runner looks
        life.start("t.forever", token="one")
        life.cancel("one")
        life.cancel("two")
        life.start("t.forever", token="two")
        os.kill(life.pid, signal.SIGCONT)
        assert life.finished("one").ending == "cancelled"
        assert life.finished("two").ending == "cancelled"


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_shared_pool_performs_what_came_with_the_word_to_leave(loop: str) -> None:
    async def hello() -> str:
        return "hello"

    with living(named([definition(hello)]), concurrency=4, runs=9, loop=loop) as life:
        os.kill(life.pid, signal.SIGSTOP)  # so that both are there when the runner looks
        life.start("t.hello", token="one")
        life.order(Retire())
        os.kill(life.pid, signal.SIGCONT)
        assert _result(life.finished("one")) == "hello"
        assert life.exit() == 0


def test_an_exception_in_a_shared_pool_ends_only_its_attempt() -> None:
    async def boom(wait: float) -> str:
        await anyio.sleep(wait)
        if not wait:
            raise SystemExit("out")
        return "unharmed"

    with living(named([definition(boom)]), concurrency=4, runs=2) as life:
        life.start("t.boom", 0.3, token="one")
        life.start("t.boom", 0, token="two")
        assert life.finished("two").ending == "raised"
        assert _result(life.finished("one")) == "unharmed"
        assert life.exit() == 0


# --- intake


def test_an_intake_runner_saves_rows(tasks: dict[str, TaskDefinition]) -> None:
    from tests.project.models import Row as Model

    def create(ask: str, task: str, fields: dict[str, Any]) -> Create:
        submission = Submit(id=new_run_id(), task=task)
        return Create(ask=ask, task=task, fields=fields, submission=submission)

    with living(tasks, role="intake", runs=100) as life:
        life.order(create("a", "proj.Row", {"message": "hi", "steps": 2}))
        made = life.wait_for(Created, where=lambda message: message.ask == "a")
        life.order(create("b", "proj.Row", {"message": "x" * 101, "nothing": 1}))
        refused = life.wait_for(Created, where=lambda message: message.ask == "b")
        life.order(create("c", "proj.NoSuch", {}))
        failed = life.wait_for(Created, where=lambda message: message.ask == "c")
        life.order(Retire())
        assert life.exit() == 0
    assert made.row is not None
    assert Model.objects.get(pk=made.row.pk).message == "hi"
    assert set(refused.errors) >= {"nothing"}
    assert failed.failure is not None


# --- protection, output, death


def test_output_is_in_the_pipe_before_the_end_is_told(tasks: dict[str, TaskDefinition]) -> None:
    with living(tasks) as life:
        life.start("proj.chatty", 50)
        life.finished()
        assert life.lines() == [f"line {n}" for n in range(1, 51)]


def _close_everything() -> None:
    os.closerange(3, 4096)
    emit("after")


def _close_low_numbers() -> str:
    for fd in range(3, 100):
        try:
            os.close(fd)
        except OSError:
            continue
    emit("after")
    return "still here"


def test_a_task_that_closes_all_descriptors_leaves_with_a_code_that_says_so() -> None:
    with living(named([definition(_close_everything)])) as life:
        life.start("t._close_everything")
        assert life.exit() == 71
        assert life.order_of_kinds() == ["Hello", "Started"]


def test_a_task_that_closes_numbers_it_does_not_own_hits_none_of_ours() -> None:
    with living(named([definition(_close_low_numbers)])) as life:
        life.start("t._close_low_numbers")
        assert _result(life.finished()) == "still here"


def test_the_orders_socket_gone_ends_an_idle_runner(tasks: dict[str, TaskDefinition]) -> None:
    with living(tasks, runs=5) as life:
        life.hang_up()
        os.close(life._ends.near[2])
        life._ends.near = (*life._ends.near[:2], os.open(os.devnull, os.O_RDONLY))
        assert life.exit() == 0


def test_a_memory_limit_is_a_memory_error_in_the_task() -> None:
    def greedy() -> int:
        return len(bytearray(600 * 1024 * 1024))

    with living(named([definition(greedy)]), runs=2) as life:
        life.start("t.greedy", token="one", memory_limit=500 * 1024 * 1024)
        failure = life.finished("one").failure
        assert failure is not None
        assert failure.exception == "builtins.MemoryError"
        life.start("t.greedy", token="two")
        assert _result(life.finished("two")) == 600 * 1024 * 1024, "the next run has a limit of its own: none"


def test_a_memory_limit_that_cannot_be_set_is_the_attempts_end() -> None:
    def lowers() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2 * 1024**3, 2 * 1024**3))

    with living(named([definition(lowers)]), runs=2) as life:
        life.start("t.lowers", token="one")
        life.finished("one")
        life.start("t.lowers", token="two", memory_limit=3 * 1024**3)
        failure = life.finished("two").failure
        assert failure is not None
        assert failure.exception == "builtins.ValueError"
        assert life.exit() == 0


def test_a_runner_is_protected_and_named() -> None:
    def look() -> dict[str, Any]:
        import random
        import resource

        with open("/proc/self/comm") as comm, open("/proc/self/oom_score_adj") as score:
            return {
                "comm": comm.read().strip(),
                "oom": score.read().strip(),
                "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
                "cpu": resource.getrlimit(resource.RLIMIT_CPU),
                "group": os.getpgid(0) == os.getpid(),
                "stdin": sys.stdin.read(),
                "random": random.random(),
            }

    found = []
    for number in (1, 2):
        with living(named([definition(look)]), id=f"u-{number}", cpu_limit=100) as life:
            life.start("t.look")
            found.append(_result(life.finished()))
    assert found[0]["comm"] == "bh:runner 1"
    assert found[0]["oom"] == "500"
    assert (found[0]["core"], found[0]["cpu"]) == (0, [100, 102])
    assert found[0]["group"]
    assert found[0]["stdin"] == ""
    assert found[0]["random"] != found[1]["random"], "siblings do not draw the same numbers"


def test_a_fatal_signal_is_the_runners_end(tasks: dict[str, TaskDefinition]) -> None:
    with living(tasks) as life:
        life.start("proj.die", int(signal.SIGSEGV))
        assert life.exit() == -signal.SIGSEGV
        assert life.order_of_kinds() == ["Hello", "Started", "Event"]
        assert "Fatal Python error" in _faults(life)


def _faults(life: Any) -> str:
    from taskkit import linux

    return linux.read_from_start(life._ends.faults, 65536).decode()


def test_cancel_is_part_of_the_orders_that_a_runner_knows() -> None:
    assert Cancel(token="x").reason == "cancelled"
