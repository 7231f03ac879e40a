"""The demo project, task by task, without a tree around it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

DEMO = Path(__file__).resolve().parents[3] / "deploy" / "demo"

#: A Speaker that prints what it hears, one line of JSON each; the tasks by name.
HEAD = """
import json, os, signal, sys, threading
import django
django.setup()
from taskkit import current, registry

class Printer:
    id, attempt, task, metadata = "run", 1, "demo", {}
    def emit(self, type, data=None):
        os.write(OUT, (json.dumps([type, data], separators=(",", ":")) + "\\n").encode())
    def progress(self, done, total=None, message=""):
        self.emit("P", [done, total, message])

OUT = 1
current.speaker.set(Printer())
tasks = registry.load()
assert threading.active_count() == 1
def call(name, **kwargs):
    args, kwargs = tasks[name].bind([], kwargs)
    return tasks[name].func(*args, **kwargs)
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {
        **{
            name: value for name, value in os.environ.items() if not name.startswith(("DJANGO_", "BULKHEAD_"))
        },
        "DJANGO_SETTINGS_MODULE": "bulkhead_demo.settings",
        "BULKHEAD_DEMO_DIR": str(tmp_path / "state" / "demo"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@pytest.fixture
def run(env: dict[str, str]) -> Any:
    """Give `run(code)`: run it in the demo project; return the finished process."""

    def start(code: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, *(arguments or ("-c", HEAD + code))]
        return subprocess.run(command, capture_output=True, timeout=100, check=False, cwd=DEMO, env=env)

    return start


def events(done: subprocess.CompletedProcess[bytes]) -> list[Any]:
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_it_is_a_complete_django_project(run: Any, tmp_path: Path) -> None:
    for command in (
        ("check", "--fail-level", "WARNING"),
        ("makemigrations", "--check", "--dry-run", "demo"),
        ("migrate", "--verbosity", "0"),
    ):
        done = run("", "manage.py", *command)
        assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "state" / "demo"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "demo.sqlite3").exists()
    key = folder / "secret_key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert run("from django.conf import settings; print(settings.SECRET_KEY)").stdout.decode() == (
        key.read_text() + "\n"
    )


def test_the_tasks_of_the_demo(run: Any) -> None:
    done = run("print(json.dumps(list(tasks)))")
    names = "ExampleTask audit burn count crash flood noisy quiet".split()
    assert events(done) == [[f"demo.{name}" for name in names]]


def test_count_emits_one_event_per_step(run: Any) -> None:
    *steps, result = events(run("print(call('demo.count', n=3, delay=0))"))
    assert steps == [["progress", {"step": step, "total": 3}] for step in (1, 2, 3)]
    assert result == 3


def test_audit_measures_what_it_can_parse(run: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "site-packages").mkdir(parents=True)
    (source / "site-packages" / "other.py").write_text("def not_ours(): ...\n")
    (source / "broken.py").write_text("def (:\n")
    (source / "null.py").write_bytes(b"x = 1\0\n")
    (source / "plain.py").write_text("class A:\n    def m(self):\n        return [x for x in y if x and z]\n")
    branches = "".join(f"    if a == {i}:\n        pass\n" for i in range(20))
    (source / "worst.py").write_text(f"def f(a):\n    def inner(): ...\n{branches}")
    *told, result = events(run(f"print(json.dumps(call('demo.audit', path={str(source)!r})))"))
    progress = [data for type, data in told if type == "P"]
    assert progress == [
        [i, 4, f"{name}.py"] for i, name in enumerate(("broken", "null", "plain", "worst"), 1)
    ]
    assert [data["file"] for type, data in told if type == "unreadable"] == ["broken.py", "null.py"]
    findings = [data for type, data in told if type == "finding"]
    assert findings == [{"file": "worst.py", "name": "f", "line": 1, "lines": 42, "complexity": 21}]
    worst = result.pop("worst")
    assert result == {"path": str(source), "files": 4, "lines": 45, "functions": 3, "errors": 2}
    assert [(each["function"], each["complexity"]) for each in worst] == [
        ("f", 21),
        ("A.m", 4),
        ("f.inner", 1),
    ]


def test_audit_of_nothing_says_so(run: Any, tmp_path: Path) -> None:
    done = run(f"call('demo.audit', path={str(tmp_path / 'nowhere')!r})")
    assert b"ValueError: there is no Python file at" in done.stderr


def test_audit_measures_real_code(run: Any) -> None:
    """One package of it stands for all, in a second rather than in twenty."""
    *told, result = events(
        run("import email; print(json.dumps(call('demo.audit', path=os.path.dirname(email.__file__))))")
    )
    assert result["files"] > 15
    assert result["errors"] == 0
    assert len(result["worst"]) == 10
    complexities = [each["complexity"] for each in result["worst"]]
    assert complexities == sorted(complexities, reverse=True)
    assert {"finding", "P"} <= {type for type, _ in told}


def test_flood_emits_events_of_the_wanted_size(run: Any) -> None:
    *told, result = events(run("print(call('demo.flood', n=12, size=100))"))
    assert [data["i"] for _, data in told] == list(range(1, 13))
    assert {len(json.dumps(data, separators=(",", ":"))) for _, data in told} == {100}
    assert result == 1200


