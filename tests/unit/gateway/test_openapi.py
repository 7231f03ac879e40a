"""The OpenAPI document against the routes that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import schemathesis
from starlette.routing import Route

from gateway import problems
from gateway.app import all_routes
from gateway.auth import Authenticator
from gateway.describing import SIGHT_OF_ALL
from gateway.openapi import describe_routes
from gateway.resource import Resource
from gateway.retention import Retention
from gateway.tally import DoorTally
from taskkit.tokens import ACTIONS
from tests.unit.gateway.fakes import KEY, StubEngine, client_of, token


def routes() -> list[Route]:
    engine = StubEngine()
    retention = Retention(engine.store, engine.settings, "boot")
    found = all_routes(engine, Authenticator(KEY, [], desk=engine), retention, DoorTally())
    return [route for route in found if isinstance(route, Route)]


DOCUMENT = describe_routes(routes(), "0")
OPERATIONS = [
    (method, path, operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]
IDS = [f"{method} {path}" for method, path, _ in OPERATIONS]
#: Codes that leave where no route is (preflights, WebSockets), and that of a class of which only subclasses are raised.
ELSEWHERE = {
    "invalid-submission",
    "not-found",
    "method-not-allowed",
    "not-implemented",
    "unavailable",
    "cors",
    "wrong-origin",
}


def filled(path: str) -> str:
    """Return a path with something in each placeholder."""
    return path.format(
        id="00000000-0000-7000-8000-000000000000", name="demo.count", inbox="i", app="a", model="b", pk="1"
    )


def allowed(operation: dict[str, Any], where: str) -> set[str]:
    return {one["name"] for one in operation["parameters"] if one["in"] == where}


def schemas(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every schema in a document."""
    if isinstance(value, dict):
        if isinstance(value.get("schema"), dict):
            yield value["schema"]
        for part in value.values():
            yield from schemas(part)
    elif isinstance(value, list):
        for part in value:
            yield from schemas(part)


