"""Has the gateway cancel, replay or release a run, on behalf of a user of the site.

The token is made here for this one call, with the key of the tree that the settings name; it lasts a minute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from taskkit import conf
from taskkit.errors import GatewayError
from taskkit.models import Run

if TYPE_CHECKING:
    from taskkit.client import Client

#: Seconds that the token is valid: a call is tried for ten, and answered within fifteen.
_TTL: Final = 60.0


def is_quarantined(run: Run) -> bool:
    """Whether the run has killed three runners and may only be performed again as a new one."""
    return isinstance(run.error, dict) and run.error.get("code") == "quarantined"


def cancel(run: Run, *, subject: str) -> None:
    """Ask a run to stop.

    Raises:
      GatewayError: it is refused, among others because the run has ended; or the gateway is away.
      SettingsError: there is no key, no address, or this process may not read the key; the message has the remedy.
    """
    _client(run, subject, "cancel", "read").cancel(str(run.id))


def replay(run: Run, *, subject: str, key: str | None = None) -> str:
    """Have an ended run performed again; return the id of the new one. The same `key` means the same new one.

    Raises:
      GatewayError, SettingsError: as `cancel`.
    """
    made = _client(run, subject, "submit", "read").replay(str(run.id), idempotency_key=key)
    return str(made["id"])


def release(run: Run, *, subject: str) -> str:
    """Have a quarantined run performed again; return the id of the new one, which is the same a second time.

    Raises:
      GatewayError, SettingsError: as `cancel`; also when the run is not in quarantine.
    """
    if not is_quarantined(run):
        raise GatewayError(f"run {run.id} is {run.status}, not in quarantine")
    return replay(run, subject=subject, key=f"release-{run.id}")


def _client(run: Run, subject: str, *actions: str) -> Client:
    from taskkit import client, tokens  # httpx and PyJWT: what only shows the admin need not load them

    key = tokens.load_key(conf.key_file())
    grants: dict[str, Any] = {"actions": actions, "runs": (str(run.id),), "tasks": (run.task,)}
    return client.get_client(
        conf.gateway_address(), token=tokens.issue(key, ttl=_TTL, subject=subject, **grants)
    )
