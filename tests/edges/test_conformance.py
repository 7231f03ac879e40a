"""One table of what is asked, and what every client must see; four clients that must agree.

Each case is one line of CASES. A new form of stream (multiplexed, by tag, behind a ticket) is another line, with the
`path` or `token` that asks for it; a setting under which all of it has to hold is another line of MATRIX.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.edges.listeners import Heard, Helper, Listener, Listening
from tests.edges.tap import Tap
from tests.edges.trees import edge_tree
from tests.helpers import Tree, eventually

#: Settings, as environment, under which the whole suite has to pass.
MATRIX: dict[str, Mapping[str, str]] = {
    "usual": {},
    "without the fast path": {"TASKKIT_FAST_PATH": "false"},
}

#: Events that are long, foreign, or look like the format itself.
ODD = {
    "four bytes": "\U0001f6a2 \U0001d11e",
    "line separators": "a\u2028b\u2029c\u0085d\vf\fg",
    "breaks": "cr\rlf\ncrlf\r\nend",
    "bom": "\ufeffbom\ufeff",
    "nul": "nul\0",
    "fields": "\n\nid: 99\nevent: forged\ndata: forged\n\n",
    "spaces": "  two before, two behind  ",
    "empty": "",
}
LARGE = "x" * 200_000

Event = tuple[str, str, Any]


def started(id: int = 1) -> Event:
    return str(id), "run.started", ...


def ended(id: int, status: str = "SUCCESSFUL") -> Event:
    return str(id), "stream.end", {"status": status}


@dataclass(frozen=True)
class Case:
    """What is asked, and what must be seen.

    Attributes:
      first, then: what the run says, `then` when every client listens (only if `live`).
      live: whether clients come while the run stands between the two; otherwise it has ended.
      query: behind the path.
      path: of the stream, with {run}; a row's with {pk}.
      task: submitted with the arguments of `say`, unless `arguments` are others.
      seen: the events; data of ... may be anything, a mapping's keys are compared with those of the data.
      until: type of the event at which a client leaves by itself; None: it stays until it is sent away.
      closed: whether it gives up for good, as an EventSource does after any status but 200.
      finals: of each error that an EventSource fires, whether `readyState` is CLOSED.
      token: claims of the client's token, or the token itself.
    """

    seen: tuple[Event, ...]
    first: tuple[tuple[str, Any], ...] = ()
    then: tuple[tuple[str, Any], ...] = ()
    live: bool = False
    query: str = ""
    path: str = "/api/v1/runs/{run}/events"
    task: str = "proj.say"
    arguments: Mapping[str, Any] | None = None
    fields: Mapping[str, Any] | None = None
    prints: tuple[str, ...] = ()
    until: str | None = "stream.end"
    closed: bool = False
    finals: tuple[bool, ...] = ()
    token: Mapping[str, Any] | str = field(default_factory=dict)

    @property
    def expires(self) -> bool:
        """Whether the token's end is waited for, with the run standing at its gate."""
        return isinstance(self.token, Mapping) and "ttl" in self.token


THREE = tuple(("step", {"n": n}) for n in (1, 2, 3))
SEEN_THREE = tuple((str(n + 1), "step", {"n": n}) for n in (1, 2, 3))


def refused(query: str = "", **changes: Any) -> Case:
    """Return a case of a status that is not 200."""
    return Case((), THREE, query=query, until=None, closed=True, finals=(True,), **changes)


