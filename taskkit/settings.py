"""The one dict `TASKKIT` as typed data: every key, its default, its meaning.

Pure: it reads neither Django nor the environment; callers hand in plain data. The README's table is compared with
`Settings` by a test.
"""

from __future__ import annotations

import difflib
import functools
import ipaddress
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from taskkit.errors import SettingsError

#: Prefix of environment variables: TASKKIT_BIND, TASKKIT_POOLS (JSON) …
ENVIRONMENT_PREFIX: Final = "TASKKIT_"

_Positive = Annotated[int, Meta(ge=1)]
#: At most a day: a wait without an end is none.
_Seconds = Annotated[float, Meta(ge=0, le=86_400)]
#: A second at least, a century at most.
_Age = Annotated[float, Meta(ge=1, le=3_155_760_000)]


def default_runners() -> int:
    """Return how many runs one pool performs at once: twice the usable cores, at least four."""
    return max(4, 2 * len(os.sched_getaffinity(0)))


class PoolSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The runners of one kind.

    Attributes:
      runners: how many runs at once.
      standby: idle runners kept forked beyond that, so that a start costs about a millisecond.
      runs: runs per process; 1 gives every run a fresh process. Either way, processes that a run has started end with
        it.
      concurrency: runs at once in one process (async tasks only); the compartment is then the process.
      start: "fork" from the zygote, or "spawn" for libraries that do not survive a fork.
      loop: event loop of async tasks.
      nice: added to the runner's priority.
      memory_limit: bytes of address space (RLIMIT_AS); a task's own `memory_limit` stands over it.
      cpu_limit: seconds of CPU per process (RLIMIT_CPU).
      timeout: seconds per attempt, unless the task or the submission says otherwise.
    """

    runners: _Positive | None = None
    standby: Annotated[int, Meta(ge=0)] = 2
    runs: _Positive = 1
    concurrency: _Positive = 1
    start: Literal["fork", "spawn"] = "fork"
    loop: Literal["asyncio", "trio"] = "asyncio"
    nice: Annotated[int, Meta(ge=0, le=19)] = 5
    memory_limit: _Positive | None = None
    cpu_limit: _Positive | None = None
    timeout: Annotated[float, Meta(gt=0)] | None = None

    @property
    def size(self) -> int:
        """How many runs at once, default resolved."""
        return self.runners if self.runners is not None else default_runners()


class LimitSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds; what lies beyond gets a clear error.

    Attributes:
      body_bytes: of a request, and of each item of a batch.
      batch_bytes: of a batch.
      batch_runs: in a batch.
      event_bytes: of one event's JSON.
      result_bytes: of a result's JSON; at most 32 MiB.
      queued_runs: that wait; then 429.
      connections: at once; then 503.
      streams_per_connection: runs and tags that one request to `/api/v1/events` may name; then 413.
      streams_per_token: open at once by one token (its `jti`, else its `sub`); then `stream.busy`, or 429.
      auth_failures: tokens from one address that were not valid within a minute; then 429 for more. 0: no limit.
      accepts_per_second: new connections; more wait in the backlog, but for a second's worth at once.
      headers_seconds: for a request's head to arrive, on a new connection or after an answer.
      header_bytes: of a request's head; then 431. A token may have 8 KiB.
      body_seconds: for a request's body to arrive; then 408.
      write_seconds: without progress of a write to a client, which is let go then; it continues at its cursor.
      send_buffer_bytes: that the kernel buffers for a client (SO_SNDBUF, of which it takes twice as many).
      message_bytes: of a WebSocket message from a client; then close code 1009.
      cancel_grace_seconds: between asking a run to stop and TERM.
      kill_grace_seconds: between TERM and KILL.
      stop_grace_seconds: for open runs when the tree stops.
      disconnect_grace_seconds: without subscribers until a run whose task has `on_disconnect="cancel"` is asked to
        stop.
      output_lines_per_second: stored per runner; what is more is dropped with a count.
      gateway_beat_seconds: of silence after which a gateway hangs and is replaced; it beats four times in between.
      gateway_restarts: within 120 s; one more, and the supervisor gives up with exit code 4.
      restart_delay_seconds: longest wait before a process of the tree that keeps dying is started again.
      lease_seconds: without a word to the project's database until other trees that share it take this one's runs
        over; it is renewed four times in between.
    """

    body_bytes: _Positive = 1024 * 1024
    batch_bytes: _Positive = 8 * 1024 * 1024
    batch_runs: Annotated[int, Meta(ge=1, le=10_000)] = 1_000
    event_bytes: _Positive = 1024 * 1024
    # With the arguments it has to fit a message to the courier: taskkit.seqpacket.MESSAGE_LIMIT.
    result_bytes: Annotated[int, Meta(ge=1, le=32 * 1024 * 1024)] = 8 * 1024 * 1024
    queued_runs: _Positive = 10_000
    connections: _Positive = 10_000
    streams_per_connection: _Positive = 128
    streams_per_token: _Positive = 32
    auth_failures: Annotated[int, Meta(ge=0, le=1_000)] = 10
    accepts_per_second: Annotated[int, Meta(ge=1, le=100_000)] = 200
    headers_seconds: Annotated[float, Meta(ge=1, le=600)] = 15.0
    header_bytes: Annotated[int, Meta(ge=4_096, le=1_048_576)] = 16_384
    body_seconds: Annotated[float, Meta(ge=1, le=3_600)] = 30.0
    write_seconds: Annotated[float, Meta(ge=1, le=600)] = 10.0
    send_buffer_bytes: Annotated[int, Meta(ge=4_096, le=16_777_216)] = 131_072
    message_bytes: Annotated[int, Meta(ge=1_024, le=16_777_216)] = 65_536
    cancel_grace_seconds: _Seconds = 5.0
    kill_grace_seconds: _Seconds = 2.0
    stop_grace_seconds: _Seconds = 10.0
    disconnect_grace_seconds: _Seconds = 10.0
    output_lines_per_second: _Positive = 2_000
    gateway_beat_seconds: Annotated[float, Meta(ge=0.5, le=3_600)] = 10.0
    gateway_restarts: _Positive = 10
    restart_delay_seconds: Annotated[float, Meta(ge=0.1, le=3_600)] = 30.0
    lease_seconds: Annotated[float, Meta(ge=1, le=3_600)] = 15.0


class RetentionSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the store keeps; null keeps it for ever. A run that is open, or that Django does not know to have ended,
    is never removed.

    Attributes:
      run_events: newest events of a run, and as many of its lines. 50 a second for a day are 4.3 million.
      event_age_seconds: of events and lines; the last event of a run stays as long as the run.
      event_bytes: of events and lines of all runs together, 64 for each one's own included; the oldest go.
      run_age_seconds: since its end; the run goes with all that belongs to it.
      key_age_seconds: of an Idempotency-Key since its first use.
      every_seconds: between two looks at what is due.
    """

    run_events: _Positive | None = 5_000_000
    event_age_seconds: _Age | None = 604_800.0
    event_bytes: _Positive | None = 4_294_967_296
    run_age_seconds: _Age | None = 2_592_000.0
    key_age_seconds: _Age | None = 172_800.0
    every_seconds: Annotated[float, Meta(ge=0.1, le=86_400)] = 30.0


class BreakerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a task is held back whose runs keep killing their processes.

    Attributes:
      crashes: distinct runs that crash without a success in between; 0 never holds a task back.
      period: seconds within which they do.
      pause: seconds until one run is tried; doubled each time that it crashes, too.
      longest_pause: seconds that the pause grows to.
      exempt: names of tasks that are never held back, with `*` for any characters; requests are many views'.
    """

    crashes: Annotated[int, Meta(ge=0)] = 5
    period: Annotated[float, Meta(gt=0, le=86_400)] = 60.0
    pause: Annotated[float, Meta(gt=0, le=86_400)] = 10.0
    longest_pause: Annotated[float, Meta(gt=0, le=86_400)] = 300.0
    exempt: list[str] = msgspec.field(default_factory=lambda: ["taskkit.request"])


class AsyncRequestSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Views that run as tasks (`taskkit.middleware.AsyncRequestMiddleware`).

    Attributes:
      user: dotted path of a function of a request that returns its user, or None, for those who do not log in to the
        site's session.
      anonymous: whether clients without credentials are served, by the name of a channel that they choose.
      pool: that performs requests.
      lane: dotted path of a function of a request that returns another pool's name, or None.
      partition: dotted path of a function of a request that returns what it is about, or None: requests about the same
        are performed in their order. Without it: the header X-Partition-Key, else `data.id` of a JSON body.
      drop_headers: that are not kept, besides Authorization, X-CSRFToken and the cookies that log in.
      body_bytes: of a request; then 413.
      response_bytes: kept of an answer's body; the events of a streaming view have all of it.
      kept_seconds: for which a request can be performed again, and its result asked for.
      away: without a tree, a request waits for one ("queue"), is performed at once as any other ("run"), or gets 503
        ("refuse").
    """

    user: str | None = None
    anonymous: bool = False
    pool: str = "default"
    lane: str | None = None
    partition: str | None = None
    drop_headers: list[str] = []
    body_bytes: _Positive = 32 * 1024 * 1024
    response_bytes: Annotated[int, Meta(ge=1, le=6_291_456)] = 4 * 1024 * 1024
    kept_seconds: Annotated[float, Meta(ge=1, le=31_536_000)] = 86_400.0
    away: Literal["queue", "run", "refuse"] = "queue"


#: Keys of TASKKIT that have keys of their own.
_GROUPS: Final[Mapping[str, Any]] = {
    "LIMITS": LimitSettings,
    "BREAKER": BreakerSettings,
    "RETENTION": RetentionSettings,
    "ASYNC_REQUEST": AsyncRequestSettings,
}


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="upper"):
    """Everything that can be set.

    Attributes:
      state_dir: directory of the store, the key, the sockets; made when missing.
      bind: `HOST:PORT` of the gateway; port 0 takes a free one.
      uds: path of a Unix socket to listen on instead.
      url: of the gateway as browsers reach it, such as `https://tasks.example.com`; default `http://BIND`.
      node_url: of this tree's gateway as clients reach it when several trees share a database: a request for a run that
        another tree has is sent there (307). Without it, such a run is unknown.
      key_file: key of the tokens; default `key` in the state directory.
      allowed_hosts: accepted Host headers; default Django's ALLOWED_HOSTS, plus loopback names.
      cors_origins: origins whose pages may read answers.
      token_claims: dotted path of a function that says what a logged-in user's token may do (`taskkit.views`).
      pools: pools by name; "default" always exists.
      limits: bounds.
      breaker: when a task is held back.
      retention: what the store keeps.
      result_ttl: seconds after a run's end until its result is removed, the run stays; null keeps it.
      durability: "process": what the death of any process cannot lose; "power": nor can a power cut, at 0.4 ms more
        per commit.
      intake_runners: runners that validate and save model tasks submitted over HTTP.
      start_on_connect: whether a GET on a seed's route may start a row that never ran.
      async_request: views that run as tasks.
      fast_path: whether plain requests for streams, subscribers who are up to date, are served past the HTTP library.
    """

    state_dir: str | None = None
    bind: str = "127.0.0.1:8888"
    uds: str | None = None
    url: str | None = None
    node_url: str | None = None
    key_file: str | None = None
    allowed_hosts: list[str] | None = None
    cors_origins: list[str] = []
    token_claims: str | None = None
    pools: dict[str, PoolSettings] = {}
    limits: LimitSettings = LimitSettings()
    breaker: BreakerSettings = BreakerSettings()
    retention: RetentionSettings = RetentionSettings()
    result_ttl: _Age | None = 604_800.0
    durability: Literal["process", "power"] = "process"
    intake_runners: Annotated[int, Meta(ge=0)] = 1
    start_on_connect: bool = False
    async_request: AsyncRequestSettings = AsyncRequestSettings()
    fast_path: bool = True

    def replace(self, **fields: Any) -> Settings:
        """Return these settings with other values for the fields that are named."""
        return msgspec.structs.replace(self, **fields)

    def pool(self, name: str) -> PoolSettings | None:
        """Return a pool's settings; "default" exists without being named."""
        return self.pools.get(name, PoolSettings() if name == "default" else None)

    @property
    def all_pools(self) -> dict[str, PoolSettings]:
        """Every pool by name, "default" included."""
        return {"default": PoolSettings(), **self.pools}


def _where(path: str, value: Any) -> tuple[str, Any]:
    """Return the key and the value at msgspec's `path`, such as `$.LIMITS.connections` or `$.CORS_ORIGINS[1]`."""
    for part in re.findall(r"\.([^.\[]+)|\[(\d+)\]", path):
        name, index = part
        if name and isinstance(value, Mapping) and name in value:
            value = value[name]
        elif index and isinstance(value, list) and int(index) < len(value):
            value = value[int(index)]
        else:
            break
    return path.removeprefix("$").lstrip("."), value


def _convert(value: Any, type: Any, source: str, prefix: str = "") -> Any:
    try:
        return msgspec.convert(value, type=type)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `")
        key, shown = _where(path.rstrip("`"), value)
        key = ".".join(filter(None, (prefix, key)))
        if "unknown field" in reason:
            kind = type if prefix else _GROUPS.get(key, Settings)
            known = ", ".join(field.encode_name for field in msgspec.structs.fields(kind))
            reason += f"; the keys are {known}"
        if "enum value" in reason and (values := _values_of(key.rpartition(".")[2], type)):
            reason += f"; the values are {', '.join(values)}"
        raise SettingsError(f"{source}: {key or 'TASKKIT'} = {shown!r:.200}: {reason}") from error


def _values_of(key: str, type: Any) -> list[str]:
    """Return the words that a key may have, if it is one of words."""
    fields = msgspec.structs.fields(type)
    return [word for field in fields if field.encode_name == key for word in get_args(field.type)]


