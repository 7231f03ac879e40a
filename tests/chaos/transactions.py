"""A Django process that submits in transactions of every shape until it is told to stop, or killed.

    python -m tests.chaos.transactions SEED COUNT

Prints the id of each submission before its transaction can commit. A row of `proj.Row` with the id as its message is
made beside it: it is there exactly if the submission is committed, whoever was killed when.
"""

from __future__ import annotations

import random
import sys

#: Transactions: committed, rolled back, two submissions in one, one of them in a savepoint that is rolled back, all of
#: it rolled back although the savepoint was not.
SHAPES = ("commit", "drop", "two", "inner dropped", "outer dropped")


class Dropped(Exception):
    """The caller changed its mind."""


def submit_one() -> None:
    """Submit a run with its witness, in the transaction that is open."""
    from django.apps import apps

    from taskkit import submit

    run = submit("proj.chaos_ticks", kwargs={"salt": 1, "n": 1})
    apps.get_model("proj", "Row").objects.create(message=run.id)
    print(run.id, flush=True)


def one_transaction(shape: str) -> None:
    """Make one transaction."""
    from django.db import transaction

    try:
        with transaction.atomic():
            submit_one()
            if shape == "two":
                submit_one()
            if shape in ("inner dropped", "outer dropped"):
                try:
                    with transaction.atomic():
                        submit_one()
                        if shape == "inner dropped":
                            raise Dropped
                except Dropped:
                    pass
            if shape in ("drop", "outer dropped"):
                raise Dropped
    except Dropped:
        pass


def main() -> None:
    """Make COUNT transactions."""
    import django
    from django.db import Error, connection

    django.setup()
    rng = random.Random(int(sys.argv[1]))
    for _ in range(int(sys.argv[2])):
        try:
            one_transaction(rng.choice(SHAPES))
        except Error as error:
            print("error", error, file=sys.stderr, flush=True)
        connection.close()


if __name__ == "__main__":
    main()
