"""What people type: arguments, durations, flags of `run`; what a config makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from supervisor.cli.options import parse_duration, parse_pairs, parse_value, split_words
from supervisor.cli.tree import overrides
from supervisor.config import Config
from taskkit.errors import SettingsError
from taskkit.settings import load_settings


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ('"10"', "10"),
        ('{"a":[1]}', {"a": [1]}),
        ("hello", "hello"),
        ("", ""),
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
        ("[1,", "[1,"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_a_value_is_json_if_it_parses_else_text(text: str, value: Any) -> None:
    assert parse_value(text) == value


def test_pairs_keep_what_follows_the_first_equals_sign() -> None:
    assert parse_pairs(["n=1", "q=a=b", "text=two\nlines"]) == {"n": 1, "q": "a=b", "text": "two\nlines"}
    assert parse_pairs(None) == {}


@pytest.mark.parametrize("words", [["n"], ["=1"], ["1n=2"], ["a-b=1"], ["n=1", "n=2"]])
def test_other_words_are_refused_by_name(words: list[str]) -> None:
    with pytest.raises(typer.BadParameter):
        parse_pairs(words)


def test_durations() -> None:
    assert [parse_duration(t) for t in ("90", "90s", "15m", "1.5h", "7d")] == [90, 90, 900, 5400, 604800]


@pytest.mark.parametrize("text", ["", "0", "-1", "5 m", "1w", "1e3", "h"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="15m"):
        parse_duration(text)


def test_lists() -> None:
    assert split_words(" read, submit ,,") == ["read", "submit"]


def test_flags_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert overrides("127.0.0.1:0", None, Path("s"), 3) == {
        "BIND": "127.0.0.1:0",
        "STATE_DIR": str(tmp_path / "s"),
        "POOLS": {"default": {"runners": 3}},
    }
    assert overrides(None, Path("s"), None, None) == {"UDS": str(tmp_path / "s")}


@pytest.mark.parametrize(
    ("bind", "uds"), [("127.0.0.1:0", Path("/s")), ("nonsense", None), ("host:99999", None)]
)
def test_flags_that_cannot_be_are_refused(bind: str, uds: Path | None) -> None:
    with pytest.raises(SettingsError):
        overrides(bind, uds, None, None)


def test_flags_stand_over_settings_and_pools_are_merged() -> None:
    settings = {"UDS": "/old", "POOLS": {"default": {"nice": 7, "runners": 9}, "gpu": {"runners": 1}}}
    config = Config(
        settings_module="m", overrides={"BIND": "127.0.0.1:0", "POOLS": {"default": {"runners": 2}}}
    )
    merged = config.apply(settings)
    assert merged["POOLS"] == {"default": {"nice": 7, "runners": 2}, "gpu": {"runners": 1}}
    assert (load_settings(merged).bind, load_settings(merged).uds) == ("127.0.0.1:0", None)
    assert settings["POOLS"]["default"]["runners"] == 9  # type: ignore[index]
    assert Config(settings_module="m").apply(settings) == settings
