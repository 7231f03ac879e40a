"""Tokens: who may do what with which runs, as JWTs signed with the state directory's key.

Rule 1: one algorithm, HS256, whatever the token's header says (RFC 8725 §3.1).

Rule 2: a missing claim grants nothing. A token without `exp` is none at all.

Rule 3: no function here logs or raises the text of a token.

Rule 4: a ticket opens one session, the session's cookie only reads; neither is accepted where a token is wanted, nor
the other way round (RFC 8725 §3.12): the claim `use` tells them apart.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import os
import secrets
import stat
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import jwt

from taskkit.claims import ACTIONS as ACTIONS
from taskkit.claims import MAX_LIFE as MAX_LIFE
from taskkit.claims import OWN as OWN
from taskkit.claims import Claims as Claims
from taskkit.claims import Ticket as Ticket
from taskkit.errors import SettingsError, TaskkitError

ALGORITHM: Final = "HS256"
AUDIENCE: Final = "bulkhead"

#: Bytes of a key: as many as the hash has, below which RFC 7518 §3.2 forbids HS256.
KEY_BYTES: Final = 32

#: Seconds that an issuer's clock may run ahead of ours. For `nbf` only: `exp` is exact, since a
#: connection ends at it.
LEEWAY: Final = 5.0

#: Longest token looked at, characters: half of what the server accepts as a request's head (16 KiB).
MAX_TOKEN: Final = 8 * 1024

#: PyJWT compares times with the process's clock only; `verify` gets its moment handed in.
_TIMES_UNCHECKED: Final[Any] = {"verify_exp": False, "verify_nbf": False, "verify_iat": False}

#: Seconds that a ticket is good for: from a page to its request.
TICKET_SECONDS: Final = 60.0

#: Seconds that the session of a ticket lasts, unless somebody says otherwise.
SESSION_SECONDS: Final = 3_600.0

#: Longest ticket made, characters. Its session is a cookie about as long; browsers drop one of more than 4,096
#: (RFC 6265 §6.1), and four of these fit into a request's head beside the rest.
MAX_TICKET: Final = 2_500

TokenProblem = Literal[
    "missing", "malformed", "signature", "expired", "audience", "claims", "use", "spent", "revoked"
]

#: What a JWT of ours is for: the claim `use`; a token has none.
Use = Literal["token", "ticket", "cookie"]


class TokenError(TaskkitError):
    """A token is absent or not valid. The caller's fault: get another one.

    Attributes:
      code: one of TokenProblem; stable.
    """

    def __init__(self, code: TokenProblem, detail: str) -> None:
        super().__init__(detail)
        self.code: TokenProblem = code


def key_id(key: bytes) -> str:
    """Return the `kid` that names `key`: the first 4 bytes of its SHA-256 in hex."""
    return hashlib.sha256(key).hexdigest()[:8]


def load_or_create_key(path: Path) -> bytes:
    """Return the key in the file `path`; make it first when there is none.

    The file holds 32 random bytes as one line of base64url, mode 0600. It may be made readable by a group, so
    that a Django site under another user can sign. Two processes that create it at once get the same key.

    Raises:
      SettingsError: the file cannot be read or made, others may read or change it, or it holds no key. The
        operator's fault; the message names the remedy.
    """
    try:
        try:
            return _read_key(path)
        except FileNotFoundError:
            _create_key(path)
            return _read_key(path)
    except OSError as error:
        raise SettingsError(f"KEY_FILE = {os.fspath(path)!r}: {error.strerror or error}") from error


def load_key(path: Path) -> bytes:
    """Return the key in the file `path`, for whoever signs beside a tree; never makes one.

    Raises:
      SettingsError: there is none, it cannot be read, others may read or change it, or it holds no key. The
        operator's fault; the message names the remedy.
    """
    try:
        return _read_key(path)
    except PermissionError as error:
        remedy = (
            "share it with a group of this process (chmod 640, and a directory it may enter), or set KEY_FILE"
        )
        raise SettingsError(
            f"KEY_FILE = {os.fspath(path)!r} is not readable for this process: {remedy}"
        ) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SettingsError(
            f"KEY_FILE = {os.fspath(path)!r} does not exist: "
            "start the tree once with `bulkhead run`, or set KEY_FILE"
        ) from error
    except OSError as error:
        raise SettingsError(f"KEY_FILE = {os.fspath(path)!r}: {error.strerror or error}") from error


def _read_key(path: Path) -> bytes:
    # O_NONBLOCK: opening a FIFO that somebody put there must not wait for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        _check_key_file(path, status)
        text = os.read(fd, 4096)
    finally:
        os.close(fd)
    try:
        key = base64.b64decode(_padded(text.strip()), altchars=b"-_", validate=True)
    except binascii.Error:
        key = b""
    if len(key) < KEY_BYTES:
        raise SettingsError(
            f"KEY_FILE = {os.fspath(path)!r} holds no key: it must be one line of base64url with at least "
            f"{KEY_BYTES} bytes; remove the file and a new key is made at the next start"
        )
    return key


def _check_key_file(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SettingsError(f"KEY_FILE = {os.fspath(path)!r} is no regular file; name another path")
    mode = stat.S_IMODE(status.st_mode)
    # Readable by the group is fine; writable by it, or anything for others, lets strangers make tokens.
    if mode & 0o027:
        raise SettingsError(
            f"KEY_FILE = {os.fspath(path)!r} has mode {mode:04o}, so others can sign tokens: "
            f"chmod 600 it (or 640, to share it with its group), and remove it first if it may have been read"
        )


def _padded(text: bytes) -> bytes:
    return text + b"=" * (-len(text) % 4)


def _create_key(path: Path) -> None:
    """Make the key file; do nothing when somebody else was faster.

    The text is written to a private name and linked to the real one: link(2) fails when the name exists, so a
    reader sees either no file or a whole key.
    """
    text = base64.urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).rstrip(b"=") + b"\n"
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.write(fd, text)
            os.fsync(fd)
        finally:
            os.close(fd)
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        os.unlink(draft)


def issue(
    key: bytes,
    *,
    actions: Iterable[str],
    runs: Iterable[str] | Literal["*", "own"] = (),
    tasks: Iterable[str] = (),
    ttl: float,
    subject: str,
    now: float | None = None,
) -> str:
    """Return a signed token that is valid for `ttl` seconds from `now` (Unix seconds, default: the clock).

    Raises:
      ValueError: an action is not in ACTIONS, or `ttl` is not positive or above MAX_LIFE. The caller's fault.
    """
    start = time.time() if now is None else now
    payload = _payload(actions, runs, tasks, subject, start)
    return _sign(key, payload | {"exp": int(start + _lifetime(ttl)), "jti": uuid.uuid4().hex})


def issue_ticket(
    key: bytes,
    *,
    actions: Iterable[str] = ("read",),
    runs: Iterable[str] | Literal["*", "own"] = (),
    tasks: Iterable[str] = (),
    session: float = SESSION_SECONDS,
    subject: str,
    parent: str = "",
    now: float | None = None,
) -> str:
    """Return a ticket: for TICKET_SECONDS, `?ticket=` on a GET opens a session with these claims, once.

    The gateway answers that GET with a cookie that reads for `session` seconds from `now`, for EventSource, which sends
    no headers and reconnects with the same URL.

    Args:
      parent: `jti` of the token it is made from: whoever revokes that one ends the session as well.

    Raises:
      ValueError: as `issue` with `session` for `ttl`, or the claims do not fit into a cookie. The caller's fault.
    """
    start = time.time() if now is None else now
    payload = _payload(actions, runs, tasks, subject, start)
    until = start + _lifetime(session)
    # Rounded down like every `exp`: a session never outlives the token that it was made from.
    times = {"exp": int(min(start + TICKET_SECONDS, until)), "until": int(until)}
    own = {"use": "ticket", "jti": uuid.uuid4().hex}
    text = _sign(key, payload | times | own | ({"parent": parent} if parent else {}))
    if len(text) > MAX_TICKET:
        raise ValueError(
            "a ticket becomes a cookie, and these claims are too long for one: name fewer runs, or patterns of tasks"
        )
    return text


def session_of(key: bytes, claims: Claims, now: float) -> str:
    """Return the cookie's value for a session with `claims`: it reads, and is accepted as a cookie only."""
    payload = _payload(claims.actions, claims.runs, claims.tasks, claims.subject, now)
    return _sign(key, payload | {"exp": int(claims.expires_at), "jti": claims.id, "use": "cookie"})


