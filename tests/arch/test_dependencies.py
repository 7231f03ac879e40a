"""Every dependency is used, with a reason beside it."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.arch import imports
from tests.helpers import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(PYPROJECT)["project"]

#: Import names where they differ from the distribution's.
IMPORT_NAMES = {"Django": "django", "PyJWT": "jwt"}
CARD = ("Django", "anyio", "trio", "hypercorn", "msgpack", "httpx")


def distribution(requirement: str) -> str:
    """Return the name in a requirement."""
    match = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert match, requirement
    return match[0]


DEPENDENCIES = {distribution(line): line for line in PROJECT["dependencies"]}
TEST_DEPENDENCIES = {distribution(line): line for line in PROJECT["optional-dependencies"]["test"]}


def test_the_packages_of_the_card_are_dependencies() -> None:
    assert set(CARD) <= set(DEPENDENCIES)


@pytest.mark.parametrize("name", DEPENDENCIES)
def test_every_dependency_is_imported_by_product_code(name: str) -> None:
    wanted = (IMPORT_NAMES.get(name, name),)
    users = [
        f"{path.relative_to(ROOT)}:{line}"
        for module, path in imports.modules(ROOT).items()
        for line, imported in imports.imports(module, path)
        if imports.below(imported, wanted)
    ]
    assert users, f"{name} is a dependency that nothing imports"


@pytest.mark.parametrize("requirement", [*DEPENDENCIES.values(), *TEST_DEPENDENCIES.values()])
def test_every_requirement_has_a_floor_and_a_reason(requirement: str) -> None:
    lines = [
        line for line in PYPROJECT.splitlines() if f'"{requirement}"' in line and line.startswith("    ")
    ]
    assert ">=" in requirement
    assert lines
    for line in lines:
        assert re.search(r'",\s+# \S.{10,}', line), f"say why: {line.strip()}"


def test_hypercorn_is_pinned_below_the_next_minor() -> None:
    """Our serve() leans on internals of 0.18 (DESIGN §5)."""
    assert "<0.19" in DEPENDENCIES["hypercorn"]


def test_python_and_django_are_what_the_contract_says() -> None:
    assert PROJECT["requires-python"] == ">=3.11"
    assert DEPENDENCIES["Django"] == "Django>=5.2,<6.2"
