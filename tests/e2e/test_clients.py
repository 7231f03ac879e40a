"""`get_client` against a real gateway over a line that keeps breaking: plain, asyncio and trio see the same."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest
import trio

from taskkit.client import Client, close_clients, get_client
from taskkit.errors import GatewayError, RunCrashed, RunError, RunFailed, RunWasCancelled
from tests.helpers import Tree
from tests.proxy import Proxy

#: Keys of `run.started` that say which process it was.
PROCESS = ("pid", "runner")

#: A run that does not exist.
NOBODY = "0190b5a0-0000-7000-8000-000000000001"


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """Give a tree with the tests' tasks."""
    with Tree(runners=4) as tree:
        yield tree


class Plain:
    """The synchronous face, spelt like the asynchronous one so that one scenario fits all."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def follow(self, run: str, stop: int | None = None, **options: Any) -> list[tuple[str, str, Any]]:
        """Return the events of a run, or the first `stop`."""
        events = self._client.follow(run, **options)
        found = [(event.id, event.type, event.data) for event in itertools.islice(events, stop)]
        events.close()  # type: ignore[attr-defined]
        return found

    async def lines(self, run: str) -> list[str]:
        """Return what a run printed."""
        return list(self._client.lines(run))

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(self._client, name)(*args, **kwargs)

        return call


class Asynchronous:
    """The asynchronous face without its `a`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def follow(self, run: str, stop: int | None = None, **options: Any) -> list[tuple[str, str, Any]]:
        """Return the events of a run, or the first `stop`."""
        found: list[tuple[str, str, Any]] = []
        async with aclosing(self._client.afollow(run, **options)) as events:
            async for event in events:
                found.append((event.id, event.type, event.data))
                if len(found) == stop:
                    break
        return found

    async def lines(self, run: str) -> list[str]:
        """Return what a run printed."""
        async with aclosing(self._client.alines(run)) as lines:
            return [line async for line in lines]

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        found: Callable[..., Awaitable[Any]] = getattr(self._client, f"a{name}")
        return found


Face = Plain | Asynchronous
Scenario = Callable[[Face], Awaitable[Any]]


def in_nothing(client: Client, scenario: Scenario) -> Any:
    """Run a scenario with plain calls: it never waits, so one step is all."""
    try:
        scenario(Plain(client)).__await__().send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("a plain call has waited")


async def _with(client: Client, scenario: Scenario) -> Any:
    try:
        return await scenario(Asynchronous(client))
    finally:
        await client.aclose()


def in_asyncio(client: Client, scenario: Scenario) -> Any:
    """Run a scenario in asyncio."""
    return asyncio.run(_with(client, scenario))


def in_trio(client: Client, scenario: Scenario) -> Any:
    """Run a scenario in trio."""
    return trio.run(_with, client, scenario)


WORLDS = [in_nothing, in_asyncio, in_trio]


def anonymous(events: list[tuple[str, str, Any]]) -> list[tuple[str, str, Any]]:
    """Return events without what differs from run to run."""
    return [
        (id, type, {key: value for key, value in data.items() if key not in PROCESS and key[0] != "_"})
        for id, type, data in events
    ]


async def whole(client: Face) -> Any:
    """Submit, follow from the start, ask for the result."""
    run = (await client.submit("proj.count", kwargs={"n": 200, "delay": 0.002}))["id"]
    return anonymous(await client.follow(run)), await client.result(run, timeout=10)


async def in_pieces(client: Face) -> Any:
    """Follow in pieces, each from the last cursor; then from behind the end."""
    run = (await client.submit("proj.count", kwargs={"n": 60}))["id"]
    first = await client.follow(run, 10)
    second = await client.follow(run, 20, after=first[-1][0])
    third = await client.follow(run, after=second[-1][0])
    return anonymous(first + second + third), await client.follow(run, after=third[-1][0])


async def output(client: Face) -> Any:
    """Read what a run printed, as events and as lines."""
    run = (await client.submit("proj.chatty", kwargs={"lines": 20}))["id"]
    logs = [data["text"] for _, type, data in await client.follow(run, include_log=True) if type == "log"]
    return logs, await client.lines(run)


async def endings(client: Face) -> Any:
    """End runs badly in every way; return what is raised, and whose word it is."""
    told: list[tuple[str, str, str]] = []
    for task, kwargs in (("proj.boom", {"message": "no luck"}), ("proj.die", {}), ("proj.patient", {})):
        run = (await client.submit(task, kwargs=kwargs, max_attempts=1))["id"]
        if task == "proj.patient":
            await client.follow(run, 2)
            await client.cancel(run, grace=5)
        try:
            await client.result(run, timeout=10)
        except RunError as error:
            told.append((type(error).__name__, error.snapshot["status"], error.snapshot["error"]["code"]))
    return told


