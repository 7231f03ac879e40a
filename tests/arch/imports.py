"""The import rules as data, with two checkers: one reads the source, one watches a fresh interpreter.

DESIGN §1: only a process that imports your code can be hurt by it. The source checker names file:line of the
import; the interpreter finds what comes along through others.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import ROOT

PACKAGES = ("supervisor", "gateway", "taskkit")

#: Rooms of taskkit that know neither Django nor user code: what supervisor and gateway may import of it.
SHARED = (
    "taskkit.wire",
    "taskkit.lifecycle",
    "taskkit.errors",
    "taskkit.identifiers",
    "taskkit.settings",
    "taskkit.linux",
    "taskkit.failpoints",
    "taskkit.seqpacket",
    "taskkit.channel",
    "taskkit.claims",
    "taskkit.timetable",
    "taskkit.rates",
    "taskkit.tokens",
    "taskkit.background",
)

#: What the client adds to them, for the command line and for any program of a user's.
CLIENT = (
    *("taskkit.client", "taskkit.calls", "taskkit.connections", "taskkit.credentials"),
    "taskkit.schedule_client",
    *("taskkit.following", "taskkit.current"),
)

#: Rooms that need an app of Django's which not every project has; the tree does not import them by itself.
NOT_WATCHED = ("taskkit.admin",)

#: Rooms without I/O: bytes and numbers in, bytes and decisions out.
PURE = (
    "taskkit.wire",
    "taskkit.lifecycle",
    "taskkit.errors",
    "taskkit.identifiers",
    "taskkit.settings",
    "taskkit.claims",
    "taskkit.timetable",
    "taskkit.rates",
    "taskkit.background",
    "gateway.sse",
    "gateway.dialects",
    "gateway.handshake",
    "gateway.selection",
    "gateway.submission",
    "gateway.timing",
    "gateway.fields",
    "gateway.documents",
    "gateway.tally",
    "gateway.families",
    "gateway.arguments",
    "gateway.output",
    "gateway.book",
    "gateway.breaker",
    "gateway.pace",
    "gateway.untold",
    "gateway.casualties",
    "gateway.ordering",
    "gateway.plan",
    "gateway.endings",
    "gateway.state",
    "gateway.snapshot",
    "gateway.dispatch",
    "gateway.store.rows",
    "gateway.store.removal",
    "gateway.ages",
    "gateway.grants",
    "gateway.expiry",
    "gateway.inputs",
    "gateway.throttle",
    "gateway.flows",
    "gateway.failures",
    "supervisor.policy",
    "supervisor.causes",
    "supervisor.deadlines",
    "supervisor.pool",
    "supervisor.config",
)

USER_CODE = ("bulkhead_demo", "demo", "tests")
IO = (
    "trio anyio asyncio socket select selectors ssl http urllib.request subprocess multiprocessing threading "
    "concurrent sqlite3 fcntl tempfile shutil ctypes httpx starlette hypercorn django psutil taskkit.linux "
    "taskkit.seqpacket"
).split()


@dataclass(frozen=True)
class Rule:
    """What the modules below `rooms` may not import.

    Attributes:
      only_ours: of the three packages, nothing but these (and what lies below them); None: no such limit.
      but_not: rooms below `rooms` that another rule covers.
    """

    name: str
    rooms: tuple[str, ...]
    forbidden: tuple[str, ...]
    only_ours: tuple[str, ...] | None = None
    but_not: tuple[str, ...] = ()

    def covers(self, module: str) -> bool:
        """Whether the rule is about `module`."""
        return below(module, self.rooms) and not below(module, self.but_not)

    def complaint(self, imported: str) -> str | None:
        """Return why `imported` is not allowed here, or None."""
        if below(imported, self.forbidden):
            return f"{self.name} must not import {imported}"
        ours = imported.split(".")[0] in PACKAGES and imported not in PACKAGES
        if self.only_ours is not None and ours and not below(imported, self.only_ours):
            return f"{self.name} must not import {imported}"
        return None


#: The table of DESIGN §1.
RULES = (
    Rule(
        "supervisor",
        ("supervisor",),
        ("django", "django_tasks", "gateway", "starlette", "hypercorn", "sqlite3", *USER_CODE),
        only_ours=("supervisor", *SHARED),
        but_not=("supervisor.cli", "supervisor.__main__"),
    ),
    Rule(
        "the command line",
        ("supervisor.cli", "supervisor.__main__"),
        ("django", "django_tasks", "gateway", "starlette", "hypercorn", *USER_CODE),
        only_ours=("supervisor", *CLIENT, *SHARED),
    ),
    Rule(
        "gateway",
        ("gateway",),
        ("django", "django_tasks", "supervisor", "typer", "rich", *USER_CODE),
        only_ours=("gateway", *SHARED),
    ),
    Rule(
        "a shared room",
        (*SHARED, *CLIENT),
        ("django", "django_tasks", "supervisor", "gateway", "starlette", "hypercorn", *USER_CODE),
        only_ours=(*SHARED, *CLIENT),
    ),
    Rule(
        "taskkit",
        ("taskkit",),
        ("supervisor", "gateway", "starlette", "hypercorn", *USER_CODE),
        but_not=("taskkit.management",),
    ),
    Rule("a pure room", PURE, tuple(IO), only_ours=PURE),
)

#: What must not be in sys.modules after a process of this kind has imported all of its rooms. Pure rooms are
#: absent: a package they parse with may import sockets for itself; what they import themselves is read above.
PROCESSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "supervisor": (("supervisor",), ("django", "gateway", "starlette", "hypercorn", *USER_CODE)),
    "gateway": (("gateway",), ("django", "supervisor", "typer", *USER_CODE)),
    "shared rooms": (
        (*SHARED, *CLIENT),
        ("django", "supervisor", "gateway", "starlette", "hypercorn", *USER_CODE),
    ),
    "pure rooms": (PURE, ("django", "trio", "anyio", "starlette", "hypercorn", "httpx", "sqlite3")),
    "zygote, courier, runner": (
        ("taskkit",),
        ("supervisor", "gateway", "starlette", "hypercorn"),
    ),
}


def below(module: str, roots: tuple[str, ...]) -> bool:
    """Whether `module` is one of `roots` or lies in one."""
    return any(module == root or module.startswith(root + ".") for root in roots)


def modules(root: Path) -> dict[str, Path]:
    """Return the files of the three packages below `root` by module name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but those that run for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield other
                yield from _nodes(other)
            continue
        yield child
        yield from _nodes(child)


