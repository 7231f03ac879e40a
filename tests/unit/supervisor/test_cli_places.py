"""Which project and which state directory a command means."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from supervisor.cli import connect, operate, project
from supervisor.cli.project import DEMO_SETTINGS, Project, control_socket, demo_folder, state_dir_for
from supervisor.state import StateDirectory
from taskkit.errors import SettingsError
from taskkit.wire.messages import Status

SETTINGS = (
    "TASKKIT = {'STATE_DIR': '/own/place', 'KEY_FILE': '/own/key'}\nprint('a settings file may print')\n"
)


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DJANGO_SETTINGS_MODULE", "TASKKIT_STATE_DIR", "TASKKIT_KEY_FILE", "TASKKIT_BIND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SETTINGS)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "wrong.py").write_text("TASKKIT = {'BIND': 'nonsense'}\n")


def test_the_demo_is_what_runs_without_settings() -> None:
    chosen = Project.choose(None)
    assert (chosen.settings_module, chosen.demo, chosen.given) == (DEMO_SETTINGS, True, False)
    assert chosen.path[0] == str(demo_folder())
    assert (demo_folder() / "bulkhead_demo").is_dir()


def test_a_flag_stands_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "theirs")
    assert Project.choose(None).settings_module == "theirs"
    chosen = Project.choose("mine")
    assert (chosen.settings_module, chosen.demo, chosen.path) == ("mine", False, (str(tmp_path),))


def test_state_dir_flag_then_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TASKKIT_STATE_DIR", "env")
    chosen = Project.choose("broken")  # neither asks the project
    assert state_dir_for(chosen, Path("flag"), exactly=True) == tmp_path / "flag"
    assert state_dir_for(chosen, None, exactly=True) == tmp_path / "env"


def test_the_demo_keeps_its_database_in_a_named_state_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(project.DEMO_FOLDER_VARIABLE, "")
    monkeypatch.delenv(project.DEMO_FOLDER_VARIABLE)
    project.place_demo_database(None)
    assert project.DEMO_FOLDER_VARIABLE not in os.environ
    project.place_demo_database(Path("flag"))
    assert os.environ[project.DEMO_FOLDER_VARIABLE] == str(tmp_path / "flag")
    project.place_demo_database(Path("other"))  # what somebody chose stays
    assert os.environ[project.DEMO_FOLDER_VARIABLE] == str(tmp_path / "flag")


def test_a_project_is_asked_for_its_own(tmp_path: Path) -> None:
    assert state_dir_for(Project.choose("mine"), None, exactly=True) == Path("/own/place")
    assert state_dir_for(Project.choose("mine"), None, exactly=False) == Path("/own/place")


def test_a_socket_at_the_usual_place_answers_the_question(tmp_path: Path) -> None:
    usual = tmp_path / "state" / "bulkhead" / "broken"
    usual.mkdir(parents=True)
    control_socket(usual).touch()
    assert state_dir_for(Project.choose("broken"), None, exactly=False) == usual


def test_the_demo_is_never_asked(tmp_path: Path) -> None:
    expected = tmp_path / "state" / "bulkhead" / DEMO_SETTINGS
    assert state_dir_for(Project.choose(None), None, exactly=True) == expected


@pytest.mark.parametrize(
    ("module", "word"), [("broken", "nothing_of_that_name"), ("absent", "absent"), ("wrong", "nonsense")]
)
def test_settings_that_cannot_be_read_are_named_with_the_reason(module: str, word: str) -> None:
    with pytest.raises(SettingsError, match=word) as caught:
        state_dir_for(Project.choose(module), None, exactly=True)
    assert module in str(caught.value)
    assert "--settings" in str(caught.value)


def test_settings_that_never_import_are_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import threading; threading.Event().wait(30)\n")
    monkeypatch.setattr(project, "_IMPORT_DEADLINE", 0.3)
    with pytest.raises(SettingsError, match="did not import"):
        Project.choose("slow").read_settings()


def test_the_key_is_in_the_state_directory_unless_said_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert connect.key_file(Project.choose("mine"), tmp_path) == Path("/own/key")
    assert connect.key_file(Project.choose(None), tmp_path) == tmp_path / "key"
    (tmp_path / "key").touch()
    assert connect.key_file(Project.choose("mine"), tmp_path) == tmp_path / "key"
    monkeypatch.setenv("TASKKIT_KEY_FILE", "env-key")
    assert connect.key_file(Project.choose("mine"), tmp_path) == tmp_path / "env-key"


def test_hints_name_what_finds_the_same_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert project.flags_of(Project.choose(None), None) == ""
    assert project.flags_of(Project.choose("mine"), Path("a b")) == (
        f" --settings mine --state-dir '{tmp_path}/a b'"
    )
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "theirs")
    monkeypatch.setenv("TASKKIT_STATE_DIR", "env")
    assert project.flags_of(Project.choose(None), None) == f" --settings theirs --state-dir {tmp_path}/env"


def test_beside_a_manage_py_the_demo_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    connect.choose(None, None)
    (tmp_path / "manage.py").touch()
    connect.choose("mine", None)
    connect.choose(None, Path("place"))
    assert capsys.readouterr().err == ""
    connect.choose(None, None)
    assert project.PRESUMED in capsys.readouterr().err
    assert project.PRESUMED in str(connect.not_running(Project.choose(None), tmp_path))
    assert project.PRESUMED not in str(connect.not_running(Project.choose("mine"), tmp_path))


def test_a_tree_without_its_operator_socket_is_named(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    directory.acquire()
    said = str(connect.not_running(Project.choose("mine"), tmp_path))
    directory.release()
    assert f"kill {os.getpid()}" in said
    assert "control.sock is gone" in said


def test_a_search_waits_for_the_tree_then_says_that_it_has_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now, said = 100.0, list[str]()
    search = connect.Search(tmp_path, said.append, "; start it", clock=lambda: now)
    assert search() is None
    now += connect.TREE_PATIENCE
    assert search() is None
    assert said == ["the gateway is gone; waiting for it (Ctrl-C leaves)"]
    search.found()
    assert search() is None
    now += connect.TREE_PATIENCE + 0.1
    with pytest.raises(connect.NotRunning, match="has stopped; start it"):
        search()
    assert len(said) == 2


def test_a_search_tells_the_address_of_today(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Operator:
        def __enter__(self) -> Operator:
            return self

        def __exit__(self, *_: object) -> None: ...

        def ask(self, name: str) -> Status:
            return Status(
                pid=1,
                state="RUNNING",
                url="http://127.0.0.1:7",
                state_dir="",
                settings_module="m",
                uptime=0.0,
            )

    search = connect.Search(tmp_path, lambda text: None)
    monkeypatch.setattr("supervisor.cli.operate.connect", lambda place: Operator())
    assert search() == "http://127.0.0.1:7"

    def stuck(place: Path) -> None:
        raise operate.Unresponsive("does not answer")

    monkeypatch.setattr("supervisor.cli.operate.connect", stuck)
    assert search() is None
