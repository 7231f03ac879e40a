"""The cookies that let browsers read: found in a request, made for the session of a ticket.

EventSource sends no headers and reconnects by itself with the same URL, whose ticket is used up by then; the cookie
that came with its first answer is what it comes back with. Source: RFC 6265, with SameSite and its successor's limits.
"""

from __future__ import annotations

import hashlib
from typing import Final
from urllib.parse import quote

from starlette.requests import HTTPConnection

from taskkit.tokens import Claims

#: A token that somebody else set as a cookie, for example a Django view.
COOKIE: Final = "bulkhead_token"

#: What the names of sessions begin with. What a session may read decides on the rest: one that reads the same replaces
#: it, while two pages that were let in to different runs keep their own.
SESSION_PREFIX: Final = "bulkhead_session_"

#: Sessions that one path keeps in one browser; with MAX_TICKET they fit into a request's head (16 KiB).
MAX_SESSIONS: Final = 4

#: Cookies of ours that are looked at in one request.
MAX_LOOKED_AT: Final = 2 * MAX_SESSIONS

#: What may stand in `Path` as it is: the characters of a path but `;`, which would end the attribute.
_IN_PATH: Final = "/%:@!$&'()*+,=~-._"


def name_of(claims: Claims) -> str:
    """Return the name of a session's cookie: the same for everything that reads the same."""
    runs = claims.runs if isinstance(claims.runs, str) else "|".join(sorted(claims.runs))
    said = "\n".join([claims.subject, ",".join(sorted(claims.actions)), runs, *claims.tasks])
    return SESSION_PREFIX + hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def values_in(connection: HTTPConnection, first: str = "") -> list[str]:
    """Return the values of our cookies, those named `first` in front, the others as the browser sent them: longer paths
    before shorter ones (RFC 6265 §5.4)."""
    found = [(name, value) for name, value in _pairs(connection) if name == COOKIE or _is_session(name)]
    found.sort(key=lambda pair: pair[0] != first)
    return [value for _, value in found[:MAX_LOOKED_AT] if value]


def session_cookies(connection: HTTPConnection, claims: Claims, value: str, now: float) -> list[str]:
    """Return the `Set-Cookie` values that give a browser its session, and take the oldest from one with too many."""
    attributes = f"Path={_path(connection)}; HttpOnly; {_site(connection)}"
    name = name_of(claims)
    others = [other for other, _ in _pairs(connection) if _is_session(other) and other != name]
    surplus = others[: max(0, len(others) + 1 - MAX_SESSIONS)]
    made = f"{name}={value}; Max-Age={max(0, int(claims.expires_at - now))}; {attributes}"
    return [made, *(f"{other}=; Max-Age=0; {attributes}" for other in surplus)]


def _is_session(name: str) -> bool:
    return name.startswith(SESSION_PREFIX) and name.removeprefix(SESSION_PREFIX).isalnum()


def _pairs(connection: HTTPConnection) -> list[tuple[str, str]]:
    """Return all cookies in their order. Starlette's dict keeps the last of a name, which is the least specific."""
    header = "; ".join(connection.headers.getlist("cookie"))
    parts = [part.partition("=") for part in header.split(";")]
    return [(name.strip(), value.strip().strip('"')) for name, _, value in parts]


def _path(connection: HTTPConnection) -> str:
    """Return the path of the request as the browser compares it with `Path`."""
    raw: bytes = connection.scope.get("raw_path") or quote(connection.scope["path"]).encode()
    return quote(raw, safe=_IN_PATH)


def _site(connection: HTTPConnection) -> str:
    """Return the attributes that let the cookie come back to where it was set from.

    A page of another site needs `SameSite=None`, which browsers take with `Secure` only; `Partitioned` keeps it in
    browsers that give a third party no other. Whoever lies in these headers only spoils his own cookie.
    """
    origin = connection.headers.get("origin", "")
    schemes = {
        connection.url.scheme,
        connection.headers.get("x-forwarded-proto", ""),
        origin.partition(":")[0],
    }
    secure = not schemes.isdisjoint(("https", "wss"))
    if _is_cross_site(connection, origin):
        return "SameSite=None; Secure; Partitioned"
    return "SameSite=Lax; Secure" if secure else "SameSite=Lax"


def _is_cross_site(connection: HTTPConnection, origin: str) -> bool:
    said = connection.headers.get("sec-fetch-site")
    if said is not None:
        return said == "cross-site"
    # Browsers from before 2023, and any browser towards http: which registrable domain a name belongs to is not known
    # here. Without TLS the other kind of cookie would not be kept at all.
    return origin.startswith("https://") and origin.removeprefix("https://").lower() != host(connection)


def host(connection: HTTPConnection) -> str:
    """Return the Host header in lower case, with its port."""
    return connection.headers.get("host", "").lower()
