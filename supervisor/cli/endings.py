"""How a command ends: its exit code, one message for an error of ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from supervisor.cli import exits
from supervisor.cli.output import print_error
from taskkit.errors import SettingsError, SupervisorError, TaskkitError


def exit_code_of(error: TaskkitError) -> int:
    """Return the exit code for an error that ends a command."""
    if isinstance(error, SupervisorError):
        return error.exit_code
    return exits.BAD_CONFIGURATION if isinstance(error, SettingsError) else exits.FAILED


def ending_of(command: Callable[[], object]) -> int:
    """Carry out a command; return its exit code. Errors of ours become one message without a traceback."""
    try:
        command()
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
