"""Every route against everything that can be presented, as one table."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx
import pytest
from starlette.routing import BaseRoute, Route, WebSocketRoute

from gateway.resource import Resource
from taskkit import tokens
from tests.helpers import Tree
from tests.unit.gateway.fakes import StubEngine, app_of

# A new route needs a row: method, path, then a status for each column. `{run}` is a run that has ended, `{row}` the
# key of a task row that has; what a POST sends stands in BODIES. The columns:
#
#   none    nothing                                  submit … logs   one action, on every run and task
#   bad     no JWT                                   all             every action
#   key     signed with another key                  cookie          every action, as a cookie
#   exp     expired                                  ticket          every action, as a ticket
#   aud     for another audience                     spent           a ticket that was used, without its cookie
#   other   what a submission answers, of another run
TABLE = """
method path                          none bad key exp aud other submit read cancel operate logs all cookie ticket spent
GET  /health                         200  200 200 200 200 200   200    200  200    200     200  200 200    200    200
GET  /ready                          200  200 200 200 200 200   200    200  200    200     200  200 200    200    200
GET  /tasks.js                       200  200 200 200 200 200   200    200  200    200     200  200 200    200    200
GET  /ws                             426  426 426 426 426 426   426    426  426    426     426  426 426    426    426
GET  /flowrra/ws                     426  426 426 426 426 426   426    426  426    426     426  426 426    426    426
GET  /nowhere                        404  404 404 404 404 404   404    404  404    404     404  404 404    404    404
POST /api/v1/runs                    401  401 401 401 401 403   202    403  403    403     403  202 401    401    401
POST /api/v1/runs/batch              401  401 401 401 401 403   200    403  403    403     403  200 401    401    401
GET  /api/v1/runs                    401  401 401 401 401 200   403    200  403    403     403  200 200    200    401
GET  /api/v1/runs/{run}              401  401 401 401 401 404   403    200  403    403     403  200 200    200    401
GET  /api/v1/runs/{run}/result       401  401 401 401 401 404   403    200  403    403     403  200 200    200    401
GET  /api/v1/runs/{run}/events       401  401 401 401 401 404   403    200  403    403     403  200 200    200    401
GET  /api/v1/events                  401  401 401 401 401 400   403    400  403    403     403  400 400    400    401
POST /api/v1/events                  401  401 401 401 401 422   403    422  403    403     403  422 401    401    401
POST /api/v1/runs/{run}/cancel       401  401 401 401 401 404   403    403  409    403     403  409 401    401    401
POST /api/v1/runs/{run}/input/{inbox} 401 401 401 401 401 404   403    403  409    403     403  409 401    401    401
POST /api/v1/runs/{run}/replay       401  401 401 401 401 403   404    403  403    403     403  202 401    401    401
GET  /api/v1/runners                 401  401 401 401 401 403   403    200  403    200     403  200 200    200    401
POST /api/v1/runners/{id}/kill       401  401 401 401 401 403   403    403  403    404     403  404 401    401    401
POST /api/v1/runners/{id}/drain      401  401 401 401 401 403   403    403  403    404     403  404 401    401    401
GET  /api/v1/tasks                   401  401 401 401 401 200   200    200  200    200     200  200 200    200    401
GET  /api/v1/tasks/{name}            401  401 401 401 401 404   200    200  404    404     404  200 200    200    401
POST /api/v1/tasks/{name}/reset      401  401 401 401 401 403   403    403  403    200     403  200 401    401    401
GET  /api/v1/stats                   401  401 401 401 401 403   403    200  403    200     403  200 200    200    401
GET  /metrics                        401  401 401 401 401 403   403    200  403    200     403  200 200    200    401
GET  /openapi.json                   401  401 401 401 401 200   200    200  200    200     200  200 200    200    401
POST /api/v1/vacuum                  401  401 401 401 401 403   403    403  403    200     403  200 401    401    401
POST /api/v1/tickets                 401  401 401 401 401 201   403    201  403    403     201  201 401    401    401
POST /api/v1/tokens/revoke           401  401 401 401 401 403   403    403  403    200     403  200 401    401    401
GET  /api/v1/schedules               401  401 401 401 401 200   403    200  403    403     403  200 200    200    401
POST /api/v1/schedules               401  401 401 401 401 403   422    403  403    403     403  422 401    401    401
GET  /api/v1/schedules/{id}          401  401 401 401 401 404   403    404  403    403     403  404 404    404    401
DELETE /api/v1/schedules/{id}        401  401 401 401 401 403   404    403  403    403     403  404 401    401    401
POST /api/v1/schedules/{id}/enable   401  401 401 401 401 403   404    403  403    403     403  404 401    401    401
POST /api/v1/schedules/{id}/disable  401  401 401 401 401 403   404    403  403    403     403  404 401    401    401
GET  /api/v1/async_request_response/{run}/ 401 401 401 401 401 403 403 200 403 403  403  200 200    200    401
GET  /api/v1/async_background_response/{run}/ 401 401 401 401 401 403 403 200 403 403 403 200 200   200    401
GET  /stream/{app}/{model}/{pk}      401  401 401 401 401 404   403    200  403    403     403  200 200    200    401
GET  /stream/{model}/{pk}            401  401 401 401 401 404   403    200  403    403     403  200 200    200    401
"""

BODIES: dict[str, dict[str, Any]] = {
    "/api/v1/runs": {"task": "proj.echo"},
    "/api/v1/runs/batch": {"runs": [{"task": "proj.echo"}]},
    "/api/v1/tokens/revoke": {"jti": "of nobody"},
    "/api/v1/schedules": {"task": "proj.echo"},  # without a time
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    path: str
    expected: dict[str, int]

    @property
    def route(self) -> str:
        return f"{self.method} {self.path}"


def parse(table: str) -> list[Row]:
    head, *lines = (line.split() for line in table.strip().splitlines())
    columns = head[2:]
    found = []
    for method, path, *cells in lines:
        assert len(cells) == len(columns), f"{method} {path}: {len(cells)} cells, {len(columns)} columns"
        found.append(Row(method, path, dict(zip(columns, map(int, cells), strict=True))))
    return found


ROWS = parse(TABLE)


@dataclass
class World:
    """A tree with a run that has ended, another one, and a row that has a run."""

    tree: Tree

    @cached_property
    def key(self) -> bytes:
        return tokens.load_key(self.tree.state_dir / "key")

    @cached_property
    def run(self) -> str:
        return self._ended({"task": "proj.echo"})

    @cached_property
    def other(self) -> str:
        answer = self.tree.http.post("/api/v1/runs", json={"task": "proj.add", "kwargs": {"a": 1, "b": 1}})
        return str(answer.json()["token"])

    @cached_property
    def row(self) -> str:
        self._ended({"task": "proj.Row", "fields": {"message": "m"}})
        with closing(sqlite3.connect(self.tree.database)) as connection:
            return str(connection.execute("SELECT max(id) FROM proj_row").fetchone()[0])

    def _ended(self, body: dict[str, Any]) -> str:
        answer = self.tree.http.post("/api/v1/runs", json=body)
        assert answer.status_code == 202, answer.text
        run = str(answer.json()["id"])
        self.tree.wait(run)
        return run

    def path(self, row: Row) -> str:
        names = {
            "run": self.run,
            "id": "r999",
            "name": "proj.echo",
            "inbox": "x",
            "app": "proj",
            "model": "row",
            "pk": self.row,
        }
        return row.path.format(**names)

    def ticket(self) -> str:
        return tokens.issue_ticket(self.key, actions=tokens.ACTIONS, runs="*", tasks=("*",), subject="t")


def header(text: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {text}"}}


def allowing(*actions: str) -> Callable[[World], dict[str, Any]]:
    return lambda world: header(world.tree.token(actions=actions, runs="*"))


def used(world: World) -> str:
    text = world.ticket()
    assert httpx.get(f"{world.tree.url}/api/v1/tasks?ticket={text}", trust_env=False).status_code == 200
    return text


def of_another_key(world: World) -> str:
    return tokens.issue(b"o" * 32, actions=tokens.ACTIONS, runs="*", tasks=("*",), ttl=60, subject="t")


def for_another(world: World) -> str:
    import jwt

    claims = {"aud": "other", "exp": time.time() + 60, "actions": sorted(tokens.ACTIONS), "runs": "*"}
    return jwt.encode(claims, world.key, algorithm="HS256")


#: What a request of each column has, as arguments of httpx.
CREDENTIALS: dict[str, Callable[[World], dict[str, Any]]] = {
    "none": lambda world: {},
    "bad": lambda world: header("nonsense"),
    "key": lambda world: header(of_another_key(world)),
    "exp": lambda world: header(world.tree.token(runs="*", ttl=1, now=time.time() - 60)),
    "aud": lambda world: header(for_another(world)),
    "other": lambda world: header(world.other),
    "submit": allowing("submit"),
    "read": allowing("read"),
    "cancel": allowing("cancel"),
    "operate": allowing("operate"),
    "logs": allowing("logs"),
    "all": allowing(*tokens.ACTIONS),
    "cookie": lambda world: {"headers": {"Cookie": f"bulkhead_token={world.tree.token(runs='*')}"}},
    "ticket": lambda world: {"params": {"ticket": world.ticket()}},
    "spent": lambda world: {"params": {"ticket": used(world)}},
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Give a tree that never tires of invalid tokens."""
    limits = {"auth_failures": 0, "stop_grace_seconds": 3.0}
    with Tree(runners=2, env={"TASKKIT_LIMITS": json.dumps(limits)}) as tree:
        yield World(tree)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.route)
