"""What each call of the client sends, how its answer is judged. Does no I/O."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn
from urllib.parse import quote

import httpx

from taskkit.connections import Address
from taskkit.credentials import Credentials
from taskkit.errors import ENDINGS, GatewayError, RunError, RunFailed
from taskkit.following import Pauses, parse_retry_after, refusal, run_path, stream_params

#: Seconds for an answer. The gateway answers in milliseconds; a model task waits up to 5 s for its intake.
ANSWER: Final = 15.0

#: Seconds without a byte after which a stream counts as lost: three of the gateway's 15 s heartbeats.
SILENCE: Final = httpx.Timeout(45.0, connect=5.0)

#: Seconds that one long poll for a result may take at the gateway.
LONG_POLL: Final = 30.0

#: Seconds for which a call that may be repeated is tried again; a killed gateway is back in about 0.5 s.
PATIENCE: Final = 10.0

#: Nodes that one call is sent on to: a run that is taken over meanwhile is found all the same.
MOVES: Final = 4


def error_of(snapshot: dict[str, Any]) -> RunError:
    """Return the error that says how the run in `snapshot`, which did not succeed, ended."""
    error = snapshot.get("error") or {}
    attempts = snapshot.get("attempts") or [{}]
    ending = "cancelled" if snapshot.get("status") == "CANCELLED" else attempts[-1].get("ending")
    kind = ENDINGS.get(ending or error.get("code", ""), RunFailed)
    text = error.get("message") or error.get("detail") or f"ended as {snapshot.get('status')}"
    return kind(f"run {snapshot.get('id')} of {snapshot.get('task')}: {text}", snapshot)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request, and how its answer is judged. `repeatable`: sending it twice has the effect of once."""

    method: str = "GET"
    path: str
    params: Mapping[str, str | int] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    timeout: float = ANSWER

    def request(self, headers: Mapping[str, str]) -> dict[str, Any]:
        """Return the keyword arguments for httpx; `headers` are those that every request has."""
        return {
            "method": self.method,
            "url": self.path,
            "params": dict(self.params),
            "headers": {**self.headers, **headers},
            "timeout": httpx.Timeout(self.timeout, connect=5.0),
            **({} if self.body is None else {"json": self.body}),
        }


class Tries:
    """One call, sent until it is answered or refused for good.

    Args:
      url: of the gateway, for the error that says it is away.
    """

    def __init__(self, call: Call, url: str, credentials: Credentials) -> None:
        self._call = call
        self._url = url
        self._credentials = credentials
        self._renewed = False
        self._pauses = Pauses(PATIENCE, time.monotonic())
        self._moves = 0

    def moved(self, other: Address | None) -> Address | None:
        """Return where to send the call now, if another node is to answer it; not from one to the next for ever."""
        if other is None or self._moves >= MOVES:
            return None
        self._moves += 1
        return other

    def failed(self, error: httpx.TransportError) -> float:
        """Return the seconds before the next try after a broken connection.

        Raises:
          GatewayError: the call cannot be repeated, or was for long enough.
        """
        never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        pause = self._pauses.next(time.monotonic()) if self._call.repeatable or never_sent else None
        if pause is None:
            unreachable(error, self._url)
        return pause

    def answered(self, response: httpx.Response) -> float | None:
        """Return None for a success, else the seconds before the next try.

        Raises:
          GatewayError: the gateway refuses.
        """
        status = response.status_code
        if response.is_success:
            return None
        if not self._renewed and self._credentials.can_renew(status):
            self._renewed = True
            return 0.0
        if status in (502, 503, 504) and self._call.repeatable:
            pause = self._pauses.next(
                time.monotonic(), parse_retry_after(response.headers.get("retry-after"))
            )
            if pause is not None:
                return pause
        raise refusal(status, response.content, str(response.url))


def unreachable(error: httpx.TransportError, url: str) -> NoReturn:
    """Raise GatewayError for a gateway that does not answer."""
    raise GatewayError(
        f"no answer from the gateway at {url}: {error or type(error).__name__}; "
        "is it running? `bulkhead status` tells"
    ) from error


