"""The project's `TASKKIT` dict with the environment over it, read anew at each call.

Nothing here runs at import, so `override_settings` works.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from taskkit.errors import SettingsError
from taskkit.settings import (
    Settings,
    default_state_dir,
    from_environment,
    hidden_from_browsers,
    load_settings,
)


class TaskkitImproperlyConfigured(SettingsError, ImproperlyConfigured):
    """A key of TASKKIT, or a TASKKIT_* variable, is wrong; the message names key and value."""


def _plain(value: Any) -> Any:
    """Return `value` with what settings files like to hold (paths, tuples, sets) as plain data."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, Set)):
        return [_plain(item) for item in value]
    return value


def read_settings() -> dict[str, Any]:
    """Return what the project sets, environment over TASKKIT, as plain data by upper-case key; checked.

    Keys that nobody sets are absent, so that flags and defaults can still be told apart.

    Raises:
      TaskkitImproperlyConfigured: a key is unknown or a value is wrong. The project's fault.
    """
    own = getattr(settings, "TASKKIT", {})
    if not isinstance(own, Mapping):
        raise TaskkitImproperlyConfigured(f"TASKKIT = {own!r}: it must be a dict")
    found = _plain(own)
    try:
        load_settings(found)
        environment = from_environment(os.environ)
        load_settings(environment, source="environment")
    except SettingsError as error:
        raise TaskkitImproperlyConfigured(str(error)) from error
    return {**found, **environment}


def get_settings() -> Settings:
    """Return the same, typed, with defaults.

    Raises:
      TaskkitImproperlyConfigured: as `read_settings`.
    """
    return load_settings(read_settings())


def pool_of(queue: str) -> str:
    """Return the pool that performs the tasks of a queue of Django's own Tasks interface: that of its name, if any."""
    try:
        return queue if queue in get_settings().all_pools else "default"
    except SettingsError:  # the system checks say so
        return "default"


def gateway_url() -> str:
    """Return the URL of the gateway as browsers reach it, without a slash at its end: URL, else `http://BIND`.

    Raises:
      TaskkitImproperlyConfigured: as `read_settings`, or there is no URL and BIND or UDS is no such address.
    """
    found = get_settings()
    if reason := hidden_from_browsers(found):
        raise TaskkitImproperlyConfigured(f"TASKKIT: {reason}; set URL to what browsers shall open")
    return (found.url or f"http://{found.bind}").rstrip("/")


def gateway_address() -> str:
    """Return where this process reaches the gateway: `unix:` and UDS where there is that socket, else as browsers do.

    Raises:
      TaskkitImproperlyConfigured: as `gateway_url`.
    """
    found = get_settings()
    if found.uds and (found.url is None or os.path.exists(found.uds)):
        return f"unix:{found.uds}"
    return gateway_url()


def stream_url(run: str) -> str:
    """Return the URL of a run's events, without a ticket.

    Raises:
      TaskkitImproperlyConfigured: as `gateway_url`.
    """
    return f"{gateway_url()}/api/v1/runs/{run}/events"


def key_file() -> Path:
    """Return the file with the key of the tokens: KEY_FILE, else `key` in STATE_DIR, else in the default one.

    A tree that was started with `--state-dir` and no such setting has its key where this does not look.

    Raises:
      TaskkitImproperlyConfigured: as `read_settings`.
    """
    found = get_settings()
    if found.key_file:
        return Path(found.key_file).expanduser().absolute()
    if found.state_dir:
        return Path(found.state_dir).expanduser().absolute() / "key"
    # settings.configure() leaves no module's name behind.
    module = getattr(settings, "SETTINGS_MODULE", None) or os.environ.get("DJANGO_SETTINGS_MODULE", "")
    return default_state_dir(module, os.environ) / "key"