def _payload(
    actions: Iterable[str],
    runs: Iterable[str] | Literal["*", "own"],
    tasks: Iterable[str],
    subject: str,
    start: float,
) -> dict[str, Any]:
    allowed = frozenset(actions)
    if unknown := allowed - ACTIONS:
        raise ValueError(
            f"no such action: {', '.join(sorted(unknown))}; there are {', '.join(sorted(ACTIONS))}"
        )
    return {
        "aud": AUDIENCE,
        "sub": subject,
        # With its fraction: a token made in the second after a revocation is not covered by it.
        "iat": math.floor(start * 1000) / 1000,  # never later than it was: a revocation of now covers it
        "actions": sorted(allowed),
        "runs": runs if isinstance(runs, str) else sorted(runs),
        "tasks": list(tasks),
    }


def _lifetime(ttl: float) -> float:
    if not 0 < ttl <= MAX_LIFE:
        raise ValueError(
            f"ttl = {ttl}: a token must be valid for some time, and for at most {MAX_LIFE:.0f} seconds"
        )
    return ttl


def _sign(key: bytes, payload: Mapping[str, Any]) -> str:
    return jwt.encode(dict(payload), key, algorithm=ALGORITHM, headers={"kid": key_id(key)})


def verify(key: bytes, token: str, now: float | None = None, *, uses: Iterable[Use] = ("token",)) -> Claims:
    """Return what `token` says, checked at `now` (Unix seconds, default: the clock).

    Raises:
      TokenError: it is not a token of one of these `uses`, not signed with `key`, not for us, over, or says nonsense.
    """
    moment = time.time() if now is None else now
    payload = _checked(key, token, moment, uses)
    _refuse_expired(payload, moment)
    return _claims(payload)