def test_each_cell_of_the_table(world: World, row: Row) -> None:
    # A connection of its own for each: one that is refused before its body was read is closed.
    once = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=world.tree.url, trust_env=False, timeout=20, limits=once) as client:
        found = {}
        for column, credential in CREDENTIALS.items():
            client.cookies.clear()
            json_body = BODIES.get(row.path, {}) if row.method == "POST" else None
            answer = client.request(row.method, world.path(row), json=json_body, **credential(world))
            found[column] = answer.status_code
            if answer.status_code >= 400:
                assert answer.headers["content-type"] == "application/problem+json", (column, answer.text)
            if answer.status_code == 401:
                assert answer.headers["www-authenticate"].startswith('Bearer realm="bulkhead"'), column
    assert found == row.expected


def test_the_table_has_every_column() -> None:
    assert list(ROWS[0].expected) == list(CREDENTIALS)


def methods_of(route: BaseRoute) -> set[str]:
    """Return the methods of one entry of the route list; HEAD and OPTIONS follow from them."""
    if isinstance(route, WebSocketRoute):
        return {"GET"}
    endpoint = getattr(route, "endpoint", None)
    if isinstance(endpoint, Resource):
        return set(endpoint.handlers) - {"HEAD"}
    return (getattr(route, "methods", None) or {"GET"}) - {"HEAD", "OPTIONS"}


def test_every_route_has_a_row() -> None:
    app = app_of(StubEngine())
    while not hasattr(app, "routes"):
        app = app.app
    served = {
        f"{method} {re.sub('(?:(?<=/runs/)|(?<=_response/)){id}', '{run}', route.path)}"
        for route in app.routes
        if isinstance(route, Route | WebSocketRoute)
        for method in methods_of(route)
    }
    rows = {row.route for row in ROWS}
    missing, gone = served - rows, rows - served - {"GET /nowhere"}
    assert not missing, (
        f"no row for {', '.join(sorted(missing))}: add a line to TABLE in tests/e2e/test_authorisation.py, with a "
        f"status for each of {', '.join(CREDENTIALS)} (a POST's body goes into BODIES). Run it once with guesses: the "
        "failure shows what was answered, and each cell is then either right or a hole"
    )
    assert not gone, f"TABLE has rows for routes that are no more: {', '.join(sorted(gone))}"
