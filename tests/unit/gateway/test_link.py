"""The gateway's side of the courier, with a courier played by hand."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import trio

from gateway import link
from gateway.link import transition_of
from gateway.store.rows import RunFilter, RunRow
from taskkit import linux, seqpacket
from taskkit.channel import Channel
from taskkit.errors import NotWritable
from taskkit.identifiers import new_run_id
from taskkit.lifecycle import RunStatus
from taskkit.wire.codec import pack
from taskkit.wire.messages import (
    Answer,
    Ask,
    Company,
    Disown,
    Disowned,
    Forgotten,
    GatewayToCourier,
    Locate,
    Located,
    Message,
    Recall,
    Row,
    Submit,
    Submitted,
    Taken,
    Told,
    Transition,
)
from tests.unit.gateway.gate import ROW_TASK, Gate, HandRunner, gate, submission

_M = TypeVar("_M", bound=Message)


class Courier:
    """The other end of the link."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.channel: Channel[Any] = Channel(sock, GatewayToCourier)

    async def next(self, kind: type[_M]) -> _M:
        """Return the next message of that kind; others are passed over."""
        with trio.fail_after(20):
            while True:
                message, _ = await self.channel.receive()
                if isinstance(message, kind):
                    return message


@asynccontextmanager
async def linked(g: Gate) -> AsyncIterator[Courier]:
    """Give a courier that is linked to the gateway."""
    ours, theirs = linux.seqpacket_pair()
    courier = Courier(ours)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(g.engine.courier.run, theirs.detach())
        nursery.start_soon(courier.channel.run)
        await g.until(lambda: g.engine.courier.up)
        try:
            yield courier
        finally:
            nursery.cancel_scope.cancel()
            courier.channel.close()


async def test_an_outbox_row_becomes_a_run_and_only_one(tmp_path: Path) -> None:
    async with gate(tmp_path) as g, linked(g) as courier:
        submit = Submit(
            id=new_run_id(), task="t.f", kwargs={"n": 5}, priority=3, tags=["a"], subject="bob", using="other"
        )
        courier.channel.send(submit)
        courier.channel.send(submit)
        for _ in range(2):
            answer = await courier.next(Submitted)
            assert (answer.id, answer.run, answer.code) == (submit.id, submit.id, "")
            assert answer.fence == g.engine.book.runs[1].fence != ""
        (run,) = g.engine.book.runs.values()
        assert (run.id, run.priority, run.tags, run.subject) == (submit.id, 3, ("a",), "bob")
        assert (run.using, run.origin, run.kwargs) == ("other", "outbox", b'{"n":5}')


async def test_rows_that_come_at_once_become_runs_in_their_order(tmp_path: Path) -> None:
    async with gate(tmp_path) as g, linked(g) as courier:
        for _ in range(5):  # an order that is left to chance is right once in a while
            ids = [new_run_id() for _ in range(20)]
            for id in ids:
                courier.channel.send(Submit(id=id, task="t.f"))
            for _ in ids:
                await courier.next(Submitted)
            assert [run.id for _, run in sorted(g.engine.book.runs.items())][-20:] == ids


async def test_a_row_may_come_before_the_one_that_it_comes_after(tmp_path: Path) -> None:
    async with gate(tmp_path) as g, linked(g) as courier:
        first, second = Submit(id=new_run_id(), task="t.f"), Submit(id=new_run_id(), task="t.f")
        courier.channel.send(msgspec.structs.replace(second, after=[first.id]))
        await trio.sleep(0.1)
        courier.channel.send(first)
        assert {(await courier.next(Submitted)).run for _ in range(2)} == {first.id, second.id}
        assert g.engine.book.waiting == 2
        assert len(g.engine.book.flows) == 1


async def test_a_row_that_comes_after_a_refused_one_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "_RELATIVE_SECONDS", 600.0)
    async with gate(tmp_path) as g, linked(g) as courier:
        bad = Submit(id=new_run_id(), task="t.none")
        courier.channel.send(bad)
        assert (await courier.next(Submitted)).code == "unknown-task"
        courier.channel.send(Submit(id=new_run_id(), task="t.f", after=[bad.id]))
        answer = await courier.next(Submitted)
        assert (answer.code, bad.id in answer.error) == ("invalid-arguments", True)


