"""The command `bulkhead`: its commands, the exit code of what goes wrong in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from supervisor.cli import demo, exits, foreground, runs, schedules, token, tree, upkeep
from supervisor.cli.endings import ending_of
from supervisor.cli.foreground import Foreground

#: Plain help: rich's would cost 70 ms at every `--help`.
app = typer.Typer(
    name="bulkhead",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # 20 ms that the other commands do not need

        print(f"bulkhead {version('django-bulkhead')}")
        raise typer.Exit(exits.OK)


@app.callback()
def bulkhead(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Django's long and heavy tasks, each in a process of its own, streamed live to browsers."""


for command in (
    tree.run,
    demo.demo,
    tree.start,
    tree.stop,
    tree.restart,
    tree.reload,
    tree.upgrade,
    tree.status,
    runs.submit,
    runs.follow,
    runs.tasks,
    runs.runs,
    runs.runners,
    runs.cancel,
    runs.release,
    runs.reset,
    runs.logs,
    schedules.schedules,
    upkeep.vacuum,
    token.token,
):
    app.command()(command)


def main(
    arguments: Sequence[str] | None = None, perform: Callable[[Foreground], None] = foreground.serve
) -> int:
    """Run one command; return its exit code. `perform` is given the tree that `run` wants."""
    given = None if arguments is None else list(arguments)
    return ending_of(lambda: app(args=given, prog_name="bulkhead", obj=perform))
