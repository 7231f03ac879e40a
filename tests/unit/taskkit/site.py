"""The tests' project as a site within this process: what `tests.site.settings` adds, on the test's database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: What a site has beyond the tests' project.
_NAMES = ("INSTALLED_APPS", "MIDDLEWARE", "ROOT_URLCONF", "STATIC_URL", "TEMPLATES", "PASSWORD_HASHERS")


@contextmanager
def site(**taskkit: Any) -> Iterator[None]:
    """Let this process be the site, with `taskkit` over its TASKKIT."""
    from django.core.management import call_command
    from django.test import override_settings

    from tests.site import settings

    own = {name: getattr(settings, name) for name in _NAMES}
    with override_settings(**own, TASKKIT={**settings.TASKKIT, **taskkit}):
        call_command("migrate", verbosity=0)
        yield
