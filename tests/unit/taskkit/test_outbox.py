"""Submitting from Django: in the caller's transaction, with a poke at its commit."""

from __future__ import annotations

import datetime as dt
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import transaction
from django.test import override_settings
from django.utils import timezone
from django.utils.translation import gettext_lazy

from tests.unit.taskkit import under_asyncio

pytestmark = pytest.mark.usefixtures("django_project")


@pytest.fixture(autouse=True)
def _no_cached_addresses(django_project: Any) -> Iterator[None]:
    from taskkit import outbox

    outbox._addresses.clear()
    yield
    outbox._addresses.clear()


@pytest.fixture
def poked(tmp_state_dir: Path) -> Iterator[socket.socket]:
    """Give a bound socket that a fresh node's row names."""
    from taskkit.models import Node

    path = str(tmp_state_dir / "poke.sock")
    Node.objects.create(name="here", poke_address=path, pid=1, seen_at=timezone.now())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.settimeout(5)
        yield sock


def test_a_submission_is_an_outbox_row_with_a_projection() -> None:
    from taskkit.models import Outbox, Run
    from taskkit.outbox import submit

    handle = submit("proj.add", [1], {"b": 2}, priority=5, tags=["x"], metadata={"who": "me"})
    entry = Outbox.objects.get()
    assert str(entry.id) == str(handle) == handle.id
    assert entry.payload == {
        "task": "proj.add",
        "args": [1],
        "kwargs": {"b": 2},
        "priority": 5,
        "tags": ["x"],
        "metadata": {"who": "me"},
    }
    run = handle.run()
    assert (run.status, run.version, run.args, run.kwargs, run.is_finished) == (
        "READY",
        0,
        [1],
        {"b": 2},
        False,
    )
    assert Run.objects.count() == 1


def test_a_rolled_back_transaction_leaves_nothing_and_pokes_nobody(poked: socket.socket) -> None:
    from taskkit.models import Outbox, Run
    from taskkit.outbox import submit

    with transaction.atomic():
        submit("proj.echo")
        transaction.set_rollback(True)
    assert not Outbox.objects.exists()
    assert not Run.objects.exists()
    poked.setblocking(False)
    with pytest.raises(BlockingIOError):
        poked.recv(16)


def test_the_poke_comes_at_the_commit_and_not_before(poked: socket.socket) -> None:
    from taskkit.outbox import submit

    with transaction.atomic():
        submit("proj.echo")
        poked.setblocking(False)
        with pytest.raises(BlockingIOError):
            poked.recv(16)
        poked.settimeout(5)
    assert poked.recv(16)


def test_stale_nodes_are_not_poked(poked: socket.socket) -> None:
    from taskkit.models import Node
    from taskkit.outbox import poke

    Node.objects.update(seen_at=timezone.now() - dt.timedelta(minutes=5))
    poke()
    poked.setblocking(False)
    with pytest.raises(BlockingIOError):
        poked.recv(16)


def test_a_poke_never_raises_and_never_waits(tmp_state_dir: Path) -> None:
    from taskkit import outbox
    from taskkit.models import Node

    full = str(tmp_state_dir / "full.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(full)
        for name, address in (("full", full), ("gone", str(tmp_state_dir / "nothing.sock")), ("odd", "")):
            Node.objects.create(name=name, poke_address=address, pid=1, seen_at=timezone.now())
        for _ in range(2000):  # net.unix.max_dgram_qlen is 512 at most by default
            outbox.poke()
    outbox._addresses.clear()
    outbox.poke("no such database")


def test_an_abstract_address_is_poked() -> None:
    from taskkit.models import Node
    from taskkit.outbox import poke

    name = f"bulkhead-test-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        sock.settimeout(5)
        Node.objects.create(name="here", poke_address="@" + name, pid=1, seen_at=timezone.now())
        poke()
        assert sock.recv(16)


def test_a_deep_state_directory_is_poked(tmp_path: Path) -> None:
    from taskkit import linux
    from taskkit.models import Node
    from taskkit.outbox import poke

    deep = tmp_path / ("d" * 120) / "poke.sock"
    deep.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        with linux.short_socket_path(deep) as path:
            sock.bind(path)
        sock.settimeout(5)
        Node.objects.create(name="here", poke_address=str(deep), pid=1, seen_at=timezone.now())
        poke()
        assert sock.recv(16)


def test_arguments_become_json_at_once() -> None:
    from taskkit.outbox import submit

    moment = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
    mine: dict[str, Any] = {"when": moment, "id": uuid.UUID(int=1), 7: (1, 2), "word": gettext_lazy("Yes")}
    run = submit("proj.echo", [mine]).run()
    mine.clear()
    assert run.args == [
        {"when": "2026-01-02T00:00:00Z", "id": str(uuid.UUID(int=1)), "7": [1, 2], "word": "Yes"}
    ]


@pytest.mark.parametrize("value", [object(), float("nan"), 2**70, lambda: None, "\ud800"])
def test_what_json_cannot_express_is_a_type_error_and_submits_nothing(value: Any) -> None:
    from taskkit.models import Outbox, Run
    from taskkit.outbox import submit

    with pytest.raises(TypeError, match=r"proj\.echo"):
        submit("proj.echo", [value])
    assert not Outbox.objects.exists()
    assert not Run.objects.exists()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"priority": 101}, "priority"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"run_after": dt.datetime(2026, 1, 1)}, "run_after"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], name: str) -> None:
    from taskkit.outbox import submit

    with pytest.raises(ValueError, match=name):
        submit("proj.echo", **options)


@pytest.mark.parametrize("task", ["echo", "", "a b.c", 3, lambda: None])
def test_what_is_no_task_is_refused(task: Any) -> None:
    from taskkit.outbox import submit

    with pytest.raises((TypeError, ValueError), match="task"):
        submit(task)


def test_a_function_is_submitted_by_its_dotted_path() -> None:
    from taskkit.outbox import submit
    from tests.project.tasks import echo

    assert submit(echo).run().task == "tests.project.tasks.echo"


def test_too_many_bytes_are_refused_with_the_limit() -> None:
    from taskkit.outbox import submit

    with override_settings(TASKKIT={"LIMITS": {"body_bytes": 100}}), pytest.raises(ValueError, match="= 100"):
        submit("proj.echo", ["x" * 200])


def test_a_time_from_now_becomes_a_moment() -> None:
    from taskkit.models import Outbox
    from taskkit.outbox import submit

    submit("proj.echo", run_after=dt.timedelta(hours=1), timeout=dt.timedelta(minutes=1))
    payload = Outbox.objects.get().payload
    assert abs(payload["run_after"] - timezone.now().timestamp() - 3600) < 60
    assert payload["timeout"] == 60.0


def test_async_submission_under_asyncio() -> None:
    from taskkit.models import Outbox
    from taskkit.outbox import asubmit

    handle = under_asyncio.run(asubmit("proj.echo", [1]))
    assert str(Outbox.objects.get().id) == handle.id


async def test_async_submission_under_trio() -> None:
    from taskkit.models import Outbox
    from taskkit.outbox import asubmit

    handle = await asubmit("proj.echo", [1])
    assert str(Outbox.objects.get().id) == handle.id
