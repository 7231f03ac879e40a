"""The routes that hand out tickets, take tokens back; what a token of one's own runs reaches."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
import trio

from gateway import grants
from gateway.grants import Revocation
from gateway.store.rows import RunRow
from taskkit import tokens
from taskkit.errors import NotWritable
from taskkit.settings import Settings
from taskkit.tokens import Claims
from tests.unit.gateway.fakes import KEY, StubEngine, client_of, token
from tests.unit.gateway.test_api import code

TICKETS, REVOKE, RUNS = "/api/v1/tickets", "/api/v1/tokens/revoke", "/api/v1/runs"


@pytest.fixture
def engine() -> StubEngine:
    return StubEngine()


async def asked(engine: StubEngine, body: dict[str, Any], **claims: Any) -> httpx.Response:
    async with client_of(engine, token(**claims)) as client:
        return await client.post(TICKETS, json=body)


def granted(answer: httpx.Response) -> Claims:
    assert answer.status_code == 201, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return tokens.read_ticket(KEY, answer.json()["ticket"]).claims


async def test_a_ticket_allows_what_its_token_reads_and_no_longer(engine: StubEngine) -> None:
    text = token(ttl=50, subject="ann")
    async with client_of(engine, text) as client:
        answer = await client.post(TICKETS)
    claims, parent = granted(answer), tokens.verify(KEY, text)
    assert (claims.subject, claims.id, claims.runs, claims.tasks) == ("ann", parent.id, "*", ("*",))
    assert claims.actions == {"read", "logs"}
    assert claims.expires_at <= parent.expires_at
    assert answer.json()["expires_at"] <= answer.json()["session_expires_at"]


async def test_it_is_narrowed_at_wish(engine: StubEngine) -> None:
    run = engine.start()
    wish = {"actions": ["read"], "runs": [run.id.upper()], "session": 5}
    claims = granted(await asked(engine, wish))
    assert (claims.actions, claims.runs, claims.tasks) == ({"read"}, {run.id}, ())
    assert claims.expires_at <= time.time() + 5
    claims = granted(await asked(engine, {"tasks": ["demo.count"]}))
    assert (claims.runs, claims.tasks) == (frozenset(), ("demo.count",))
    assert granted(await asked(engine, {"runs": "own"})).runs == "own"


@pytest.mark.parametrize(
    ("claims", "wish", "status"),
    [
        ({"actions": ["read"]}, {"actions": ["read", "logs"]}, 403),
        ({"actions": ["submit"]}, {}, 403),
        ({"runs": "own"}, {"runs": "*"}, 403),
        ({"runs": ()}, {"runs": "own"}, 403),
        ({"runs": "own", "tasks": ["demo.*"]}, {"tasks": ["*"]}, 403),
        ({"runs": "own", "tasks": ["demo.*"]}, {"tasks": ["demo.c*"]}, 403),
        ({"runs": "own", "tasks": ["demo.*"]}, {"tasks": ["demo.*", "demo.count"]}, 201),
        ({"runs": "own", "tasks": ["*"]}, {"tasks": ["x.*"]}, 201),
        ({"tasks": ()}, {"tasks": ["x.*"]}, 201),
        ({"tasks": ()}, {"tasks": ["x.*"], "actions": ["read", "submit"]}, 403),
    ],
)
async def test_it_allows_no_more_than_its_token(
    engine: StubEngine, claims: dict[str, Any], wish: dict[str, Any], status: int
) -> None:
    assert (await asked(engine, wish, **claims)).status_code == status


async def test_runs_beyond_the_tokens_reach_are_unknown(engine: StubEngine) -> None:
    mine, other = engine.start(subject="me"), engine.start(subject="you")
    assert granted(await asked(engine, {"runs": [mine.id]}, runs="own", tasks=())).runs == {mine.id}
    for id in (other.id, "01890a5d-ac96-774b-bcce-b302099a8057"):
        answer = await asked(engine, {"runs": [mine.id, id]}, runs="own", tasks=())
        assert (answer.status_code, code(answer)) == (404, "unknown-run")


@pytest.mark.parametrize(
    ("wish", "field"),
    [
        ({"action": ["read"]}, "action"),
        ({"actions": []}, "actions"),
        ({"actions": ["fly"]}, "actions"),
        ({"actions": "read"}, "actions"),
        ({"runs": []}, "runs"),
        ({"runs": ["x"]}, "runs"),
        ({"runs": "all"}, "runs"),
        ({"tasks": [1]}, "tasks"),
        ({"tasks": ["demo." + "x" * 3000]}, "runs"),
        ({"session": 0}, "session"),
        ({"session": True}, "session"),
        ({"session": 1e300}, "session"),
    ],
)
async def test_a_wish_that_makes_no_sense_names_the_field(
    engine: StubEngine, wish: dict[str, Any], field: str
) -> None:
    answer = await asked(engine, wish)
    assert (answer.status_code, list(answer.json()["errors"])) == (422, [field])


async def test_a_cookie_makes_no_ticket(engine: StubEngine) -> None:
    async with client_of(engine, "") as client:
        answer = await client.post(TICKETS, headers={"Cookie": f"bulkhead_token={token()}"})
    assert (answer.status_code, code(answer)) == (401, "token-missing")


async def test_the_cookie_comes_with_the_answer_to_any_get(engine: StubEngine) -> None:
    run = engine.start()
    async with client_of(engine, "") as client:
        for path, status in (
            (RUNS, 200),
            (f"{RUNS}/{run.id}", 200),
            (f"{RUNS}/{run.id[:-1]}9", 404),
            ("/x", 404),
        ):
            ticket = tokens.issue_ticket(KEY, runs="*", subject="t")
            client.cookies.clear()
            answer = await client.get(f"{path}?ticket={ticket}")
            assert answer.status_code == status
            assert ("set-cookie" in answer.headers) is (path != "/x")


async def test_a_ticket_is_no_parameter_of_a_post(engine: StubEngine) -> None:
    async with client_of(engine) as client:
        answer = await client.post(f"{TICKETS}?ticket=x")
    assert (answer.status_code, code(answer)) == (400, "bad-parameter")


# --- revocation


async def test_a_token_is_taken_back(engine: StubEngine) -> None:
    text = token(subject="ann")
    async with client_of(engine) as operator, client_of(engine, text) as other:
        assert (await other.get(RUNS)).status_code == 200
        answer = await operator.post(REVOKE, json={"jti": tokens.verify(KEY, text).id})
        assert (answer.status_code, answer.json()["ended_streams"]) == (200, 0)
        refused = await other.get(RUNS)
        assert (refused.status_code, code(refused)) == (401, "token-revoked")
        assert 'error="invalid_token"' in refused.headers["www-authenticate"]
        assert (await operator.get(RUNS)).status_code == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "jti"),
        ({"jti": "a", "sub": "b"}, "jti"),
        ({"jti": ""}, "jti"),
        ({"sub": 1}, "sub"),
        ({"x": 1}, "x"),
    ],
)
async def test_a_revocation_that_makes_no_sense(engine: StubEngine, body: dict[str, Any], field: str) -> None:
    async with client_of(engine) as client:
        answer = await client.post(REVOKE, json=body)
    assert (answer.status_code, list(answer.json()["errors"])) == (422, [field])
    assert engine.grants.statistics()["revocations"] == 0


async def test_taking_back_takes_an_operator(engine: StubEngine) -> None:
    async with client_of(engine, token(actions=tokens.ACTIONS - {"operate"})) as client:
        assert (await client.post(REVOKE, json={"jti": "a"})).status_code == 403


async def test_there_is_room_for_so_many(engine: StubEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grants, "MAX_REVOCATIONS", 0)
    async with client_of(engine) as client:
        answer = await client.post(REVOKE, json={"jti": "a"})
    assert (answer.status_code, code(answer)) == (409, "too-many-revocations")


async def test_a_revocation_that_is_not_on_disk_is_503(
    engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(revocation: object) -> None:
        raise NotWritable("no space left on device", retry_after=2)

    monkeypatch.setattr(engine, "revoke", fails)
    async with client_of(engine) as client:
        answer = await client.post(REVOKE, json={"jti": "a"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")


# --- own runs


async def test_a_token_of_own_runs_reaches_those_and_no_others(engine: StubEngine) -> None:
    mine, other, nobodys = (engine.start(subject=subject) for subject in ("ann", "bob", ""))
    shared = engine.start(task="shop.all", subject="bob")
    async with client_of(engine, token(subject="ann", runs="own", tasks=["shop.*"])) as client:
        listed = (await client.get(RUNS)).json()["runs"]
        assert {one["id"] for one in listed} == {mine.id, shared.id}
        for run, status in ((mine, 200), (shared, 200), (other, 404), (nobodys, 404)):
            assert (await client.get(f"{RUNS}/{run.id}")).status_code == status
    async with client_of(engine, token(subject="", runs="own", tasks=())) as client:
        assert (await client.get(RUNS)).json()["runs"] == []
        assert (await client.get(f"{RUNS}/{nobodys.id}")).status_code == 404


# --- across origins


@pytest.mark.parametrize(
    ("asked_for", "said"),
    [
        ({"Origin": "https://b.example", "Access-Control-Request-Method": "GET"}, "origin"),
        ({"Origin": "https://a.example", "Access-Control-Request-Method": "PUT"}, "method"),
        (
            {
                "Origin": "https://a.example",
                "Access-Control-Request-Method": "GET",
                "Access-Control-Request-Headers": "X-Mine",
            },
            "headers",
        ),
    ],
)
async def test_a_preflight_that_asks_for_too_much_is_a_problem(asked_for: dict[str, str], said: str) -> None:
    engine = StubEngine(settings=Settings(cors_origins=["https://a.example"]))
    async with client_of(engine, "") as client:
        answer = await client.request("OPTIONS", RUNS, headers=asked_for)
    assert (answer.status_code, answer.headers["content-type"]) == (403, "application/problem+json")
    assert said in answer.json()["detail"]
    assert ("access-control-allow-origin" in answer.headers) is (said != "origin")


# --- waiting


@pytest.mark.parametrize(
    ("path", "headers"),
    [("result", {"Prefer": "wait=30"}), ("events?wait=30", {"Accept": "application/json"})],
)
async def test_who_waits_hears_nothing_more_when_the_token_has_gone(
    engine: StubEngine, path: str, headers: dict[str, str]
) -> None:
    run = engine.start()
    for gone, said in ((False, "token-expired"), (True, "token-revoked")):
        text = token(ttl=60 if gone else 1)
        async with client_of(engine, text) as client, trio.open_nursery() as nursery:
            if gone:
                nursery.start_soon(_revoke_soon, engine, tokens.verify(KEY, text).id, run)
            with trio.fail_after(20):
                answer = await client.get(f"{RUNS}/{run.id}/{path}", headers=headers)
        assert (answer.status_code, code(answer)) == (401, said)


async def _revoke_soon(engine: StubEngine, jti: str, run: RunRow) -> None:
    while not engine.hub.subscribers(run.no):
        await trio.sleep(0.01)
    await engine.revoke(Revocation("jti", jti, time.time()))
    engine.end(run)
