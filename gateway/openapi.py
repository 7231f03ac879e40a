"""The OpenAPI 3.1 document, made from what the handlers of all routes say of themselves."""

from __future__ import annotations

import http
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from gateway import problems
from gateway.auth import Authenticator
from gateway.cookies import COOKIE
from gateway.describing import JSON, Description, Reply, description_of, document
from gateway.face import Engine
from gateway.reading import TICKET, Parameters
from gateway.resource import Resource, answer
from gateway.telling import NAME as INPUT_NAME

VERSION: Final = "3.1.0"

_SCHEMAS: Final = "#/components/schemas/{name}"

#: What each placeholder of a path stands for, where the path alone does not say it.
_PLACEHOLDERS: Final = {
    "name": "Name or dotted path of a task.",
    "inbox": "Name under which the task waits for it.",
    "app": "App label of a model.",
    "model": "Name of a model, in any letter case.",
    "pk": "Primary key of a row.",
}

_CLAIMS: Final = (
    "Claims: `sub`, `exp`, `jti`, `actions`, and what they reach: `runs` (ids, `*`, or `own`: those submitted for its "
    "`sub`) or `tasks` (names, `*` for any characters)."
)
_TICKETS: Final = (
    "From POST /api/v1/tickets, good for one request; it becomes a cookie that reads the same path."
)

_TEXT: Final = {"type": "string"}

#: What any request can be answered with before a handler sees it.
_ALWAYS: Final = (
    *("bad-request", "ambiguous-length", "bad-host", "wrong-host", "headers-too-large"),
    *("internal", "too-many-connections", "http-version"),
)
_WITH_TOKEN: Final = (
    *(code for code in problems.CODES if code.startswith("token-")),
    "too-many-failures",
    "forbidden",
    "not-writable",
)
_WITH_QUERY: Final = ("bad-parameter",)
_WITH_BODY: Final = ("bad-json", "client-gone", "too-large", "unsupported-media-type", "slow-body")


#: Of whatever has a run in its path: it may be another node's.
_ELSEWHERE: Final = Reply(
    "Another node has the run: the same request is answered there.", headers={"Location": "Where."}
)


class OpenApi:
    """Serves GET /openapi.json.

    Args:
      routes: all routes but its own.
    """

    def __init__(self, engine: Engine, authenticator: Authenticator, routes: Iterable[BaseRoute]) -> None:
        self._engine = engine
        self._authenticator = authenticator
        self._routes = [*routes, self.route()]
        self._made: dict[str, Any] | None = None

    def route(self) -> Route:
        """Return its own route, for Starlette."""
        return Route("/openapi.json", Resource(get=self.show))

    @Description(needs="", answers={200: document(dict[str, Any], "The document.")})
    async def show(self, request: Request) -> Response:
        """Serve this description of all routes, as OpenAPI 3.1."""
        await self._authenticator.admit(request)
        Parameters(request, ())
        if self._made is None:
            self._made = describe_routes(self._routes, self._engine.versions.get("bulkhead", ""))
        return answer(self._made)


def describe_routes(routes: Iterable[BaseRoute], version: str) -> dict[str, Any]:
    """Return the OpenAPI document of these routes.

    Raises:
      LookupError: a handler says nothing of itself.
    """
    plain = [route for route in routes if isinstance(route, Route)]  # OpenAPI has no words for a WebSocket
    operations = [(route.path, method, handler) for route in plain for method, handler in _handlers(route)]
    said = {handler: _said(handler, path) for path, _, handler in operations}
    types = [type for description in said.values() for type in _types(description)]
    schemas, components = msgspec.json.schema_components([*types, problems.Problem], ref_template=_SCHEMAS)
    schema_of = dict(zip(map(_key, types), schemas, strict=False))
    paths: dict[str, Any] = {}
    for path, method, handler in operations:
        paths.setdefault(path, {})[method] = _operation(path, method, handler, said[handler], schema_of)
    return {
        "openapi": VERSION,
        "info": {"title": "Bulkhead", "version": version, "summary": "Tasks, each in a process of its own."},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": _CLAIMS},
                "ticket": {"type": "apiKey", "in": "query", "name": TICKET, "description": _TICKETS},
                "cookie": {"type": "apiKey", "in": "cookie", "name": COOKIE},
            },
        },
    }


def _handlers(route: Route) -> Iterator[tuple[str, Callable[..., Any]]]:
    resource = route.endpoint
    if isinstance(resource, Resource):
        for method, handler in resource.handlers.items():
            if method != "HEAD":  # it answers as GET does, without a body
                yield method.lower(), handler


def _said(handler: Callable[..., Any], path: str) -> Description:
    found = description_of(handler)
    if found is None:
        raise LookupError(f"{path}: {handler.__qualname__} has no description (gateway.describing.describe)")
    return found


