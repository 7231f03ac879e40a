"""The command that makes the store's file smaller."""

from __future__ import annotations

from supervisor.cli.connect import connected
from supervisor.cli.options import Json, SettingsModule, StateDir
from supervisor.cli.output import print_json


def vacuum(settings: SettingsModule = None, state_dir: StateDir = None, json: Json = False) -> None:
    """Give the store's free pages back to the disk; streams and runs do not notice."""
    client = connected(settings, state_dir)
    freed, seconds = 0, 0.0
    while True:  # each request works for some seconds; what is left shrinks, or nothing was given back
        answer = client.vacuum()
        freed += answer["freed_bytes"]
        seconds += answer["seconds"]
        if not answer["free_bytes"] or not answer["freed_bytes"]:
            break
    total = answer | {"freed_bytes": freed, "seconds": round(seconds, 3)}
    if json:
        print_json(total)
    else:
        print(f"Freed {freed / 2**20:.1f} MiB; the store has {total['file_bytes'] / 2**20:.1f} MiB.")
