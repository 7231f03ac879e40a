"""Every fenced block of the README, in its order, in a fresh project: what a reader copies has to work.

A block without a language is a drawing. Any other has a line in WAYS: a text that only this block has, and how it is
run.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.edges.listeners import Helper, new_folder
from tests.edges.proxies import free_port
from tests.helpers import ROOT, eventually, raw_get
from tests.processes import opened

README = ROOT / "README.md"

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)

_TITLE = re.compile(r"^#+ (.*)$", re.MULTILINE)

#: The section whose reader begins anew: it is for somebody who has read nothing else.
TUTORIAL = "A progress bar on a page"

#: Lines that its reader writes or types, at most.
TUTORIAL_LINES = 40

#: Seconds for one command; the slowest imports Django three times.
PATIENCE = 60


@dataclass(frozen=True)
class Block:
    """One fenced block, without the indentation of its fence, in the section of this title."""

    line: int
    language: str
    text: str
    section: str = ""

    @property
    def label(self) -> str:
        return f"README.md:{self.line} ({self.language or 'drawing'}) {self.text.strip().splitlines()[0]}"


def blocks() -> list[Block]:
    """Return the README's blocks in their order."""
    text = README.read_text()
    return [
        Block(
            text.count("\n", 0, found.start()) + 1,
            found["language"],
            textwrap.dedent(found["text"]),
            _TITLE.findall(text, 0, found.start())[-1],
        )
        for found in _FENCE.finditer(text)
    ]


@dataclass
class Server:
    """A process that goes on until the end; counts as an open tree."""

    process: subprocess.Popen[bytes]
    log: Path
    state_dir: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        finally:
            opened.remove(self)


