"""A real tree, fuzzed from its own OpenAPI document: no answer that it does not tell of, and no 500."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gateway import sse
from tests.helpers import Tree
from tests.unit.gateway.test_openapi import DOCUMENT

#: Repeat a run by its seed: BULKHEAD_FUZZ_SEED=… python -m pytest tests/e2e/test_openapi_fuzz.py
SEED = int(os.environ.get("BULKHEAD_FUZZ_SEED") or random.SystemRandom().randrange(1 << 32))

#: Requests per operation.
EXAMPLES = int(os.environ.get("BULKHEAD_FUZZ_EXAMPLES", "30"))

#: Seconds for any answer. Every run that a stream is asked of has ended, so its stream ends.
PATIENCE = 20.0

PROBLEM = "application/problem+json"
OPERATIONS = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods]

#: Tasks that end at once whatever they are given; most arguments do not fit them.
TASKS = ("proj.echo", "proj.add", "proj.boom", "proj.Row", "tests.project.tasks.echo")

#: What is accepted, of what a client may want.
ACCEPT = (
    "*/*",
    "application/json",
    "application/x-ndjson",
    "text/plain",
    "text/event-stream",
    "image/png",
    "x;q=",
)
CURSORS = ("0", "1", "2", "3.1", "e1-1", "latest", "now", "999999", "")

CHECKS: tuple[Callable[..., Any], ...] = (
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)

#: Where a schema cannot say what is right: an opaque cursor, a date that no calendar has, arguments of a task,
#: parameters of one rendering only, the primary key of any model, what fits into a cookie, that only a WebSocket
#: will do, when a cron text comes.
CANNOT_SAY = {
    *(("/api/v1/runs", "get"), ("/api/v1/runs", "post"), ("/api/v1/runs/{id}/events", "get")),
    *(("/stream/{app}/{model}/{pk}", "get"), ("/stream/{model}/{pk}", "get")),
    *(("/api/v1/tickets", "post"), ("/ws", "get"), ("/flowrra/ws", "get")),
    *(("/api/v1/events", "get"), ("/api/v1/events", "post")),
    *(("/api/v1/schedules", "get"), ("/api/v1/schedules", "post")),
}

#: Choices of many runs, right ones and wrong ones. Made by hand: the stream of a tag ends when its life does, so a
#: generated request would wait for that.
CHOICES: tuple[dict[str, Any], ...] = (
    *({"runs": ["{run}"], "until": "done", "after": cursor} for cursor in CURSORS),
    *(
        {"runs": ["{run}"], "until": "done", "types": types}
        for types in (["run.started", "x"], [""], ["a" * 300])
    ),
    *(
        {"runs": runs, "until": "done"}
        for runs in (["x"], [], ["0190b5a0-0000-7000-8000-000000000001"], [""])
    ),
    {"tags": ["x"], "until": "done"},
    {"tags": [""]},
    {"runs": ["{run}"], "until": "never"},
    {},
)


#: Where what is wrong is told of in a 200: each item has an outcome of its own.
TELLS_INSIDE = {("/api/v1/runs/batch", "post")}


@dataclass
class Target:
    """A tree with its document, and what there is in it by the kind of placeholder."""

    tree: Tree
    schema: Any
    session: requests.Session
    fillings: dict[str, list[dict[str, Any]]]
    tokens: list[str]


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    """Give a tree with runs of each kind that have ended."""
    print(f"BULKHEAD_FUZZ_SEED={SEED}")
    with Tree(runners=2) as tree, requests.Session() as session:
        session.trust_env = False
        runs = [tree.submit(f"proj.{name}") for name in ("echo", "boom", "chatty")]
        runs.append(
            tree.http.post("/api/v1/runs", json={"task": "proj.Row", "fields": {"message": "x"}}).json()
        )
        for run in runs:
            tree.wait(run["id"])
        runner = tree.http.get("/api/v1/runners").json()["runners"][0]["id"]
        schedule = tree.http.post("/api/v1/schedules", json={"task": "proj.echo", "every": 86400}).json()[
            "id"
        ]
        schema = schemathesis.openapi.from_dict(tree.http.get("/openapi.json").json())
        schema.config.update(base_url=tree.url)
        schema.config.generation.update(with_security_parameters=False)
        fillings = {
            "run": [{"id": run["id"]} for run in runs],
            "inbox": [{"id": run["id"], "inbox": "x"} for run in runs],
            "runner": [{"id": runner}],
            "schedule": [{"id": schedule}],
            "task": [{"name": name} for name in TASKS],
            "app": [{"app": "proj", "model": "row", "pk": "1"}],
            "model": [{"model": "Row", "pk": "1"}, {"model": "Row", "pk": "x"}],
        }
        everything = tree.token()
        yield Target(tree, schema, session, fillings, [*[everything] * 8, runs[0]["token"], "nonsense"])


def kind_of(path: str) -> str:
    """Return what the placeholders of a path stand for."""
    marks = {
        "{inbox}": "inbox",
        "{app}": "app",
        "{model}": "model",
        "{name}": "task",
        "runners/{id}": "runner",
        "schedules/{id}": "schedule",
        "{id}": "run",
    }
    return next((kind for mark, kind in marks.items() if mark in path), "")


def cases(target: Target, path: str, method: str) -> st.SearchStrategy[Any]:
    """Return requests of one operation: right ones and wrong ones, of what there is and of what there is not."""
    operation = target.schema[path][method.upper()]
    if path == "/api/v1/events":
        return st.one_of([many_runs(operation, method, choice, target) for choice in CHOICES])
    fillings = [*target.fillings.get(kind_of(path), []), None]
    kinds = [
        operation.as_strategy(mode, path_parameters=filling)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        for filling in fillings
    ]
    if path.endswith("/events") or path.startswith("/stream"):
        kinds += [
            operation.as_strategy(path_parameters=filling, query={"after": cursor})
            for filling in fillings[:2]
            for cursor in CURSORS
        ]
    return st.one_of(kinds)


def many_runs(operation: Any, method: str, choice: dict[str, Any], target: Target) -> st.SearchStrategy[Any]:
    """Return a request for the stream of a choice of runs."""
    run = target.fillings["run"][0]["id"]
    filled = {
        name: [run if one == "{run}" else one for one in value] if isinstance(value, list) else value
        for name, value in choice.items()
    }
    if method == "post":
        return operation.as_strategy(body=filled)
    return operation.as_strategy(
        query={{"runs": "run", "tags": "tag"}.get(name, name): value for name, value in filled.items()}
    )


def name_tasks(body: Any, name: str | None) -> None:
    """Have submissions be of a task that there is."""
    if name is None or not isinstance(body, dict):
        return
    for one in (body, *(body["runs"] if isinstance(body.get("runs"), list) else ())):
        if isinstance(one, dict) and isinstance(one.get("task"), str):
            one["task"] = name


def hides_a_cursor(case: Any) -> bool:
    """Whether a request says more than once where to begin: what the first one hides is not looked at."""
    said = [name for name in sse.CURSOR_PARAMETERS if name in (case.query or {})]
    return len(said) + ("Last-Event-ID" in (case.headers or {})) > 1


def checks_of(case: Any, path: str, method: str, status: int) -> list[Callable[..., Any]]:
    """Return what an answer is held to."""
    checks = [*CHECKS]
    if (path, method) not in TELLS_INSIDE and not hides_a_cursor(case):
        checks.append(negative_data_rejection)
        if (path, method) not in CANNOT_SAY and status != 406:  # the data may be right then
            checks.append(positive_data_acceptance)
    return checks


@pytest.mark.parametrize(
    ("path", "method"), OPERATIONS, ids=[f"{method} {path}" for path, method in OPERATIONS]
)
def test_every_answer_is_told_of(target: Target, path: str, method: str) -> None:
    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
        print_blob=False,
    )
    @hypothesis.given(
        case=cases(target, path, method),
        task=st.sampled_from([None, *TASKS]),
        token=st.sampled_from(target.tokens),
        accept=st.sampled_from(ACCEPT),
    )
    def fuzz(case: Any, task: str | None, token: str, accept: str) -> None:
        name_tasks(case.body, task)
        headers = {"Authorization": f"Bearer {token}", "Accept": accept}
        response = case.call(session=target.session, headers=headers, timeout=PATIENCE)
        where = (
            f"{method} {response.request.url} → {response.status_code} {response.text[:300]!r} (seed {SEED})"
        )
        assert response.status_code != 500, where
        if response.status_code >= 400:
            assert response.headers["content-type"][0] == PROBLEM, where
            assert response.json()["status"] == response.status_code, where
        case.validate_response(response, checks=checks_of(case, path, method, response.status_code))

    fuzz()


def test_it_is_still_a_whole_tree(target: Target) -> None:
    assert target.tree.http.get("/ready").status_code == 200
    assert target.tree.wait(target.tree.submit("proj.echo", value=2)["id"])["result"] == 2
    assert "Traceback" not in target.tree.tail(1_000_000)