async def refusals(client: Face) -> Any:
    """Ask for what there is not; return the words."""
    told: list[tuple[int, str]] = []
    for call in (
        lambda: client.status(NOBODY),
        lambda: client.follow(NOBODY),
        lambda: client.result(NOBODY),
        lambda: client.submit("proj.nothing"),
        lambda: client.submit("proj.add", kwargs={"a": 1, "b": "x"}),
    ):
        try:
            await call()
        except GatewayError as error:
            told.append((error.problem["status"], error.problem["type"]))
    return told


async def two_submissions_of_one_key(client: Face) -> Any:
    """Submit twice under one key; return whether that was one run, and what it came to."""
    ids = {
        (await client.submit("proj.echo", kwargs={"value": 7}, idempotency_key=f"k-{id(client)}"))["id"]
        for _ in "ab"
    }
    return len(ids), await client.result(ids.pop(), timeout=10)


async def late(client: Face) -> Any:
    """Join a run late: from the newest event, then live."""
    run = (await client.submit("proj.patient"))["id"]
    await client.follow(run, 2)
    latest = await client.follow(run, 1, after="latest")
    await client.cancel(run)
    rest = await client.follow(run, after=latest[-1][0])
    return anonymous(latest), [type for _, type, _ in rest]


SCENARIOS = [whole, in_pieces, output, endings, refusals, two_submissions_of_one_key, late]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Try again soon: what is tested is that it is tried, not how long that takes."""
    monkeypatch.setattr("taskkit.following.FIRST_PAUSE", 0.01)
    yield
    close_clients()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.__name__)
def test_all_three_see_the_same(tree: Tree, scenario: Scenario) -> None:
    client = get_client(tree.url, token=tree.token)
    plain, *others = [world(client, scenario) for world in WORLDS]
    assert plain, "it has something to say"
    assert others == [plain, plain]


def test_they_see_what_there_is(tree: Tree) -> None:
    client = get_client(tree.url, token=tree.token)
    events, result = in_nothing(client, whole)
    assert [id for id, _, _ in events] == [str(n) for n in range(1, 203)]
    assert [data["step"] for _, type, data in events if type == "progress"] == list(range(1, 201))
    assert result == 200
    assert in_nothing(client, in_pieces)[1] == []
    assert in_nothing(client, output) == ([f"line {n}" for n in range(1, 21)],) * 2
    raised = [name for name, _, _ in in_nothing(client, endings)]
    assert raised == [kind.__name__ for kind in (RunFailed, RunCrashed, RunWasCancelled)]
    assert [status for status, _ in in_nothing(client, refusals)] == [404, 404, 404, 404, 422]
    assert in_nothing(client, two_submissions_of_one_key) == (1, 7)


@pytest.mark.parametrize("world", WORLDS, ids=lambda one: one.__name__)
def test_a_line_cut_at_random_bytes_loses_and_repeats_nothing(
    tree: Tree, world: Callable[[Client, Scenario], Any], rng: random.Random
) -> None:
    cuts = (rng.randrange(1, 6000) for _ in range(40))
    before = tree.http.get("/api/v1/stats").json()["runs"]
    with Proxy(tree.url, cuts) as proxy:
        events, result = world(get_client(proxy.url, token=tree.token), whole)
        assert len(proxy.requests) > 5, "it was cut, again and again"
        close_clients()
    assert [id for id, _, _ in events] == [str(n) for n in range(1, 203)]
    assert (events[-1][1], result) == ("stream.end", 200)
    after = tree.http.get("/api/v1/stats").json()["runs"]
    assert sum(after.values()) == sum(before.values()) + 1, "one submission, however often it was sent"


@pytest.mark.parametrize("world", WORLDS, ids=lambda one: one.__name__)
def test_the_death_of_the_gateway_goes_unnoticed(
    tree: Tree, world: Callable[[Client, Scenario], Any]
) -> None:
    async def scenario(client: Face) -> Any:
        run = (await client.submit("proj.count", kwargs={"n": 40, "delay": 0.02}))["id"]
        first = await client.follow(run, 5)
        tree.kill("gateway")
        snapshot = await client.status(run)
        rest = await client.follow(run, after=first[-1][0])
        return anonymous(first + rest), snapshot, await client.result(run)

    events, snapshot, result = world(get_client(tree.url, token=tree.token), scenario)
    assert [id for id, _, _ in events] == [str(n) for n in range(1, 43)]
    assert (snapshot["task"], result) == ("proj.count", 40)