def _types(description: Description) -> Iterator[Any]:
    for told in description.answers.values():
        yield from (type for type in told.content.values() if type not in (str, bytes))


def _key(type: Any) -> str:
    return repr(type)


def _operation(
    path: str,
    method: str,
    handler: Callable[..., Any],
    said: Description,
    schemas: Mapping[str, Any],
) -> dict[str, Any]:
    text = inspect.getdoc(handler) or ""
    summary, _, rest = text.partition("\n\n")
    parts = [part for part in path.split("/") if part not in ("", "api", "v1")]
    operation: dict[str, Any] = {
        "operationId": "_".join([method, *re.findall(r"[a-z0-9]+", path)]),
        "summary": " ".join(summary.split()),
        **({"description": rest} if rest else {}),
        "tags": [parts[0].removesuffix(".json") if parts else "root"],
        "parameters": [*_path_parameters(path), *_parameters(said)],
        "responses": _responses(said, schemas, elsewhere="/runs/{id}" in path),
        "security": _security(said, method),
    }
    if said.body is not None:
        content = {JSON: {"schema": said.body}}
        operation["requestBody"] = {"required": not said.body_optional, "content": content}
    if said.needs:
        operation["x-needs-action"] = said.needs
    return operation


def _path_parameters(path: str) -> Iterator[dict[str, Any]]:
    for before, name in re.findall(r"([^/]*)/\{([a-z]+)\}", path):
        doc = _PLACEHOLDERS.get(name, f"Id of a {before.removesuffix('s')}.")
        schema = {"type": "string", "minLength": 1}
        if name == "inbox":
            schema["pattern"] = f"^{INPUT_NAME}$"
        yield {"name": name, "in": "path", "required": True, "description": doc, "schema": schema}


def _parameters(said: Description) -> Iterator[dict[str, Any]]:
    for one in said.query:
        yield {"name": one.name, "in": "query", "description": one.doc, "schema": one.schema}
    for header in said.headers:
        yield {"name": header.name, "in": "header", "description": header.doc, "schema": header.schema}


def _security(said: Description, method: str) -> list[dict[str, list[str]]]:
    if said.needs is None:
        return []
    return [{"bearer": []}, {"ticket": []}, {"cookie": []}] if method == "get" else [{"bearer": []}]


# --- responses -------------------------------------------------------------------------------------------------


def _responses(said: Description, schemas: Mapping[str, Any], *, elsewhere: bool) -> dict[str, Any]:
    found = {str(status): _response(told, schemas) for status, told in sorted(said.answers.items())}
    if elsewhere and "unknown-run" in said.problems:
        found["307"] = _response(_ELSEWHERE, schemas)
    by_status: dict[int, list[str]] = {}
    for code in _codes(said):
        by_status.setdefault(problems.CODES[code].status, []).append(code)
    for status, codes in sorted(by_status.items()):
        refusal = _refusal(status, codes)
        if str(status) in found:  # such as /ready, whose 503 says more than a problem does
            refusal["content"] |= found[str(status)].get("content", {})
        found[str(status)] = refusal
    return found


def _codes(said: Description) -> list[str]:
    """Return the codes of all problems that the operation can end with, in the order of the table."""
    codes = {*_ALWAYS, *said.problems}
    if said.needs is not None:
        codes |= {*_WITH_TOKEN, *_WITH_QUERY}
    if said.body is not None:
        codes |= set(_WITH_BODY)
    return [code for code in problems.CODES if code in codes]


def _response(told: Reply, schemas: Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {"description": told.says}
    if told.content:
        shown["content"] = {
            media: {} if type is bytes else {"schema": _TEXT if type is str else schemas[_key(type)]}
            for media, type in told.content.items()
        }
    if told.headers:
        shown["headers"] = {name: _header(doc) for name, doc in told.headers.items()}
    return shown


def _header(doc: str, *, required: bool = False) -> dict[str, Any]:
    return {"description": doc, "schema": {"type": "string"}, **({"required": True} if required else {})}


def _refusal(status: int, codes: Sequence[str]) -> dict[str, Any]:
    kinds = {"properties": {"type": {"enum": [problems.TYPE_PREFIX + code for code in codes]}}}
    schema = {"allOf": [{"$ref": _SCHEMAS.format(name="Problem")}, kinds]}
    titles = dict.fromkeys(problems.CODES[code].title for code in codes)
    shown: dict[str, Any] = {
        "description": "; ".join(titles) or http.HTTPStatus(status).phrase,
        "content": {problems.MEDIA_TYPE: {"schema": schema}},
    }
    headers = problems.HEADERS.get(status)
    if headers:
        shown["headers"] = {name: _header(doc, required=True) for name, doc in headers.items()}
    return shown
