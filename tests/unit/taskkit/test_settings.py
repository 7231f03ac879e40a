"""Settings: whatever is wrong is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskkit.errors import SettingsError
from taskkit.settings import (
    LimitSettings,
    PoolSettings,
    Settings,
    default_state_dir,
    dump_settings,
    from_environment,
    is_loopback,
    load_settings,
    parse_bind,
)

FIELDS = {field.encode_name: field for field in msgspec.structs.fields(Settings)}
POOL_FIELDS = [field.encode_name for field in msgspec.structs.fields(PoolSettings)]
LIMIT_FIELDS = [field.encode_name for field in msgspec.structs.fields(LimitSettings)]


class Odd:
    """A value that no setting accepts."""

    def __repr__(self) -> str:
        return "<odd>"


def test_defaults() -> None:
    settings = load_settings({})
    assert settings.bind == "127.0.0.1:8888"
    assert settings.all_pools == {"default": PoolSettings()}
    assert settings.pool("default") == PoolSettings()
    assert settings.pool("other") is None
    assert PoolSettings().size >= 4
    assert PoolSettings(runners=3).size == 3


def test_default_can_be_changed_and_others_added() -> None:
    settings = load_settings({"POOLS": {"default": {"runners": 1}, "big": {"memory_limit": 1 << 30}}})
    assert settings.pool("default") == PoolSettings(runners=1)
    assert list(settings.all_pools) == ["default", "big"]


@pytest.mark.parametrize("key", FIELDS)
def test_a_wrong_type_names_key_and_value(key: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({key: Odd()}, "somewhere")
    assert str(caught.value).startswith(f"somewhere: {key} = <odd>: ")


@pytest.mark.parametrize("name", POOL_FIELDS)
def test_a_wrong_pool_value_names_key_and_value(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({"POOLS": {"big": {name: Odd()}}})
    assert f".{name} = <odd>: " in str(caught.value)
    assert "POOLS." in str(caught.value)


@pytest.mark.parametrize("name", LIMIT_FIELDS)
def test_a_wrong_limit_names_key_and_value(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({"LIMITS": {name: Odd()}})
    assert f"LIMITS.{name} = <odd>: " in str(caught.value)


@pytest.mark.parametrize(
    ("value", "key", "shown"),
    [
        ({"POOLS": {"a": {"runners": 0}}}, "runners", "0"),
        ({"POOLS": {"a": {"runs": -1}}}, "runs", "-1"),
        ({"POOLS": {"a": {"nice": 20}}}, "nice", "20"),
        ({"POOLS": {"a": {"nice": -1}}}, "nice", "-1"),
        ({"POOLS": {"a": {"start": "thread"}}}, "start", "'thread'"),
        ({"POOLS": {"a": {"loop": "uvloop"}}}, "loop", "'uvloop'"),
        ({"POOLS": {"a": {"timeout": 0}}}, "timeout", "0"),
        ({"POOLS": {"a": {"timeout": math.nan}}}, "timeout", "nan"),
        ({"POOLS": {"a": {"standby": True}}}, "standby", "True"),
        ({"LIMITS": {"connections": 0}}, "LIMITS.connections", "0"),
        ({"LIMITS": {"body_bytes": "1 MiB"}}, "LIMITS.body_bytes", "'1 MiB'"),
        ({"LIMITS": {"stop_grace_seconds": -0.5}}, "LIMITS.stop_grace_seconds", "-0.5"),
        ({"LIMITS": {"stop_grace_seconds": math.nan}}, "LIMITS.stop_grace_seconds", "nan"),
        ({"INTAKE_RUNNERS": -1}, "INTAKE_RUNNERS", "-1"),
        ({"START_ON_CONNECT": "yes"}, "START_ON_CONNECT", "'yes'"),
        ({"BIND": "8888"}, "BIND", "'8888'"),
        ({"CORS_ORIGINS": "https://a"}, "CORS_ORIGINS", "'https://a'"),
    ],
)
def test_a_wrong_value_names_key_and_value(value: dict[str, Any], key: str, shown: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(value)
    assert f"{key} = {shown}" in str(caught.value)


def test_with_many_pools_the_wrong_one_is_named() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({"POOLS": {"good": {"runners": 2}, "bad": {"runners": 0}}})
    assert "POOLS.bad.runners = 0: " in str(caught.value)


def test_a_wrong_item_of_a_list_is_named() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({"CORS_ORIGINS": ["https://a", 7]})
    assert "CORS_ORIGINS[1] = 7: " in str(caught.value)


@pytest.mark.parametrize("name", [name for name in LIMIT_FIELDS if name.endswith("_seconds")])
def test_no_wait_is_endless(name: str) -> None:
    with pytest.raises(SettingsError, match=f"LIMITS.{name} = inf"):
        load_settings({"LIMITS": {name: math.inf}})


@pytest.mark.parametrize(
    "value", [{"NOPE": 1}, {"bind": "x"}, {"LIMITS": {"nope": 1}}, {"POOLS": {"a": {"nope": 1}}}, {7: 1}]
)
def test_an_unknown_key_is_named(value: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"nope|NOPE|bind|7"):
        load_settings(value)


def test_an_unknown_key_tells_the_known_ones() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({"NOPE": 1})
    assert all(key in str(caught.value) for key in FIELDS)


@pytest.mark.parametrize("name", ["", "a-b", "1", "a b", "ä/ö"])
def test_a_pool_has_a_plain_name(name: str) -> None:
    with pytest.raises(SettingsError, match="POOLS"):
        load_settings({"POOLS": {name: {}}})


def test_more_concurrency_than_runs_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"POOLS\.a\.runs = 1"):
        load_settings({"POOLS": {"a": {"concurrency": 4}}})


pools = st.builds(
    PoolSettings,
    runners=st.none() | st.integers(1, 2**40),
    standby=st.integers(0, 99),
    runs=st.integers(10, 99),
    concurrency=st.integers(1, 10),
    start=st.sampled_from(["fork", "spawn"]),
    loop=st.sampled_from(["asyncio", "trio"]),
    nice=st.integers(0, 19),
    memory_limit=st.none() | st.integers(1, 2**60),
    cpu_limit=st.none() | st.integers(1, 2**30),
    timeout=st.none() | st.floats(0.001, 1e9),
)
limits = st.builds(LimitSettings, connections=st.integers(1, 2**40), stop_grace_seconds=st.floats(0, 86_400))
settings_values = st.builds(
    Settings,
    state_dir=st.none() | st.text(),
    bind=st.sampled_from(["127.0.0.1:0", "[::1]:80", "0.0.0.0:65535"]),
    allowed_hosts=st.none() | st.lists(st.text()),
    cors_origins=st.lists(st.text()),
    pools=st.dictionaries(st.sampled_from(["default", "big", "_x"]), pools),
    limits=limits,
    intake_runners=st.integers(0, 9),
    start_on_connect=st.booleans(),
)


@given(settings_values)
def test_dump_and_load_are_inverse(settings: Settings) -> None:
    plain = dump_settings(settings)
    assert load_settings(plain) == settings
    assert load_settings(json.loads(json.dumps(plain))) == settings, "it survives JSON"


@given(
    st.dictionaries(
        st.sampled_from([*FIELDS, "X"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=10,  # per field, and there are a dozen
        ),
    )
)
def test_anything_is_settings_or_a_settings_error(value: dict[str, Any]) -> None:
    complaint = ""
    try:
        load_settings(value)
    except SettingsError as error:
        complaint = str(error)
    assert not complaint or any(key in complaint for key in value)


def test_the_environment_gives_text_or_json() -> None:
    found = from_environment(
        {
            "TASKKIT_BIND": "0.0.0.0:80",
            "TASKKIT_STATE_DIR": "/srv/state",
            "TASKKIT_POOLS": '{"default": {"runners": 3}}',
            "TASKKIT_START_ON_CONNECT": "true",
            "TASKKIT_ALLOWED_HOSTS": '["a.example"]',
            "BIND": "x",
        }
    )
    assert found == {
        "BIND": "0.0.0.0:80",
        "STATE_DIR": "/srv/state",
        "POOLS": {"default": {"runners": 3}},
        "START_ON_CONNECT": True,
        "ALLOWED_HOSTS": ["a.example"],
    }
    assert load_settings(found).pools["default"].runners == 3


def test_a_mistyped_variable_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"TASKKIT_BINDD = 'x'.*did you mean TASKKIT_BIND\?") as caught:
        from_environment({"TASKKIT_BINDD": "x", "TASKKIT_BIND": "127.0.0.1:0"})
    assert all(f"TASKKIT_{key}" in str(caught.value) for key in FIELDS)


#: Settings that are text, one of some words included.
TEXTS = {key for key, field in FIELDS.items() if field.type in (str, str | None) or key == "DURABILITY"}


@pytest.mark.parametrize("key", sorted(FIELDS.keys() - TEXTS))
def test_an_environment_value_that_is_no_json_is_named(key: str) -> None:
    with pytest.raises(SettingsError, match=f"TASKKIT_{key} = 'nope'"):
        from_environment({f"TASKKIT_{key}": "nope"})


def test_a_word_is_a_text_and_another_word_is_refused_with_those_that_are_known() -> None:
    assert from_environment({"TASKKIT_DURABILITY": "power"}) == {"DURABILITY": "power"}
    with pytest.raises(SettingsError, match=r"DURABILITY = 'disk'.*the values are process, power"):
        load_settings({"DURABILITY": "disk"})
    with pytest.raises(SettingsError, match=r"POOLS\.x\.start = 'run'.*the values are fork, spawn"):
        load_settings({"POOLS": {"x": {"start": "run"}}})


@pytest.mark.parametrize(
    ("bind", "expected"),
    [
        ("127.0.0.1:8888", ("127.0.0.1", 8888)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:80", ("::1", 80)),
        ("[::]:65535", ("::", 65535)),
    ],
)
def test_bind(bind: str, expected: tuple[str, int]) -> None:
    assert parse_bind(bind) == expected


@pytest.mark.parametrize(
    "bind",
    [
        "",
        "x",
        ":80",
        "80",
        "a:",
        "a:b",
        "a:-1",
        "a:65536",
        "a: 80",
        "a:80 ",
        "[::1]",
        "a:1e3",
        "::1:80",
        "[::1:80",
    ],
)
def test_a_malformed_bind_is_shown_with_an_example(bind: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_bind(bind)
    assert f"BIND = {bind!r}" in str(caught.value)
    assert "127.0.0.1:8888" in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.10", "::1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["", "0.0.0.0", "::", "10.0.0.1", "example.com", "127.0.0.1.example.com", "127.x"]
)
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_default_state_dir() -> None:
    assert default_state_dir("a.b", {"XDG_STATE_HOME": "/s"}) == Path("/s/bulkhead/a.b")
    assert default_state_dir("a.b", {"HOME": "/h"}) == Path("/h/.local/state/bulkhead/a.b")
    assert default_state_dir("a.b", {"HOME": "/h", "XDG_STATE_HOME": ""}) == Path(
        "/h/.local/state/bulkhead/a.b"
    )
