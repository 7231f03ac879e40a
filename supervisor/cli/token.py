"""The command that makes a token."""

from __future__ import annotations

import os
import time
from typing import Annotated

import typer

from supervisor.cli.connect import choose, key_file
from supervisor.cli.options import Json, SettingsModule, StateDir, parse_duration, split_words
from supervisor.cli.output import print_json
from supervisor.cli.project import state_dir_for
from taskkit.errors import SettingsError


def token(
    actions: Annotated[
        str, typer.Option(metavar="LIST", help="Of submit, read, cancel, operate, logs.")
    ] = "submit,read,cancel,logs",
    runs: Annotated[str, typer.Option(metavar="LIST", help="Ids of runs, or * for all.")] = "*",
    tasks: Annotated[str, typer.Option(metavar="LIST", help="Patterns of task names.")] = "*",
    ttl: Annotated[str, typer.Option(metavar="DURATION", help="How long it is valid, such as 15m.")] = "12h",
    subject: Annotated[str, typer.Option(help="On whose behalf.")] = "",
    settings: SettingsModule = None,
    state_dir: StateDir = None,
    json: Json = False,
) -> None:
    """Print a token for the HTTP API; it is the last line."""
    from taskkit import tokens  # jwt: 30 ms that the other commands do not need

    lifetime = parse_duration(ttl)
    wanted = split_words(actions)
    if unknown := sorted(set(wanted) - tokens.ACTIONS):
        raise typer.BadParameter(
            f"unknown: {', '.join(unknown)}; there are {', '.join(sorted(tokens.ACTIONS))}"
        )
    project = choose(settings, state_dir)
    place = state_dir_for(project, state_dir, exactly=False)
    path = key_file(project, place)
    if not path.parent.is_dir():
        raise SettingsError(f"{path.parent} does not exist, so no tree has made a key there; start one first")
    text = tokens.issue(
        tokens.load_or_create_key(path),
        actions=wanted,
        runs="*" if runs.strip() == "*" else split_words(runs),
        tasks=split_words(tasks),
        ttl=lifetime,
        subject=subject or f"uid-{os.getuid()}",
    )
    if json:
        print_json({"token": text, "expires_at": int(time.time() + lifetime)})
    else:
        print(text)
