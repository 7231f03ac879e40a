"""System checks: wrong settings, task models that cannot run, clashing names.

`manage.py check` reports what would stop the tree from starting, with the key to change.

taskkit.E001  a setting is wrong
taskkit.E002  a StreamTask has no process()
taskkit.E003  the tasks cannot be collected: two of one name, or options that are wrong
taskkit.E004  TOKEN_CLAIMS names nothing that can be called
taskkit.E005  OPTIONS of the backend of TASKS have an unknown key (taskkit.backend)
taskkit.E006  the backend of TASKS names a database that does not exist (taskkit.backend)
taskkit.E007  an @schedule can make no run: it is on no task, its arguments do not fit, two have one name
taskkit.E008  a function that ASYNC_REQUEST names cannot be called
taskkit.E009  AsyncRequestMiddleware stands before a middleware that has to have its say first
taskkit.E010  the database routers send tables that belong together to different databases
taskkit.W001  a path in TASKKIT is relative
taskkit.W002  a queue of TASKS has no pool of its name (taskkit.backend)
taskkit.W003  browsers have no URL of the gateway: URL is not set, and BIND or UDS is none
taskkit.W004  the admin shows runs live by a script, but STATIC_URL is not set
taskkit.W005  submissions go to another database than "default", so they are no part of its transactions
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from django.apps import apps
from django.apps.config import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning, register
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections, router
from django.utils.module_loading import autodiscover_modules, import_string

from taskkit.conf import TaskkitImproperlyConfigured, read_settings
from taskkit.errors import TaskkitError
from taskkit.settings import hidden_from_browsers, load_settings
from taskkit.tasks import MIDDLEWARE


@register("taskkit")
def check_settings(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """Report a wrong key or value of TASKKIT, paths that depend on the current directory."""
    try:
        found = read_settings()
    except TaskkitImproperlyConfigured as error:
        hint = "Correct it in TASKKIT, or in the environment (TASKKIT_<KEY>); the README has a table of all keys."
        return [Error(str(error), hint=hint, id="taskkit.E001")]
    return [*of_site(found), *_relative(found), *_hidden(found)]


def of_site(found: Mapping[str, Any]) -> list[CheckMessage]:
    """Return what is wrong with what only the site uses, not the tree."""
    path = found.get("TOKEN_CLAIMS")
    wrong: list[CheckMessage] = []
    if reason := _uncallable(path):
        hint = "Name a function of a request that returns claims, for example 'reports.tokens.claims'."
        wrong.append(Error(f"TASKKIT: TOKEN_CLAIMS = {path!r}: {reason}", hint=hint, id="taskkit.E004"))
    return [*wrong, *_requests(found)]


#: What functions of a request return that ASYNC_REQUEST names by their dotted paths.
_OF_REQUEST: Final = {
    "user": "its user or None, for example 'reports.requests.user_of'",
    "lane": "a pool's name or None, for example 'reports.requests.lane_of'",
    "partition": "what it is about or None, for example 'reports.requests.object_of'",
}

#: What has to stand before AsyncRequestMiddleware.
_FIRST: Final = (
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.auth.middleware.LoginRequiredMiddleware",
)


def _uncallable(path: str | None) -> str:
    """Return why nobody can call what a setting names by its dotted path."""
    try:
        return "" if path is None or callable(import_string(path)) else "it cannot be called"
    except ImportError as error:
        return str(error)


def _requests(found: Mapping[str, Any]) -> list[CheckMessage]:
    """Return what is wrong with views that run as tasks."""
    wrong: list[CheckMessage] = []
    for name, returned in _OF_REQUEST.items():
        path = found.get("ASYNC_REQUEST", {}).get(name)
        if reason := _uncallable(path):
            hint = f"Name a function of a request that returns {returned}."
            said = f"TASKKIT: ASYNC_REQUEST.{name} = {path!r}: {reason}"
            wrong.append(Error(said, hint=hint, id="taskkit.E008"))
    order = list(getattr(settings, "MIDDLEWARE", ()))
    ours = order.index(MIDDLEWARE) if MIDDLEWARE in order else len(order)
    for name in order[ours:]:
        if name in _FIRST:
            hint = "Put it last: a request is handed over when everybody before it has seen it."
            said = f"MIDDLEWARE has {MIDDLEWARE} before {name}, which would not see a request that becomes a task"
            wrong.append(Error(said, hint=hint, id="taskkit.E009"))
    return wrong


def _relative(found: Mapping[str, Any]) -> list[CheckMessage]:
    return [
        Warning(
            f"TASKKIT: {key} = {found[key]!r} is relative: each process may read it differently",
            hint="Write an absolute path, for example BASE_DIR / 'state'.",
            id="taskkit.W001",
        )
        for key in ("STATE_DIR", "UDS", "KEY_FILE")
        if found.get(key) and not os.path.isabs(found[key])
    ]


def _hidden(found: Mapping[str, Any]) -> list[CheckMessage]:
    reason = hidden_from_browsers(load_settings(found))
    hint = "Set URL to what browsers shall open, for example 'https://tasks.example.com'; silence this without pages."
    return [] if reason is None else [Warning(f"TASKKIT: {reason}", hint=hint, id="taskkit.W003")]


@register("taskkit")
def check_routers(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """Report tables that one transaction has to reach, but that would lie in different databases."""
    from taskkit.models import TOGETHER

    split = [
        (alias, [model.__name__ for model in TOGETHER if not router.allow_migrate_model(alias, model)])
        for alias in connections
    ]
    found = [(alias, absent) for alias, absent in split if 0 < len(absent) < len(TOGETHER)]
    homes = {router.db_for_write(model) for model in TOGETHER}
    hint = "Have DATABASE_ROUTERS answer for the app 'taskkit' as a whole, in allow_migrate and db_for_write."
    messages: list[CheckMessage] = [
        Error(
            f"The database {alias!r} would have some of taskkit's tables, but not {', '.join(absent)}.",
            hint=hint,
            id="taskkit.E010",
        )
        for alias, absent in found
    ]
    if len(homes) > 1:
        text = f"taskkit's tables would be written in different databases: {', '.join(sorted(homes))}."
        messages.append(Error(text, hint=hint, id="taskkit.E010"))
    return messages


@register("taskkit")
def check_admin(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """Report an admin whose pages would not find our script."""
    if settings.STATIC_URL or not apps.is_installed("django.contrib.admin"):
        return []
    hint = "Add 'django.contrib.staticfiles' to INSTALLED_APPS, and set STATIC_URL = 'static/'."
    return [Warning("Runs cannot be shown live: STATIC_URL is not set.", hint=hint, id="taskkit.W004")]


@register("taskkit")
def check_home(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """Report routers that keep submissions apart from what most code is about."""
    from taskkit.outbox import alias_of

    home = alias_of(None)
    if home == DEFAULT_DB_ALIAS or DEFAULT_DB_ALIAS not in connections:
        return []
    hint = (
        "What is submitted in a transaction of 'default' runs even if that is rolled back. Let the routers keep the "
        "app 'taskkit' in 'default', use transaction.on_commit(), or silence this if that is what you want."
    )
    return [Warning(f"The routers send submissions to the database {home!r}.", hint=hint, id="taskkit.W005")]


@register("taskkit")
def check_tasks(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """Report task models without process(), tasks of one name. Imports each app's `tasks` module."""
    return [*_without_process(), *(_uncollectable() or _unschedulable())]


def _without_process() -> list[CheckMessage]:
    from taskkit.rows import task_models
    from taskkit.stream_task import StreamTask

    return [
        Error(
            f"{model._meta.label} has no process(): there is nothing to run.",
            hint="Define process() as a function, a coroutine function or a generator.",
            obj=model,
            id="taskkit.E002",
        )
        for model in task_models()
        if model.process is StreamTask.process
    ]


def _uncollectable() -> list[CheckMessage]:
    from taskkit import registry

    autodiscover_modules("tasks")  # outside of the try: what a module raises keeps its traceback
    try:
        registry.load()
    except (TaskkitError, ImproperlyConfigured, ValueError) as error:
        hint = "The tree cannot start with it: correct the task, or leave its module out of INSTALLED_APPS."
        return [Error(str(error), hint=hint, id="taskkit.E003")]
    return []


def _unschedulable() -> list[CheckMessage]:
    from taskkit import registry
    from taskkit.schedules import declared

    _, complaints = declared(registry.load())
    hint = "The README has a section on schedules; `overlap`, `catchup`, `tz` and `name` are explained there."
    return [Error(complaint, hint=hint, id="taskkit.E007") for complaint in complaints]
