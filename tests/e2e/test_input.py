"""Bad input, at every door: what is wrong is named, in one shape, with the right status or exit code."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from starlette.routing import Route

from gateway.app import all_routes
from tests.helpers import ROOT, Tree, migrated_database, raw_get

PROBLEM = "application/problem+json"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
BODY_BYTES = 1024 * 1024

ALREADY_RUNNING, BAD_CONFIGURATION = 3, 2


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """Give the demo project's tree."""
    with Tree(settings=None, runners=2) as tree:
        yield tree


def check_problem(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """Check that a response is a problem document (RFC 9457 with all our members); return it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].partition(";")[0] == PROBLEM, response.text
    document: dict[str, Any] = response.json()
    assert set(document) >= {"type", "title", "status", "detail", "instance"}, document
    assert document["status"] == status
    assert document["type"].startswith("urn:bulkhead:problem:")
    if code is not None:
        assert document["type"] == f"urn:bulkhead:problem:{code}"
    return document


def post(tree: Tree, body: Any) -> httpx.Response:
    return tree.http.post("/api/v1/runs", json=body)


# -- submissions


def test_an_unknown_task_is_404_and_named(tree: Tree) -> None:
    document = check_problem(post(tree, {"task": "demo.nonsense"}), 404, "unknown-task")
    assert "demo.nonsense" in document["detail"]


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({}, "how"),
        ({"how": "nicely"}, "how"),
        ({"how": "segv", "twice": True}, "twice"),
    ],
)
def test_a_wrong_or_missing_argument_is_422_with_its_name(
    tree: Tree, kwargs: dict[str, Any], name: str
) -> None:
    document = check_problem(post(tree, {"task": "demo.crash", "kwargs": kwargs}), 422, "invalid-arguments")
    assert list(document["errors"]) == [name]
    assert document["errors"][name]


@pytest.mark.parametrize(
    ("task", "kwargs", "name"),
    [
        ("demo.count", {"n": "five"}, "n"),
        ("demo.count", {"n": -1}, "n"),
        ("demo.count", {"n": 1.5}, "n"),
        ("demo.count", {"n": None}, "n"),
        ("demo.burn", {"seconds": []}, "seconds"),
        ("demo.flood", {"size": 0}, "size"),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_422_with_its_name(
    tree: Tree, task: str, kwargs: dict[str, Any], name: str
) -> None:
    document = check_problem(post(tree, {"task": task, "kwargs": kwargs}), 422, "invalid-arguments")
    assert list(document["errors"]) == [name]


def test_too_many_arguments_by_position_are_422(tree: Tree) -> None:
    document = check_problem(post(tree, {"task": "demo.count", "args": [1, 2, 3]}), 422)
    assert list(document["errors"]) == ["args"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", 1000),
        ("timeout", -1),
        ("max_attempts", 0),
        ("run_after", "yesterday"),
        ("pool", "nowhere"),
        ("tags", "one"),
        ("metadata", []),
        ("id", "me"),
        ("colour", "red"),
    ],
)
def test_a_wrong_or_unknown_option_is_422_with_its_name(tree: Tree, field: str, value: Any) -> None:
    document = check_problem(post(tree, {"task": "demo.count", field: value}), 422)
    assert list(document["errors"]) == [field]


@pytest.mark.parametrize("body", [b"{", b"nonsense", b"[]", b"null", b'"text"', b'{"task": NaN}', b"\xff{}"])
def test_a_body_that_is_no_json_object_is_400(tree: Tree, body: bytes) -> None:
    response = tree.http.post("/api/v1/runs", content=body, headers={"Content-Type": "application/json"})
    check_problem(response, 400, "bad-json")


def test_an_announced_body_over_the_limit_is_413(tree: Tree) -> None:
    body = {"task": "demo.audit", "kwargs": {"path": "x" * BODY_BYTES}}
    document = check_problem(post(tree, body), 413, "too-large")
    assert document["max_bytes"] == BODY_BYTES


def test_a_streamed_body_over_the_limit_is_413(tree: Tree) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"task": "demo.audit", "kwargs": {"path": "'
        for _ in range(20):
            yield b"x" * (BODY_BYTES // 16)

    response = tree.http.post("/api/v1/runs", content=chunks(), headers={"Content-Type": "application/json"})
    check_problem(response, 413, "too-large")


def test_another_media_type_is_415(tree: Tree) -> None:
    response = tree.http.post("/api/v1/runs", data={"task": "demo.count"})
    check_problem(response, 415, "unsupported-media-type")


def test_bad_input_leaves_no_run_behind(tree: Tree) -> None:
    before = tree.http.get("/api/v1/stats").json()["runs"]
    post(tree, {"task": "demo.nonsense"})
    post(tree, {"task": "demo.crash"})
    assert tree.http.get("/api/v1/stats").json()["runs"] == before


# -- who asks


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "token-missing"),
        ("Bearer nonsense", "token-malformed"),
        ("Basic dXNlcjpwYXNz", "token-malformed"),
        ("Bearer", None),
    ],
)
def test_no_token_or_none_at_all_is_401(tree: Tree, header: str | None, code: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for path in ("/api/v1/runs", "/api/v1/tasks", "/api/v1/runners", "/api/v1/stats"):
        response = httpx.get(tree.url + path, headers=headers, trust_env=False)
        check_problem(response, 401, code)
        assert response.headers["www-authenticate"].startswith("Bearer")


def test_an_expired_token_is_401(tree: Tree) -> None:
    token = tree.token(now=time.time() - 3600, ttl=60)
    response = httpx.get(
        f"{tree.url}/api/v1/runs", headers={"Authorization": f"Bearer {token}"}, trust_env=False
    )
    check_problem(response, 401, "token-expired")
    assert token not in response.text


def test_a_token_signed_with_another_key_is_401(tree: Tree) -> None:
    from taskkit import tokens

    token = tokens.issue(b"k" * 32, actions=["read"], runs="*", ttl=60, subject="mallory")
    response = httpx.get(
        f"{tree.url}/api/v1/runs", headers={"Authorization": f"Bearer {token}"}, trust_env=False
    )
    check_problem(response, 401, "token-signature")


def test_a_token_without_the_action_is_403(tree: Tree) -> None:
    client = tree.client(actions=["read"])
    check_problem(client.post("/api/v1/runs", json={"task": "demo.count"}), 403, "forbidden")


def test_a_foreign_run_is_404_like_one_that_is_not_there(tree: Tree) -> None:
    mine, theirs = (tree.submit("demo.count", n=1, delay=0) for _ in range(2))
    client = tree.client(runs=[mine["id"]], tasks=(), actions=["read", "cancel", "logs"])
    assert client.get(f"/api/v1/runs/{mine['id']}").status_code == 200
    nobody = str(uuid.uuid4())
    for path in ("", "/events", "/result"):
        foreign = check_problem(client.get(f"/api/v1/runs/{theirs['id']}{path}"), 404, "unknown-run")
        absent = check_problem(client.get(f"/api/v1/runs/{nobody}{path}"), 404, "unknown-run")
        assert foreign["detail"] == absent["detail"], "the answer does not tell which"
    check_problem(client.post(f"/api/v1/runs/{theirs['id']}/cancel", json={}), 404, "unknown-run")


def test_the_token_of_a_submission_reaches_its_run_only(tree: Tree) -> None:
    first, second = (tree.submit("demo.count", n=1, delay=0) for _ in range(2))
    headers = {"Authorization": f"Bearer {first['token']}"}
    with httpx.Client(base_url=tree.url, headers=headers, trust_env=False) as client:
        assert client.get(first["urls"]["self"]).status_code == 200
        check_problem(client.get(second["urls"]["self"]), 404)
        check_problem(client.post("/api/v1/runs", json={"task": "demo.count"}), 403)


def test_a_run_id_that_is_none_is_404(tree: Tree) -> None:
    check_problem(tree.http.get("/api/v1/runs/nonsense"), 404, "unknown-run")


# -- streams and lists


@pytest.mark.parametrize("cursor", ["nonsense", "-1", "1.5.2", "1e3", "٣", "9" * 200])
def test_a_bad_cursor_is_400(tree: Tree, cursor: str) -> None:
    run = tree.submit("demo.count", n=1, delay=0)["id"]
    path = f"/api/v1/runs/{run}/events"
    check_problem(tree.http.get(path, params={"after": cursor}), 400, "bad-cursor")
    headers = {"Last-Event-ID": cursor.encode(), "Accept": "text/event-stream"}
    check_problem(tree.http.get(path, headers=cast("Any", headers)), 400, "bad-cursor")


@pytest.mark.parametrize(
    "query",
    [
        "status=DONE",
        "limit=0",
        "limit=many",
        "cursor=nonsense",
        "since=yesterday",
        "nonsense=1",
        "tag=a&tag=b",
    ],
)
def test_a_bad_parameter_of_the_list_is_400(tree: Tree, query: str) -> None:
    document = check_problem(tree.http.get(f"/api/v1/runs?{query}"), 400, "bad-parameter")
    assert document["parameter"] == query.partition("=")[0]


def test_a_rendering_that_there_is_not_is_406(tree: Tree) -> None:
    run = tree.submit("demo.count", n=1, delay=0)["id"]
    response = tree.http.get(f"/api/v1/runs/{run}/events", headers={"Accept": "image/png"})
    check_problem(response, 406, "not-acceptable")


def test_cancelling_what_has_ended_is_409(tree: Tree) -> None:
    run = tree.submit("demo.count", n=1, delay=0)["id"]
    tree.wait(run)
    check_problem(tree.http.post(f"/api/v1/runs/{run}/cancel", json={}), 409, "run-finished")


def test_an_idempotency_key_with_another_body_is_409(tree: Tree) -> None:
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    first = tree.http.post("/api/v1/runs", json={"task": "demo.count", "kwargs": {"n": 1}}, headers=headers)
    again = tree.http.post("/api/v1/runs", json={"kwargs": {"n": 1}, "task": "demo.count"}, headers=headers)
    other = tree.http.post("/api/v1/runs", json={"task": "demo.count", "kwargs": {"n": 2}}, headers=headers)
    assert (first.status_code, again.status_code) == (202, 200)
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["idempotency-replayed"] == "true"
    check_problem(other, 409, "idempotency-conflict")


# -- every route


def routes() -> list[str]:
    """Return the paths that the gateway serves, as it registers them."""
    nobody = cast("Any", None)
    served = all_routes(nobody, nobody, nobody, nobody)
    # The path of a WebSocket has a Route as well, for plain requests.
    return [route.path for route in served if isinstance(route, Route)]


def filled(path: str) -> Iterator[str]:
    """Yield a path with its parameters filled in, with what is not there and with nonsense."""
    fillings = (
        {"id": str(uuid.uuid4()), "name": "no.such", "inbox": "x", "app": "no", "model": "such", "pk": "1"},
        {
            "id": "%00",
            "name": "%F0%28%8C",
            "inbox": "%0A",
            "app": "demo",
            "model": "ExampleTask",
            "pk": "..%2f..",
        },
        {
            "id": "x" * 300,
            "name": "demo.count",
            "inbox": "y" * 300,
            "app": "demo",
            "model": "ExampleTask",
            "pk": "999999",
        },
    )
    for filling in fillings:
        yield path.format(**filling)


UNKNOWN_PATHS = [
    "/nope",
    "/api",
    "/api/v1",
    "/api/v1/",
    "/api/v1/runs/",
    "/api/v2/runs",
    "/health/",
    "//",
    "/%00",
]


@pytest.mark.parametrize("path", [*routes(), *UNKNOWN_PATHS])
def test_only_problems_leave_for_errors(tree: Tree, path: str) -> None:
    seen = set()
    tokens = (None, "nonsense", tree.token())
    bodies = (None, b"{", b'{"task": 1}', b"[]")
    for url in filled(path):
        for method in METHODS:
            for token in tokens:
                for body in bodies if method in ("POST", "PUT", "PATCH", "DELETE") else (None,):
                    seen.add(check_shape(tree, method, url, token, body))
    if path not in ("/health", "/ready", "/tasks.js"):  # public, they have nothing to refuse but methods
        assert seen & {400, 401, 404, 422, 426}
    assert 405 in seen or path in UNKNOWN_PATHS
    assert 500 not in seen


def check_shape(tree: Tree, method: str, path: str, token: str | None, body: bytes | None) -> int:
    """Send one request; check that its answer, if it is an error, is a problem. Return its status."""
    headers = {"Accept": "application/json"} | ({"Content-Type": "application/json"} if body else {})
    with raw_get(tree.url + path, token=token, method=method, body=body, headers=headers) as response:
        said = response.read() if response.status != 204 else b""
    where = f"{method} {path} → {response.status} {said[:200]!r}"
    if response.status < 400:
        return response.status
    assert response.headers["content-type"].partition(";")[0] == PROBLEM, where
    if method == "HEAD":
        assert said == b"", where
        return response.status
    document = json.loads(said)
    assert set(document) >= {"type", "title", "status", "detail", "instance"}, where
    assert document["status"] == response.status, where
    if response.status == 405:
        assert response.headers["allow"], where
    return response.status


def talk(tree: Tree, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send raw bytes; return status, headers, body of the answer."""
    host, _, port = tree.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        sock.sendall(request)
        received = b""
        while part := sock.recv(65536):
            received += part
            head, _, body = received.partition(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
            if body and len(body) >= int(headers.get("content-length", "0")):
                break
    return int(lines[0].split()[1]), headers, body


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"NONSENSE\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nBad Header: 1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", 431),
        (b"POST /api/v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: many\r\n\r\n", 400),
    ],
)
def test_bytes_that_are_no_request_get_a_problem(tree: Tree, request_: bytes, status: int) -> None:
    found, headers, body = talk(tree, request_)
    assert found == status
    assert headers["content-type"].partition(";")[0] == PROBLEM
    assert json.loads(body)["status"] == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:8888", 200),
        ("[::1]", 200),
        ("evil.example", 421),
        ("127.evil.example", 421),
        ("localhost.evil.example:80", 421),
        ("a b", 400),
    ],
)
def test_a_strangers_host_is_refused(tree: Tree, host: str, status: int) -> None:
    request = f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    found, headers, body = talk(tree, request)
    assert found == status
    if status != 200:
        assert headers["content-type"].partition(";")[0] == PROBLEM
        assert set(json.loads(body)) >= {"type", "title", "status", "detail", "instance"}


