"""The command about schedules."""

from __future__ import annotations

from typing import Annotated

import typer

from supervisor.cli.connect import connected
from supervisor.cli.options import Json, SettingsModule, StateDir
from supervisor.cli.output import clean, print_json, print_table
from taskkit.errors import SettingsError


def schedules(
    enable: Annotated[str | None, typer.Option(metavar="ID", help="Keep this schedule from now on.")] = None,
    disable: Annotated[
        str | None, typer.Option(metavar="ID", help="Do not keep this schedule; its runs go on.")
    ] = None,
    delete: Annotated[str | None, typer.Option(metavar="ID", help="Remove this schedule.")] = None,
    settings: SettingsModule = None,
    state_dir: StateDir = None,
    json: Json = False,
) -> None:
    """List the schedules by name, or switch or remove one."""
    orders = {"enable": enable, "disable": disable, "delete": delete}
    chosen = [(order, id) for order, id in orders.items() if id is not None]
    if len(chosen) > 1:
        raise SettingsError("--enable, --disable and --delete: give one of them")
    client = connected(settings, state_dir)
    for order, id in chosen:
        done = client.order_schedule(id, order)
        if json:
            print_json(done)
        else:
            print(f"Schedule {clean(str(done.get('name', id)))} is {order}d.")
        return
    rows = list(client.all_schedules())
    if json:
        print_json({"schedules": rows})
        return
    table = [
        (
            row.get("id"),
            row.get("name"),
            row.get("task"),
            row.get("cron") or (f"every {row['every']:g} s" if row.get("every") else f"at {row.get('at')}"),
            row.get("tz"),
            "yes" if row.get("enabled") else "no",
            row.get("next_at"),
            row.get("last_at"),
            row.get("error"),
        )
        for row in rows
    ]
    print_table(("SCHEDULE", "NAME", "TASK", "WHEN", "ZONE", "ENABLED", "NEXT", "LAST", "ERROR"), table)
