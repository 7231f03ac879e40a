"""What Django's own backends promise and its tests expect, asked of ours: the test suite of a project that has moved.

    python -m django test tests.interface --pattern contract.py --settings tests.interface.settings

`tests/unit/taskkit/test_contract.py` runs it on this interpreter, `tests/e2e/test_django6.py` on others.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import logging
import pickle
import uuid
from typing import Any

import django
from asgiref.sync import sync_to_async
from django.core.checks import run_checks
from django.db import transaction
from django.test import SimpleTestCase, TestCase, TransactionTestCase, override_settings
from django.utils import timezone
from django.utils.module_loading import import_string

from taskkit import registry
from taskkit.backend import BulkheadBackend, BulkheadTask
from taskkit.models import Outbox, Run
from taskkit.testing import perform_submitted
from tests.interface import orders, tasks
from tests.interface.package import PACKAGE, TaskResultStatus, exceptions, signals, task, task_backends

BACKEND = "taskkit.backend.BulkheadBackend"


def two_backends(**params: Any) -> Any:
    return override_settings(
        TASKS={"default": {"BACKEND": BACKEND, **params}, "second": {"BACKEND": BACKEND, "QUEUES": []}}
    )


class Definitions(SimpleTestCase):
    """Before anything is enqueued."""

    def test_the_backend_is_ours_and_says_what_it_can(self) -> None:
        backend = task_backends["default"]
        self.assertIsInstance(backend, BulkheadBackend)
        self.assertEqual((backend.alias, backend.options), ("default", {}))
        self.assertEqual(backend.queues, {"default", "mail", "slow"})
        for name in ("defer", "async_task", "get_result", "priority"):
            self.assertIs(getattr(backend, f"supports_{name}"), True)
        self.assertEqual([one.id for one in backend.check()], ["taskkit.W002"], "mail has no pool of its own")

    def test_a_decorated_function_is_a_task_that_can_be_imported_by_its_path(self) -> None:
        for one in (orders.confirm, orders.later, tasks.flaky):
            self.assertIsInstance(one, BulkheadTask)
            self.assertIs(import_string(one.module_path), one)
        self.assertEqual((orders.later.name, orders.later.module_path[-12:]), ("later", "orders.later"))
        self.assertIs(orders.later.get_backend(), task_backends["default"])
        with self.assertRaises(TypeError):
            orders.confirm(1, "x")

    def test_using_makes_another_with_other_defaults(self) -> None:
        now = timezone.now()
        changed = orders.later.using(priority=10).using(run_after=now).using(queue_name="mail")
        self.assertEqual((changed.priority, changed.run_after, changed.queue_name), (10, now, "mail"))
        self.assertEqual((orders.later.priority, orders.later.run_after), (0, None))
        same = orders.later.using()
        self.assertEqual(same, orders.later)
        self.assertIsNot(same, orders.later)
        self.assertEqual(hash(orders.later.using(metadata={"a": 1})), hash(orders.later))
        self.assertEqual(copy.deepcopy(changed), changed)

    def test_what_is_not_valid_is_refused_with_django_s_words(self) -> None:
        def nested() -> None: ...

        for make, message in (
            (lambda: task(nested), "Task function must be defined at a module level."),
            (lambda: task(any), "Task function must be defined at a module level."),
            (lambda: task(self.test_what_is_not_valid_is_refused_with_django_s_words), "module level"),
            (
                lambda: task(takes_context=True)(orders.later.func),
                "does not have a first argument of 'context'",
            ),
            (
                lambda: orders.later.using(priority=101),
                "priority must be a whole number between -100 and 100.",
            ),
            (lambda: orders.later.using(priority=-101), "priority must be a whole number"),
            (lambda: orders.later.using(priority=3.1), "priority must be a whole number"),
            (lambda: orders.later.using(queue_name="nowhere"), "Queue 'nowhere' is not valid for backend."),
            (lambda: orders.later.using(run_after=datetime.datetime.now()), "run_after must be an aware"),
        ):
            with self.assertRaisesMessage(exceptions.InvalidTask, message):
                make()
        for priority in (-100, 0, 100):
            self.assertEqual(orders.later.using(priority=priority).priority, priority)

    def test_backends_that_do_not_exist(self) -> None:
        with self.assertRaisesMessage(
            exceptions.InvalidTaskBackend, "The connection 'unknown' doesn't exist."
        ):
            orders.later.using(backend="unknown")
        with override_settings(TASKS={}), self.assertRaises(exceptions.InvalidTaskBackend):
            orders.later.enqueue(1)

    def test_a_task_can_be_called_here(self) -> None:
        self.assertEqual(orders.later.call(42), 42)
        self.assertEqual(orders.confirm.call(1, to="x")["to"], "x")

    async def test_a_task_can_be_awaited_here(self) -> None:
        self.assertEqual(await orders.later.acall(42), 42)
        self.assertEqual((await orders.confirm.acall(1, to="x"))["to"], "x")

    def test_options_by_the_decorator_that_every_version_has(self) -> None:
        self.assertEqual((tasks.flaky.max_attempts, tasks.flaky.metadata), (3, {"colour": "red"}))
        self.assertEqual(tasks.endless.timeout, 0.5)
        self.assertEqual(tasks.flaky.using(metadata={"a": 1}).using(priority=1).metadata, {"a": 1})
        for options, error, message in (
            ({"max_attempts": 0}, exceptions.InvalidTask, "max_attempts"),
            ({"backoff": 3}, exceptions.InvalidTask, "backoff"),
            ({"metadata": {"a": object()}}, exceptions.InvalidTask, "metadata"),
            ({"attempts": 3}, TypeError, "@task has no option 'attempts'; it has "),
            ({"run_after": timezone.now()}, TypeError, "run_after"),
        ):
            with self.assertRaisesMessage(error, message):
                tasks.task(**options)(orders.later.func)

    def test_django_s_own_decorator_takes_our_options_where_it_takes_any(self) -> None:
        if PACKAGE == "django.tasks" and django.VERSION < (6, 1):
            with self.assertRaises(TypeError):
                task(max_attempts=3)
        else:
            self.assertEqual(task(max_attempts=3)(orders.later.func).max_attempts, 3)
            with self.assertRaises(TypeError):
                task(run_after=timezone.now())(orders.later.func)

    def test_another_backend_gets_its_own_task_without_our_options(self) -> None:
        with override_settings(
            TASKS={"default": {"BACKEND": f"{PACKAGE}.backends.immediate.ImmediateBackend"}}
        ):
            made = tasks.task(max_attempts=3, takes_context=True)(tasks.flaky.func)
            self.assertNotIsInstance(made, BulkheadTask)
            self.assertIs(made.takes_context, True)

    def test_what_is_a_task_follows_a_setting_that_a_test_overrides(self) -> None:
        self.assertIn("shop.later", registry.known())
        with override_settings(
            TASKS={"default": {"BACKEND": f"{PACKAGE}.backends.immediate.ImmediateBackend"}}
        ):
            self.assertNotIn("shop.later", registry.known())
        self.assertIn("shop.later", registry.known())

    def test_a_task_can_be_pickled_where_django_s_own_can(self) -> None:
        if PACKAGE == "django.tasks" and django.VERSION >= (6, 1):
            for one in (orders.later, tasks.flaky.using(metadata={"a": [1]}, priority=4)):
                self.assertEqual(pickle.loads(pickle.dumps(one)), one)

    @override_settings(USE_TZ=False)
    def test_without_time_zones_a_naive_time_is_right(self) -> None:
        orders.later.using(run_after=datetime.datetime.now())


class Results(TestCase):
    """Within the transaction of a test, which never commits."""

    def test_what_enqueue_returns_is_ready(self) -> None:
        before = timezone.now()
        for one in (orders.confirm, orders.remember, orders.confirm.using(priority=7)):
            with self.subTest(one):
                result = one.enqueue(1, to="x")
                self.assertEqual(result.status, TaskResultStatus.READY)
                self.assertIs(result.is_finished, False)
                self.assertEqual((result.args, result.kwargs), ([1], {"to": "x"}))
                self.assertEqual((result.task, result.backend), (one, "default"))
                self.assertEqual((result.errors, result.worker_ids, result.attempts), ([], [], 0))
                self.assertEqual(
                    (result.started_at, result.finished_at, result.last_attempted_at), (None,) * 3
                )
                self.assertLessEqual(abs(result.enqueued_at - before), datetime.timedelta(seconds=10))
                self.assertLessEqual(len(result.id), 64)
                with self.assertRaisesMessage(ValueError, "Task has not finished yet"):
                    _ = result.return_value

    async def test_what_aenqueue_returns_is_the_same(self) -> None:
        result = await orders.remember.aenqueue(1, to="x")
        self.assertEqual((result.status, result.task), (TaskResultStatus.READY, orders.remember))
        self.assertEqual(await orders.remember.aget_result(result.id), result)
        await result.arefresh()
        self.assertEqual(result.status, TaskResultStatus.READY)

    def test_the_backend_itself_can_be_asked(self) -> None:
        result = task_backends["default"].enqueue(orders.remember, [], {"a": (1, 2)})
        self.assertEqual((result.args, result.kwargs), ([], {"a": [1, 2]}))

    def test_get_result_finds_it_in_one_query(self) -> None:
        later = timezone.now() + datetime.timedelta(hours=1, microseconds=1)
        for one in (orders.later, orders.later.using(run_after=later, queue_name="mail", metadata={"a": 1})):
            result = one.enqueue({"1": [1, 2.5, None, "é", True]})
            with self.assertNumQueries(1):
                found = task_backends["default"].get_result(result.id)
            self.assertEqual(found, result)
            self.assertEqual(one.get_result(result.id), result)
            with self.assertNumQueries(1):
                result.refresh()
            self.assertEqual(dataclasses.asdict(result), dataclasses.asdict(found))

    def test_what_is_none_of_its_results(self) -> None:
        result = orders.later.enqueue(1)
        for id in ("123", 123, str(uuid.uuid4()), "", None, "é" * 40):
            with self.subTest(id=id), self.assertRaises(exceptions.TaskResultDoesNotExist):
                task_backends["default"].get_result(id)
        with self.assertRaisesMessage(exceptions.TaskResultMismatch, "Task does not match"):
            orders.fail.get_result(result.id)

    async def test_what_is_none_of_its_results_from_a_coroutine(self) -> None:
        result = await orders.later.aenqueue(1)
        with self.assertRaises(exceptions.TaskResultDoesNotExist):
            await task_backends["default"].aget_result("123")
        with self.assertRaises(exceptions.TaskResultMismatch):
            await orders.fail.aget_result(result.id)

    def test_success(self) -> None:
        for one in (orders.remember, orders.later):
            with self.subTest(one):
                result = one.enqueue(value={"a": [1]})
                perform_submitted()
                self.assertEqual(result.status, TaskResultStatus.READY)
                result.refresh()
                self.assertEqual(result.status, TaskResultStatus.SUCCESSFUL)
                self.assertIs(result.is_finished, True)
                self.assertEqual(result.attempts, 1)
                self.assertTrue(result.worker_ids[0])
                self.assertGreaterEqual(result.started_at, result.enqueued_at)
                self.assertGreaterEqual(result.finished_at, result.started_at)
                self.assertEqual(result.last_attempted_at, result.started_at)
                self.assertEqual(result.errors, [])
        self.assertEqual(result.return_value, {"a": [1]})

    def test_nothing_is_a_return_value(self) -> None:
        result = orders.remember.enqueue()
        perform_submitted()
        result.refresh()
        self.assertIsNone(result.return_value)

    def test_failures(self) -> None:
        for one, args, path, ending in (
            (orders.fail, ["no luck"], "builtins.LookupError", "LookupError: no luck\n"),
            (orders.leave, [], "builtins.SystemExit", "SystemExit: 3\n"),
            (orders.tangled, [], "builtins.ValueError", 'ValueError: ValueError("deep")\n'),
            (orders.opaque, [], "builtins.TypeError", ""),
        ):
            with self.subTest(one), self.assertLogs(PACKAGE, "DEBUG") as logged:
                result = one.enqueue(*args)
                perform_submitted()
                result.refresh()
                self.assertEqual(result.status, TaskResultStatus.FAILED)
                self.assertIs(result.is_finished, True)
                self.assertGreaterEqual(result.finished_at, result.started_at)
                with self.assertRaisesMessage(ValueError, "Task failed"):
                    _ = result.return_value
                (error,) = result.errors
                self.assertEqual(error.exception_class_path, path)
                self.assertTrue(error.traceback.endswith(ending), error.traceback)
                self.assertTrue(issubclass(error.exception_class, BaseException))
                self.assertIn("state=FAILED", logged.output[-1])

    def test_what_is_logged(self) -> None:
        with self.assertLogs(PACKAGE, logging.DEBUG) as logged:
            result = orders.remember.enqueue()
            perform_submitted()
        self.assertEqual(len(logged.output), 3)
        for line, words in zip(logged.output, ("enqueued", "state=RUNNING", "state=SUCCESSFUL"), strict=True):
            self.assertIn(words, line)
            self.assertIn(result.id, line)
            self.assertNotIn("NoneType", line)

    def test_signals_come_from_the_class_with_the_result(self) -> None:
        heard: list[tuple[str, Any, str]] = []

        def listen(name: str) -> Any:
            def note(sender: Any, task_result: Any, **_: Any) -> None:
                heard.append((name, sender, str(task_result.status)))

            return note

        for name in ("task_enqueued", "task_started", "task_finished"):
            signal, receiver = getattr(signals, name), listen(name)
            signal.connect(receiver, weak=False)
            self.addCleanup(signal.disconnect, receiver)
        orders.later.enqueue(1)
        perform_submitted()
        self.assertEqual(
            heard,
            [
                ("task_enqueued", BulkheadBackend, "READY"),
                ("task_started", BulkheadBackend, "RUNNING"),
                ("task_finished", BulkheadBackend, "SUCCESSFUL"),
            ],
        )

    def test_the_context(self) -> None:
        result = orders.contextual.enqueue(word="y")
        perform_submitted()
        result.refresh()
        told = result.return_value
        self.assertEqual((told["attempt"], told["id"], told["word"]), (1, result.id, "y"))
        self.assertEqual((told["status"], told["workers"]), ("RUNNING", result.worker_ids))

    def test_attempts(self) -> None:
        result = tasks.flaky.using(metadata={"colour": "blue"}).enqueue(3)
        perform_submitted()
        result.refresh()
        self.assertEqual(result.return_value, {"attempt": 3, "metadata": {"colour": "blue"}})
        self.assertEqual(result.attempts, 3)

    def test_arguments_that_json_does_not_have_are_refused(self) -> None:
        for value in (datetime.datetime.now(), object(), {1, 2}, uuid.uuid4(), lambda: 1):
            with self.subTest(value), self.assertRaises(TypeError):
                orders.remember.enqueue(value)
            with self.subTest(value), self.assertRaises(TypeError):
                orders.remember.enqueue(deep={"a": [value]})
        self.assertEqual((Run.objects.count(), Outbox.objects.count()), (0, 0))

    async def test_so_they_are_from_a_coroutine(self) -> None:
        with self.assertRaises(TypeError):
            await orders.remember.aenqueue(datetime.datetime.now())

    def test_a_task_is_checked_again_when_it_is_enqueued(self) -> None:
        mailed = orders.later.using(queue_name="mail")
        result = mailed.enqueue(1)
        with two_backends(QUEUES=["default"]):
            with self.assertRaisesMessage(exceptions.InvalidTask, "Queue 'mail' is not valid for backend."):
                mailed.enqueue(1)
            self.assertEqual(task_backends["default"].get_result(result.id).status, TaskResultStatus.READY)

    @two_backends()
    def test_another_backend_of_ours_keeps_its_results_to_itself(self) -> None:
        result = orders.later.using(backend="second", queue_name="anything").enqueue(1)
        self.assertEqual((result.backend, result.task.queue_name), ("second", "anything"))
        found = task_backends["second"].get_result(result.id)
        self.assertEqual((found, found.backend), (result, "second"))
        with self.assertRaises(exceptions.TaskResultDoesNotExist):
            task_backends["default"].get_result(result.id)
        perform_submitted()
        found.refresh()
        self.assertEqual(found.return_value, 1)

    def test_a_result_can_be_pickled_where_django_s_own_can(self) -> None:
        result = orders.later.enqueue({"a": [1]})
        if PACKAGE == "django.tasks" and django.VERSION >= (6, 1):
            self.assertEqual(pickle.loads(pickle.dumps(result)), result)

    def test_the_project_s_checks_have_nothing_to_say(self) -> None:
        self.assertEqual([one for one in run_checks() if one.id not in ("taskkit.W002",)], [])


class Transactions(TransactionTestCase):
    """Where Django's own documentation has `transaction.on_commit(partial(task.enqueue, …))`."""

    def test_it_is_part_of_the_transaction(self) -> None:
        with transaction.atomic():
            kept = orders.later.enqueue(1)
            self.assertEqual(orders.later.get_result(kept.id).status, TaskResultStatus.READY)
            with self.assertRaises(LookupError), transaction.atomic():
                lost = orders.later.enqueue(2)
                raise LookupError
        self.assertEqual(orders.later.get_result(kept.id), kept)
        with self.assertRaises(exceptions.TaskResultDoesNotExist):
            orders.later.get_result(lost.id)

    def test_on_commit_works_as_well(self) -> None:
        with transaction.atomic():
            transaction.on_commit(lambda: orders.later.enqueue(1))
            self.assertIsNone(orders.later.enqueue_on_commit(2))
            self.assertEqual(Run.objects.count(), 0)
        self.assertEqual(sorted(Run.objects.values_list("args", flat=True)), [[1], [2]])

    async def test_from_a_coroutine(self) -> None:
        result = await orders.later.aenqueue(1)
        await sync_to_async(perform_submitted)()
        await result.arefresh()
        self.assertEqual(result.return_value, 1)