async def test_a_row_that_comes_after_none_is_refused_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "_RELATIVE_SECONDS", 0.1)
    async with gate(tmp_path) as g, linked(g) as courier:
        courier.channel.send(Submit(id=new_run_id(), task="t.f", after=[new_run_id()]))
        assert (await courier.next(Submitted)).code == "invalid-arguments"
        assert g.engine.book.waiting == 0


async def test_a_child_that_the_gateway_refuses_has_failed_for_its_parent(tmp_path: Path) -> None:
    async with gate(tmp_path) as g, linked(g) as courier:
        parent, bad = Submit(id=new_run_id(), task="t.f"), Submit(id=new_run_id(), task="t.none")
        courier.channel.send(parent)
        await courier.next(Submitted)
        courier.channel.send(msgspec.structs.replace(bad, parent=parent.id))
        assert (await courier.next(Submitted)).code == "unknown-task"
        run = g.engine.book.find(parent.id)
        assert run is not None
        assert (run.children, run.children_ended, run.children_failed) == (1, 1, 1)


@pytest.mark.parametrize(
    ("changes", "code", "word"),
    [
        ({"task": "t.none"}, "unknown-task", "t.none"),
        ({"kwargs": {"n": "x"}}, "invalid-arguments", "n"),
        ({"pool": "none"}, "invalid-arguments", "pool"),
    ],
)
async def test_a_row_that_cannot_run_is_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], code: str, word: str
) -> None:
    async with gate(tmp_path) as g, linked(g) as courier:
        courier.channel.send(Submit(**{"id": new_run_id(), "task": "t.f"} | changes))
        answer = await courier.next(Submitted)
        assert (answer.run, answer.code) == ("", code)
        assert word in answer.error


async def test_a_row_that_runs_already_is_answered_with_that_run(tmp_path: Path) -> None:
    async with gate(tmp_path) as g, linked(g) as courier:
        row = Row(app="t", model="Row", pk=1)
        first, second = (Submit(id=new_run_id(), task="t.Row", row=row) for _ in range(2))
        courier.channel.send(first)
        assert (await courier.next(Submitted)).run == first.id
        courier.channel.send(second)
        answer = await courier.next(Submitted)
        assert (answer.id, answer.run, answer.code, answer.fence) == (second.id, first.id, "", "")


async def test_every_change_is_told_until_it_is_confirmed(tmp_path: Path) -> None:
    async with gate(tmp_path) as g:
        run = await g.submit()
        async with linked(g) as courier:
            told = await courier.next(Transition)
            assert (told.run, told.version, told.status) == (run.id, 1, "READY")
            await g.engine.cancel(run, None)
            told = await courier.next(Transition)
            assert (told.version, told.status) == (2, "CANCELLED")
        async with linked(g) as courier:  # nothing was confirmed: the next courier hears of it
            told = await courier.next(Transition)
            assert told.version == 2
            courier.channel.send(Told(run=run.id, version=2))
            await g.until(lambda: not g.engine.book.untold)
        await g.engine.flush()
    async with gate(tmp_path) as g:
        assert not g.engine.book.untold


async def test_an_old_confirmation_leaves_the_new_state_to_be_told(tmp_path: Path) -> None:
    async with gate(tmp_path) as g, linked(g) as courier:
        run = await g.submit()
        await courier.next(Transition)
        await g.engine.cancel(run, None)
        courier.channel.send(Told(run=run.id, version=1))
        assert (await courier.next(Transition)).version == 2
        await g.engine.flush()
        assert list(g.engine.book.untold) == [run.no]
        courier.channel.send(Told(run=run.id, version=2))
        courier.channel.send(Told(run="nobody's", version=9))
        await g.until(lambda: not g.engine.book.untold)


