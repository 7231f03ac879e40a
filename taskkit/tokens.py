"""Tokens: who may do what with which runs, as JWTs signed with the state directory's key.

Rule 1: one algorithm, HS256, whatever the token's header says (RFC 8725 §3.1).

Rule 2: a missing claim grants nothing. A token without `exp` is none at all.

Rule 3: no function here logs or raises the text of a token.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
import stat
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Literal

import jwt

from taskkit.errors import SettingsError, TaskkitError

ALGORITHM: Final = "HS256"
AUDIENCE: Final = "bulkhead"

#: Everything a token can allow. `operate` drains and kills runners, `logs` shows what a run printed.
ACTIONS: Final = frozenset({"submit", "read", "cancel", "operate", "logs"})

#: Bytes of a key: as many as the hash has, below which RFC 7518 §3.2 forbids HS256.
KEY_BYTES: Final = 32

#: Seconds that an issuer's clock may run ahead of ours. For `nbf` only: `exp` is exact, since a
#: connection ends at it.
LEEWAY: Final = 5.0

#: Longest token looked at, characters: half of what the server accepts as a request's head (16 KiB).
MAX_TOKEN: Final = 8 * 1024

#: PyJWT compares times with the process's clock only; `verify` gets its moment handed in.
_TIMES_UNCHECKED: Final[Any] = {"verify_exp": False, "verify_nbf": False, "verify_iat": False}

TokenProblem = Literal["missing", "malformed", "signature", "expired", "audience", "claims"]


class TokenError(TaskkitError):
    """A token is absent or not valid. The caller's fault: get another one.

    Attributes:
      code: "missing", "malformed", "signature", "expired", "audience" or "claims"; stable.
    """

    def __init__(self, code: TokenProblem, detail: str) -> None:
        super().__init__(detail)
        self.code: TokenProblem = code


@dataclass(frozen=True, slots=True)
class Claims:
    """What a verified token says.

    Attributes:
      subject: on whose behalf.
      expires_at: Unix seconds; a connection ends then.
      id: `jti`, names the token in a log.
      actions: subset of ACTIONS.
      runs: ids of runs, or "*" for every run.
      tasks: shell patterns of task names, such as "demo.*".
    """

    subject: str
    expires_at: float
    id: str
    actions: frozenset[str]
    runs: frozenset[str] | Literal["*"]
    tasks: tuple[str, ...]

    def may(self, action: str) -> bool:
        """Whether the token allows `action` at all; on which runs is `sees_run`'s business."""
        return action in self.actions

    def sees_run(self, run_id: str, task_name: str) -> bool:
        """Whether the run is within the token's reach, by its id or by its task's name."""
        return self.runs == "*" or run_id in self.runs or self._matches(task_name)

    def may_submit(self, task_name: str) -> bool:
        """Whether the token allows to submit this task."""
        return self.may("submit") and self._matches(task_name)

    def _matches(self, task_name: str) -> bool:
        return any(fnmatchcase(task_name, pattern) for pattern in self.tasks)


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
    runs: Iterable[str] | Literal["*"] = (),
    tasks: Iterable[str] = (),
    ttl: float,
    subject: str,
    now: float | None = None,
) -> str:
    """Return a signed token that is valid for `ttl` seconds from `now` (Unix seconds, default: the clock).

    Raises:
      ValueError: an action is not in ACTIONS, or `ttl` is not positive. The caller's fault.
    """
    allowed = frozenset(actions)
    if unknown := allowed - ACTIONS:
        raise ValueError(
            f"no such action: {', '.join(sorted(unknown))}; there are {', '.join(sorted(ACTIONS))}"
        )
    if ttl <= 0:
        raise ValueError(f"ttl = {ttl}: a token must be valid for some time")
    start = time.time() if now is None else now
    payload = {
        "aud": AUDIENCE,
        "sub": subject,
        "iat": int(start),
        "exp": int(start + ttl),
        "jti": uuid.uuid4().hex,
        "actions": sorted(allowed),
        "runs": runs if runs == "*" else sorted(runs),
        "tasks": list(tasks),
    }
    return jwt.encode(payload, key, algorithm=ALGORITHM, headers={"kid": key_id(key)})


def verify(key: bytes, token: str, now: float | None = None) -> Claims:
    """Return what `token` says, checked at `now` (Unix seconds, default: the clock).

    Raises:
      TokenError: it is not a token, not signed with `key`, not for us, over, or says nonsense.
    """
    if not token:
        raise TokenError("missing", "a token is needed")
    payload = _decode(key, token)
    moment = time.time() if now is None else now
    expires_at = _number(payload, "exp")
    if expires_at is None:
        raise TokenError("claims", "the token has no `exp`: it would be valid for ever")
    if expires_at <= moment:
        raise TokenError("expired", "the token has expired")
    # Not `iat`, which is information (RFC 7519 §4.1.6): a clock that is set back would void every token that is out.
    _number(payload, "iat")
    if (_number(payload, "nbf") or 0.0) > moment + LEEWAY:
        raise TokenError("claims", "the token's `nbf` is in the future")
    return Claims(
        subject=_text(payload, "sub"),
        expires_at=expires_at,
        id=_text(payload, "jti"),
        actions=frozenset(_texts(payload, "actions")) & ACTIONS,
        runs="*" if payload.get("runs") == "*" else frozenset(_texts(payload, "runs")),
        tasks=_texts(payload, "tasks"),
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
