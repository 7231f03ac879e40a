"""Submitting from Django: in the caller's transaction, with a poke at its commit."""

from __future__ import annotations

import datetime as dt
import json
import socket
import time
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
    mine: dict[Any, Any] = {"when": moment, "id": uuid.UUID(int=1), 7: (1, 2), "word": gettext_lazy("Yes")}
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

    assert submit(echo).run().task == "proj.echo"
    assert submit("tests.project.tasks.echo").run().task == "proj.echo"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("proj.ecko", "did you mean 'proj.echo'?"),
        ("tests.project.tasks.ecko", "did you mean 'tests.project.tasks.echo'?"),
        ("zzz.qqq", "in the tasks module of an installed app"),
    ],
)
def test_a_task_that_does_not_exist_is_refused_with_advice(name: str, words: str) -> None:
    from taskkit.errors import UnknownTask
    from taskkit.models import Outbox, Run
    from taskkit.outbox import submit

    with pytest.raises(UnknownTask) as caught:
        submit(name)
    assert words in str(caught.value)
    assert not Outbox.objects.exists()
    assert not Run.objects.exists()


def test_a_function_that_is_no_task_is_refused() -> None:
    from taskkit.errors import UnknownTask
    from taskkit.outbox import submit

    with pytest.raises(UnknownTask, match=r"'json\.dumps'|'json\.__init__\.dumps'"):
        submit(json.dumps)


def test_arguments_that_do_not_fit_are_refused_by_parameter() -> None:
    from taskkit.errors import InvalidArguments
    from taskkit.models import Outbox, Run
    from taskkit.outbox import submit

    with pytest.raises(InvalidArguments, match=r"^proj\.add: ") as caught:
        submit("proj.add", kwargs={"a": "one", "c": 3})
    assert set(caught.value.errors) == {"a", "b", "c"}
    assert not Outbox.objects.exists()
    assert not Run.objects.exists()


def test_a_task_model_by_name_wants_its_row() -> None:
    from taskkit.outbox import submit

    with pytest.raises(TypeError, match=r"proj\.Row is a task model"):
        submit("proj.Row")


def test_a_refused_submission_leaves_the_transaction_around_it_usable() -> None:
    from taskkit.errors import UnknownTask
    from taskkit.models import Outbox
    from taskkit.outbox import submit

    with transaction.atomic():
        with pytest.raises(UnknownTask):
            submit("proj.nothing")
        kept = submit("proj.echo")
    assert str(Outbox.objects.get().id) == kept.id


def test_the_handle_gives_a_token_for_its_run_alone(tmp_state_dir: Path) -> None:
    from taskkit import tokens
    from taskkit.outbox import submit

    key = tokens.load_or_create_key(tmp_state_dir / "key")
    handle = submit("proj.echo")
    with override_settings(TASKKIT={"STATE_DIR": tmp_state_dir}):
        claims = tokens.verify(key, handle.token(actions=["read", "cancel"], subject="ann"))
        with pytest.raises(ValueError, match="fly"):
            handle.token(actions=["fly"])
    assert claims.runs == frozenset({handle.id})
    assert claims.actions == frozenset({"read", "cancel"})
    assert claims.tasks == ()
    assert claims.subject == "ann"
    assert 3500 < claims.expires_at - time.time() <= 3600


def test_a_token_without_a_key_says_what_to_do(tmp_state_dir: Path) -> None:
    from taskkit.errors import SettingsError
    from taskkit.outbox import submit

    missing = tmp_state_dir / "nothing"
    with override_settings(TASKKIT={"KEY_FILE": missing}), pytest.raises(SettingsError) as caught:
        submit("proj.echo").token()
    for words in (str(missing), "bulkhead run", "KEY_FILE"):
        assert words in str(caught.value)
    assert not missing.exists()


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


def test_a_child_with_a_key_is_submitted_once() -> None:
    from taskkit.identifiers import new_run_id, run_id_time
    from taskkit.models import Outbox
    from taskkit.outbox import submit

    parent = new_run_id()
    first, again = (submit("proj.add", [1, 2], parent=parent, key="sum") for _ in range(2))
    other = submit("proj.add", [1, 2], parent=new_run_id(), key="sum")
    assert (first.id, first.new, again.new, again.parent) == (again.id, True, False, parent)
    assert run_id_time(first.id) == run_id_time(parent)
    assert other.id != first.id
    assert Outbox.objects.count() == 2
    with pytest.raises(ValueError, match="other arguments"):
        submit("proj.add", [1, 3], parent=parent, key="sum")
    with pytest.raises(ValueError, match="no parent"):
        submit("proj.add", [1, 3], key="sum")


def test_relatives_are_named_by_handle_row_or_id() -> None:
    from taskkit import chain, group, step
    from taskkit.models import Outbox
    from taskkit.outbox import submit

    first = submit("proj.echo")
    second = submit("proj.echo", after=[first, first.run(), first.id])
    assert Outbox.objects.get(id=second.id).payload["after"] == [first.id] * 3
    with pytest.raises(ValueError, match="is no run"):
        submit("proj.echo", parent="nobody")
    both = group([step("proj.echo", 1), step("proj.echo", 2).having(priority=7)], tags=["x"])
    ends = chain(step("proj.echo"), [step("proj.echo"), step("proj.echo")], step("proj.echo"), after=both)
    entries = {str(entry.id): entry.payload for entry in Outbox.objects.all()}
    assert [entries[one.id].get("priority") for one in both] == [None, 7]
    assert [entries[one.id]["tags"] for one in both] == [["x"]] * 2
    assert [entries[one.id]["after"] for one in ends] == [
        [one.id for one in both],
        *[[ends[0].id]] * 2,
        [ends[1].id, ends[2].id],
    ]
    before = Outbox.objects.count()
    with pytest.raises(TypeError):
        group([step("proj.echo"), step("proj.echo", object())])
    assert Outbox.objects.count() == before, "all or none"


def test_a_key_that_nothing_can_share_is_refused() -> None:
    from taskkit.outbox import submit

    with pytest.raises(ValueError, match="concurrency"):
        submit("proj.echo", concurrency_key="a")
    assert submit("proj.narrow", concurrency_key="a").new
