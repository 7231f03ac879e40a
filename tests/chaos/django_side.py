"""A Django process of the project's own, as gunicorn would run one: submits inside transactions.

Reads one JSON object per line, `{no, task, arguments, tag, commit}`; answers one, `{no, run, outcome}`, in order.
Outcome: "committed", "rolled back", or "asked" when the commit itself failed and nobody knows.
"""

from __future__ import annotations

import json
import sys
from typing import Any


class RolledBack(Exception):
    """The caller changed its mind."""


def perform(order: dict[str, Any]) -> dict[str, Any]:
    """Submit in a transaction; commit it, or roll it back."""
    from django.apps import apps
    from django.db import transaction

    from taskkit import submit

    run = None
    try:
        with transaction.atomic():
            if order["task"] == "proj.ARow":
                row = apps.get_model("proj", "ARow").objects.create(**order["arguments"])
                run = submit(row, tags=[order["tag"]]).id
            else:
                run = submit(order["task"], kwargs=order["arguments"], tags=[order["tag"]]).id
            if not order["commit"]:
                raise RolledBack
    except RolledBack:
        return {"run": run, "outcome": "rolled back"}
    except Exception as error:
        return {"run": run, "outcome": "asked", "detail": f"{type(error).__name__}: {error}"}
    return {"run": run, "outcome": "committed"}


def main() -> None:
    """Serve until the end of input."""
    import django
    from django.db import connection

    django.setup()
    for line in sys.stdin:
        order = json.loads(line)
        answer = perform(order)
        connection.close()  # as at the end of a request with CONN_MAX_AGE 0
        print(json.dumps({"no": order["no"], **answer}), flush=True)


if __name__ == "__main__":
    main()
