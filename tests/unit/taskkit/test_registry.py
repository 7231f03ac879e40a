"""What `load` finds in a project, what it refuses: each project a folder, loaded by a fresh process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import jsonschema
import pytest

from taskkit.errors import InvalidArguments

HEAD = """
import sys
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["django.contrib.contenttypes", "taskkit", *sys.argv[1].split(",")],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    USE_TZ=True,
    TASKS={
        "default": {"BACKEND": "taskkit.backend.BulkheadBackend", "QUEUES": []},
        "other": {"BACKEND": "%(package)s.backends.dummy.DummyBackend"},
    },
)
import django
django.setup()
from taskkit import registry
"""

#: Where Django's Tasks interface lives here: in Django 6, else in its backport.
PACKAGE = "django.tasks" if importlib.util.find_spec("django.tasks") else "django_tasks"
HEAD %= {"package": PACKAGE}


class Project:
    """A folder of apps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.apps: list[str] = []

    def app(self, name: str, **modules: str) -> None:
        """Add an app with these modules; a double underscore in a module's name is a folder."""
        self.apps.append(name)
        (self.folder / name).mkdir()
        (self.folder / name / "__init__.py").touch()
        for module, code in modules.items():
            path = self.folder / name / f"{module.replace('__', '/')}.py"
            if not path.parent.exists():
                path.parent.mkdir()
                (path.parent / "__init__.py").touch()
            path.write_text(dedent(code))

    def run(self, code: str, ok: bool = True) -> str:
        """Run `code` with `registry` at hand; return what it prints, or what it fails with."""
        script = HEAD + dedent(code)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script, ",".join(self.apps)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=self.folder,
            env={"PATH": "", "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert (done.returncode == 0) is ok, done.stdout + done.stderr
        return done.stdout if ok else done.stderr


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


NAMES = "print(*registry.load())"


def test_functions_and_models_of_every_app(project: Project) -> None:
    project.app(
        "shop",
        tasks="""
            from taskkit import task
            from shop.helpers import helper

            @task(timeout=5, pool="heavy")
            def bill(order: int) -> None:
                "Bill it."

            @task(name="send_mail")
            def mail() -> None: ...

            @task(name="office.print_out")
            async def paper() -> None: ...

            def no_task() -> None: ...
        """,
        helpers="""
            from taskkit import task

            @task
            def helper() -> None: ...
        """,
        elsewhere="""
            from taskkit import task

            @task
            def not_offered() -> None: ...
        """,
        models="""
            from django.db import models
            from taskkit import StreamTask
            import shop.elsewhere

            class Base(StreamTask):
                class Meta:
                    abstract = True

            class Import(Base):
                pool = "heavy"
                priority = 5
                metadata = models.JSONField(default=dict)
                async def process(self):
                    "Import it."

            class NoTask(models.Model):
                pass
        """,
    )
    project.app("plain")
    output = project.run("""
        tasks = registry.load()
        print(*tasks)
        bill, model = tasks["shop.bill"], tasks["shop.Import"]
        info = bill.info
        print(info.path, info.kind, info.doc, info.timeout, info.pool, info.positional)
        print(bill.is_async, bill.is_generator, bill.target is bill.func, bill.bind([1], {}))
        print(model.info.path, model.info.kind, repr(model.info.doc), model.info.pool, model.info.priority)
        print(model.info.metadata, list(model.info.parameters["properties"]), model.is_async, model.func)
        print(model.target is model.model.process, model.bind([], {}))
        print(tasks["office.print_out"].is_async, "shop.tasks.bill (" in bill.place)
    """)
    assert output.splitlines() == [
        "office.print_out shop.Import shop.bill shop.helper shop.send_mail",
        "shop.tasks.bill function Bill it. 5.0 heavy ('order',)",
        "False False True ([1], {})",
        "shop.models.Import model '' heavy 5",
        "{} ['metadata'] True None",
        "True ([], {})",
        "True True",
    ]


def test_a_tasks_package_and_functions_offered_by_two_apps(project: Project) -> None:
    project.app(
        "a",
        tasks__first="""
            from taskkit import task

            @task
            def one() -> None: ...
        """,
    )
    (project.folder / "a" / "tasks" / "__init__.py").write_text("import a.tasks.first\n")
    project.app("b", tasks="from a.tasks.first import one\n")
    assert project.run(NAMES) == "a.one\n"


def test_a_function_of_a_plain_module_belongs_to_the_app_that_offers_it(project: Project) -> None:
    (project.folder / "library.py").write_text("from taskkit import task\n@task\ndef tool() -> None: ...\n")
    project.app("a", tasks="from library import tool\n")
    assert project.run(NAMES) == "a.tool\n"


def test_a_decorator_above_ours_keeps_its_effect(project: Project) -> None:
    project.app(
        "a",
        tasks="""
            import functools
            from taskkit import task

            def twice(function):
                @functools.wraps(function)
                def wrapper(*args):
                    return function(*args) * 2
                return wrapper

            @twice
            @task
            def one(n: int) -> int:
                return n
        """,
    )
    output = project.run("""
        (one,) = registry.load().values()
        print(one.info.name, one.func(4), one.info.parameters["properties"])
    """)
    assert output == "a.one 8 {'n': {'type': 'integer'}}\n"


@pytest.mark.parametrize(
    ("tasks", "models"),
    [
        ("@task\ndef one(): ...\n\n@task\ndef one(): ...\n", ""),
        ("@task\ndef one(): ...\n\n@task(name='one')\ndef two(): ...\n", ""),
        ("@task(name='one')\ndef two(): ...\n", "class one(StreamTask):\n    def process(self): ...\n"),
    ],
)
def test_two_tasks_of_one_name_are_refused_with_both_places(
    project: Project, tasks: str, models: str
) -> None:
    project.app(
        "a",
        tasks=f"from taskkit import task\n\n{tasks}",
        models=f"from taskkit import StreamTask\n\n{models}",
    )
    error = project.run(NAMES, ok=False).splitlines()[-1]
    assert error.startswith("taskkit.registry.DuplicateTask: two tasks are named 'a.one': a.")
    places = error.partition("named 'a.one': ")[2].partition(";")[0].split(" and ")
    assert len(set(places)) == 2


def test_a_wrong_option_of_a_model_is_named(project: Project) -> None:
    project.app("a", models="from taskkit import StreamTask\n\nclass M(StreamTask):\n    on_lost = 'shrug'\n")
    assert "ValueError: a.models.M: on_lost = 'shrug'" in project.run(NAMES, ok=False)


def test_what_a_tasks_module_raises_comes_through(project: Project) -> None:
    project.app("a", tasks="import nowhere_to_be_found\n")
    assert "No module named 'nowhere_to_be_found'" in project.run(NAMES, ok=False)


def test_tasks_of_djangos_interface_are_taken_by_their_backend(project: Project) -> None:
    project.app(
        "a",
        tasks=f"""
            from {PACKAGE} import task

            @task(priority=3, queue_name="heavy")
            def ours(n: int) -> None:
                "Ours."

            @task(takes_context=True)
            def contextual(context, n: int) -> None: ...

            @task(backend="other")
            def not_ours() -> None: ...
        """,
    )
    output = project.run("""
        tasks = registry.load()
        print(*tasks)
        ours, contextual = tasks["a.ours"], tasks["a.contextual"]
        print(ours.info.pool, ours.info.priority, ours.info.doc, ours.info.path, ours.interface.takes_context)
        print(contextual.interface.takes_context, contextual.info.positional, contextual.func.__name__)
    """)
    assert output.splitlines() == [
        "a.contextual a.ours taskkit.announce",
        "default 3 Ours. a.tasks.ours False",
        "True ('n',) contextual",
    ]


def test_the_tests_own_project(django_project: object) -> None:
    from taskkit import registry

    tasks = registry.load()
    assert {"proj.echo", "proj.add", "proj.Row", "proj.AGenRow"} <= set(tasks)
    for definition in tasks.values():
        jsonschema.Draft202012Validator.check_schema(definition.info.parameters)
    kinds = {name: (tasks[name].is_async, tasks[name].is_generator) for name in ("proj.gen", "proj.agen")}
    assert kinds == {"proj.gen": (False, True), "proj.agen": (True, True)}
    assert tasks["proj.AGenRow"].is_async
    assert tasks["proj.GenRow"].is_generator
    assert tasks["proj.add"].bind([], {"a": 1, "b": 2}) == ([], {"a": 1, "b": 2})
    with pytest.raises(InvalidArguments):
        tasks["proj.add"].bind(["1"], {})
    with pytest.raises(InvalidArguments):
        tasks["proj.Row"].bind([], {"message": "x"})
