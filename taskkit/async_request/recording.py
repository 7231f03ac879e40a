"""What is kept of a request, from which a view gets it again."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, Final

from django.conf import settings
from django.core.handlers.wsgi import WSGIRequest
from django.http import HttpRequest

from taskkit.async_request.arriving import MARK, Mark
from taskkit.async_request.owners import HEADERS
from taskkit.request_models import StoredRequest

#: Headers that nobody may read in a database.
_CREDENTIALS: Final = ("Authorization", "Proxy-Authorization", "X-CSRFToken", "Cookie")

#: Variables beside headers that views see.
_VARIABLES: Final = (
    *("CONTENT_TYPE", "QUERY_STRING", "REMOTE_ADDR", "REMOTE_HOST", "SCRIPT_NAME", "SERVER_NAME"),
    *("SERVER_PORT", "SERVER_PROTOCOL"),
)


def meta_of(request: HttpRequest, drop: Sequence[str] = ()) -> dict[str, str]:
    """Return what is kept of META: headers but for credentials and `drop`, what the server says of the connection.

    Cookies stay, except for the session's, the CSRF token's, and messages'; with `Cookie` in `drop`, none.
    """
    dropped = {_variable(name) for name in (*_CREDENTIALS, *HEADERS, *drop)} | {settings.CSRF_HEADER_NAME}
    kept = {
        name: value
        for name, value in request.META.items()
        if isinstance(value, str)
        and (name in _VARIABLES or (name.startswith("HTTP_") and name not in dropped))
    }
    cookies = _without_credentials(request.META.get("HTTP_COOKIE", ""))
    if cookies and "cookie" not in (name.lower() for name in drop):
        kept["HTTP_COOKIE"] = cookies
    kept["wsgi.url_scheme"] = request.scheme or "http"
    return kept


def _variable(header: str) -> str:
    return "HTTP_" + header.upper().replace("-", "_")


def _without_credentials(header: str) -> str:
    """Return a Cookie header without the cookies that log in, the others as they came."""
    names = (settings.SESSION_COOKIE_NAME, settings.CSRF_COOKIE_NAME, "messages")
    # Also behind a comma: whoever joins two headers with one makes one cookie of two.
    private = re.compile(rf"(?:^|[\s,])(?:{'|'.join(map(re.escape, names))})\s*=")
    kept = (part.strip() for part in header.split(";") if not private.search(part))
    return "; ".join(part for part in kept if part)


def rebuilt(stored: StoredRequest) -> WSGIRequest:
    """Return the request that a view shall see."""
    body = bytes(stored.body or b"")
    environ: dict[str, Any] = {
        **stored.meta,
        "REQUEST_METHOD": stored.method,
        # PEP 3333: bytes as latin-1.
        "PATH_INFO": stored.path.encode().decode("latin-1"),
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": io.StringIO(),
        "wsgi.version": (1, 0),
        "wsgi.multithread": False,
        "wsgi.multiprocess": True,
        "wsgi.run_once": True,
        MARK: Mark(stored.user, stored.named),
    }
    return WSGIRequest(environ)
