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


def render_event(data: Any, extras: Mapping[str, Any]) -> bytes:
    """Return an event's data: the task's own object plus `extras`; what is no object becomes `{"value": data}`."""
    own = data if isinstance(data, Mapping) else {} if data is None else {"value": data}
    return render({**own, **extras, "_timestamp": dt.datetime.now(dt.UTC)})


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
