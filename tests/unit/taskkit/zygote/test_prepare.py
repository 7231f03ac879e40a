"""What a newcomer reads when the project cannot be imported: the first message of a real zygote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from taskkit import linux, seqpacket
from taskkit.wire.codec import unpack
from taskkit.wire.messages import ZygoteFailed, ZygoteMessage, ZygoteReady
from taskkit.zygote import prepare

HEAD = "DATABASES = {}\nUSE_TZ = True\n"


def begin(folder: Path, module: str) -> ZygoteReady | ZygoteFailed:
    """Return what a zygote of this project says first."""
    ours, theirs = linux.seqpacket_pair()
    options = {"settings_module": module, "path": [str(folder)], "supervisor": os.getpid()}
    with ours:
        with theirs:
            command = [sys.executable, "-m", "taskkit.zygote", str(theirs.fileno()), json.dumps(options)]
            zygote = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        try:
            ours.settimeout(60)
            received = seqpacket.receive(ours)
            assert received is not None
            ours.close()
            zygote.wait(30)
        finally:
            zygote.kill()
            zygote.wait()
    message: object = unpack(received[0], ZygoteMessage)
    assert isinstance(message, ZygoteReady | ZygoteFailed)
    return message


def failure(folder: Path, module: str) -> ZygoteFailed:
    """Return why it does not start."""
    message = begin(folder, module)
    assert isinstance(message, ZygoteFailed)
    return message


def settings(folder: Path, text: str) -> str:
    """Write a settings module; return its name."""
    (folder / "theirs.py").write_text(HEAD + text)
    return "theirs"


def app(folder: Path, **modules: str) -> None:
    """Write an app named `shop`."""
    (folder / "shop").mkdir()
    (folder / "shop" / "__init__.py").touch()
    for name, text in modules.items():
        (folder / "shop" / f"{name}.py").write_text(text)


@pytest.mark.parametrize("module", ["no.such.settings", "theirs.missing", ".theirs", "", "theirs."])
def test_a_settings_module_that_is_not_there_is_said_in_one_sentence(tmp_path: Path, module: str) -> None:
    settings(tmp_path, "")
    message = failure(tmp_path, module)
    assert message.reason.startswith(f"cannot import settings module {module}: No module named ")
    assert message.reason.endswith("; start in the folder of manage.py, or check --settings")
    assert message.detail == ""


def test_what_the_settings_module_lacks_is_not_taken_for_it(tmp_path: Path) -> None:
    message = failure(tmp_path, settings(tmp_path, "import nothing_of_theirs\n"))
    assert message.reason == "ModuleNotFoundError: No module named 'nothing_of_theirs'"
    assert 'theirs.py", line 3' in message.detail
    assert message.detail.count("  File ") == 1


def test_a_function_of_claims_that_is_not_there_is_said(tmp_path: Path) -> None:
    app(tmp_path)
    text = "INSTALLED_APPS = ['taskkit', 'shop']\nTASKKIT = {'TOKEN_CLAIMS': 'shop.tokens.nope'}\n"
    message = failure(tmp_path, settings(tmp_path, text))
    assert message.reason.startswith(
        "TASKKIT: TOKEN_CLAIMS = 'shop.tokens.nope': No module named 'shop.tokens'"
    )
    assert "Name a function" in message.reason


def test_an_app_that_is_not_installed_is_said_before_a_model_is_imported(tmp_path: Path) -> None:
    app(tmp_path, models="from taskkit import StreamTask\nclass Order(StreamTask):\n    pass\n")
    message = failure(tmp_path, settings(tmp_path, "INSTALLED_APPS = ['shop']\n"))
    assert message.reason.startswith('"taskkit" is missing from INSTALLED_APPS of theirs; add it')
    assert message.detail == ""


APPS = "from taskkit.apps import TaskkitConfig\nclass Ours(TaskkitConfig):\n    verbose_name = 'Tasks'\n"


@pytest.mark.parametrize("entry", ["taskkit", "taskkit.apps.TaskkitConfig", "shop.apps.Ours"])
def test_every_way_to_install_it_counts(tmp_path: Path, entry: str) -> None:
    app(tmp_path, apps=APPS)
    message = begin(
        tmp_path, settings(tmp_path, f"INSTALLED_APPS = {['django.contrib.contenttypes', entry]}\n")
    )
    assert isinstance(message, ZygoteReady), message


INSTALLED = "INSTALLED_APPS = ['django.contrib.contenttypes', 'taskkit', 'shop']\n"


@pytest.mark.parametrize("module", ["models", "tasks"])
def test_an_error_of_the_project_is_shown_from_its_own_frame_on(tmp_path: Path, module: str) -> None:
    app(tmp_path, **{module: "def careless():\n    return 1 / 0\ncareless()\n"})
    message = failure(tmp_path, settings(tmp_path, INSTALLED))
    lines = message.detail.splitlines()
    frames = [line for line in lines if line.startswith("  File ")]
    assert lines[0] == "Traceback (most recent call last):"
    assert [f'{module}.py", line {it}' in frame for it, frame in zip((3, 2), frames, strict=True)] == [
        True,
        True,
    ]
    assert message.reason == lines[-1] == "ZeroDivisionError: division by zero"


def test_the_frames_of_a_cause_are_trimmed_too(tmp_path: Path) -> None:
    app(
        tmp_path,
        tasks="try:\n    import not_there\nexcept ImportError as e:\n    raise OSError('x') from e\n",
    )
    message = failure(tmp_path, settings(tmp_path, INSTALLED))
    assert "No module named 'not_there'" in message.detail
    assert message.detail.count("  File ") == message.detail.count("tasks.py") == 2


@pytest.mark.parametrize(
    ("apps", "words"),
    [
        ("['taskkit', 'taskkit']", "aren't unique"),
        ("['taskkit', 'not_there']", "No module named 'not_there'"),
    ],
)
def test_what_django_refuses_by_itself_needs_no_frames(tmp_path: Path, apps: str, words: str) -> None:
    message = failure(tmp_path, settings(tmp_path, f"INSTALLED_APPS = {apps}\n"))
    assert words in message.reason
    assert message.detail == ""


def test_a_syntax_error_is_shown_with_its_file_and_line(tmp_path: Path) -> None:
    app(tmp_path, tasks="x = 1\ndef f(:\n")
    message = failure(tmp_path, settings(tmp_path, INSTALLED))
    assert message.reason.startswith("SyntaxError: ")
    assert 'shop/tasks.py", line 2' in message.detail
    assert "importlib" not in message.detail


def test_two_tasks_of_one_name_need_no_frames(tmp_path: Path) -> None:
    task = "from taskkit import task\n@task(name='one')\ndef {}(): pass\n"
    app(tmp_path, tasks=task.format("first") + task.format("second"))
    message = failure(tmp_path, settings(tmp_path, INSTALLED))
    assert "two tasks are named 'shop.one'" in message.reason
    assert message.detail == ""


@pytest.mark.parametrize(
    ("loop", "pool", "wanted"),
    [("asyncio", "asyncio", False), ("trio", "asyncio", True), (None, "trio", True)],
)
def test_trio_is_in_memory_only_where_a_task_may_need_it(
    tmp_path: Path, loop: str | None, pool: str, wanted: bool
) -> None:
    app(tmp_path, tasks=f"from taskkit import task\n@task(loop={loop!r})\nasync def one(): pass\n")
    name = settings(tmp_path, f"{INSTALLED}TASKKIT = {{'POOLS': {{'default': {{'loop': {pool!r}}}}}}}\n")
    program = (
        "import sys; from taskkit.zygote import prepare\n"
        f"prepare.load_project({name!r}, [{str(tmp_path)!r}])\n"
        "print('trio' in sys.modules, 'asyncio' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.split() == [str(wanted), "True"]


def test_a_fault_of_this_package_keeps_every_frame() -> None:
    with pytest.raises(ValueError) as caught:
        prepare._read_until_end(-1)  # what raises is a line of ours
    assert "in _read_until_end" in prepare.complaint_of(caught.value)