@dataclass
class Reader:
    """Somebody who follows the README: a project, a shell's variables, what runs in other terminals.

    What the README leaves to its reader is filled in: the ports, which other programs of this machine may have taken,
    ids, and how long the work of the example takes.
    """

    folder: Path
    chromium: Helper
    app: str = "reports"
    port: int = field(default_factory=free_port)
    site_port: int = field(default_factory=free_port)
    variables: dict[str, str] = field(default_factory=dict)
    servers: list[Server] = field(default_factory=list)

    def __post_init__(self) -> None:
        own = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("TASKKIT_", "DJANGO_", "BULKHEAD_", "PYTEST_"))
        }
        self.variables = own | {
            # Of a virtual environment into which Bulkhead has been installed: it is the one that runs this test.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.folder),
            "XDG_STATE_HOME": str(self.folder),
        }
        self.sh(f"django-admin startproject mysite . && python manage.py startapp {self.app}")

    def filled(self, text: str) -> str:
        """Return a block with what the README leaves to its reader."""
        text = text.replace("8888", str(self.port)).replace("8000", str(self.site_port))
        text = text.replace("time.sleep(0.3)  # your work", "time.sleep(0.02)  # your work")
        return text.replace("time.sleep(0.2)  # your work", "time.sleep(0.05)  # your work")

    def sh(self, script: str) -> str:
        """Run a script as a shell does, and keep what it exports; return its output."""
        dump = self.folder / "variables"
        finished = subprocess.run(
            ["sh", "-e", "-c", f"{self.filled(script)}\nenv -0 > {dump}"],
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert finished.returncode == 0, f"{script}\n{finished.stdout}\n{finished.stderr}\n{self.logs()}"
        self.variables = dict(pair.split("=", 1) for pair in dump.read_text().split("\0") if "=" in pair)
        return finished.stdout

    def serve(self, command: str, url: str) -> None:
        """Run a command in another terminal, until `url` answers."""
        log = self.folder / f"{len(self.servers)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["sh", "-c", f"exec {self.filled(command)}"],
                cwd=self.folder,
                env=self.variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        server = Server(process, log, self.folder)
        opened.append(server)
        self.servers.append(server)

        def answers() -> bool:
            assert process.poll() is None, self.logs()
            with contextlib.suppress(OSError), raw_get(url) as response:
                return response.status < 500
            return False

        eventually(answers, PATIENCE, f"an answer of {url}")

    def write(self, path: str, text: str) -> None:
        """Put a file into the project; a later change must look later to Python's compiled files."""
        (self.folder / path).write_text(self.filled(text))
        shutil.rmtree(self.folder / path.rpartition("/")[0] / "__pycache__", ignore_errors=True)

    def logs(self) -> str:
        return "\n".join(server.log.read_text(errors="replace")[-3000:] for server in self.servers)

    def close(self) -> None:
        for server in reversed(self.servers):
            server.close()


@pytest.fixture(scope="module")
def reader(chromium: Helper) -> Iterator[Reader]:
    """Give the reader, with nothing but an empty project."""
    folder = new_folder()
    made = Reader(folder, chromium)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def newcomer(chromium: Helper) -> Iterator[Reader]:
    """Give somebody who has just been through Django's tutorial."""
    folder = new_folder()
    made = Reader(folder, chromium, "photos")
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


# -- how each block is run ----------------------------------------------------------------------------------


def two_commands(reader: Reader, text: str) -> None:
    """The installation is that of the environment which runs this test: .ci/run makes it by these very words.

    The demo is shown a shorter task; the second command is the one that runs this test.
    """
    first, second = text.splitlines()
    assert first.endswith(".venv/bin/bulkhead demo")
    assert second == ".venv/bin/python -m tests"
    assert importlib.metadata.distribution("django-bulkhead")
    assert "SUCCESSFUL" in reader.sh("bulkhead demo demo.count n=3 delay=0")


def installation(reader: Reader, text: str) -> None:
    """pip's part is what the environment that runs this test has behind it."""
    install, migrate = text.split(" && ")
    assert install == "pip install PATH_OF_THIS_CHECKOUT"
    assert "taskkit" in reader.sh(migrate)


def settings(reader: Reader, text: str) -> None:
    """Add to the project's settings; `...` stands for what the reader has there already."""
    path = reader.folder / "mysite" / "settings.py"
    text = text.replace("[...,", "[*INSTALLED_APPS, 'reports',")
    reader.write("mysite/settings.py", path.read_text() + text)


def cors(reader: Reader, text: str) -> None:
    settings(reader, text)
    reader.sh("bulkhead reload")


def tasks(reader: Reader, text: str) -> None:
    reader.write("reports/tasks.py", text)


def start(reader: Reader, text: str) -> None:
    """The first two lines in one terminal, the first and the third in another."""
    export, run, submit = text.strip().splitlines()
    reader.sh(export)
    reader.serve(run, f"http://127.0.0.1:{reader.port}/ready")
    assert "SUCCESSFUL" in reader.sh(submit)
    assert "reports.build" in reader.sh("bulkhead tasks")


def curl(reader: Reader, text: str) -> None:
    """RUN is the id that the first curl has printed."""
    submit, marker, follow = text.partition("curl -N")
    run = json.loads(reader.sh(submit))["id"]
    told = reader.sh((marker + follow).replace("RUN", run))
    assert told.count("\nevent: month\n") == 12
    assert told.rstrip().splitlines()[-2] == "event: stream.end"


def views(reader: Reader, text: str) -> None:
    """The view, one that serves the page of the next block, Bulkhead's own."""
    reader.write("reports/views.py", text)
    reader.write(
        "mysite/urls.py",
        "from django.http import FileResponse\nfrom django.urls import include, path\n"
        "from reports.views import start_report\n"
        "def page(request):\n    return FileResponse(open('page.html', 'rb'), content_type='text/html')\n"
        "urlpatterns = [path('start_report', start_report), path('page', page),\n"
        "               path('bulkhead/', include('taskkit.urls'))]\n",
    )
    reader.serve(
        f"python manage.py runserver --noreload {reader.site_port}", f"http://127.0.0.1:{reader.site_port}/"
    )


_SAID = """async () => {
    const over = () => window.said.some(what => what.rows && !what.month);
    while (!over()) await new Promise(resolve => setTimeout(resolve, 20));
    return window.said;
}"""


def browser(reader: Reader, text: str) -> None:
    """In Chromium, as part of a page of the site."""
    ears = "<!doctype html><script>window.said = []; console.log = what => window.said.push(what)</script>\n"
    reader.write("page.html", ears + text)
    page = f"http://localhost:{reader.site_port}/page"
    said = reader.chromium.ask(op="run", page=page, script=_SAID)["value"]
    assert [one["month"] for one in said[:-1]] == list(range(1, 13))
    assert said[-1] == {"rows": 7800}


_POST = """
import json
from django.contrib.auth.models import User
from django.test import Client
from taskkit import tokens
import jwt
for staff in (True, False):
    client = Client(headers={"host": "localhost"})
    client.force_login(User.objects.create(username=f"u{staff}", is_staff=staff))
    answer = client.post("/bulkhead/token/").json()
    print(json.dumps(jwt.decode(answer["token"], options={"verify_signature": False})))
"""


def claims(reader: Reader, text: str) -> None:
    """Staff gets what the function says, another user what he would without it."""
    reader.write("reports/tokens.py", text)
    settings(reader, 'TASKKIT["TOKEN_CLAIMS"] = "reports.tokens.claims"\n')
    reader.write("post.py", _POST)
    told = reader.sh("python manage.py shell < post.py").splitlines()
    staff, user = (json.loads(line) for line in told if line.startswith("{"))
    assert (staff["runs"], sorted(staff["actions"])) == ("*", ["cancel", "logs", "read"])
    assert (user["runs"], user["actions"]) == ("own", ["read"])


def program(reader: Reader, text: str) -> None:
    """A program of its own, with the variables of the shell."""
    reader.write("program.py", text)
    told = reader.sh("python program.py").splitlines()
    assert sum(" month " in line for line in told) == 12
    assert told[-1] == "{'rows': 7800}"


def model(reader: Reader, text: str) -> None:
    reader.write("reports/models.py", text)


def migrated(reader: Reader, text: str) -> None:
    assert "report of 2026" in reader.sh(text)


def own_tasks(reader: Reader, text: str) -> None:
    """Settings with that line: checked, and what they lead to."""
    backport = [] if importlib.util.find_spec("django.tasks") else ["django_tasks"]
    package = "django_tasks" if backport else "django.tasks"
    reader.write("own.py", f"from mysite.settings import *\nINSTALLED_APPS += {backport!r}\n{text}")
    reader.write(
        "enqueue.py",
        "import django; django.setup()\n"
        "from taskkit.backend import BulkheadBackend\n"
        f"from {package} import task_backends\n"
        "assert isinstance(task_backends['default'], BulkheadBackend)\n"
        "assert task_backends['default'].queues == {'default', 'mail'}\n",
    )
    told = reader.sh("DJANGO_SETTINGS_MODULE=own python manage.py check 2>&1 --settings own")
    assert "'mail' has no pool of that name" in told
    reader.sh("DJANGO_SETTINGS_MODULE=own python enqueue.py")


def own_tests(reader: Reader, text: str) -> None:
    reader.write("reports/tests.py", text)
    assert "Ran 2 tests" in reader.sh("python manage.py test reports 2>&1")


def by_the_clock(reader: Reader, text: str) -> None:
    """An app of its own, with settings of its own: what the code declares, as a tree would find it."""
    (reader.folder / "accounts").mkdir()
    reader.write("accounts/__init__.py", "")
    reader.write("accounts/tasks.py", text)
    reader.write(
        "clock.py", "from mysite.settings import *\nINSTALLED_APPS = [*INSTALLED_APPS, 'accounts']\n"
    )
    reader.write(
        "declared.py",
        "import django; django.setup()\nfrom taskkit import registry, schedules\n"
        "print(*schedules.declared(registry.known()))\n",
    )
    assert "no issues" in reader.sh("python manage.py check --settings clock 2>&1")
    told = reader.sh("DJANGO_SETTINGS_MODULE=clock python declared.py")
    assert "'accounts.close_books'" in told
    assert "'accounts.look_for_mail'" in told


def families(reader: Reader, text: str) -> None:
    """An app of its own, with a pool, a database, a tree of its own."""
    (reader.folder / "albums").mkdir()
    reader.write("albums/__init__.py", "")
    reader.write("albums/tasks.py", text)
    reader.write(
        "printer.py",
        "from mysite.settings import *\nINSTALLED_APPS = [*INSTALLED_APPS, 'albums']\n"
        "TASKKIT = TASKKIT | {'POOLS': {'books': {'runners': 1}}}\n"
        "DATABASES = {'default': {**DATABASES['default'], 'NAME': BASE_DIR / 'albums.sqlite3'}}\n",
    )
    reader.sh("python manage.py migrate --settings printer")
    reader.write(
        "printing.py",
        "import django; django.setup()\nfrom taskkit.testing import live_tree, wait_for_run\n"
        "from albums.tasks import album, print_album\nfrom taskkit import submit\n"
        "with live_tree():\n    print(wait_for_run(submit(album, [3])).result)\n"
        "    print(wait_for_run(print_album()).result)\n",
    )
    told = reader.sh("DJANGO_SETTINGS_MODULE=printer python printing.py")
    assert told.split("\n")[-3:-1] == ["600", "[100, 200]"]


def schedules_of_django(reader: Reader, text: str) -> None:
    """In a process of the project's, whose tree is there."""
    reader.write("monthly.py", f"import django; django.setup()\n{text}print(row.id)\n")
    id = reader.sh("DJANGO_SETTINGS_MODULE=mysite.settings python monthly.py").strip()
    found = json.loads(reader.sh("bulkhead schedules --json"))["schedules"]
    assert [(one["name"], one["cron"], one["enabled"]) for one in found if one["id"] == id] == [
        ("monthly", "0 6 1 * *", False)
    ]


def tutorial_settings(reader: Reader, text: str) -> None:
    """Add to the project's; the tree's own port is the only thing that its reader need not think of."""
    path = reader.folder / "mysite" / "settings.py"
    reader.write("mysite/settings.py", path.read_text() + text + 'TASKKIT["BIND"] = "127.0.0.1:8888"\n')


def tutorial_file(reader: Reader, text: str) -> None:
    """Write the file that the block's first line names."""
    found = re.search(r"(mysite|photos)/[\w/]+\.\w+", text.splitlines()[0])
    assert found
    (reader.folder / found[0]).parent.mkdir(exist_ok=True)
    reader.write(found[0], text)


_PRESS = """async () => {
    const form = document.querySelector("form");
    return (await fetch("/", { method: "POST", body: new FormData(form) })).url;
}"""

_WATCH = """async () => {
    const part = name => document.querySelector(`[data-part=${name}]`).textContent;
    const bar = document.querySelector("progress");
    const said = [];
    for (const end = Date.now() + 30_000; !part("result") && Date.now() < end; ) {
        await new Promise(resolve => setTimeout(resolve, 20));
        if (said.at(-1) !== bar.position) said.push(bar.position);
    }
    return { said, result: part("result"), message: part("message") };
}"""


def tutorial_go(reader: Reader, text: str) -> None:
    """As three terminals' worth of commands, then press the button in Chromium."""
    install, migrate, start, serve = text.strip().splitlines()
    assert install == "pip install PATH_OF_THIS_CHECKOUT"
    assert "taskkit" in reader.sh(migrate)
    reader.sh(start)
    try:
        press(reader, serve)
    finally:
        reader.sh("bulkhead stop --settings mysite.settings")


def press(reader: Reader, serve: str) -> None:
    """Serve the site, press the button, look on."""
    url = f"http://127.0.0.1:{reader.site_port}/"
    reader.serve(f"{serve} --noreload {reader.site_port}", url)
    page = reader.chromium.ask(op="run", page=url, script=_PRESS)["value"]
    seen = reader.chromium.ask(op="run", page=page, script=_WATCH)["value"]
    assert seen["result"] == "50 photos resized"
    assert seen["message"] == "50 / 50 · photo 50"
    moved = [position for position in seen["said"] if position >= 0]
    assert len(moved) > 3, "it moves"
    assert moved == sorted(moved)
    assert moved[-1] == 1


WAYS: dict[str, Callable[[Reader, str], None]] = {
    "bulkhead demo": two_commands,
    '"BIND": "127.0.0.1:8888"': settings,
    "PATH_OF_THIS_CHECKOUT && python": installation,
    "# reports/tasks.py": tasks,
    "bulkhead run\n": start,
    "curl -N": curl,
    'TASKKIT["CORS_ORIGINS"]': cors,
    "# reports/views.py": views,
    '<script type="module">': browser,
    "# reports/tokens.py": claims,
    "client = get_client(": program,
    "# reports/models.py": model,
    "makemigrations reports": migrated,
    "taskkit.backend.BulkheadBackend": own_tasks,
    "# reports/tests.py": own_tests,
    "# accounts/tasks.py": by_the_clock,
    "schedules.create(": schedules_of_django,
    "# albums/tasks.py": families,
    "# mysite/settings.py": tutorial_settings,
    "# mysite/urls.py": tutorial_file,
    "# photos/tasks.py": tutorial_file,
    "# photos/views.py": tutorial_file,
    "photos/templates/": tutorial_file,
    "bulkhead start --settings": tutorial_go,
}


def way(block: Block) -> Callable[[Reader, str], None]:
    """Return how a block is run."""
    found = [name for name in WAYS if name in block.text]
    assert len(found) == 1, (
        f"{block.label}: nobody knows how to run this block ({found}). Give it a line in WAYS of "
        "tests/edges/test_readme.py: a text that only this block has, and a function that runs it in the reader's "
        "project and looks at what came of it; or write it as a drawing, a fence without a language."
    )
    return WAYS[found[0]]


def test_every_way_is_of_one_block() -> None:
    used = [way(block) for block in blocks() if block.language]
    assert sorted(used, key=id) == sorted(WAYS.values(), key=id), "a block has gone, or is there twice"


def test_the_tutorial_is_short() -> None:
    lines = [line for block in blocks() if block.section == TUTORIAL for line in block.text.splitlines()]
    assert 0 < len([line for line in lines if line.strip()]) <= TUTORIAL_LINES


def test_a_block_that_nobody_can_run_says_what_to_do() -> None:
    with pytest.raises(AssertionError, match=r"README\.md:7 \(sh\) rm -r x: nobody knows .* WAYS"):
        way(Block(7, "sh", "rm -r x\n"))


@pytest.mark.parametrize(
    "block", [one for one in blocks() if one.language], ids=lambda one: f"line {one.line}"
)
def test_it_runs_as_it_is_written(block: Block, reader: Reader, newcomer: Reader) -> None:
    way(block)(newcomer if block.section == TUTORIAL else reader, block.text)
