"""The tests' project as a site within this process: what `tests.site.settings` adds, on the test's database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: What a site has beyond the tests' project.
_NAMES = ("INSTALLED_APPS", "MIDDLEWARE", "ROOT_URLCONF", "STATIC_URL", "TEMPLATES", "PASSWORD_HASHERS")


#: The database with the site's tables and nothing in them, once some test has begun. Migrating takes 0.25 s.
_tables: list[bytes] = []


@contextmanager
def site(**taskkit: Any) -> Iterator[None]:
    """Let this process be the site, with `taskkit` over its TASKKIT; the database is empty then."""
    from django.test import override_settings

    from tests.site import settings

    own = {name: getattr(settings, name) for name in _NAMES}
    with override_settings(**own, TASKKIT={**settings.TASKKIT, **taskkit}):
        _migrate()
        yield


def _migrate() -> None:
    from django.core.management import call_command
    from django.db import connections

    database = Path(connections.settings["default"]["NAME"])
    if not _tables:
        call_command("migrate", verbosity=0)
        connections.close_all()
        _tables.append(database.read_bytes())
    connections.close_all()
    database.write_bytes(_tables[0])