# -- the command line


def run(
    cwd: Path, *arguments: str, settings: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a supervisor that must refuse to; return how it left. Its database is that of the tests' project."""
    shutil.copyfile(migrated_database(), cwd / "project.sqlite3")
    tree = Tree(cwd, env={"BULKHEAD_TEST_DB": str(cwd / "project.sqlite3"), **environment})
    command = [sys.executable, "-m", "supervisor", "run", "--state-dir", str(cwd / "state")]
    command += ["--settings", settings] if settings else []
    if not {"--bind", "--uds"} & set(arguments) and "TASKKIT_BIND" not in environment:
        command += ["--bind", "127.0.0.1:0"]
    return subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        env=tree.environment(),
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def refusal(cwd: Path, *arguments: str, settings: str | None = None, **environment: str) -> str:
    """Return what a supervisor says that leaves with exit code 2; it must not be a traceback of ours."""
    left = run(cwd, *arguments, settings=settings, **environment)
    assert left.returncode == BAD_CONFIGURATION, (left.returncode, left.stdout, left.stderr)
    assert "supervisor/" not in left.stderr, f"a traceback of ours: {left.stderr}"
    assert left.stderr.strip()
    return left.stderr


def project(folder: Path, name: str, **settings: Any) -> str:
    """Write a settings module on top of the tests' project; return its name."""
    lines = ["from tests.project.settings import *"]
    lines += [f"{key} = {value!r}" for key, value in settings.items()]
    (folder / f"{name}.py").write_text("\n".join(lines) + "\n")
    return name


def test_a_second_supervisor_on_the_same_state_directory_exits_3(tree: Tree) -> None:
    command = tree.command()
    left = subprocess.run(
        command, cwd=ROOT, env=tree.environment(), capture_output=True, text=True, timeout=30, check=False
    )
    assert left.returncode == ALREADY_RUNNING, left.stderr
    assert str(tree.pid) in left.stderr
    assert "Traceback" not in left.stderr
    assert tree.http.get("/health").text == "OK", "the first one did not notice"


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("TASKKIT_BIND", "nonsense", ("BIND", "nonsense")),
        ("TASKKIT_POOLS", '{"default": {"runners": 0}}', ("runners", "0")),
        ("TASKKIT_POOLS", '{"default": {"start": "thread"}}', ("start", "thread")),
        ("TASKKIT_POOLS", "{not json", ("TASKKIT_POOLS", "{not json")),
        ("TASKKIT_LIMITS", '{"body_bytes": -5}', ("LIMITS.body_bytes", "-5")),
        ("TASKKIT_LIMITS", '{"colour": 1}', ("LIMITS", "colour")),
        ("TASKKIT_START_ON_CONNECT", '"maybe"', ("START_ON_CONNECT", "maybe")),
    ],
)
def test_a_bad_setting_in_the_environment_exits_2_with_key_and_value(
    tmp_path: Path, key: str, value: str, named: tuple[str, ...]
) -> None:
    said = refusal(tmp_path, settings="tests.project.settings", **{key: value})
    assert all(name in said for name in named), said


