"""TASKKIT with the environment over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

pytestmark = pytest.mark.usefixtures("django_project")


def test_paths_and_tuples_become_plain_data() -> None:
    from taskkit.conf import get_settings, read_settings

    with override_settings(TASKKIT={"STATE_DIR": Path("/tmp/x"), "CORS_ORIGINS": ("https://a.example",)}):
        assert read_settings() == {"STATE_DIR": "/tmp/x", "CORS_ORIGINS": ["https://a.example"]}
        assert get_settings().state_dir == "/tmp/x"


def test_the_environment_stands_over_the_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkit.conf import read_settings

    monkeypatch.setenv("TASKKIT_BIND", "127.0.0.1:1")
    with override_settings(TASKKIT={"BIND": "127.0.0.1:2", "INTAKE_RUNNERS": 2}):
        assert read_settings() == {"BIND": "127.0.0.1:1", "INTAKE_RUNNERS": 2}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"BIND": 5}, ("BIND", "5")),
        ({"BIMD": "x"}, ("BIMD",)),
        ({"POOLS": {"default": {"runners": 0}}}, ("runners", "0")),
        (["BIND"], ("TASKKIT", "dict")),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(value: Any, words: tuple[str, ...]) -> None:
    from taskkit.conf import read_settings
    from taskkit.errors import SettingsError

    with override_settings(TASKKIT=value), pytest.raises(ImproperlyConfigured) as caught:
        read_settings()
    assert isinstance(caught.value, SettingsError)
    assert all(word in str(caught.value) for word in words)


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkit.conf import read_settings

    monkeypatch.setenv("TASKKIT_INTAKE_RUNNERS", "-1")
    with pytest.raises(ImproperlyConfigured, match="environment: INTAKE_RUNNERS = -1"):
        read_settings()


def test_the_key_lies_where_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkit.conf import key_file

    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    with override_settings(TASKKIT={"KEY_FILE": "/keys/one", "STATE_DIR": "/var/x"}):
        assert key_file() == Path("/keys/one")
    with override_settings(TASKKIT={"STATE_DIR": "/var/x"}):
        assert key_file() == Path("/var/x/key")
    with override_settings(TASKKIT={}):
        assert key_file() == Path("/state/bulkhead/tests.project.settings/key")
