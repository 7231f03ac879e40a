"""Values to JSON, once, in the process that made them."""

from __future__ import annotations

import datetime as dt
import traceback
from collections.abc import Mapping
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, Final

import msgspec
from django.utils.functional import Promise

from taskkit.wire.messages import TaskFailure

_OURS: Final = str(Path(__file__).parent)

#: When an event was made, RFC 3339.
_TIMESTAMP: Final = "_timestamp"


def _foreign(value: Any) -> Any:
    if isinstance(value, Promise | PurePath):
        return str(value)
    if value is None or isinstance(value, bool | tuple | frozenset):  # as values JSON has them
        raise TypeError(f"JSON cannot have {_shown(value)} as a key; keys are text or numbers")
    raise TypeError(
        f"JSON cannot express {_shown(value)} of type {class_path(type(value))}; "
        "convert it first (for a model instance, send its pk and the fields that matter)"
    )


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.100}"
    except BaseException:  # the user's __repr__; it must not hide what is wrong
        return "a value"


_encoder: Final = msgspec.json.Encoder(enc_hook=_foreign, decimal_format="string")


def render(value: Any) -> bytes:
    """Return `value` as one line of compact JSON. NaN and infinities become null, as JSON has none.

    Raises:
      TypeError: something in it JSON cannot express. The task's fault.
      ValueError: it contains itself, or text that is no Unicode.
    """
    try:
        return _encoder.encode(value)
    except RecursionError:
        raise ValueError("the value is nested too deeply for JSON, or contains itself") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"the value holds text that UTF-8 cannot express: {error}") from None


class EventRenderer:
    """Renders an event's data: the task's own object plus `extras` and `_timestamp`.

    What does not change is rendered once, and put behind the task's own: 1.7 against 2.9 µs for a small event.
    """

    def __init__(self, extras: Mapping[str, Any]) -> None:
        self._extras = dict(extras)
        self._names = frozenset((*extras, _TIMESTAMP))
        members = [render({name: value})[1:-1] for name, value in extras.items()]
        self._tail = b",".join([b"", *members, b'"%b":' % _TIMESTAMP.encode()])

    def render(self, data: Any) -> bytes:
        """Return the event's JSON; what is no object becomes `{"value": data}`.

        Raises:
          TypeError, ValueError: as `render`.
        """
        if type(data) is not dict:
            data = dict(data) if isinstance(data, Mapping) else {} if data is None else {"value": data}
        now = dt.datetime.now(dt.UTC)
        if not data.keys().isdisjoint(self._names):  # ours take the place of the task's
            return render({**data, **self._extras, _TIMESTAMP: now})
        tail = self._tail if data else self._tail[1:]
        return b"".join((render(data)[:-1], tail, _encoder.encode(now), b"}"))


def class_path(cls: type) -> str:
    """Return the dotted path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OURS):
        trace = trace.tb_next
    return trace


def failure_of(error: BaseException) -> TaskFailure:
    """Return an exception as data; the traceback begins at the task's own code."""
    text = "".join(
        traceback.format_exception(type(error), error, _without_ours(error.__traceback__), limit=-60)
    )
    try:
        message = str(error)
    except BaseException as broken:  # whatever it is, the failure has to be told
        message = f"<no message: {type(error).__qualname__}.__str__ raised {type(broken).__qualname__}>"
    # A lone surrogate in a message must not keep the failure itself from being told.
    return TaskFailure(
        exception=class_path(type(error)),
        message=message.encode("utf-8", "replace").decode(),
        traceback=text.encode("utf-8", "replace").decode(),
    )