async def test_no_more_than_a_window_is_unanswered(tmp_path: Path) -> None:
    async with gate(tmp_path) as g:
        runs = [await g.submit() for _ in range(250)]
        async with linked(g) as courier:
            seen: set[str] = set()
            for _ in range(100):
                seen.add((await courier.next(Transition)).run)
            await g.engine.flush()
            with pytest.raises(BlockingIOError):
                seqpacket.receive(courier.sock)
            while len(seen) < 250:
                for id in list(seen):
                    courier.channel.send(Told(run=id, version=1))
                seen.add((await courier.next(Transition)).run)
            assert seen == {run.id for run in runs}


async def test_a_question_is_answered(tmp_path: Path) -> None:
    async with gate(tmp_path) as g, linked(g) as courier, trio.open_nursery() as nursery:
        answers: list[Answer] = []

        async def ask() -> None:
            answers.append(await g.engine.ask("t", "Row", "7"))

        nursery.start_soon(ask)
        question = await courier.next(Ask)
        assert (question.app, question.model, question.pk) == ("t", "Row", "7")
        courier.channel.send(Answer(ask="another", status="found"))
        courier.channel.send(Answer(ask=question.ask, status="unknown"))
        await g.until(lambda: answers)
        assert answers[0].status == "unknown"


async def test_questions_without_a_courier_or_an_answer_or_a_database_are_503(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.link._ASK_SECONDS", 0.1)
    async with gate(tmp_path) as g:
        with pytest.raises(NotWritable, match="courier is away"):
            await g.engine.ask("t", "Row", "7")
        async with linked(g) as courier:
            with pytest.raises(NotWritable, match="no answer"):
                await g.engine.ask("t", "Row", "7")
            question = await courier.next(Ask)
            monkeypatch.undo()

            async def away() -> None:
                late = await courier.next(Ask)
                courier.channel.send(Answer(ask=question.ask, status="found"))  # nobody waits for it any more
                courier.channel.send(Answer(ask=late.ask, status="away", detail="no such host"))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(away)
                with pytest.raises(NotWritable, match="no such host"):
                    await g.engine.ask("t", "Row", "7")


async def test_a_courier_that_breaks_the_protocol_is_let_go(tmp_path: Path) -> None:
    async with gate(tmp_path) as g:
        async with linked(g) as courier:
            courier.sock.send(b"\x00garbage")
            await _gone(g)
        run = await g.submit()
        assert run.status is RunStatus.READY, "streams and runs go on without it"


async def test_a_new_link_takes_the_old_ones_place(tmp_path: Path) -> None:
    async with gate(tmp_path) as g:
        async with linked(g) as old:
            async with linked(g) as new:
                with pytest.raises(trio.EndOfChannel):
                    await old.channel.receive()
                run = await g.submit()
                assert (await new.next(Transition)).run == run.id
                assert g.engine.courier.up
        await _gone(g)


async def test_messages_of_the_wrong_side_are_refused(tmp_path: Path) -> None:
    async with gate(tmp_path) as g, linked(g) as courier:
        seqpacket.send(courier.sock, pack(Submitted(id="x")))
        await _gone(g)


async def _gone(g: Gate) -> None:
    await g.until(lambda: not g.engine.courier.up)


def test_a_transition_carries_the_run_as_it_stands() -> None:
    run = RunRow(
        no=1,
        id="r",
        task="t.f",
        args=b"[1]",
        kwargs=b'{"a":2}',
        row=b'{"app":"t","model":"Row","pk":7}',
        status=RunStatus.FAILED,
        version=4,
        attempt=2,
        result=None,
        error=b'{"code":"raised"}',
        metadata=b'{"m":1}',
        tags=("x",),
        using="other",
        created_at=1.0,
        started_at=2.0,
        finished_at=3.0,
    )
    told = transition_of(run)
    assert (told.version, told.status, told.attempt, told.using) == (4, "FAILED", 2, "other")
    assert told.row == Row(app="t", model="Row", pk=7)
    assert (told.args, told.kwargs, told.metadata) == (b"[1]", b'{"a":2}', b'{"m":1}')
    assert (told.error, told.result, told.tags) == (b'{"code":"raised"}', None, ["x"])
    assert (told.created_at, told.started_at, told.finished_at) == (1.0, 2.0, 3.0)


async def test_the_idempotency_key_of_a_row_over_http_comes_along(tmp_path: Path) -> None:
    """Its gateway died before the run was accepted: a repetition by key finds the run that the outbox has brought."""
    async with gate(tmp_path) as g, linked(g) as courier:
        row = Row(app="t", model="Row", pk=1)
        first = Submit(id=new_run_id(), task="t.Row", row=row, subject="ann", key="k", digest=b"1")
        courier.channel.send(first)
        assert (await courier.next(Submitted)).run == first.id
        again = submission(task=ROW_TASK, args=b"[]", key="k", digest=b"1")
        run, replayed = await g.engine.submit(again)
        assert (run.id, replayed) == (first.id, True)
        courier.channel.send(Submit(id=new_run_id(), task="t.Row", subject="ann", key="k", digest=b"2"))
        assert (await courier.next(Submitted)).code == "idempotency-conflict"


async def test_what_django_holds_to_be_open_is_put_right(tmp_path: Path) -> None:
    async with gate(tmp_path) as g:
        open, ended, untold = await g.submit(), await g.submit(), await g.submit()
        await g.engine.cancel(ended, None)
        async with linked(g) as courier:
            for _ in range(3):
                await courier.next(Transition)
            for run, version in ((open, 1), (ended, 2)):
                courier.channel.send(Told(run=run.id, version=version))
            await g.until(lambda: list(g.engine.book.untold) == [untold.no])
            unknown = new_run_id()
            asked = {open.id: 1, ended.id: 1, untold.id: 0, unknown: 5}
            courier.channel.send(Recall(runs=asked))
            told = await courier.next(Transition)
            assert (told.run, told.version, told.status) == (ended.id, 2, "CANCELLED")
            assert await courier.next(Forgotten) == Forgotten(run=unknown)
            courier.channel.send(Told(run=ended.id, version=2))
            courier.channel.send(Recall(runs={unknown: 0}))
            assert await courier.next(Forgotten) == Forgotten(run=unknown)


async def test_more_than_memory_holds_is_told_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Django's database was away for long: everything is told all the same, and memory stays bounded."""
    monkeypatch.setattr(link, "_PAGE", 7)
    async with gate(tmp_path) as g:
        untold = g.engine.book.untold
        untold._most = 10
        runs = [await g.submit() for _ in range(40)]
        for run in runs[:30]:
            await g.engine.cancel(run, 0.0)
        assert (len(untold), untold.more) == (10, True)
        told: dict[str, int] = {}
        async with linked(g) as courier:
            while len(told) < 40 or untold.more or untold:
                with trio.move_on_after(0.5):
                    transition = await courier.next(Transition)
                    told[transition.run] = transition.version
                    courier.channel.send(Told(run=transition.run, version=transition.version))
                assert len(untold) <= 10
        assert told == {run.id: 2 if run in runs[:30] else 1 for run in runs}


async def test_a_run_that_is_another_nodes_is_let_go_of_and_can_come_back(tmp_path: Path) -> None:
    async with gate(tmp_path) as g, linked(g) as courier:
        id = new_run_id()
        courier.channel.send(Submit(id=id, task="t.f", fence="f1"))
        assert (await courier.next(Submitted)).fence == "f1"
        courier.channel.send(Disown(run=id, fence="other"))
        assert await courier.next(Disowned) == Disowned(run=id, fence="other")
        assert g.engine.book.find(id) is not None, "only the copy that is meant"
        courier.channel.send(Disown(run=id, fence="f1"))
        assert await courier.next(Disowned) == Disowned(run=id, fence="f1")
        assert await g.engine.store.run(id) is None
        assert await g.engine.store.runs(RunFilter()) == []
        courier.channel.send(Disown(run=id, fence="f1"))
        assert await courier.next(Disowned) == Disowned(run=id, fence="f1"), "also what is not there"
        taken = Taken(node="n2", moves=2, version=9, attempt=1, began=True, created_at=time.time())
        courier.channel.send(Submit(id=id, task="t.f", fence="f3", taken=taken))
        assert (await courier.next(Submitted)).fence == "f3"
        run = await g.engine.store.run(id)
        assert run is not None
        assert (run.fence, run.epoch, run.attempt, run.no) == ("f3", 2000, 1, 2)
        told = await courier.next(Transition)
        assert (told.fence, told.version) == ("f3", 10)


async def test_a_copy_of_earlier_times_is_not_taken_for_the_run_that_came_back(tmp_path: Path) -> None:
    async with gate(tmp_path) as g, linked(g) as courier:
        id = new_run_id()
        courier.channel.send(Submit(id=id, task="t.f", fence="f1"))
        await courier.next(Submitted)
        again = Submit(id=id, task="t.f", fence="f2", taken=Taken(node="n2", moves=1, version=3))
        for _ in range(2):  # the second time it is a repetition
            courier.channel.send(again)
            assert (await courier.next(Submitted)).fence == "f2"
        assert [run.fence for run in g.engine.book.runs.values()] == ["f2"]


async def test_where_a_run_is_is_asked_only_in_company(tmp_path: Path) -> None:
    async with gate(tmp_path) as g, linked(g) as courier:
        assert await g.engine.locate("x") is None
        courier.channel.send(Company(shared=True))
        await g.until(lambda: g.engine.courier.shared)
        found: list[Located | None] = []

        async def locate() -> None:
            found.append(await g.engine.locate("x"))

        async with trio.open_nursery() as nursery:
            for status in ("found", "unknown"):
                nursery.start_soon(locate)
                asked = await courier.next(Locate)
                courier.channel.send(Located(ask=asked.ask, status=status, url="http://there"))
                await g.until(lambda status=status: len(found) == 1 + (status == "unknown"))
        assert [None if one is None else one.url for one in found] == ["http://there", None]


async def test_a_transition_says_what_another_node_would_need(tmp_path: Path) -> None:
    async with gate(tmp_path) as g, linked(g) as courier:
        run = await g.submit(max_attempts=3, timeout=5.0, priority=2)
        told = await courier.next(Transition)
        assert told.fence == run.fence
        assert msgspec.json.decode(told.options) == {
            "pool": "default",
            "priority": 2,
            "max_attempts": 3,
            "timeout": 5.0,
            "subject": "ann",
        }


async def test_a_repetition_by_http_of_what_is_another_nodes_makes_no_second_run(tmp_path: Path) -> None:
    async with gate(tmp_path) as g, linked(g) as courier:
        run = await g.submit(key="k", digest=b"d")
        courier.channel.send(Disown(run=run.id, fence=run.fence))
        id = (await courier.next(Disowned)).run
        again, before = await g.engine.submit(submission(key="k", digest=b"d"))
        assert (again.id, before, again.status) == (id, True, RunStatus.READY)
        assert not g.engine.book.runs


async def test_no_run_begins_before_it_is_known_whose_it_is(tmp_path: Path) -> None:
    async with gate(tmp_path) as g:
        g.engine.hold(60.0)
        mine, theirs = await g.submit(), await g.submit()
        id = theirs.id
        runner = HandRunner()
        runner.up(g.engine)
        runner.hello()
        async with linked(g) as courier:
            await g.engine.flush()
            assert not g.engine.book.attempts
            courier.channel.send(Disown(run=id, fence=theirs.fence))
            courier.channel.send(Company(shared=True))
            await courier.next(Disowned)
            await g.until(lambda: len(g.engine.book.attempts) == 1)
            assert [attempt.run.id for attempt in g.engine.book.attempts.values()] == [mine.id]
            await g.until(lambda: not g.engine.book.held)
        assert await g.engine.store.upkeep.noted(link.SHARED) == "yes"
        runner.close()


async def test_whoever_hears_nothing_begins_by_himself(tmp_path: Path) -> None:
    async with gate(tmp_path) as g:
        g.engine.hold(0.05)
        await g.submit()
        runner = HandRunner()
        runner.up(g.engine)
        runner.hello()
        await g.until(lambda: len(g.engine.book.attempts) == 1)
        runner.close()
