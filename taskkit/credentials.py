"""The token that a client's requests carry: a text, or whatever a callable returns.

Rule: it is never logged, shown by `repr` or put into an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping

from taskkit.errors import GatewayError

#: Returns a token; for asynchronous calls it may be a coroutine function.
TokenSource = Callable[[], str | Awaitable[str]]


class Credentials:
    """A token, and where the next one comes from.

    A callable is asked before the first request, and again when the gateway refuses its token with 401: tokens
    expire. Threads share what it returned; two that are refused at the same moment may both ask.
    """

    def __init__(self, token: str | TokenSource | None) -> None:
        self._source = token if callable(token) else None
        self._token = None if callable(token) else token

    def can_renew(self, status: int) -> bool:
        """Whether another token may change an answer of `status`; the next request then asks for one."""
        if status != 401 or self._source is None:
            return False
        self._token = None
        return True

    def headers(self) -> Mapping[str, str]:
        """Return the headers that carry the token.

        Raises:
          GatewayError: the token comes from a coroutine function, and this call is synchronous. The caller's fault.
        """
        if self._token is None and self._source is not None:
            token = self._source()
            if not isinstance(token, str):
                if inspect.iscoroutine(token):
                    token.close()
                raise GatewayError("the `token` of a synchronous call must be a text or a plain function")
            self._token = token
        return self._bearer()

    async def aheaders(self) -> Mapping[str, str]:
        """Return the headers that carry the token: see `headers`. A plain function must not block."""
        if self._token is None and self._source is not None:
            token = self._source()
            self._token = token if isinstance(token, str) else await token
        return self._bearer()

    def _bearer(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}
