"""Who is let in: by header, ticket, cookie, in which order, how often."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from http.cookies import SimpleCookie
from typing import Any

import pytest
from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope, Send

from gateway import cookies
from gateway.auth import Authenticator, TicketCookies, TooManyFailures
from gateway.grants import Revocation
from taskkit.errors import Forbidden
from taskkit.settings import LimitSettings
from taskkit.tokens import ACTIONS, TokenError, issue, issue_ticket, session_of, verify
from tests.unit.gateway.fakes import KEY, StubEngine, client_of

PATH = "/api/v1/runs/x/events"


def connection(
    query: str = "", *headers: tuple[str, str], kind: str = "http", method: str = "GET", **scope: Any
) -> HTTPConnection:
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    made: dict[str, Any] = {"type": kind, "path": PATH, "headers": raw, "query_string": query.encode()}
    if kind == "http":
        made["method"] = method
    return HTTPConnection(made | {"scheme": "http", "server": ("h", 80), "client": ("192.0.2.1", 1)} | scope)


def ticket(**claims: Any) -> str:
    return issue_ticket(KEY, **{"subject": "ann", "runs": "*", **claims})


def token(**claims: Any) -> str:
    return issue(KEY, **{"subject": "ann", "actions": ["read"], "runs": "*", "ttl": 600, **claims})


@pytest.fixture
def engine() -> StubEngine:
    return StubEngine()


@pytest.fixture
def door(engine: StubEngine) -> Authenticator:
    return Authenticator(KEY, [], ["https://app.example"], desk=engine)


def kept(*values: str) -> str:
    """Return the Cookie header of a browser that was given these Set-Cookie values."""
    jar: SimpleCookie = SimpleCookie()
    for value in values:
        jar.load(value)
    return "; ".join(f"{name}={morsel.value}" for name, morsel in jar.items() if morsel["max-age"] != "0")


async def refused(door: Authenticator, asked: HTTPConnection, code: str, **options: Any) -> None:
    with pytest.raises(TokenError) as caught:
        await door.admit(asked, "read", **options)
    assert caught.value.code == code


# --- tickets


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_a_ticket_is_swapped_for_a_cookie_once(door: Authenticator, kind: str) -> None:
    text = ticket(actions=["read", "logs"], tasks=["demo.*"], session=100)
    admission = await door.admit(connection(f"ticket={text}", kind=kind), "read")
    assert (admission.claims.subject, admission.claims.runs, admission.claims.tasks) == (
        "ann",
        "*",
        ("demo.*",),
    )
    assert admission.claims.actions == {"read", "logs"}
    (cookie,) = admission.cookies
    (morsel,) = SimpleCookie(cookie).values()
    assert morsel.key == cookies.name_of(admission.claims)
    assert (morsel["path"], morsel["httponly"], morsel["samesite"], morsel["secure"]) == (
        PATH,
        True,
        "Lax",
        "",
    )
    assert 97 <= int(morsel["max-age"]) <= 100
    session = verify(KEY, morsel.value, uses=("cookie",))
    assert session.expires_at == admission.claims.expires_at
    assert (session.actions, session.runs, session.tasks) == ({"read", "logs"}, "*", ("demo.*",))
    await refused(door, connection(f"ticket={text}", kind=kind), "spent")


async def test_an_event_source_comes_back_with_a_spent_ticket_and_its_cookie(door: Authenticator) -> None:
    text = ticket()
    first = await door.admit(connection(f"ticket={text}"), "read")
    for _ in range(3):
        back = await door.admit(connection(f"ticket={text}", ("Cookie", kept(*first.cookies))), "read")
        assert back.claims.id == first.claims.id
        assert back.cookies == ()


async def test_it_comes_back_when_the_ticket_is_over(door: Authenticator) -> None:
    now = time.time()
    text = ticket(now=now - 100, session=1000)
    session = session_of(KEY, verify(KEY, token()), now)
    await refused(door, connection(f"ticket={text}"), "expired")
    asked = connection(f"ticket={text}", ("Cookie", f"{cookies.SESSION_PREFIX}x={session}"))
    assert (await door.admit(asked)).claims.subject == "ann"


async def test_a_fresh_ticket_stands_before_an_old_cookie(door: Authenticator) -> None:
    old = await door.admit(connection(f"ticket={ticket(session=50)}"), "read")
    new = await door.admit(
        connection(f"ticket={ticket(session=500)}", ("Cookie", kept(*old.cookies))), "read"
    )
    assert new.claims.expires_at > old.claims.expires_at
    assert len(new.cookies) == 1, "the new session takes the place of the old"


async def test_each_page_comes_back_to_its_own_session(door: Authenticator) -> None:
    """Two pages follow different runs through one path: `/api/v1/events`."""
    texts = [ticket(runs=[run]) for run in ("a", "b", "c")]
    made = [cookie for text in texts for cookie in (await door.admit(connection(f"ticket={text}"))).cookies]
    for text, run in zip(texts, "abc", strict=True):
        back = await door.admit(connection(f"ticket={text}", ("Cookie", kept(*made))))
        assert back.claims.runs == {run}


async def test_a_browser_keeps_so_many_sessions(door: Authenticator) -> None:
    held: list[str] = []
    for n in range(20):
        asked = connection(f"ticket={ticket(runs=[str(n)])}", *([("Cookie", kept(*held))] if held else []))
        held += (await door.admit(asked)).cookies
        assert kept(*held).count("=") <= cookies.MAX_SESSIONS
    assert cookies.name_of((await door.admit(connection("", ("Cookie", kept(*held))))).claims) in kept(*held)


@pytest.mark.parametrize(
    ("query", "code"),
    [
        (lambda: "ticket=", "missing"),
        (lambda: "ticket=x", "malformed"),
        (lambda: f"ticket={token()}", "use"),
        (lambda: f"ticket={ticket()}&ticket={ticket()}", "malformed"),
        (lambda: f"ticket={ticket()[:-4]}AAAA", "signature"),
        (lambda: f"ticket={issue_ticket(b'o' * 32, subject='ann')}", "signature"),
        (lambda: f"ticket={session_of(KEY, verify(KEY, token()), time.time())}", "use"),
        (lambda: f"token={token()}", "missing"),
    ],
)
async def test_what_is_no_ticket_opens_nothing(
    door: Authenticator, query: Callable[[], str], code: str
) -> None:
    await refused(door, connection(query()), code)


async def test_a_bad_ticket_is_not_made_good_by_a_cookie(door: Authenticator) -> None:
    await refused(door, connection("ticket=x", ("Cookie", f"{cookies.COOKIE}={token()}")), "malformed")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
async def test_a_ticket_changes_nothing(door: Authenticator, engine: StubEngine, method: str) -> None:
    await refused(door, connection(f"ticket={ticket()}", method=method), "missing")
    assert engine.grants.statistics()["tickets"] == 0


async def test_a_header_stands_before_a_ticket(door: Authenticator, engine: StubEngine) -> None:
    header = ("Authorization", f"Bearer {token(subject='bob')}")
    assert (await door.admit(connection(f"ticket={ticket()}", header))).claims.subject == "bob"
    assert engine.grants.statistics()["tickets"] == 0


@pytest.mark.parametrize("text", [ticket(), session_of(KEY, verify(KEY, token()), time.time())])
async def test_tickets_and_sessions_are_no_bearer_tokens(door: Authenticator, text: str) -> None:
    await refused(door, connection("", ("Authorization", f"Bearer {text}")), "use")


async def test_a_ticket_is_no_cookie(door: Authenticator) -> None:
    await refused(door, connection("", ("Cookie", f"{cookies.COOKIE}={ticket()}")), "use")


async def test_an_action_that_is_missing_is_403_with_the_cookie_kept(door: Authenticator) -> None:
    made: list[str] = []
    asked = connection(f"ticket={ticket(actions=['logs'])}", **{"bulkhead.cookies": made})
    with pytest.raises(Forbidden):
        await door.admit(asked, "read")
    assert len(made) == 1


# --- cookies


async def test_the_first_valid_cookie_counts(door: Authenticator) -> None:
    over = issue(KEY, actions=["read"], ttl=1, subject="old", now=time.time() - 60)
    header = ("Cookie", f"a=b; {cookies.COOKIE}={over}; {cookies.COOKIE}={token(subject='eve')}")
    assert (await door.admit(connection("", header))).claims.subject == "eve"
    await refused(door, connection("", ("Cookie", f"{cookies.COOKIE}={over}")), "expired")


@pytest.mark.parametrize(
    ("origin", "counts"), [("https://app.example", True), ("https://evil.example", False)]
)
async def test_a_strange_page_opens_no_websocket_with_a_cookie(
    door: Authenticator, origin: str, counts: bool
) -> None:
    headers = ("Cookie", f"{cookies.COOKIE}={token()}"), ("Origin", origin), ("Host", "h")
    asked = connection("", *headers, kind="websocket", scheme="ws")
    if counts:
        assert (await door.admit(asked)).claims.subject == "ann"
    else:
        await refused(door, asked, "missing")


@pytest.mark.parametrize(
    ("headers", "attributes"),
    [
        ({}, "SameSite=Lax"),
        ({"X-Forwarded-Proto": "https"}, "SameSite=Lax; Secure"),
        ({"Sec-Fetch-Site": "same-origin"}, "SameSite=Lax"),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:8000"}, "SameSite=Lax"),
        (
            {"Sec-Fetch-Site": "cross-site", "Origin": "https://app.example"},
            "SameSite=None; Secure; Partitioned",
        ),
        ({"Origin": "https://app.example"}, "SameSite=None; Secure; Partitioned"),
        ({"Origin": "https://H"}, "SameSite=Lax; Secure"),
        ({"Origin": "http://127.0.0.1:8000"}, "SameSite=Lax"),
    ],
)
def test_a_cookie_comes_back_to_where_it_was_set_from(headers: dict[str, str], attributes: str) -> None:
    asked = connection("", ("Host", "h"), *headers.items())
    (made,) = cookies.session_cookies(asked, verify(KEY, token()), "v", 0.0)
    assert made.endswith(f"; HttpOnly; {attributes}")


def test_a_path_ends_no_attribute() -> None:
    asked = connection(raw_path=b"/stream/a%20b/x;Domain=evil/1")
    (made,) = cookies.session_cookies(asked, verify(KEY, token()), "v", 0.0)
    assert "; Path=/stream/a%20b/x%3BDomain=evil/1; HttpOnly" in made


async def test_the_answer_has_the_cookies_whatever_it_is() -> None:
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["bulkhead.cookies"].append("a=b")
        await send({"type": "http.response.start", "status": 404, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    await TicketCookies(app)({"type": "http", "query_string": b"ticket=x"}, receive, send)
    assert sent[0]["headers"] == [(b"x", b"y"), (b"set-cookie", b"a=b")]


# --- ?token=


async def test_a_token_in_the_query_counts_where_the_caller_says_so(door: Authenticator) -> None:
    asked = connection(f"token={token()}", kind="websocket")
    assert (await door.admit(asked, "read", query_token=True)).claims.subject == "ann"
    await refused(door, asked, "missing")
    await refused(door, connection(f"token={ticket()}", kind="websocket"), "use", query_token=True)


# --- revocation


async def test_what_was_revoked_opens_nothing(door: Authenticator, engine: StubEngine) -> None:
    text = token()
    parent = verify(KEY, text).id
    spent = ticket(parent=parent)
    first = await door.admit(connection(f"ticket={spent}"))
    assert first.claims.id == parent
    await engine.revoke(Revocation("jti", parent, time.time()))
    await refused(door, connection("", ("Authorization", f"Bearer {text}")), "revoked")
    await refused(door, connection(f"ticket={ticket(parent=parent)}"), "revoked")
    await refused(door, connection(f"ticket={spent}", ("Cookie", kept(*first.cookies))), "revoked")
    await refused(door, connection("", ("Cookie", kept(*first.cookies))), "revoked")
    assert (await door.admit(connection("", ("Authorization", f"Bearer {token()}")))).claims.id != parent


async def test_a_subject_goes_on_with_what_it_gets_afterwards(
    door: Authenticator, engine: StubEngine
) -> None:
    before = ticket(now=time.time() - 1)
    await engine.revoke(Revocation("sub", "ann", time.time() - 0.5))
    await refused(door, connection(f"ticket={before}"), "revoked")
    assert (await door.admit(connection(f"ticket={ticket()}"))).claims.subject == "ann"


# --- failures


async def test_the_eleventh_failure_is_429_and_a_valid_token_is_not(engine: StubEngine) -> None:
    now = 0.0
    door = Authenticator(KEY, [], desk=engine, clock=lambda: now)
    bad = connection("", ("Authorization", "Bearer x"))
    for _ in range(10):
        await refused(door, bad, "malformed")
    with pytest.raises(TooManyFailures) as caught:
        await door.admit(bad)
    assert caught.value.headers == {"Retry-After": "60"}
    assert (await door.admit(connection("", ("Authorization", f"Bearer {token()}")))).claims.subject == "ann"
    forwarded = ("X-Forwarded-For", "198.51.100.7")
    with pytest.raises(TooManyFailures):
        door.claims(connection("", ("Authorization", "Bearer x"), forwarded))
    await refused(door, connection("", ("Authorization", "Bearer x"), client=("192.0.2.2", 1)), "malformed")
    await refused(door, connection(""), "missing")
    now = 61.0
    await refused(door, bad, "malformed")


async def test_requests_without_a_token_are_no_failures(engine: StubEngine) -> None:
    door = Authenticator(KEY, [], desk=engine, limits=LimitSettings(auth_failures=1))
    for _ in range(3):
        await refused(door, connection(), "missing")
    await refused(door, connection("ticket=x"), "malformed")
    with pytest.raises(TooManyFailures):
        await door.admit(connection("ticket=x"))


LATE = [
    ("/api/v1/runs", {"task": "t.count", "kwargs": {"n": 1}}),
    ("/api/v1/runs/batch", {"runs": []}),
    ("/api/v1/tickets", {}),
    ("/api/v1/tokens/revoke", {"jti": "x"}),
    ("/api/v1/vacuum", {}),
    ("/api/v1/runners/r1/kill", {}),
    ("/api/v1/events", {"tags": ["x"]}),
]


@pytest.mark.parametrize(("path", "body"), LATE, ids=[path for path, _ in LATE])
async def test_a_token_that_is_revoked_while_the_body_arrives_opens_nothing(path: str, body: Any) -> None:
    engine = StubEngine()
    mine = token(subject="eve", actions=sorted(ACTIONS), runs="*", tasks=["*"])

    async def arriving() -> AsyncIterator[bytes]:
        data = json.dumps(body).encode()
        yield data[:1]
        await engine.revoke(Revocation("sub", "eve", time.time()))
        yield data[1:]

    async with client_of(engine) as client:
        headers = {"Authorization": f"Bearer {mine}", "Content-Type": "application/json"}
        answer = await client.post(path, content=arriving(), headers=headers)
    assert (answer.status_code, answer.json()["type"]) == (401, "urn:bulkhead:problem:token-revoked")
    assert engine.store.rows == {}