def test_burn_and_quiet(run: Any) -> None:
    done = run("""
import trio
print(call("demo.burn", seconds=0.05))
print(json.dumps(trio.run(tasks["demo.quiet"].func, 0)))
""")
    rounds, nothing = events(done)
    assert rounds > 100
    assert nothing is None


def test_noisy_speaks_in_four_ways(run: Any) -> None:
    done = run("import logging; logging.basicConfig(); call('demo.noisy', lines=2)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        line for i in (b"1", b"2") for line in (b"print: line " + i, b"os.write: line " + i)
    ]
    assert b"stderr: line 2" in done.stderr
    assert b"logging: line 2" in done.stderr


@pytest.mark.parametrize("arguments", ["{}", "{'how': 'nicely'}", "{'how': 'segv', 'why': 1}"])
def test_crash_takes_only_known_ways(run: Any, arguments: str) -> None:
    done = run(f"call('demo.crash', **{arguments})")
    assert b"InvalidArguments" in done.stderr


def test_the_ways_are_those_of_the_signature(run: Any) -> None:
    done = run("""
from demo.crashes import WAYS
print(json.dumps(sorted(WAYS) == sorted(tasks["demo.crash"].info.parameters["properties"]["how"]["enum"])))
print(json.dumps(tasks["demo.crash"].info.memory_limit))
""")
    assert events(done) == [True, 512 * 1024 * 1024]


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("segv", -signal.SIGSEGV),
        ("abort", -signal.SIGABRT),
        ("exit", 3),
        ("kill", -signal.SIGKILL),
        pytest.param("recursion", -signal.SIGSEGV if sys.version_info < (3, 12) else 1, id="recursion"),
    ],
)
def test_crashes_that_end_the_process(run: Any, how: str, code: int) -> None:
    done = run(
        f"import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\ncall('demo.crash', how={how!r})"
    )
    assert done.returncode == code, done.stderr


def test_oom_is_a_memory_error_under_a_limit(run: Any) -> None:
    done = run("""
import resource
limit = tasks["demo.crash"].info.memory_limit
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
call("demo.crash", how="oom")
""")
    assert done.stderr.rstrip().endswith(b"MemoryError")


def test_raise_raises(run: Any) -> None:
    assert b"ValueError: this task was asked to raise" in run("call('demo.crash', how='raise')").stderr


def test_close_fds_closes_all_but_three_then_speaks(run: Any) -> None:
    done = run("""
opened = [os.dup(0) for _ in range(20)]
call("demo.crash", how="close_fds")
for fd in opened:
    try:
        os.fstat(fd)
    except OSError:
        continue
    raise AssertionError(f"{fd} is open")
""")
    assert events(done) == [["still_here", {"closed": True}]]


def test_garbage_reaches_pipes_or_sockets_but_no_file(run: Any, tmp_path: Path) -> None:
    done = run(f"""
import socket
reading, writing = os.pipe()
left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
file = open({str(tmp_path / "file")!r}, "w+b")
full = os.pipe()  # writing to it would block for ever
os.set_blocking(full[1], False)
try:
    while True:
        os.write(full[1], b"x" * 4096)
except BlockingIOError:
    os.set_blocking(full[1], True)
call("demo.crash", how="garbage")
assert len(os.read(reading, 4096)) == len(left.recv(4096)) == len(right.recv(4096)) == 512
assert os.fstat(file.fileno()).st_size == 0
""")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == len(done.stderr) == 512


def test_fork_orphan_leaves_a_process_of_its_own_session(run: Any) -> None:
    done = run("""
out = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
os.dup2(null, 1)  # the orphan must not hold the ends that the test reads to their end
os.dup2(null, 2)
os.register_at_fork(after_in_child=lambda: os.close(out))
os.write(out, str(call("demo.crash", how="fork_orphan")).encode())
""")
    orphan = psutil.Process(int(done.stdout))
    try:
        end = time.monotonic() + 10
        while os.getsid(orphan.pid) != orphan.pid and time.monotonic() < end:
            os.sched_yield()
        assert os.getsid(orphan.pid) == orphan.pid
        assert orphan.is_running()
    finally:
        orphan.kill()
        psutil.wait_procs([orphan], timeout=5)


def test_example_task_takes_its_three_steps(run: Any) -> None:
    done = run("""
import asyncio
from django.core.management import call_command
call_command("migrate", verbosity=0)
from demo.models import ExampleTask
row = ExampleTask.objects.create(message="hi", step_seconds=0)
assert ExampleTask().step_seconds == 2.0
result = asyncio.run(row.process())
print(json.dumps(["result", result]))
""")
    (start, *steps, complete, result) = events(done)
    assert start[0] == "start"
    assert set(start[1]) == {"message"}
    assert [type for type, _ in steps] == ["progress"] * 3
    assert [(data["step"], data["total_steps"]) for _, data in steps] == [(1, 3), (2, 3), (3, 3)]
    assert all(set(data) == {"step", "total_steps", "message"} for _, data in steps)
    assert complete == ["complete", {"message": result[1]}]
