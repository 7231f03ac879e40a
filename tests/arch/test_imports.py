"""The import graph is the isolation proof."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.arch import imports
from tests.helpers import ROOT


def test_the_source_imports_only_what_its_room_may() -> None:
    assert imports.read_source(ROOT) == []


@pytest.mark.parametrize("kind", imports.PROCESSES)
def test_a_fresh_process_has_only_what_it_may(kind: str) -> None:
    assert imports.watch(ROOT, kind) == []


def test_every_room_of_the_rules_exists() -> None:
    """A rule about a renamed room would prove nothing."""
    named = {room for rule in imports.RULES for room in (*rule.rooms, *(rule.only_ours or ()))}
    assert named - set(imports.modules(ROOT)) == set()


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Give a copy of the three packages that may be broken."""
    for package in imports.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def append(path: Path, line: str) -> int:
    """Add lines to a file; return the number of the last."""
    text = path.read_text() + line + "\n"
    path.write_text(text)
    return len(text.splitlines())


def added(scratch: Path) -> list[str]:
    """Return what is wrong in the broken copy, and right in the original."""
    before = set(imports.read_source(ROOT))
    return [complaint for complaint in imports.read_source(scratch) if complaint not in before]


def test_django_in_the_gateway_is_caught(scratch: Path) -> None:
    line = append(scratch / "gateway" / "app.py", "import django")
    assert added(scratch) == [f"gateway/app.py:{line}: gateway must not import django"]
    assert any(each.endswith(" brings django") for each in imports.watch(scratch, "gateway"))


def test_the_supervisor_in_the_gateway_is_caught(scratch: Path) -> None:
    line = append(scratch / "gateway" / "app.py", "from supervisor.policy import __doc__ as policy")
    found = added(scratch)
    assert found
    where = f"gateway/app.py:{line}: gateway must not import supervisor.policy"
    assert all(each.startswith(where) for each in found)
    assert any(each.endswith(" brings supervisor.policy") for each in imports.watch(scratch, "gateway"))


@pytest.mark.parametrize(
    ("file", "line", "imported"),
    [
        ("gateway/app.py", "def late() -> None:\n    import django.conf", "django.conf"),
        ("gateway/app.py", "from taskkit import models", "taskkit.models"),
        ("gateway/app.py", "from taskkit import StreamTask", "taskkit.StreamTask"),
        ("gateway/app.py", "__import__('demo.tasks')", "demo.tasks"),
        ("gateway/store/rows.py", "from ...supervisor import policy", "supervisor.policy"),
        ("supervisor/policy.py", "import trio", "trio"),
        ("supervisor/policy.py", "from supervisor import child", "supervisor.child"),
        ("taskkit/wire/codec.py", "import socket", "socket"),
        ("taskkit/linux.py", "import importlib\nimportlib.import_module('gateway.app')", "gateway.app"),
    ],
)
def test_other_violations_are_caught_at_their_line(
    scratch: Path, file: str, line: str, imported: str
) -> None:
    number = append(scratch / file, line)
    found = added(scratch)
    assert found
    assert all(complaint.startswith(f"{file}:{number}: ") for complaint in found)
    assert all(complaint.endswith(f" must not import {imported}") for complaint in found)


def test_imports_for_type_checkers_do_not_count(scratch: Path) -> None:
    append(
        scratch / "gateway" / "app.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import django",
    )
    assert added(scratch) == []