@pytest.mark.parametrize(
    ("taskkit", "named"),
    [
        ({"BINDD": "127.0.0.1:1"}, ("BINDD", "BIND")),
        ({"POOLS": {"default": {"runners": "many"}}}, ("runners", "many")),
        ({"POOLS": {"a-b": {}}}, ("POOLS", "a-b")),
        ({"ALLOWED_HOSTS": "example.org"}, ("ALLOWED_HOSTS", "example.org")),
        ([], ("TASKKIT", "[]")),
    ],
)
def test_a_bad_setting_of_the_project_exits_2_with_key_and_value(
    tmp_path: Path, taskkit: Any, named: tuple[str, ...]
) -> None:
    settings = project(tmp_path, "wrong_settings", TASKKIT=taskkit)
    said = refusal(tmp_path, settings=settings)
    assert all(name in said for name in named), said


def test_a_bad_flag_exits_2_with_its_value(tmp_path: Path) -> None:
    assert "nonsense" in refusal(tmp_path, "--bind", "nonsense")
    assert "--runners" in refusal(tmp_path, "--runners", "0")


def test_a_port_in_use_exits_2_with_the_remedy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        said = refusal(tmp_path, "--bind", address)
    assert address in said
    assert "--bind" in said


def test_an_import_error_in_settings_exits_2_with_the_tracebacks_last_line(tmp_path: Path) -> None:
    (tmp_path / "broken_settings.py").write_text("import nowhere_to_be_found\n")
    left = run(tmp_path, settings="broken_settings")
    assert left.returncode == BAD_CONFIGURATION, left.stderr
    assert "ModuleNotFoundError: No module named 'nowhere_to_be_found'" in left.stderr
    assert "broken_settings.py" in left.stderr, "where"


