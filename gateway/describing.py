"""What a route takes, what it answers, said once: beside the handler, in the words that it works with.

Parameters are read through the objects that describe them, bodies are checked by the fields that describe them,
documents have the types that the type checker holds their builders to. So the OpenAPI document cannot say what is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from gateway.fields import Schema, parse_time, text, time_in_utc
from gateway.reading import MAX_WAIT, Parameters

JSON: Final = "application/json"

#: What is needed to see what tells of everybody's runs.
SIGHT_OF_ALL: Final = "operate, or read of every run"

_ATTRIBUTE: Final = "description"

_H = TypeVar("_H", bound=Callable[..., Any])
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Query(Generic[_T]):
    """A parameter of the query: its schema, and how it is read."""

    name: str
    doc: str
    schema: Schema
    read: Callable[[Parameters], _T]

    def of(self, query: Parameters) -> _T:
        """Return its value in `query`.

        Raises:
          Refusal: it is wrong; the client's fault.
        """
        return self.read(query)


@dataclass(frozen=True, slots=True)
class Header:
    """A header of a request."""

    name: str
    doc: str
    schema: Schema


@dataclass(frozen=True, slots=True)
class Reply:
    """What comes with one status.

    Attributes:
      says: in a sentence.
      content: type of the document by media type; `str` for text, `bytes` for a stream.
      headers: names, each with its meaning.
    """

    says: str
    content: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


def document(type: Any, says: str, **headers: str) -> Reply:
    """Return the answer of one JSON document; `headers` by name, with `_` for the hyphen."""
    return Reply(says, {JSON: type}, {name.replace("_", "-"): doc for name, doc in headers.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """One method of one route: a decorator, which leaves the handler as it is.

    Attributes:
      needs: the action that its token must allow; "" is any token, None is none at all.
      body: JSON Schema of what it takes; None takes no body.
      body_optional: whether nothing is as good as an empty object.
      answers: by status.
      problems: codes of gateway.problems beyond those that follow from the rest.
    """

    needs: str | None
    query: tuple[Query[Any], ...] = ()
    headers: tuple[Header, ...] = ()
    body: Schema | None = None
    body_optional: bool = False
    answers: Mapping[int, Reply]
    problems: tuple[str, ...] = ()

    def __call__(self, handler: _H) -> _H:
        """Say this of `handler`."""
        setattr(handler, _ATTRIBUTE, self)
        return handler


def description_of(handler: Callable[..., Any]) -> Description | None:
    """Return what was said of a handler, None when nothing was."""
    found: Description | None = getattr(handler, _ATTRIBUTE, None)
    return found


def names(parameters: Iterable[Query[Any]]) -> tuple[str, ...]:
    """Return what `Parameters` is to allow."""
    return tuple(parameter.name for parameter in parameters)


# --- parameters ------------------------------------------------------------------------------------------------


def word(name: str, doc: str, pattern: str | None = None) -> Query[str | None]:
    """Return a parameter of any text; whoever reads it holds it to `pattern`."""
    schema = text(1).schema | ({} if pattern is None else {"pattern": pattern})
    return Query(name, doc, schema, lambda query: query.text(name))


def choice(name: str, values: Iterable[str], doc: str) -> Query[str | None]:
    """Return a parameter of a few words."""
    known = list(values)
    return Query(name, doc, {"type": "string", "enum": known}, lambda query: query.choice(name, known))


def number(name: str, low: int, high: int, default: int, doc: str) -> Query[int]:
    """Return a parameter of a whole number."""
    schema: Schema = {"type": "integer", "minimum": low, "maximum": high, "default": default}
    return Query(name, doc, schema, lambda query: query.number(name, low, high, default))


def wait(name: str, doc: str) -> Query[float]:
    """Return a parameter of seconds that the client wants to wait."""
    schema: Schema = {"type": "number", "minimum": 0, "maximum": MAX_WAIT, "default": 0}
    return Query(name, doc, schema, lambda query: query.seconds(name))


def moment(name: str, doc: str) -> Query[float | None]:
    """Return a parameter of a moment, Unix seconds when it is read."""

    def read(query: Parameters) -> float | None:
        said = query.text(name)
        found = None if said is None else parse_time(said)
        if said is not None and found is None:
            raise query.refusal(name, time_in_utc().complaint)
        return found

    return Query(name, doc, time_in_utc().schema, read)
