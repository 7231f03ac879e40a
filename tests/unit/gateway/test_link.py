"""The gateway's side of the courier, with a courier played by hand."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import trio

from gateway import link
from gateway.link import transition_of
from gateway.store.rows import RunRow
from taskkit import linux, seqpacket
from taskkit.channel import Channel
from taskkit.errors import NotWritable
from taskkit.identifiers import new_run_id
from taskkit.lifecycle import RunStatus
from taskkit.wire.codec import pack
from taskkit.wire.messages import (
    Answer,
    Ask,
    Forgotten,
    GatewayToCourier,
    Message,
    Recall,
    Row,
    Submit,
    Submitted,
    Told,
    Transition,
)
from tests.unit.gateway.gate import ROW_TASK, Gate, gate, submission

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
            assert await courier.next(Submitted) == Submitted(id=submit.id, run=submit.id)
        (run,) = g.engine.book.runs.values()
        assert (run.id, run.priority, run.tags, run.subject) == (submit.id, 3, ("a",), "bob")
        assert (run.using, run.origin, run.kwargs) == ("other", "outbox", b'{"n":5}')


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
        assert await courier.next(Submitted) == Submitted(id=second.id, run=first.id)


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
