"""Every task of the project, by name.

Three ways lead into it: functions under `@taskkit.task`, Task objects of Django's own Tasks interface whose
backend is ours, concrete StreamTask models. Reads no settings but TASKS, touches no database.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any, Final

from django.apps import AppConfig, apps
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.utils.module_loading import autodiscover_modules

from taskkit import noted, tasks
from taskkit.conf import pool_of
from taskkit.errors import UnknownTask
from taskkit.model_schema import model_parameters
from taskkit.schema import NO_PARAMETERS, Parameters, parameters_of
from taskkit.signals import ANNOUNCE, run_finished
from taskkit.stream_task import StreamTask
from taskkit.tasks import Backoff, TaskOptions
from taskkit.wire.messages import TaskInfo

#: `BACKEND` in settings.TASKS of the tasks that are ours; compared as text, never imported here.
BACKEND: Final = "taskkit.backend.BulkheadBackend"

#: The task that performs views for `taskkit.middleware`.
REQUEST: Final = "taskkit.request"

#: Homes of the class Task: Django 6, its backport for 5.2. Whoever has such an object has imported one.
_TASK_HOMES: Final = ("django.tasks.base", "django_tasks.base")


class DuplicateTask(ImproperlyConfigured):
    """Two tasks have one name; the message names both places."""


@dataclass(frozen=True)
class TaskDefinition:
    """One task as the processes with Django see it.

    Attributes:
      info: what the gateway's catalogue knows.
      func: what to call; None for a model task, whose row's `process` is called.
      model: the model of a model task.
      loop: "asyncio", "trio" or None, which leaves it to the pool.
      backoff: (exception, task_result) -> seconds until the next attempt, None to give up.
      place: where it is defined, for people.
      interface: its Task object, when it came by Django's own interface.
      parameters: what `func` may be called with.
    """

    info: TaskInfo
    func: Callable[..., Any] | None
    model: type[StreamTask] | None
    loop: str | None
    backoff: Backoff | None
    place: str = ""
    interface: Any = None
    parameters: Parameters = field(default=NO_PARAMETERS, repr=False)

    @property
    def target(self) -> Callable[..., Any]:
        """What does the work: the function, or the model's `process` (unbound)."""
        if self.model is not None:
            return self.model.process
        assert self.func is not None
        return self.func

    @property
    def is_async(self) -> bool:
        """Whether it needs an event loop: a coroutine function or an async generator function."""
        return tasks.is_async(self.target)

    @property
    def is_generator(self) -> bool:
        """Whether it yields: a generator function, synchronous or not."""
        return tasks.is_generator(self.target)

    def bind(self, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return JSON arguments as the annotated types. A model task takes none.

        Raises:
          InvalidArguments: with a message per parameter. The submitter's fault.
        """
        return self.parameters.bind(args, kwargs)


def load() -> dict[str, TaskDefinition]:
    """Return every task of the project by name, after `django.setup()`. Imports each app's `tasks` module.

    Raises:
      DuplicateTask: two tasks have one name.
      ValueError: an option of a model task is wrong.
      Exception: whatever a `tasks` module raises when it is imported.
    """
    apps.check_models_ready()
    autodiscover_modules("tasks")
    if _our_aliases():
        _import_views()
    found: dict[str, TaskDefinition] = {}
    for definition in (*_functions(), *_django_tasks(), *_models()):
        other = found.setdefault(definition.info.name, definition)
        if other is not definition:
            raise DuplicateTask(
                f"two tasks are named {definition.info.name!r}: {other.place} and {definition.place}; "
                "rename one, or give it another name: @task(name=…)"
            )
    if run_finished.receivers or any(definition.interface is not None for definition in found.values()):
        found[ANNOUNCE] = _announce()
    if tasks.MIDDLEWARE in getattr(settings, "MIDDLEWARE", ()):
        found[REQUEST] = _request()
    return dict(sorted(found.items()))


@cache
def known() -> dict[str, TaskDefinition]:
    """Return what `load` returned when it was first asked in this process, or in the one it was forked from.

    Loading imports and inspects every task; a submission has no time for that, and tasks do not change in a
    process.

    Raises:
      Exception: as `load`, at each call until one succeeds.
    """
    return load()


#: Settings that decide what is a task, or in which pool.
_DECISIVE: Final = ("INSTALLED_APPS", "ROOT_URLCONF", "TASKKIT", "TASKS")


def _forget(*, setting: str, **_: Any) -> None:
    """Have a test that overrides a setting find the tasks that are there then."""
    if setting in _DECISIVE:
        known.cache_clear()


setting_changed.connect(_forget)


def find(name: str) -> TaskDefinition:
    """Return the task of that name or dotted path.

    Raises:
      UnknownTask: there is none; the message has the nearest name. The caller's fault.
      Exception: as `load`.
    """
    definitions = known()
    found = definitions.get(name) or next((it for it in definitions.values() if it.info.path == name), None)
    if found is None:
        raise UnknownTask(f"there is no task {name[:200]!r}; {_advice(name[:200], definitions)}")
    return found


def _advice(name: str, definitions: dict[str, TaskDefinition]) -> str:
    names = [*definitions, *(it.info.path for it in definitions.values())]
    if near := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {near[0]!r}?"
    return (
        "a task is a function under @task in the tasks module of an installed app, or a StreamTask model "
        f"({len(definitions)} found: {', '.join(list(definitions)[:10])}{' …' if len(definitions) > 10 else ''})"
    )


def _tasks_modules() -> Iterator[tuple[AppConfig, ModuleType]]:
    for app in apps.get_app_configs():
        module = sys.modules.get(f"{app.name}.tasks")
        if module is not None:
            yield app, module


def _place(function: Callable[..., Any]) -> str:
    code = inspect.unwrap(function).__code__
    return f"{function.__module__}.{function.__qualname__} ({code.co_filename}:{code.co_firstlineno})"


def _label(function: Callable[..., Any], finder: AppConfig) -> str:
    """Return the label of the app that the function lives in, else of the one whose `tasks` offers it."""
    home = apps.get_containing_app_config(function.__module__)
    return (home or finder).label


# --- functions under @task
# -------------------------------------------------------------------------------------


def _functions() -> Iterator[TaskDefinition]:
    """Yield the tasks offered by each app's `tasks` module, package or not.

    What counts is the outermost function of a name, so that a decorator above `@task` keeps its effect; the
    options object tells that both are one task.
    """
    seen: set[int] = set()
    for app, module in _tasks_modules():
        inside = f"{module.__name__}."
        offered = [
            *vars(module).values(),
            *(it for it in tasks.noted_functions() if f"{it.__module__}.".startswith(inside)),
        ]
        for function in offered:
            options = tasks.options_of(function)
            if options is not None and id(options) not in seen:
                seen.add(id(options))
                yield _function_task(function, options, _label(function, app))


def _function_task(
    function: Callable[..., Any], options: TaskOptions, label: str, interface: Any = None
) -> TaskDefinition:
    # Django's own interface does not look at annotations, so neither do we: what it took must not be refused here.
    takes_context = interface is not None and interface.takes_context
    parameters = parameters_of(function, skip=int(takes_context), typed=interface is None)
    name = options.name or function.__name__
    info = _info(
        options,
        name=name if "." in name else f"{label}.{name}",
        path=f"{function.__module__}.{function.__qualname__}",
        kind="function",
        doc=inspect.getdoc(function) or "",
        parameters=parameters.schema,
        positional=parameters.positional,
    )
    return TaskDefinition(
        info=info,
        func=function,
        model=None,
        loop=options.loop,
        backoff=options.backoff,
        place=_place(function),
        interface=interface,
        parameters=parameters,
    )


def _info(options: TaskOptions, **own: Any) -> TaskInfo:
    """Return the catalogue's entry: what is special to this task, with its options."""
    shared = {name: getattr(options, name) for name in TaskInfo.__struct_fields__ if hasattr(options, name)}
    return TaskInfo(**{**shared, **own})


# --- Task objects of django.tasks
# ------------------------------------------------------------------------------


def _import_views() -> None:
    """Import what serves requests: tasks of Django's interface may be defined in any module that enqueues them."""
    urls = getattr(settings, "ROOT_URLCONF", None)
    if urls:
        importlib.import_module(urls)


def _django_tasks() -> Iterator[TaskDefinition]:
    classes = tuple(sys.modules[name].Task for name in _TASK_HOMES if name in sys.modules)
    aliases = _our_aliases()
    offered: list[tuple[Any, AppConfig | None]]
    offered = [(value, app) for app, module in _tasks_modules() for value in vars(module).values()]
    offered += [(value, None) for value in noted.tasks()]
    seen: set[Callable[..., Any]] = set()
    for value, app in offered:
        if isinstance(value, classes) and value.backend in aliases and value.func not in seen:
            seen.add(value.func)
            yield _django_task(value, app)


def _our_aliases() -> set[str]:
    configured: dict[str, dict[str, Any]] = getattr(settings, "TASKS", None) or {}
    return {alias for alias, its in configured.items() if its.get("BACKEND") == BACKEND}


def _django_task(value: Any, app: AppConfig | None) -> TaskDefinition:
    """Return the definition of a Task object: its queue is our pool; newer options count if it has them."""
    function: Callable[..., Any] = value.func
    given = {name: getattr(value, name) for name in TaskOptions.__struct_fields__ if hasattr(value, name)}
    given.update(name=None, pool=pool_of(value.queue_name))
    options = tasks.make_options(_place(function), given)
    home = apps.get_containing_app_config(function.__module__) or app
    label = home.label if home is not None else function.__module__.rpartition(".")[0] or function.__module__
    return _function_task(function, options, label, value)


def _announce() -> TaskDefinition:
    """Return the task that sends signals for runs that cannot: the project has receivers for them."""
    from taskkit import announce  # it imports this module

    options = tasks.options_of(announce.announce)
    assert options is not None
    return _function_task(announce.announce, options, "taskkit")


def _request() -> TaskDefinition:
    """Return the task that performs views: the project has the middleware that hands them over."""
    from taskkit.async_request import performing  # it takes Django's handlers, which few need

    options = tasks.options_of(performing.request)
    assert options is not None
    return _function_task(performing.request, options, "taskkit")


# --- models
# ----------------------------------------------------------------------------------------------------


def _models() -> Iterator[TaskDefinition]:
    for model in apps.get_models():
        if issubclass(model, StreamTask):
            yield _model_task(model)


def _model_task(model: type[StreamTask]) -> TaskDefinition:
    path = f"{model.__module__}.{model.__qualname__}"
    options = _model_options(model, path)
    info = _info(
        options,
        name=f"{model._meta.app_label}.{model.__name__}",
        path=path,
        kind="model",
        doc=_model_doc(model),
        parameters=model_parameters(model),
        positional=(),
    )
    return TaskDefinition(
        info=info, func=None, model=model, loop=options.loop, backoff=options.backoff, place=path
    )


def _model_options(model: type[StreamTask], place: str) -> TaskOptions:
    """Read the options from class attributes; a model field of an option's name is no option."""
    fields = {field.name for field in model._meta.get_fields()} | {"name"}
    names = [name for name in TaskOptions.__struct_fields__ if name not in fields]
    return tasks.make_options(place, {name: getattr(model, name) for name in names})


def _model_doc(model: type[StreamTask]) -> str:
    """Return the model's own docstring, not the list of fields that Django writes for a model without one."""
    doc = vars(model).get("__doc__") or ""
    return "" if doc.startswith(f"{model.__name__}(") else inspect.cleandoc(doc)
