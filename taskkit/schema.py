"""A function's signature as JSON Schema (2020-12), made from the types that bind its arguments.

Rule: one source. The struct that `msgspec` describes as JSON Schema has the very types that `bind` converts
to, so what the gateway accepts is what the runner can bind. A parameter without annotation, or with one
that JSON cannot express, takes any JSON value and gets it as it came.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any, Final, Optional, get_type_hints

import msgspec

from taskkit.errors import InvalidArguments

#: Written into every schema, so that a validator takes the right rules.
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

_EMPTY: Final = inspect.Parameter.empty
_BY_POSITION: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _schema_hook(kind: type) -> dict[str, Any]:
    """Describe the types that msgspec leaves to its user."""
    if kind is object:
        return {}
    if isinstance(kind, type) and issubclass(kind, PurePath):
        return {"type": "string"}
    raise NotImplementedError(kind)


def _decode_hook(kind: type, value: Any) -> Any:
    """Make the types that msgspec leaves to its user."""
    if kind is not object and not isinstance(value, str):
        raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
    return value if kind is object else kind(value)


def _convert(value: Any, kind: Any) -> Any:
    # JSON has text keys only, hence str_keys for dict[int, …]
    return msgspec.convert(value, type=kind, dec_hook=_decode_hook, str_keys=True)


def _annotated_type(parameter: inspect.Parameter, names: dict[str, Any]) -> Any:
    """Return the parameter's type, or Any where JSON cannot express it."""
    if parameter.annotation is _EMPTY:
        return Any
    holder = SimpleNamespace(__annotations__={"it": parameter.annotation})
    try:
        kind = get_type_hints(holder, globalns=names, include_extras=True)["it"]
        if parameter.default is None:
            kind = Optional[kind]  # noqa: UP045 - `path: str = None` means it; `|` fails on some annotations
        msgspec.json.schema(kind, schema_hook=_schema_hook)
    except Exception:  # evaluating is the user's code: a name that only type checkers import, an odd union …
        return Any
    return kind


def _unset() -> Any:
    """Stand for "the function's own default" in the struct; never called, the struct is only described."""
    return None