def _base(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """Return the absolute name of the package that `from … import` looks in."""
    if not node.level:
        return node.module or ""
    package = module.split(".") if is_package else module.split(".")[:-1]
    parts = package[: len(package) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def imports(module: str, path: Path) -> tuple[tuple[int, str], ...]:
    """Return (line, imported name) of a file: at any depth, also by `import_module` with a literal name."""
    return _imports(module, path.name == "__init__.py", path.read_text())


@functools.cache  # a second for all files, and each test asks for all of them
def _imports(module: str, is_package: bool, text: str) -> tuple[tuple[int, str], ...]:
    return tuple(_found(module, is_package, ast.parse(text, module)))


def _found(module: str, is_package: bool, tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in _nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, module, is_package)
            # `from taskkit import linux` imports taskkit.linux; `from trio import Event` is below trio.
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def read_source(root: Path, rules: tuple[Rule, ...] = RULES) -> list[str]:
    """Return `file:line: complaint` for every forbidden import in the source below `root`."""
    found = []
    for module, path in modules(root).items():
        for line, imported in imports(module, path):
            for rule in rules:
                complaint = rule.covers(module) and rule.complaint(imported)
                if complaint:
                    found.append(f"{path.relative_to(root)}:{line}: {complaint}")
    return found


_PROGRAM = """
import importlib, json, os, sys
order = json.load(sys.stdin)
if order["django"]:
    import django
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.project.settings"
    django.setup()
found = {}
for name in order["modules"]:
    before = set(sys.modules)
    importlib.import_module(name)
    for new in set(sys.modules) - before:
        found[new] = name
json.dump(found, sys.stdout)
"""


def watch(root: Path, kind: str) -> list[str]:
    """Import all rooms of one kind of process in a fresh interpreter; return what should not have come."""
    rooms, forbidden = PROCESSES[kind]
    wants_django = "django" not in forbidden
    names = [module for module in modules(root) if below(module, rooms) and not below(module, NOT_WATCHED)]
    finished = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps({"modules": names, "django": wants_django}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(ROOT)])},
    )
    assert finished.returncode == 0, finished.stderr
    came: dict[str, str] = json.loads(finished.stdout)
    return [
        f"{kind}: importing {by} brings {name}" for name, by in sorted(came.items()) if below(name, forbidden)
    ]
