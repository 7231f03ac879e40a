"""Exit codes, messages, the cost of `--help`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from supervisor.cli import connect, exits, main, runs, tree
from supervisor.cli.endings import exit_code_of
from taskkit import tokens
from taskkit.errors import (
    AddressInUse,
    AlreadyRunning,
    GatewayError,
    NeverReady,
    RestartIntensityExceeded,
    RunFailed,
    SettingsError,
    TaskkitError,
)
from taskkit.following import StreamEvent
from taskkit.wire.messages import ChildStatus, Status

COMMANDS = [
    *("run", "demo", "start", "stop", "restart", "reload", "upgrade", "status"),
    *(
        "submit",
        "follow",
        "tasks",
        "runs",
        "runners",
        "cancel",
        "release",
        "reset",
        "logs",
        "schedules",
        "vacuum",
        "token",
    ),
]


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DJANGO_SETTINGS_MODULE", "TASKKIT_STATE_DIR", "TASKKIT_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("x"), exits.BAD_CONFIGURATION),
        (NeverReady("x"), exits.BAD_CONFIGURATION),
        (AddressInUse("x"), exits.BAD_CONFIGURATION),
        (AlreadyRunning("x"), exits.ALREADY_RUNNING),
        (RestartIntensityExceeded("x"), exits.GAVE_UP),
        (connect.NotRunning("x"), exits.FAILED),
        (GatewayError("x"), exits.FAILED),
        (RunFailed("x", {}), exits.FAILED),
    ],
)
def test_every_error_has_its_exit_code(error: TaskkitError, code: int) -> None:
    assert exit_code_of(error) == code


def test_an_error_is_one_message_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SettingsError("BIND = 'x': write HOST:PORT")

    monkeypatch.setattr("supervisor.daemon.serve", fail)
    assert main.main(["run"]) == exits.BAD_CONFIGURATION
    assert capsys.readouterr() == ("", "bulkhead: BIND = 'x': write HOST:PORT\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([command, "--help"]) == exits.OK
    assert "--json" in capsys.readouterr().out


def test_the_commands_are_those() -> None:
    names = {command.callback.__name__ for command in main.app.registered_commands if command.callback}
    assert names == set(COMMANDS)


@pytest.mark.parametrize(
    "words", [["nonsense"], ["submit"], ["submit", "t", "n"], ["token", "--ttl", "soon"]]
)
def test_wrong_usage_is_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(words) == exits.BAD_CONFIGURATION
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["submit", "demo.count"], ["follow", "r"], ["runs"], ["runners"], ["status"]]
)
def test_without_a_tree_it_is_1_with_the_remedy(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(words) == exits.FAILED
    assert "bulkhead start" in capsys.readouterr().err


def test_status_for_programs_without_a_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["status", "--json"]) == exits.FAILED
    assert json.loads(capsys.readouterr().out)["running"] is False


def test_stop_without_a_tree_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["stop", "--json"]) == exits.OK
    assert json.loads(capsys.readouterr().out) == {"was_running": False, "left": []}


def test_restart_without_a_start_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["restart"]) == exits.BAD_CONFIGURATION
    assert "bulkhead start" in capsys.readouterr().err
    (tmp_path / "start.json").write_text("{")
    assert main.main(["restart", "--state-dir", str(tmp_path)]) == exits.BAD_CONFIGURATION
    assert "damaged" in capsys.readouterr().err


def test_run_hands_its_flags_to_the_daemon(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: list[Any] = []
    status = Status(
        pid=1,
        state="RUNNING",
        url="http://127.0.0.1:1",
        state_dir="s",
        settings_module="m",
        uptime=0.0,
        children=[ChildStatus(name="n", kind="k", state="RUNNING")],
    )

    def serve(config: Any, on_ready: Any, on_stopping: Any) -> None:
        seen.append(config)
        on_ready(status)
        on_stopping("TERM")

    monkeypatch.setattr("supervisor.daemon.serve", serve)
    assert main.main(["run", "--bind", "127.0.0.1:0", "--runners", "2", "--settings", "mine"]) == exits.OK
    assert seen[0].overrides == {"BIND": "127.0.0.1:0", "POOLS": {"default": {"runners": 2}}}
    assert (seen[0].settings_module, seen[0].demo) == ("mine", False)
    assert "http://127.0.0.1:1" in capsys.readouterr().out
    assert main.main(["run", "--json"]) == exits.OK
    document = json.loads(capsys.readouterr().out)
    assert (document["pid"], document["children"][0]["restarts"]) == (1, 0)
    assert seen[1].demo
    assert main.main(["run", "--quiet"]) == exits.OK
    assert capsys.readouterr().out == ""


def test_the_last_line_of_token_is_a_token_signed_with_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["token", "--state-dir", str(tmp_path), "--actions", "read", "--runs", "a,b", "--tasks", "demo.*"]
    assert main.main([*words, "--ttl", "90s"]) == exits.OK
    key = tokens.load_or_create_key(tmp_path / "key")
    claims = tokens.verify(key, capsys.readouterr().out.splitlines()[-1])
    assert claims.actions == frozenset({"read"})
    assert (claims.runs, claims.tasks) == (frozenset({"a", "b"}), ("demo.*",))
    assert claims.expires_at == pytest.approx(time.time() + 90, abs=10)
    assert main.main([*words, "--json"]) == exits.OK
    assert tokens.verify(key, json.loads(capsys.readouterr().out)["token"]).may("read")


def test_a_token_for_an_unknown_action_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["token", "--state-dir", str(tmp_path), "--actions", "fly"]
    assert main.main(words) == exits.BAD_CONFIGURATION
    assert "operate" in capsys.readouterr().err


class Follower:
    """A client whose run says what the test wants."""

    def __init__(self, *events: StreamEvent | type[BaseException], status: str = "SUCCESSFUL") -> None:
        self.events = events
        self.final = status

    def follow(self, run: str, after: str = "") -> Any:
        for event in self.events:
            if isinstance(event, type):
                raise event
            yield event

    def status(self, run: str) -> dict[str, Any]:
        return {"status": self.final}


END = StreamEvent("2", "stream.end", {"status": "SUCCESSFUL"})
BAD_END = StreamEvent("2", "stream.end", {"status": "FAILED", "error": {"message": "no"}})


@pytest.mark.parametrize(
    ("client", "code"),
    [
        (Follower(END), exits.OK),
        (Follower(BAD_END), exits.FAILED),
        (Follower(KeyboardInterrupt), exits.FAILED),
        (Follower(), exits.OK),
        (Follower(status="FAILED"), exits.FAILED),
    ],
)
def test_follow_leaves_by_the_outcome(client: Any, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.follow_to_the_end(client, "r", "t", after="", json=False) == code


def test_leaving_a_run_says_that_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    runs.follow_to_the_end(Follower(KeyboardInterrupt), "r", "t", after="", json=False)  # type: ignore[arg-type]
    assert "run r goes on" in capsys.readouterr().out


def test_a_start_that_fails_passes_code_and_log_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for code, expected in ((2, 2), (3, 3), (4, 4), (70, 2)):
        command = (sys.executable, "-c", f"print('the reason'); raise SystemExit({code})")
        monkeypatch.setattr("supervisor.detach.COMMAND", command)
        assert main.main(["start", "--state-dir", str(tmp_path)]) == expected
        assert "the reason" in capsys.readouterr().err


def test_start_keeps_what_restart_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("supervisor.detach.COMMAND", (sys.executable, "-c", "raise SystemExit(2)"))
    main.main(["start", "--state-dir", str(tmp_path), "--bind", "127.0.0.1:0", "--runners", "3"])
    recipe = json.loads((tmp_path / tree._START_FILE).read_text())
    assert recipe["arguments"][-4:] == ["--bind", "127.0.0.1:0", "--runners", "3"]
    assert recipe["cwd"] == str(Path.cwd())
    assert "tree did not start" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['bulkhead', '--help']\n"
        "from supervisor.mixed import main\n"
        "main()\n"
        "print([m for m in ('httpx', 'rich', 'trio', 'anyio', 'jwt', 'django', 'psutil') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def run_bare(*flags: str) -> subprocess.CompletedProcess[str]:
    """Enter as the console script does, with a daemon that only says what it was given."""
    code = (
        f"import json, os, sys; sys.argv = {['bulkhead', 'run', *flags]!r}\n"
        "import supervisor.daemon\n"
        "def serve(config, on_ready, on_stopping):\n"
        "    heavy = [m for m in ('typer', 'rich', 'httpx', 'anyio') if m in sys.modules]\n"
        "    demo = os.environ.get('BULKHEAD_DEMO_DIR')\n"
        "    print(json.dumps([config.settings_module, config.overrides, demo, heavy]))\n"
        "supervisor.daemon.serve = serve\n"
        "from supervisor.mixed import main\n"
        "sys.exit(main())"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )


def test_a_tree_keeps_nothing_of_the_command_line_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BULKHEAD_DEMO_DIR", raising=False)
    done = run_bare("--quiet", "--settings", "mine", "--runners", "2")
    assert json.loads(done.stdout) == ["mine", {"POOLS": {"default": {"runners": 2}}}, None, []], done.stderr
    assert done.returncode == exits.OK


def test_what_the_command_line_adds_to_the_environment_reaches_the_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("BULKHEAD_DEMO_DIR", raising=False)
    done = run_bare("--quiet", "--state-dir", str(tmp_path))
    assert json.loads(done.stdout)[2] == str(tmp_path), done.stderr


@pytest.mark.parametrize(
    ("flag", "code", "said"),
    [("--help", exits.OK, "Usage"), ("--nonsense", exits.BAD_CONFIGURATION, "No such option")],
)
def test_what_the_command_line_answers_itself_is_the_end(flag: str, code: int, said: str) -> None:
    done = run_bare(flag)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_left_is_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "supervisor", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == exits.FAILED
    assert errors == b""


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == exits.BAD_CONFIGURATION
    assert "Commands:" in "".join(capsys.readouterr())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == exits.OK
    assert capsys.readouterr().out.startswith("bulkhead ")


def test_commands_to_copy_are_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    client: Any = Follower(KeyboardInterrupt)
    runs.follow_to_the_end(client, "r", "t", after="", json=False, submitted=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "run r",
        "Left; run r goes on.",
        "Back:   bulkhead follow r",
        "End it: bulkhead cancel r",
    ]


class Refusing:
    """A client whose gateway refuses everything but a status."""

    def __init__(self, code: str, detail: str) -> None:
        self.error = GatewayError(detail, {"type": f"urn:bulkhead:problem:{code}"})

    def refuse(self, *_: object, **__: object) -> Any:
        raise self.error

    task = cancel = refuse

    def tasks(self) -> dict[str, Any]:
        return {"tasks": [{"name": "demo.count"}, {"name": "demo.burn"}]}

    def status(self, run: str) -> dict[str, Any]:
        return {"status": "FAILED"}


def test_an_unknown_task_leads_to_the_list_of_tasks() -> None:
    client: Any = Refusing("unknown-task", "there is no task 'x'; GET /api/v1/tasks lists them")
    with pytest.raises(GatewayError, match="'x'; `bulkhead tasks` lists them"):
        runs.submit_pairs(client, "x", {})
    with pytest.raises(GatewayError, match=r"did you mean demo\.count\? `bulkhead tasks` lists them"):
        runs.submit_pairs(client, "demo.coutn", {})


def test_cancelling_a_run_that_has_ended_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "connected", lambda *_: Refusing("run-finished", "no"))
    assert main.main(["cancel", "r"]) == exits.FAILED
    assert "has ended already (FAILED)" in capsys.readouterr().err


def test_tasks_are_listed_with_what_one_types(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Listing:
        def tasks(self) -> dict[str, Any]:
            properties = {"how": {}, "n": {"default": 10}, "path": {"default": None}}
            schema = {"properties": properties, "required": ["how"]}
            return {"tasks": [{"name": "a.b", "doc": "Do it.\nMore.", "parameters": schema}, {"name": "a.c"}]}

    monkeypatch.setattr(runs, "connected", lambda *_: Listing())
    assert main.main(["tasks"]) == exits.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["a.b", "how", "n=10", "[path]", "Do", "it."]
    assert main.main(["tasks", "--json"]) == exits.OK
    assert len(json.loads(capsys.readouterr().out)["tasks"]) == 2


def test_restart_leaves_a_foreground_tree_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Operator:
        pid = 4711

        def close(self) -> None: ...

    monkeypatch.setattr("supervisor.cli.operate.connect", lambda place: Operator())
    for recipe in (None, {"arguments": [], "cwd": "/", "pid": 12}):
        if recipe is not None:
            (tmp_path / tree._START_FILE).write_text(json.dumps(recipe))
        assert main.main(["restart", "--state-dir", str(tmp_path)]) == exits.BAD_CONFIGURATION
        assert "pid 4711) runs in the foreground" in capsys.readouterr().err
