"""German, for the sites that speak it: every text that people see, and what is compiled is what is written."""

from __future__ import annotations

import ast
import gettext
import re
from pathlib import Path

import pytest

import taskkit
from tests.unit.taskkit.site import site

FOLDER = Path(taskkit.__file__).parent
CATALOGUE = FOLDER / "locale" / "de" / "LC_MESSAGES" / "django"

_ENTRY = re.compile(r'^msgid (".*")\nmsgstr (".*")$', re.MULTILINE)


def written() -> dict[str, str]:
    """Return the catalogue's texts as they are written."""
    text = CATALOGUE.with_suffix(".po").read_text()
    return {ast.literal_eval(id): ast.literal_eval(said) for id, said in _ENTRY.findall(text) if id != '""'}


def used() -> set[str]:
    """Return the texts that code and templates have translated."""
    found: set[str] = set()
    for path in FOLDER.rglob("*.py"):
        found.update(re.findall(r'\b_\("([^"]+)"\)', path.read_text()))
    for path in FOLDER.rglob("*.html"):
        text = path.read_text()
        found.update(re.findall(r'{% translate "([^"]+)" %}', text))
        blocks = re.findall(r"{% blocktranslate %}(.*?){% endblocktranslate %}", text, re.DOTALL)
        found.update(re.sub(r"{{ (\w+) }}", r"%(\1)s", block) for block in blocks)
    return found


def test_every_text_is_there_and_none_too_many() -> None:
    assert set(written()) == used()


def test_what_is_compiled_is_what_is_written() -> None:
    with CATALOGUE.with_suffix(".mo").open("rb") as file:
        compiled = gettext.GNUTranslations(file)
    assert {id: compiled.gettext(id) for id in written()} == written()


@pytest.mark.usefixtures("django_project")
def test_the_admin_speaks_german() -> None:
    from django.test import override_settings

    from tests.unit.taskkit.test_admin_orders import user

    with site(), override_settings(LANGUAGE_CODE="de", USE_THOUSAND_SEPARATOR=True):
        told = user("view_run", "cancel_run").get("/admin/taskkit/run/").content.decode()
        assert "Ausgewählte Läufe abbrechen" in told
        assert "In der letzten Stunde" in told
