"""What people see: events in three views, durations, tables; nothing that reprograms their terminal."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from supervisor.cli import output, view, wording
from supervisor.cli.view import JsonView, LiveView, PlainView, progress_of, was_successful
from taskkit.following import StreamEvent


def event(kind: str, data: Any, number: int = 1) -> StreamEvent:
    return StreamEvent(str(number), kind, data)


END = event("stream.end", {"status": "SUCCESSFUL", "result": {"n": 3}}, 9)
FAILED = event("stream.end", {"status": "FAILED", "error": {"message": "boom\x1b[2J"}}, 9)


def show(shown: view.View, *events: StreamEvent) -> None:
    with shown:
        for one in events:
            shown.event(one)
        shown.notice("a word")


def test_json_is_one_document_per_event(capsys: pytest.CaptureFixture[str]) -> None:
    show(JsonView(), event("progress", {"step": 1, "_run": "x"}), END)
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [
        {"id": "1", "type": "progress", "data": {"step": 1, "_run": "x"}},
        {"id": "9", "type": "stream.end", "data": END.data},
    ]
    assert err == "a word\n"


def test_plain_is_one_line_per_event_without_our_own_fields(capsys: pytest.CaptureFixture[str]) -> None:
    show(PlainView(), event("progress", {"step": 1, "_run": "x"}), FAILED)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == '     1  progress  {"step": 1}'
    assert lines[1] == r"     9  stream.end  FAILED: boom\x1b[2J"


def test_plain_tells_the_progress_once_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    shown = PlainView(clock=lambda: now)
    for number in range(1, 31):
        now += 0.1
        shown.event(event("run.progress", {"done": number, "total": 30}, number))
        shown.event(event("note", {}, number))
    kinds = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert (kinds.count("run.progress"), kinds.count("note")) == (3, 30)


def test_live_prints_events_above_a_bar_that_moves() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    live = LiveView("demo.count", console)
    with live:
        live.event(event("run.progress", {"done": 5, "total": 10, "message": "five[bold]\x1b[2J"}))
        assert (live._bar.tasks[0].completed, live._bar.tasks[0].total) == (5, 10)
        live._bar.refresh()
        live.event(event("note", "[red]not markup[/red] \x1b[2J"))
        live.event(END)
        assert live._bar.tasks[0].completed == 10
    text = screen.getvalue()
    assert "[red]not markup[/red]" in text
    assert "five[bold]" in text
    assert "SUCCESSFUL" in text
    assert "\x1b[2J" not in text


def test_a_huge_result_is_cut_on_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    huge = event("stream.end", {"status": "SUCCESSFUL", "result": "x" * 100_000})
    screen = io.StringIO()
    show(LiveView("t", Console(file=screen, width=100)), huge)
    assert len(screen.getvalue()) < 5_000
    show(PlainView(), huge)
    assert "x" * 100_000 in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (event("run.progress", {"done": 1, "total": 4, "message": "m"}), (1.0, 4.0, "m")),
        (event("run.progress", {"done": 1, "total": None, "message": ""}), (1.0, None, "")),
        (event("progress", {"step": 2, "total": 4}), (2.0, 4.0, "")),
        (event("progress", {"step": 2, "total_steps": 3, "message": 7}), (2.0, 3.0, "")),
        (event("progress", {"percent": 50}), None),
        (event("progress", {"step": True}), None),
        (event("progress", "text"), None),
        (event("note", {"done": 1}), None),
    ],
)
def test_which_events_move_the_bar(shown: StreamEvent, expected: Any) -> None:
    assert progress_of(shown) == expected


def test_success_is_what_the_last_event_says() -> None:
    assert was_successful(END)
    assert not was_successful(FAILED)
    assert not was_successful(None)
    assert not was_successful(event("stream.end", "nonsense"))


def test_durations_for_people() -> None:
    values = (0.04, 9.9, 12, 200, 3600 * 2 + 300, 86400 * 4 + 3600 * 3)
    assert [output.seconds(v) for v in values] == [
        "0.0 s",
        "9.9 s",
        "12 s",
        "3 min 20 s",
        "2 h 5 min",
        "4 d 3 h",
    ]
    assert output.between("2026-01-01T00:00:00.000Z", "2026-01-01T00:00:12.000Z") == "12 s"
    assert output.between(None, "x") == output.between("x", None) == ""


def test_a_table_in_a_pipe_is_aligned_text(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("NAME", "N"), [("a\x1b", None), ("longer", 12)])
    assert capsys.readouterr().out.splitlines() == ["NAME    N", r"a\x1b", "longer  12"]


def test_a_table_on_a_terminal_never_cuts_its_first_column(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    run = "01a1fbe3-78df-74fc-90fb-3764528d9ed1"
    output.print_table(("RUN", "TASK", "STATUS"), [(run, "a.long.name" * 3, "SUCCESSFUL")])
    assert run in capsys.readouterr().out


RAISED = event(
    "stream.end",
    {
        "status": "FAILED",
        "error": {
            "code": "raised",
            "message": "kaboom",
            "exception": "builtins.ValueError",
            "traceback": 'Traceback:\n  File "x\x1b.py"\nValueError: kaboom\n',
        },
    },
    9,
)
LINES = ["Traceback:", r'  File "x\x1b.py"', "ValueError: kaboom"]


def test_a_failure_ends_with_its_traceback_as_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show(PlainView(), RAISED)
    assert capsys.readouterr().out.splitlines()[:4] == [
        "     9  stream.end  FAILED: ValueError: kaboom",
        *LINES,
    ]
    screen = io.StringIO()
    show(LiveView("t", Console(file=screen, width=20)), RAISED)
    lines = screen.getvalue().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("FAILED: ValueError: kaboom  (after"))
    assert lines[begin + 1 : begin + 4] == LINES


def test_a_signal_shows_the_traceback_of_its_cause() -> None:
    error = {"message": "died of SIGSEGV", "cause": {"kind": "signal", "traceback": "Fatal\n  File x"}}
    assert wording.exception_line(error) == "died of SIGSEGV"
    assert wording.traceback_lines(error) == ["Fatal", "  File x"]
    assert wording.traceback_lines({"message": "m"}) == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ({"exception": "builtins.KeyError", "message": "'x'"}, "KeyError: 'x'"),
        ({"exception": "shop.errors.Sold", "message": "shop.errors.Sold"}, "shop.errors.Sold"),
        ({"exception": "builtins.MemoryError", "message": ""}, "MemoryError"),
        ({"odd": 1}, '{"odd": 1}'),
    ],
)
def test_an_exception_is_named_as_python_does(error: dict[str, Any], line: str) -> None:
    assert wording.exception_line(error) == line


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (
            {
                "attempt": 1,
                "ending": "raised",
                "delay": 2,
                "error": {"exception": "builtins.E", "message": "m"},
            },
            "attempt 1 raised E: m; again in 2 s",
        ),
        (
            {"attempt": 1, "ending": "lost", "delay": 0, "error": {"message": "x"}},
            "attempt 1 lost (the tree was stopped or died); it runs again",
        ),
        (
            {"attempt": 2, "ending": "timed_out", "delay": 75.0, "error": {"message": "over 5 s"}},
            "attempt 2 timed out: over 5 s; again in 1 min 15 s",
        ),
        ({"attempt": 3, "ending": "crashed", "error": None}, "attempt 3 crashed; it runs again"),
    ],
)
def test_a_retry_is_told_in_words(data: dict[str, Any], line: str) -> None:
    assert wording.describe(event("run.retrying", {**data, "_run": "x"})) == line


def test_a_finding_is_a_line_to_read() -> None:
    data = {"file": "re/_parser.py", "line": 507, "name": "_parse", "complexity": 123, "lines": 400}
    assert wording.describe(event("finding", data)) == "complexity 123  re/_parser.py:507 _parse"
    assert wording.describe(event("finding", {"file": "x"})) == '{"file": "x"}'


def test_the_worst_of_a_result_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"file": "a.py", "line": 1}, {"file": "b.py", "line": 22}]
    show(PlainView(), event("stream.end", {"status": "SUCCESSFUL", "result": {"n": 1, "worst": rows}}))
    out = capsys.readouterr().out.splitlines()
    assert out[:4] == ['     1  stream.end  SUCCESSFUL: {"n": 1}', "FILE  LINE", "a.py  1", "b.py  22"]
    odd = event("stream.end", {"status": "SUCCESSFUL", "result": {"worst": [{"a": 1}, {"b": 2}]}})
    assert wording.summary(odd).endswith('{"worst": [{"a": 1}, {"b": 2}]}')


def test_a_long_result_is_cut_between_words() -> None:
    assert wording.shortened("word " * 400).endswith("word …")
    assert len(wording.shortened("x" * 5000)) == wording.SUMMARY_LIMIT + 2


def test_without_progress_there_is_no_bar_and_with_it_the_bar_stands_above_the_outcome() -> None:
    def screen(*events: StreamEvent) -> str:
        file = io.StringIO()
        live = LiveView("t", Console(file=file, force_terminal=True, width=120, color_system=None))
        with live:
            for one in events:
                live.event(one)
                live._bar.refresh()
        return file.getvalue()

    assert "/?" not in screen(event("note", {}), END)
    told = screen(event("run.progress", {"done": 3, "total": 4}), END)
    assert told.rindex("4/4") < told.index("SUCCESSFUL")


def test_a_notice_is_never_cut() -> None:
    file = io.StringIO()
    LiveView("t", Console(file=file, force_terminal=True, width=20, color_system=None)).notice("word " * 30)
    assert "word " * 30 in file.getvalue()
