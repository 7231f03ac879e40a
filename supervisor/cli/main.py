"""The command `bulkhead`: its commands, the exit code of what goes wrong in them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from supervisor.cli import demo, exits, runs, token, tree, upkeep
from supervisor.cli.output import print_error
from taskkit.errors import SettingsError, SupervisorError, TaskkitError

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
    upkeep.vacuum,
    token.token,
):
    app.command()(command)


def exit_code_of(error: TaskkitError) -> int:
    """Return the exit code for an error that ends a command."""
    if isinstance(error, SupervisorError):
        return error.exit_code
    return exits.BAD_CONFIGURATION if isinstance(error, SettingsError) else exits.FAILED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. Errors of ours become one message without a traceback."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="bulkhead")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else exits.OK
    except TaskkitError as error:
        print_error(str(error))
        return exit_code_of(error)
    except BrokenPipeError:
        return _left_alone()
    except OSError as error:
        print_error(f"the system refuses: {error}")  # no room on the disk, no descriptor, no process
        return exits.FAILED
    except KeyboardInterrupt:
        return exits.FAILED
    return exits.OK


def _left_alone() -> int:
    """The reader has left (`| head`). The interpreter flushes once more at its end: give it a place to."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exits.FAILED