CASES: dict[str, Case] = {
    # -- from where
    "from the start": Case((started(), *SEEN_THREE, ended(5)), THREE),
    "while it runs": Case(
        (started(), *SEEN_THREE, ("5", "late", {"n": 4}), ended(6)), THREE, (("late", {"n": 4}),), live=True
    ),
    "?after=": Case((*SEEN_THREE[1:], ended(5)), THREE, query="?after=2"),
    "?last_event_id=": Case((*SEEN_THREE[2:], ended(5)), THREE, query="?last_event_id=3"),
    "?lastEventId=": Case((*SEEN_THREE[2:], ended(5)), THREE, query="?lastEventId=3"),
    "?after=0": Case((started(), *SEEN_THREE, ended(5)), THREE, query="?after=0"),
    "?after=latest": Case(
        (SEEN_THREE[2], ("5", "late", {}), ended(6)), THREE, (("late", {}),), live=True, query="?after=latest"
    ),
    "?after=now": Case(
        (("5", "late", {}), ended(6)), THREE, (("late", {}),), live=True, query="?after=now"
    ),
    "a cursor ahead is reset in band": Case(
        (("0", "stream.reset", {"from": 1, "reason": "ahead"}), started(), *SEEN_THREE, ended(5)),
        THREE,
        live=True,
        query="?after=1000",
    ),
    # -- what
    "names": Case(
        (
            started(),
            *((str(at), name, {}) for at, name in enumerate(("message", "ünï ☃", "a:b", " c", "error"), 2)),
            ended(7),
        ),
        tuple((name, {}) for name in ("message", "ünï ☃", "a:b", " c", "error")),
    ),
    "odd text": Case(
        (started(), *((str(at), "odd", {"text": ODD[name]}) for at, name in enumerate(ODD, 2)), ended(10)),
        tuple(("odd", {"text": text}) for text in ODD.values()),
    ),
    "values that are no objects": Case(
        (started(), ("2", "plain", {"value": [1, None]}), ("3", "plain", {"value": "text"}), ended(4)),
        (("plain", [1, None]), ("plain", "text")),
    ),
    "large events": Case(
        (started(), *((str(n), "large", {"n": n, "text": LARGE}) for n in (2, 3)), ended(4)),
        tuple(("large", {"n": n, "text": LARGE}) for n in (2, 3)),
    ),
    "large events as they come": Case(
        (started(), ("2", "large", {"text": LARGE}), ("3", "small", {}), ended(4)),
        then=(("large", {"text": LARGE}), ("small", {})),
        live=True,
    ),
    "two thousand events": Case(
        (started(), *((str(n + 2), "step", {"n": n}) for n in range(2000)), ended(2002)),
        tuple(("step", {"n": n}) for n in range(2000)),
    ),
    "with what it prints": Case(
        (started(), *SEEN_THREE, ("4.1", "log", {"text": "line ☃"}), ended(5)),
        THREE,
        prints=("line ☃",),
        live=True,  # a line stands behind the event that was known to be the newest when it was read
        query="?include=log",
    ),
    "a failed run": Case(
        (started(), ended(2, "FAILED")), task="proj.boom", arguments={"message": "no"}
    ),
    "a row that raises": Case(
        (started(), ("2", "error", {"message": "this row is bad"}), ("3", "task_error", {}), ended(4, "FAILED")),
        task="proj.BadRow",
        fields={},
        path="/stream/proj/badrow/{pk}",
    ),
    # -- the end
    "a finished run sends away": refused("?after=5"),
    "the token's end": Case(
        (started(), *SEEN_THREE), THREE, live=True, until=None, closed=True, finals=(False, True), token={"ttl": 3}
    ),
    # -- refusals
    "no token": refused(token=""),
    "a wrong token": refused(token="wrong"),
    "a token of another run": refused(token={"runs": ["01900000-0000-7000-8000-000000000000"], "tasks": ()}),
    "a token that may not read": refused(token={"actions": ["submit"]}),
    "a malformed cursor": refused("?after=x"),
    "an unknown parameter": refused("?befor=3"),
    "an unknown run": refused(path="/api/v1/runs/01900000-0000-7000-8000-000000000000/events"),
}  # fmt: skip

#: What EventSources listen for: everything that any case may show, wanted or not.
NAMES = sorted(
    {type for case in CASES.values() for _, type, _ in case.seen}
    | {"message", "error", "forged", "log", "stream.reset", "stream.lag", "stream.busy", "run.progress"}
)


@pytest.fixture(scope="module", params=MATRIX.values(), ids=MATRIX)
def tree(request: pytest.FixtureRequest, chromium: Helper) -> Iterator[Tree]:
    """Give a tree that allows the browser's origin."""
    origins = json.dumps([chromium.said["origin"]])
    with edge_tree(TASKKIT_CORS_ORIGINS=origins, **request.param) as tree:
        yield tree


@pytest.fixture(scope="module")
def taps(tree: Tree, listeners: list[Listener]) -> Iterator[dict[str, Tap]]:
    """Give each client, by name, a way to the tree that is listened to."""
    with ExitStack() as stack:
        yield {one.name: stack.enter_context(Tap(tree.url)) for one in listeners}


def submit(tree: Tree, case: Case, gate: Path) -> tuple[str, str]:
    """Start the case's run; return its path as clients ask for it, with its id."""
    body: dict[str, Any] = {"task": case.task}
    if case.fields is not None:
        body["fields"] = case.fields
    elif case.arguments is not None:
        body["kwargs"] = case.arguments
    else:
        given = {"first": case.first, "then": case.then, "prints": case.prints}
        body["kwargs"] = {**given, "gate": str(gate) if case.live else None}
    response = tree.http.post("/api/v1/runs", json=body)
    assert response.status_code == 202, response.text
    run = response.json()["id"]
    if case.live:
        said = 1 + len(case.first)
        eventually(lambda: tree.snapshot(run)["offsets"]["last"] >= said, 10, "the run at its gate")
    else:
        tree.wait(run, 20)
    pk = ""
    if "{pk}" in case.path:
        pk = next(event for event in tree.events(run) if "_task_id" in event.json).json["_task_id"]
    return case.path.format(run=run, pk=pk) + case.query, run


def token_of(tree: Tree, case: Case) -> str:
    """Return the case's token; the same claims give the same token, and so the same page in a browser."""
    if isinstance(case.token, str):
        return case.token
    return _issue(tree, json.dumps(case.token))


