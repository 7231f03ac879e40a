"""Where files lie, with a caption for each room."""

from __future__ import annotations

import ast
import fnmatch
from pathlib import Path

import pytest

from tests.arch import imports
from tests.helpers import ROOT

TOP_LEVEL = {
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"),
    *("supervisor", "gateway", "taskkit", "deploy", "tests"),
}

#: Lines beyond which a module is asked which room is hiding in it: in review, so it is only listed.
LONG = 400

ROOMS = {name: path for name, path in imports.modules(ROOT).items() if ".migrations" not in name}


def test_the_top_level_is_exactly_the_agreed_one() -> None:
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split() if line]
    found = {
        path.name
        for path in ROOT.iterdir()
        if not path.name.startswith(".") and not any(fnmatch.fnmatch(path.name, line) for line in ignored)
    }
    assert found == TOP_LEVEL


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_begins_with_its_caption(room: str) -> None:
    caption = (ast.get_docstring(ast.parse(ROOMS[room].read_text())) or "").split("\n")[0]
    assert caption, "say in one line what this room is"
    assert len(caption) <= 110
    assert caption[-1] in ".:", "a caption is a sentence"
    assert " and " not in caption, "a caption that needs `and` is two rooms"


def test_every_folder_of_tests_is_a_package() -> None:
    """Two test files of one name in different folders would otherwise clash."""
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_long_files_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    files: list[Path] = [*ROOMS.values(), *(ROOT / "tests").rglob("*.py")]
    sizes = {path: len(path.read_text().splitlines()) for path in files}
    long = sorted((size, path) for path, size in sizes.items() if size > LONG)
    with capsys.disabled():
        for size, path in long:
            print(f"\n  {path.relative_to(ROOT)}: {size} lines; which room is hiding in it?", end="")
    assert sizes
