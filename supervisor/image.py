"""The process of `bulkhead run`, bare: only what a tree needs until its end is in its memory.

The command line is read by a child, which leaves with what it imported (7 MiB), and at the same time as this process
imports trio.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Any, Final, NoReturn

#: Exit code of a command line that was killed.
_FAILED: Final = 1


def main() -> int:
    """Run the tree that the command line describes; return the exit code."""
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    reader = os.fork()
    if reader == 0:
        os.close(read_end)
        _read_command_line(write_end)
    os.close(write_end)
    try:
        return _serve(reader, read_end)
    except KeyboardInterrupt:  # the child has heard it as well
        return _FAILED


def _serve(reader: int, read_end: int) -> int:
    if not sys.flags.safe_path:
        del sys.path[0]  # the project's folder, or the script's: nothing of ours comes from there
    gc.disable()  # while modules are imported, little becomes garbage
    from supervisor import firstborn

    firstborn.bear()
    gc.enable()
    try:
        return _live(reader, read_end)
    finally:
        firstborn.dismiss()


def _live(reader: int, read_end: int) -> int:
    import msgspec

    from supervisor.cli import endings, foreground

    with open(read_end, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(reader, 0)
    if not said:  # help, or an error, which it has printed
        return max(os.waitstatus_to_exitcode(status), 0) if os.WIFEXITED(status) else _FAILED
    environment, wish = msgspec.msgpack.decode(said, type=tuple[dict[str, str], foreground.Foreground])
    os.environ.update(environment)
    return endings.ending_of(lambda: foreground.serve(wish))


def _read_command_line(write_end: int) -> NoReturn:
    """Parse it; tell the parent what it wants, and what it adds to the environment."""
    code = _FAILED
    try:
        before = dict(os.environ)

        def tell(wish: Any) -> None:
            import msgspec

            added = {name: value for name, value in os.environ.items() if before.get(name) != value}
            with open(write_end, "wb") as pipe:
                pipe.write(msgspec.msgpack.encode((added, wish)))

        from supervisor.cli.main import main as command

        code = command(perform=tell)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads what was printed
        code = _FAILED
    finally:
        os._exit(code)