@functools.cache
def _issue(tree: Tree, claims: str) -> str:
    return tree.token(**json.loads(claims))


def plain(event: tuple[str, str, str], wanted: Any) -> Event:
    """Return an event with as much of its data as is wanted."""
    id, type, data = event
    if wanted is ...:
        return id, type, ...
    found = json.loads(data)
    own = {key: value for key, value in found.items() if not key.startswith("_")}
    return id, type, {key: own.get(key) for key in wanted} if wanted else {}


def check(name: str, case: Case, heard: Heard) -> None:
    """Compare what a client has heard with the table."""
    wanted = {at: data for at, (_, _, data) in enumerate(case.seen)}
    found = tuple(plain(event, wanted.get(at, ...)) for at, event in enumerate(heard.events))
    assert found == case.seen, name
    assert heard.closed == case.closed, f"{name}: gave up for good"
    assert tuple(heard.finals) == case.finals, f"{name}: errors, last or not"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_client_sees_the_same(
    case: Case, tree: Tree, listeners: list[Listener], taps: dict[str, Tap], tmp_path: Path
) -> None:
    path, run = submit(tree, case, tmp_path / "gate")
    token = token_of(tree, case)
    listening = {one.name: one.open(taps[one.name].url + path, token, NAMES, case.until) for one in listeners}
    try:
        if case.live:
            for one in listening.values():
                eventually(lambda one=one: one.opens(), 20, "a stream to open")
        if not case.expires:
            (tmp_path / "gate").touch()
        heard = {name: one.wait() for name, one in listening.items()}
    finally:
        (tmp_path / "gate").touch()
        for one in listening.values():
            one.close()
        tree.wait(run)
    for name, one in heard.items():
        check(name, case, one)
    first, *others = heard.values()
    assert all(one.events == first.events for one in others), "every byte of every event is the same"


# -- cuts ---------------------------------------------------------------------------------------------------

#: Seconds that a client may come too early: clocks of the tap and of a browser's timers are not one.
EARLY = 0.05

#: Milliseconds after which Chromium and npm's EventSource come back when nobody has told them.
UNTOLD = 3000


@pytest.fixture
def followed(
    tree: Tree, listeners: list[Listener], taps: dict[str, Tap], tmp_path: Path
) -> Iterator[tuple[dict[str, Listening], Path]]:
    """Give every client at a run that has said half of what it will; what it waits for is the file."""
    gate = tmp_path / "gate"
    half = tuple(("step", {"n": n, "pad": "é" * 50}) for n in range(200))
    path, _ = submit(tree, Case((), half, half, live=True), gate)
    token = _issue(tree, "{}")
    for tap in taps.values():
        tap.requests.clear()
    listening = {one.name: one.open(taps[one.name].url + path, token, NAMES, None) for one in listeners}
    for one in listening.values():
        eventually(lambda one=one: one.count() == 201, 20, "the first half")
    yield listening, gate
    gate.touch()
    for one in listening.values():
        one.close()


def cut_by_the_network(tree: Tree, taps: dict[str, Tap]) -> None:
    for tap in taps.values():
        tap.cut()


def cut_by_death(tree: Tree, taps: dict[str, Tap]) -> None:
    tree.kill("gateway")


def ended_by_a_restart(tree: Tree, taps: dict[str, Tap]) -> None:
    assert not tree.operate("restart-gateway", timeout=60.0).error


@pytest.mark.parametrize("cut", [cut_by_the_network, cut_by_death, ended_by_a_restart])
def test_every_client_comes_back_where_it_was(
    cut: Callable[[Tree, dict[str, Tap]], None],
    tree: Tree,
    taps: dict[str, Tap],
    followed: tuple[dict[str, Listening], Path],
) -> None:
    """By itself, not earlier than told, behind the last event that it saw; 204 then ends it for good."""
    listening, gate = followed
    cut(tree, taps)
    for one in listening.values():
        eventually(lambda one=one: one.opens() == 2, 30, "a stream to open again")
    gate.touch()
    heard = {name: one.wait(30) for name, one in listening.items()}
    for name, one in heard.items():
        assert [int(id) for id, _, _ in one.events] == list(range(1, 403)), name
        assert (one.opens, one.finals, one.closed) == (2, [False, False, True], True), name
        requests = taps[name].requests
        assert [request.last_event_id for request in requests] == [None, "201", "402"], name
        for before, after in itertools.pairwise(requests):
            assert before.over is not None
            told, took = before.retries[-1], (after.at - before.over) * 1000
            assert took > told - EARLY * 1000, f"{name} came back after {took:.0f} ms, told {told}"
            if told < UNTOLD / 2:
                assert took < UNTOLD, f"{name} came back after {took:.0f} ms, told {told}"
    first, *others = heard.values()
    assert all(one.events == first.events for one in others)