def references(value: Any) -> Iterator[str]:
    """Yield every `$ref` in a document."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for part in value.values():
            yield from references(part)
    elif isinstance(value, list):
        for part in value:
            yield from references(part)


def test_it_follows_openapi_3_1() -> None:
    schemathesis.openapi.from_dict(DOCUMENT).validate()
    assert DOCUMENT["openapi"] == "3.1.0"


def test_every_schema_is_one_and_every_reference_leads_somewhere() -> None:
    components = DOCUMENT["components"]["schemas"]
    found = [*schemas(DOCUMENT["paths"]), *components.values()]
    assert len(found) > 200
    for schema in found:
        jsonschema.Draft202012Validator.check_schema(schema)
    named = {reference.removeprefix("#/components/schemas/") for reference in references(DOCUMENT)}
    assert named <= set(components)


def test_every_route_is_described() -> None:
    assert all(isinstance(route.endpoint, Resource) for route in routes())
    assert {route.path for route in routes()} == set(DOCUMENT["paths"])
    ids = [operation["operationId"] for _, _, operation in OPERATIONS]
    assert len(set(ids)) == len(ids)
    assert all(operation["summary"].endswith(".") or operation["summary"] for _, _, operation in OPERATIONS)


def test_a_handler_that_says_nothing_is_found() -> None:
    async def silent(request: Any) -> Any: ...

    with pytest.raises(LookupError, match="silent has no description"):
        describe_routes([Route("/silent", Resource(get=silent))], "0")


def codes(operation: dict[str, Any]) -> set[str]:
    """Return the codes of problems that an operation tells of."""
    return {
        code.removeprefix(problems.TYPE_PREFIX)
        for response in operation["responses"].values()
        for media, content in response.get("content", {}).items()
        if media == problems.MEDIA_TYPE
        for code in content["schema"]["allOf"][1]["properties"]["type"]["enum"]
    }


def test_every_code_of_a_problem_is_documented_somewhere() -> None:
    told = set().union(*(codes(operation) for _, _, operation in OPERATIONS))
    assert told == set(problems.CODES) - ELSEWHERE


def test_what_only_some_operations_answer() -> None:
    """Streams may be too many; whoever guesses tokens is told to wait; plain requests for a WebSocket get 426."""
    said = {(method, path): codes(operation) for method, path, operation in OPERATIONS}
    assert {path for (_, path), told in said.items() if "too-many-streams" in told} == {
        "/api/v1/events",
        "/api/v1/runs/{id}/events",
        "/stream/{app}/{model}/{pk}",
        "/stream/{model}/{pk}",
    }
    assert {path for (_, path), told in said.items() if "upgrade-required" in told} == {"/ws", "/flowrra/ws"}
    for method, path, operation in OPERATIONS:
        assert ("too-many-failures" in said[method, path]) == bool(operation["security"]), path
        assert ({"ticket": []} in operation["security"]) == (method == "get" and bool(operation["security"]))


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS, ids=IDS)
async def test_the_parameters_that_are_taken_are_those_that_are_told(
    method: str, path: str, operation: dict[str, Any]
) -> None:
    """A parameter nobody knows is refused with the list of those that there are."""
    async with client_of(StubEngine()) as client:
        response = await client.request(method, filled(path), params={"nonsense": "1"})
    if "bad-parameter" not in codes(operation) or path.startswith("/stream"):  # the seed's may send anything
        assert response.status_code != 400
        return
    document = response.json()
    assert (response.status_code, document["parameter"]) == (400, "nonsense"), document
    there = document["detail"].rpartition("there ")[2]
    found = set() if there == "is none" else set(there.removeprefix("are ").split(", "))
    rest = {"limit", "wait"} if path.endswith("/events") else set()  # of the JSON rendering
    assert found == allowed(operation, "query") - rest


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS, ids=IDS)
async def test_the_action_that_is_needed_is_the_one_that_is_told(
    method: str, path: str, operation: dict[str, Any]
) -> None:
    needs = operation.get("x-needs-action", "")
    url = filled(path)
    async with client_of(StubEngine(), "") as client:
        response = await client.request(method, url)
        assert (response.status_code == 401) == bool(operation["security"])
    for action in sorted(ACTIONS):
        async with client_of(StubEngine(), token(actions=[action], runs="*", tasks=())) as client:
            # A ticket of nothing but what a token cannot pass on by default is refused: ask for what there is.
            body = {"actions": [action]} if path.endswith("/tickets") else None
            status = (await client.request(method, url, json=body)).status_code
        suffices = action in ("operate", "read") if needs == SIGHT_OF_ALL else needs in ("", action)
        assert (status != 403) == suffices, f"{action}: {status}"


def has_fields(operation: dict[str, Any]) -> bool:
    """Whether an operation has a body that is not the task's own business."""
    body = operation.get("requestBody", {"content": {"application/json": {"schema": {}}}})
    return body["content"]["application/json"]["schema"].get("additionalProperties") is False


@pytest.mark.parametrize(
    ("method", "path", "operation"),
    [one for one in OPERATIONS if has_fields(one[2])],
    ids=[id for id, one in zip(IDS, OPERATIONS, strict=True) if has_fields(one[2])],
)
async def test_the_fields_of_a_body_are_those_that_are_told(
    method: str, path: str, operation: dict[str, Any]
) -> None:
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    engine = StubEngine()
    run = engine.start()
    if path.endswith("replay"):
        engine.end(run)
    body: dict[str, Any] = {"task": "demo.count"} if path.endswith("/runs") else {}
    async with client_of(engine) as client:
        url = path.format(id=run.id, name="demo.count")
        response = await client.request(method, url, json={**body, "nonsense": 1})
    assert response.status_code == 422, response.text
    there = response.json()["errors"].get("nonsense", "").rpartition("there ")[2].partition(" ")[2]
    if path.endswith("batch"):  # its one field is missing, which is what is told
        assert set(schema["properties"]) == {"runs"}
    else:  # "is none", "is id", "are task, args, …"
        assert set(there.split(", ")) == (set(schema["properties"]) or {"none"})


def test_only_what_a_task_hears_may_have_any_fields() -> None:
    free = {path for _, path, one in OPERATIONS if "requestBody" in one and not has_fields(one)}
    assert free == {"/api/v1/runs/{id}/input/{inbox}"}


async def test_it_is_served_to_whoever_has_a_token() -> None:
    async with client_of(StubEngine()) as client:
        response = await client.get("/openapi.json")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    served = response.json()
    assert served["info"]["version"] == "0.1"
    assert served["paths"] == DOCUMENT["paths"]
    async with client_of(StubEngine(), "") as client:
        assert (await client.get("/openapi.json")).status_code == 401