def document(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON object in an answer.

    Raises:
      GatewayError: it is none; whatever answered is no gateway.
    """
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise GatewayError(f"{response.url.path} answered with something other than a JSON object")
    return document


def submit_call(
    task: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    fields: Mapping[str, Any] | None,
    key: str | None,
    options: Mapping[str, Any],
) -> Call:
    """Return the call that submits a run."""
    # Without a key, a repeat after a lost answer would be a second run. The caller's own key spans processes.
    given = {"args": list(args) or None, "kwargs": kwargs or None, "fields": fields or None, **options}
    body = {"task": task, **{name: value for name, value in given.items() if value is not None}}
    headers = {"Idempotency-Key": key or uuid.uuid4().hex}
    return Call(method="POST", path="/api/v1/runs", body=body, headers=headers)


def cancel_call(run: str, grace: float | None) -> Call:
    """Return the call that cancels a run; not repeatable, since the second one meets a run that has ended."""
    body = {} if grace is None else {"grace": grace}
    return Call(method="POST", path=run_path(run, "/cancel"), body=body, repeatable=False)


def input_call(run: str, name: str, data: Mapping[str, Any], key: str | None) -> Call:
    """Return the call that tells a run something."""
    headers = {"Idempotency-Key": key or uuid.uuid4().hex}  # or a repeat would be said twice
    path = run_path(run, f"/input/{quote(name, safe='')}")
    return Call(method="POST", path=path, body=dict(data), headers=headers)


def replay_call(run: str, key: str | None) -> Call:
    """Return the call that has an ended run performed again."""
    # Without a key, a repeat after a lost answer would be one run more.
    headers = {"Idempotency-Key": key or uuid.uuid4().hex}
    return Call(method="POST", path=run_path(run, "/replay"), headers=headers)


def operate_call(*parts: str) -> Call:
    """Return the call of an operator's order, such as `runners, ID, "kill"`."""
    path = "/".join(quote(part, safe="") for part in parts)
    return Call(method="POST", path=f"/api/v1/{path}")


def runs_call(filters: Mapping[str, Any]) -> Call:
    """Return the call that lists runs."""
    return Call(path="/api/v1/runs", params={k: v for k, v in filters.items() if v is not None})


def vacuum_call() -> Call:
    """Return the call that makes the store's file smaller; the gateway takes up to 10 s for it."""
    return Call(method="POST", path="/api/v1/vacuum", body={}, timeout=2 * ANSWER)


def revoke_call(jti: str | None, sub: str | None) -> Call:
    """Return the call that takes one token back, or all of a subject; done twice it comes to the same."""
    given = {"jti": jti, "sub": sub}
    body = {name: value for name, value in given.items() if value is not None}
    return Call(method="POST", path="/api/v1/tokens/revoke", body=body)


def result_call(run: str, wait: float) -> Call:
    """Return the call that waits up to `wait` seconds for a result."""
    return Call(
        path=run_path(run, "/result"),
        headers={"Prefer": f"wait={math.ceil(wait)}"},
        timeout=ANSWER + LONG_POLL,
    )


def page_call(run: str, after: str, types: Sequence[str], output: bool) -> Call:
    """Return the call for the page of a stream that "latest" or "now" begins with: its `next` is a cursor."""
    return Call(
        path=run_path(run, "/events"),
        params={"after": after, **stream_params(types, output)},
        headers={"Accept": "application/json"},
    )


def still_running(response: httpx.Response, deadline: float, run: str) -> bool:
    """Whether to ask again for the result.

    Raises:
      TimeoutError: yes, but `deadline` has passed.
    """
    if response.status_code != 202:
        return False
    if time.monotonic() >= deadline:
        raise TimeoutError(f"run {run} has not ended yet")
    return True


def deadline_after(timeout: float | None) -> float:
    """Return the monotonic time `timeout` seconds from now; infinity for None."""
    return float("inf") if timeout is None else time.monotonic() + timeout


def poll(deadline: float) -> float:
    """Return how many seconds the next long poll may take."""
    return min(LONG_POLL, max(0.0, deadline - time.monotonic()))


def succeeded(document: dict[str, Any]) -> bool:
    """Whether the answer for a result is that of a run that succeeded."""
    return document.get("status") == "SUCCESSFUL"