def read_ticket(key: bytes, text: str, now: float | None = None) -> Ticket:
    """Return what a ticket says, checked at `now` but for its being over, which the caller looks at: an EventSource
    comes back with the URL of a ticket that was used long ago.

    Raises:
      TokenError: it is not a ticket, not signed with `key`, not for us, or says nonsense.
    """
    moment = time.time() if now is None else now
    payload = _checked(key, text, moment, ("ticket",))
    claims, until = _claims(payload), _number(payload, "until")
    if not claims.id or until is None:
        raise TokenError("claims", "the ticket has no `jti`, or no `until`")
    session = replace(claims, id=_text(payload, "parent") or claims.id, expires_at=until)
    valid_until = min(claims.expires_at, claims.issued_at + TICKET_SECONDS)
    if valid_until > moment + TICKET_SECONDS + LEEWAY:
        raise TokenError("claims", "the ticket's `iat` is in the future")
    return Ticket(claims.id, session, valid_until)


def _checked(key: bytes, text: str, moment: float, uses: Iterable[Use]) -> Mapping[str, Any]:
    """Return the payload of a token that is for one of `uses`, whose times make sense."""
    if not text:
        raise TokenError("missing", "a token is needed")
    payload = _decode(key, text)
    expires_at = _number(payload, "exp")
    if expires_at is None:
        raise TokenError("claims", "the token has no `exp`: it would be valid for ever")
    if expires_at > moment + MAX_LIFE + LEEWAY:
        raise TokenError("claims", f"the token's `exp` is more than {MAX_LIFE / 86_400:.0f} days ahead")
    # Not `iat`, which is information (RFC 7519 §4.1.6): a clock that is set back would void every token that is out.
    if (_number(payload, "nbf") or 0.0) > moment + LEEWAY:
        raise TokenError("claims", "the token's `nbf` is in the future")
    use = payload.get("use", "token")
    if use not in tuple(uses):
        raise TokenError(
            "use", "this is for another use: a ticket goes into `?ticket=`, a token into a header"
        )
    return payload


def _refuse_expired(payload: Mapping[str, Any], moment: float) -> None:
    if (_number(payload, "exp") or 0.0) <= moment:
        raise TokenError("expired", "the token has expired")


def _claims(payload: Mapping[str, Any]) -> Claims:
    runs = payload.get("runs")
    return Claims(
        subject=_text(payload, "sub"),
        expires_at=_number(payload, "exp") or 0.0,
        id=_text(payload, "jti"),
        actions=frozenset(_texts(payload, "actions")) & ACTIONS,
        runs=runs if runs in ("*", OWN) else frozenset(_texts(payload, "runs")),
        tasks=_texts(payload, "tasks"),
        issued_at=_number(payload, "iat") or 0.0,
    )


def _decode(key: bytes, token: str) -> Mapping[str, Any]:
    """Return the payload of a token with the right signature and audience; its times are not checked."""
    if len(token) > MAX_TOKEN:
        raise TokenError("malformed", f"a token may have {MAX_TOKEN} characters")
    try:
        return jwt.decode(token, key, algorithms=[ALGORITHM], audience=AUDIENCE, options=_TIMES_UNCHECKED)
    except jwt.InvalidSignatureError:
        raise TokenError("signature", "the token is signed with another key") from None
    except jwt.InvalidAlgorithmError:
        raise TokenError("signature", f"the token must be signed with {ALGORITHM}") from None
    except (jwt.InvalidAudienceError, jwt.MissingRequiredClaimError):
        raise TokenError("audience", f"the token's `aud` must be {AUDIENCE!r}") from None
    except (jwt.exceptions.InvalidSubjectError, jwt.exceptions.InvalidJTIError):
        raise TokenError("claims", "the token's `sub` or `jti` is no text") from None
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError, RecursionError):
        # Beyond its own errors PyJWT lets some of json and base64 through for unsigned garbage.
        raise TokenError("malformed", "this is not a JSON Web Token") from None


def _number(payload: Mapping[str, Any], name: str) -> float | None:
    value = payload.get(name)
    if value is None:
        return None
    # The comparison also refuses NaN, which Python's json reads.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        raise TokenError("claims", f"the token's `{name}` is no time")
    return float(value)


def _text(payload: Mapping[str, Any], name: str) -> str:
    value = payload.get(name, "")
    if not isinstance(value, str):
        raise TokenError("claims", f"the token's `{name}` is no text")
    return value


def _texts(payload: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = payload.get(name, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TokenError("claims", f"the token's `{name}` is no list of texts")
    return tuple(values)
