"""What of the gateway's entry can be looked at without a supervisor."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from gateway.__main__ import serve_limits
from gateway.serve import ServeLimits
from taskkit.settings import LimitSettings


def test_the_defaults_of_server_and_settings_are_the_same() -> None:
    assert serve_limits(LimitSettings()) == dataclasses.replace(ServeLimits(), body_seconds=31.0)


@pytest.mark.parametrize("field", dataclasses.fields(ServeLimits), ids=lambda field: field.name)
def test_every_bound_of_the_server_is_a_setting(field: dataclasses.Field[float]) -> None:
    name = "send_buffer_bytes" if field.name == "send_buffer" else field.name
    changed = LimitSettings(**{name: getattr(LimitSettings(), name) * 2})
    assert getattr(serve_limits(changed), field.name) > getattr(serve_limits(LimitSettings()), field.name)
    assert msgspec.convert(msgspec.to_builtins(changed), LimitSettings) == changed