def load_settings(value: Mapping[str, Any], source: str = "TASKKIT") -> Settings:
    """Return the settings in `value`, plain data by upper-case key.

    Raises:
      SettingsError: a key is unknown or a value is wrong; the message names both. The user's fault.
    """
    for name, pool in _mapping_of(value.get("POOLS")).items():
        _convert(
            pool, PoolSettings, source, f"POOLS.{name}"
        )  # one by one: msgspec does not say which of them is wrong
    settings: Settings = _convert(dict(value), Settings, source)
    parse_bind(settings.bind)
    for key, url in (("URL", settings.url), ("NODE_URL", settings.node_url)):
        if url is not None and (not _is_base_url(url) or len(url) > 255):
            raise SettingsError(
                f"{source}: {key} = {url!r:.200}: write http:// or https://, a host and perhaps a path, for example "
                "https://tasks.example.com"
            )
    if settings.breaker.longest_pause < settings.breaker.pause:
        raise SettingsError(
            f"{source}: BREAKER.longest_pause = {settings.breaker.longest_pause} is below "
            f"pause = {settings.breaker.pause}; the pause only grows"
        )
    for name in settings.pools:
        if not name.isidentifier():
            raise SettingsError(f"{source}: POOLS has the name {name!r}; use letters, digits and underscores")
        pool = settings.pools[name]
        if pool.concurrency > 1 and pool.runs < pool.concurrency:
            raise SettingsError(
                f"{source}: POOLS.{name}.runs = {pool.runs} is below concurrency = {pool.concurrency}; "
                "raise `runs` (a process cannot hold more runs at once than it performs in its life)"
            )
    return settings


def _mapping_of(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def dump_settings(settings: Settings) -> dict[str, Any]:
    """Return plain data that `load_settings` reads back."""
    plain: dict[str, Any] = msgspec.to_builtins(settings)
    return plain


def from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings given as TASKKIT_<KEY>: text as it is, anything else as JSON.

    Raises:
      SettingsError: a TASKKIT_ variable is none of ours, or a value that has to be JSON is none.
    """
    _refuse_unknown(environment)
    found: dict[str, Any] = {}
    for name, field in _variables().items():
        if name not in environment:
            continue
        text = environment[name]
        if field.type in (str, str | None) or get_origin(field.type) is Literal:
            found[field.encode_name] = text
            continue
        try:
            found[field.encode_name] = json.loads(text)
        except ValueError as error:
            raise SettingsError(f"environment: {name} = {text!r} is no JSON: {error}") from error
    return found


@functools.cache
def _variables() -> dict[str, msgspec.structs.FieldInfo]:
    """Return the fields by their variables. Evaluating their annotations takes 0.5 ms, and every submission asks."""
    return {ENVIRONMENT_PREFIX + field.encode_name: field for field in msgspec.structs.fields(Settings)}


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    """Refuse a mistyped variable: passed over, it would leave the default in force without a word."""
    known = list(_variables())
    for name in sorted(name for name in environment if name.startswith(ENVIRONMENT_PREFIX)):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise SettingsError(
                f"environment: {name} = {environment[name]!r:.200}: no such variable; {guess}"
                f"The variables are {', '.join(known)}"
            )


def parse_bind(bind: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`; an IPv6 host stands in brackets.

    Raises:
      SettingsError: it has another form.
    """
    host, colon, port = bind.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    well_formed = host == (f"[{bare}]" if ":" in bare else bare) and bare
    if not colon or not well_formed or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise SettingsError(f"BIND = {bind!r}: write HOST:PORT, for example 127.0.0.1:8888 or [::1]:0")
    return bare, int(port)


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = parts.hostname if parts.port is None or parts.port else None
    except ValueError:  # a port that is none, half an IPv6 address
        return False
    bare = not (parts.query or parts.fragment or "@" in parts.netloc or re.search(r"\s", url))
    return parts.scheme in ("http", "https") and bool(host) and bare


def hidden_from_browsers(settings: Settings) -> str | None:
    """Return why `http://BIND` is no URL that a browser could open, or None: it is, or URL is set."""
    host, port = parse_bind(settings.bind)
    if settings.url is not None:
        return None
    if settings.uds is not None:
        return f"UDS = {settings.uds!r} is a file, which no browser opens"
    if port == 0:
        return f"BIND = {settings.bind!r} takes any port"
    if host in ("0.0.0.0", "::"):
        return f"BIND = {settings.bind!r} is every address of the machine, and the name of none"
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def default_state_dir(settings_module: str, environment: Mapping[str, str]) -> Path:
    """Return `$XDG_STATE_HOME/bulkhead/<settings module>` (XDG Base Directory Specification)."""
    base = environment.get("XDG_STATE_HOME") or os.path.join(environment.get("HOME", "/"), ".local", "state")
    return Path(base) / "bulkhead" / settings_module
