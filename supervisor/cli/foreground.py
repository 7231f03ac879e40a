"""A tree in the foreground: what it says to its terminal.

It stays in memory as long as the tree, so nothing of the command line's packages is imported here.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import msgspec

from supervisor import detach
from supervisor.cli.output import print_json
from supervisor.config import Config
from taskkit.wire.messages import Status


@dataclass(frozen=True)
class Foreground:
    """A tree as the command line wants it. `flags` lead other commands to it; `json` is how it greets."""

    config: Config
    flags: str
    json: bool


def plain(status: Status) -> dict[str, Any]:
    """Return a status as plain data with every key, whatever its value."""
    children = [msgspec.structs.asdict(child) for child in status.children]
    return {**msgspec.structs.asdict(status), "children": children}


def next_steps(status: Status, flags: str) -> str:
    """Return commands to copy: they find this tree from any terminal."""
    demo = status.settings_module.startswith("bulkhead_demo")
    words = "demo.count n=10 delay=0.5" if demo else "TASK key=value"
    return (
        f"Look:   bulkhead status{flags}\n"
        f"Tasks:  bulkhead tasks{flags}\n"
        f"Submit: bulkhead submit {words} --follow{flags}"
    )


def _greeting(status: Status, flags: str) -> str:
    return (
        f"Bulkhead runs at {status.url} (settings {status.settings_module}, pid {status.pid}).\n"
        f"{next_steps(status, flags)}\n"
        "Stop:   Ctrl-C"
    )


def _say(text: str) -> None:
    """Print, unless the terminal has gone: a tree must end in its order all the same."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def serve(wish: Foreground) -> None:
    """Be the tree until it is stopped.

    Raises:
      SupervisorError: see `daemon.serve`.
      SettingsError: likewise.
    """
    config = wish.config
    if config.ready_fd is not None:  # a child of the tree that held it would hide this process's death
        os.set_inheritable(config.ready_fd, False)
    talks = not (config.quiet or wish.json)

    def ready(status: Status) -> None:
        if wish.json:
            print_json(plain(status))
        elif talks:
            _say(_greeting(status, wish.flags))
        if config.ready_fd is not None:  # last: whoever waits for it reads the greeting in the log
            detach.say_ready(config.ready_fd)

    def stopping(_: str) -> None:
        if talks:
            _say("Stopping (Ctrl-C again: at once)...")

    from supervisor import daemon  # trio: 0.2 s that the other commands do not need

    daemon.serve(config, on_ready=ready, on_stopping=stopping)
    if talks:
        _say("Stopped.")
