"""The tests' own tools: whoever measures needs a ruler that is right."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests import __main__ as command
from tests.helpers import (
    ROOT,
    SseDecoder,
    collect,
    descendants,
    eventually,
    is_alive,
    processes_of,
    raw_get,
    wait_until_gone,
)

STREAM = (
    "\ufeff: hello\r\nretry: 1500\r\n\r\n"
    'id: 1\nevent: progress\ndata: {"step": 1}\n\n'
    "data: a\rdata:b\rdata\r\r"
    "id: 2\r\nevent: ünï\r\ndata:  spaced\r\n\r\n"
    "event: nothing\n\n"
    "id: bad\0id\nunknown: x\ndata: kept\n\n"
    "id: 3\ndata: unfinished\n"
).encode()

EXPECTED = [
    ("1", "progress", '{"step": 1}'),
    ("1", "message", "a\nb\n"),
    ("2", "ünï", " spaced"),
    ("2", "message", "kept"),
]


def test_the_stream_reader_reads_every_cut_alike() -> None:
    for cut in range(len(STREAM) + 1):
        decoder = SseDecoder()
        events = decoder.receive(STREAM[:cut]) + decoder.receive(STREAM[cut:])
        assert [(event.id, event.type, event.data) for event in events] == EXPECTED, cut
        assert decoder.comments == ["hello"]
        assert decoder.retries == [1500]


class Handler(http.server.BaseHTTPRequestHandler):
    """Three events, the connection broken after each."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        after = int(self.headers.get("Last-Event-ID", "0"))
        number = after + 1
        kind = "stream.end" if number == 3 else "x"
        body = f"id: {number}\nevent: {kind}\ndata: {{}}\n\n".encode()
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(body), body))
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    """Give the address of a server that breaks every stream."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/x"
        server.shutdown()
        thread.join()


def test_collect_reconnects_by_id_until_the_end(url: str) -> None:
    assert [(event.id, event.type) for event in collect(url, "token")] == [
        ("1", "x"),
        ("2", "x"),
        ("3", "stream.end"),
    ]


def test_raw_get_measures_the_headers(url: str) -> None:
    with raw_get(url) as response:
        assert response.status == 200
        assert response.headers["transfer-encoding"] == "chunked"
        assert 0 < response.seconds_to_headers < 5
        assert next(response.events()).id == "1"


def test_eventually_is_bounded_and_says_what_it_waited_for() -> None:
    assert eventually(lambda: 7) == 7
    with pytest.raises(AssertionError, match="the moon"):
        eventually(lambda: None, 0.05, "the moon")


def test_processes_of_finds_them_by_environment_and_below(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'], env={})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, env=os.environ | {"SOME_PATH": str(tmp_path)}
    )
    eventually(lambda: descendants(psutil.Process(process.pid)), 10, "a grandchild")
    found = processes_of(tmp_path)
    assert {process.pid} < {each.pid for each in found}
    for each in found:
        each.kill()
    assert wait_until_gone(found, 5) == []
    assert not any(is_alive(each) for each in found)
    process.communicate()


SKIPS = {
    "skip": "def test(): pytest.skip('no')",
    "mark": "@pytest.mark.skip\ndef test(): pass",
    "xfail": "@pytest.mark.xfail\ndef test(): assert False",
    "module": "pytest.importorskip('no_such_module')\ndef test(): pass",
}


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """Give what pytest says of tests that skip themselves; each stands alone in a file."""
    folder = tmp_path_factory.mktemp("skips")
    for name, body in SKIPS.items():
        (folder / f"test_{name}.py").write_text(f"import pytest\n{body}\n")
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "tests.conftest", "--rootdir", str(folder), str(folder)),
            "--continue-on-collection-errors",
        ],
        cwd=ROOT,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", SKIPS)
def test_a_skipped_test_fails_the_run(skipping: subprocess.CompletedProcess[str], name: str) -> None:
    assert skipping.returncode != 0
    told = [line for line in skipping.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert len(told) == len(SKIPS), skipping.stdout
    assert sum(f"test_{name}.py" in line for line in told) == 1, told
    assert skipping.stdout.count("this one was skipped") >= len(SKIPS)
    assert "passed" not in skipping.stdout
    assert "skipped in" not in skipping.stdout


def test_apt_txt_is_read() -> None:
    packages = {package.name: package for package in command.read_packages(command.APT_FILE.read_text())}
    assert packages["procps"].command == "ps"
    assert {package.group for package in packages.values()} <= {None, *command.GROUPS}
    with pytest.raises(ValueError, match=r"apt\.txt:2"):
        command.read_packages("# fine\nno reason\n")


def test_a_package_may_be_provided_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "installed\tnodejs, nodejs-dev, npm (= 10)\nconfig-files\tcaddy, httpd\n"
    monkeypatch.setattr("shutil.which", lambda command: f"/usr/bin/{command}")
    monkeypatch.setattr(
        "subprocess.run", lambda command, **_: subprocess.CompletedProcess(command, 0, stdout=shown)
    )
    command.installed_packages.cache_clear()
    try:
        packages = [command.Package(name, None, name) for name in ("nodejs", "npm", "caddy", "httpd")]
        assert [command.is_installed(package) for package in packages] == [True, True, False, False]
    finally:
        command.installed_packages.cache_clear()


def test_a_missing_package_ends_the_command_before_any_test(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "is_installed", lambda package: package.name != "curl")
    monkeypatch.setattr(command, "install", lambda names: pytest.fail(f"{names} would be installed"))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(command, "run_groups", lambda *_: pytest.fail("a check ran"))
    assert command.main([]) == 2
    assert "apt-get install --yes --no-install-recommends curl\n" in capsys.readouterr().err


def test_a_group_left_out_is_said_and_needs_no_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "is_installed", lambda package: package.group not in ("e2e", "unit"))
    monkeypatch.setattr(command, "install", lambda names: pytest.fail(f"{names} would be installed"))
    ran: list[tuple[str, list[str]]] = []

    class Ran:
        """A lot that has passed but for one group."""

        passed, late, seconds = 3, ("late one",), 1.0

        def __init__(
            self, group: str, arguments: list[str], paths: object = None, *, beside: bool = False
        ) -> None:
            self.group, self.arguments = group, arguments
            self.failed = int(group == "arch")

        def start(self) -> None:
            ran.append((self.group, self.arguments))

        def has_ended(self) -> bool:
            return True

        def is_gone_within(self, seconds: float) -> bool:
            return True

        def finish(self) -> None: ...
        def repeat(self) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(command, "Lot", Ran)
    monkeypatch.setattr(command, "compile_sources", lambda: None)
    left_out = [
        "--without",
        "e2e",
        "--without=lint",
        "--without=moments",
        "--without=alone",
        "--without=edges",
        "--without=unit",
    ]
    assert command.main([*left_out, "--", "-k", "x"]) == 1
    assert ran == [(group, ["-k", "x"]) for group in ("bench-smoke", "arch", "guards", "chaos")]
    told = capsys.readouterr().out
    assert "e2e          NOT RUN" in told
    assert "lint         NOT RUN" in told
    assert "12 passed, 1 failed" in told
    assert "passed the second time only: late one" in told