def test_an_error_in_a_tasks_module_exits_2_and_says_where(tmp_path: Path) -> None:
    app = tmp_path / "brokenapp"
    app.mkdir()
    (app / "__init__.py").touch()
    (app / "tasks.py").write_text("from taskkit import task\n\n1 / 0\n")
    text = "from tests.project.settings import *\nINSTALLED_APPS = [*INSTALLED_APPS, 'brokenapp']\n"
    (tmp_path / "app_settings.py").write_text(text)
    left = run(tmp_path, settings="app_settings")
    assert left.returncode == BAD_CONFIGURATION, left.stderr
    assert "ZeroDivisionError: division by zero" in left.stderr
    assert "brokenapp/tasks.py" in left.stderr


def test_settings_that_are_not_there_exit_2(tmp_path: Path) -> None:
    assert "nowhere.settings" in run(tmp_path, settings="nowhere.settings").stderr
    assert run(tmp_path, settings="nowhere.settings").returncode == BAD_CONFIGURATION


def test_unapplied_migrations_exit_2_and_name_the_command(tmp_path: Path) -> None:
    empty = tmp_path / "empty.sqlite3"
    said = refusal(tmp_path, settings="tests.project.settings", BULKHEAD_TEST_DB=str(empty))
    assert "migrate" in said
    assert "manage.py migrate" in said
    assert "taskkit.0001" in said


def test_listening_beyond_this_machine_needs_allowed_hosts(tmp_path: Path) -> None:
    settings = project(tmp_path, "open_settings", ALLOWED_HOSTS=[])
    said = refusal(tmp_path, "--bind", "0.0.0.0:0", settings=settings)
    assert "ALLOWED_HOSTS" in said
    assert "0.0.0.0:0" in said


def test_a_state_directory_that_cannot_be_exits_2(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    assert "STATE_DIR" in refusal(tmp_path, settings="tests.project.settings")


def test_a_thread_started_at_import_exits_2_with_the_remedy(tmp_path: Path) -> None:
    text = "import threading\nfrom tests.project.settings import *\n"
    text += "threading.Thread(target=threading.Event().wait, name='sleepy', daemon=True).start()\n"
    (tmp_path / "threaded_settings.py").write_text(text)
    said = refusal(tmp_path, settings="threaded_settings")
    assert "sleepy" in said
    assert 'start="spawn"' in said