@dataclass(frozen=True)
class Parameters:
    """What a function may be called with.

    Attributes:
      schema: JSON Schema of the keyword arguments. A `*rest` parameter is an array under its own name;
        `**options` are `additionalProperties`.
      positional: names of the parameters that `args` fill, in their order.
      signature: of the function, without skipped parameters.
      types: type by parameter name; of one item for `*rest`, of one value for `**options`.
    """

    schema: dict[str, Any]
    positional: tuple[str, ...]
    signature: inspect.Signature
    types: dict[str, Any]

    def _name_of(self, kind: Any) -> str | None:
        return next((name for name, it in self.signature.parameters.items() if it.kind is kind), None)

    def bind(self, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the same arguments as the annotated types, ready for the call.

        Raises:
          InvalidArguments: some are missing, unknown, given twice or of a wrong type; `errors` has a
            message per parameter. The submitter's fault.
        """
        given, rest, errors = self._by_name(args, kwargs)
        values: dict[str, Any] = {}
        for name, value in given.items():
            self._put(values, errors, name, value, self.types.get(name, self._options_type))
        extras: dict[int, Any] = {}
        for index, value in enumerate(rest):
            self._put(extras, errors, index, value, self.types[self._rest_name])
        if errors:
            text = "; ".join(f"{name}: {message}" for name, message in errors.items())
            raise InvalidArguments(f"the arguments do not fit: {text}", errors=errors)
        return self._call(len(args), values, list(extras.values()))

    @property
    def _rest_name(self) -> str:
        return self._name_of(inspect.Parameter.VAR_POSITIONAL) or ""

    @property
    def _options_type(self) -> Any:
        return self.types.get(self._name_of(inspect.Parameter.VAR_KEYWORD) or "", Any)

    def _put(
        self, into: dict[Any, Any], errors: dict[str, str], name: str | int, value: Any, kind: Any
    ) -> None:
        """Convert one value, or say under its parameter's name why that fails."""
        try:
            into[name] = _convert(value, kind)
        except msgspec.ValidationError as error:
            label = f"{self._rest_name}[{name}]" if isinstance(name, int) else name
            errors[label] = str(error).replace("`$", f"`{label}")

    def _by_name(
        self, args: list[Any], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], list[Any], dict[str, str]]:
        """Sort the arguments: (by parameter name, beyond the named ones, what is wrong)."""
        errors: dict[str, str] = {}
        given: dict[str, Any] = dict(zip(self.positional, args, strict=False))
        rest = list(args[len(self.positional) :])
        takes_any_name = self._name_of(inspect.Parameter.VAR_KEYWORD)
        if rest and not self._rest_name:
            errors["args"] = f"at most {len(self.positional)} by position, {len(args)} were given"
            rest = []
        for name, value in kwargs.items():
            if name in given or (name == self._rest_name and rest):
                errors[name] = "was given twice, by position as well as by name"
            elif name and name == self._rest_name:
                rest = value if isinstance(value, list) else []
                if not isinstance(value, list):
                    errors[name] = f"Expected `array`, got `{type(value).__name__}`"
            elif takes_any_name or name in self.types:
                given[name] = value
            else:
                errors[name] = "is no parameter of this task"
        for name in self.schema["required"]:
            if name not in given and name not in errors:
                errors[name] = "is required"
        return given, rest, errors

    def _call(
        self, by_position: int, values: dict[str, Any], rest: list[Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Lay out converted values: by position what came so or has to, by name the others."""
        parameters = self.signature.parameters
        count = len(self.positional) if rest else min(by_position, len(self.positional))
        for index, name in enumerate(self.positional):
            if name in values and parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY:
                count = max(count, index + 1)
        leading = [
            values.pop(name) if name in values else parameters[name].default
            for name in self.positional[:count]
        ]
        return leading + rest, values


def parameters_of(function: Callable[..., Any], skip: int = 0, *, typed: bool = True) -> Parameters:
    """Return what `function` may be called with, without its first `skip` parameters.

    `typed` False: any JSON value may go into any parameter, whatever its annotation says.
    """
    plain = inspect.unwrap(function)
    signature = inspect.signature(function)
    wanted = list(signature.parameters.values())[skip:]
    known = getattr(plain, "__globals__", {})
    types = {it.name: _annotated_type(it, known) if typed else Any for it in wanted}
    return Parameters(
        schema=_schema(getattr(plain, "__name__", "task"), wanted, types),
        positional=tuple(it.name for it in wanted if it.kind in _BY_POSITION),
        signature=signature.replace(parameters=wanted),
        types=types,
    )


def _field(parameter: inspect.Parameter, kind: Any) -> tuple[str, Any] | tuple[str, Any, Any]:
    """Return the struct field that describes `parameter`."""
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return parameter.name, list[kind], msgspec.field(default_factory=list)
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return parameter.name, dict[str, kind], msgspec.field(default_factory=dict)
    if parameter.default is _EMPTY:
        return parameter.name, kind
    return parameter.name, kind, msgspec.field(default_factory=_unset)


def _schema(name: str, parameters: list[inspect.Parameter], types: dict[str, Any]) -> dict[str, Any]:
    """Describe the struct of all parameters, as one object schema with its `$defs`."""
    fields = [_field(it, types[it.name]) for it in parameters]
    struct = msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True)
    whole = msgspec.json.schema(struct, schema_hook=_schema_hook)
    definitions = whole["$defs"]
    schema = definitions.pop(whole["$ref"].rpartition("/")[2])
    properties = schema["properties"]
    for parameter in parameters:
        own = properties[parameter.name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            schema["additionalProperties"] = own.get("additionalProperties", True)
            del properties[parameter.name]
        elif parameter.default is not _EMPTY:
            _add_default(own, parameter.default)
    schema.setdefault("required", [])
    return {"$schema": DIALECT, **schema, **({"$defs": definitions} if definitions else {})}


def _add_default(schema: dict[str, Any], default: Any) -> None:
    """Show the default where JSON can express it."""
    try:
        schema["default"] = msgspec.to_builtins(default, str_keys=True)
    except (TypeError, ValueError):
        schema.pop("default", None)


def _takes_nothing() -> None:
    """Have the signature of a model task's `process`."""


#: For tasks that get nothing but their row.
NO_PARAMETERS: Final = parameters_of(_takes_nothing)
