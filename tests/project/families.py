"""Tasks that have to do with other runs."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from django.db import transaction

from taskkit import chain, current_run, emit, group, step, task


@task
def leaf(value: Any = None, gate: str = "") -> Any:
    """Wait for a file; return what came, and fail at "bad"."""
    while gate and not Path(gate).exists():
        time.sleep(0.01)
    if value == "bad":
        raise ValueError("a bad leaf")
    return value


@task(on_lost="retry")
def tree(values: list[Any], gate: str = "") -> list[Any]:
    """Submit children, wait for them, return what has become of them."""
    run = current_run()
    children = [run.submit(leaf, [value], {"gate": gate}) for value in values]
    emit("waiting", {"children": [child.id for child in children]})
    return [outcome.result if outcome.ok else (outcome.error or {})["code"] for outcome in run.wait(children)]


@task
async def atree(values: list[Any]) -> list[Any]:
    """Do the same in a coroutine."""
    run = current_run()
    children = [await run.asubmit(leaf, [value]) for value in values]
    return [outcome.result for outcome in await run.wait_async(children)]


@task
def collected(more: Any = None) -> list[Any]:
    """Return the results of what this run came after, and what came."""
    return [outcome.result for outcome in current_run().after] + ([] if more is None else [more])


@task
def conducting(gate: str = "") -> list[Any]:
    """Submit a chain with a group in it as children; return the result of its end."""
    run = current_run()
    with transaction.atomic():
        steps = chain(
            step(leaf, 1, gate), [step(collected, 2), step(collected, 3)], step(collected, 4), parent=run
        )
    emit("waiting", {"children": [one.id for one in steps]})
    return list(run.wait(steps[-1:])[0].result)


@task
def impatient() -> list[str]:
    """Wait in every way that would never end; return what was said."""
    run, said = current_run(), []
    try:
        with transaction.atomic():
            run.wait([run.submit(leaf)])
    except RuntimeError as error:
        said.append(str(error))
    try:
        run.wait(group([step(leaf)]))
    except ValueError as error:
        said.append(str(error))
    try:
        run.wait([run.submit(leaf, kwargs={"gate": "/nowhere"})], timeout=0.2)
    except TimeoutError as error:
        said.append(type(error).__name__)
    return said


@task
def misdirected() -> str:
    """Submit a child that the gateway refuses; return the code of its error."""
    run = current_run()
    (outcome,) = run.wait([run.submit(leaf, pool="nowhere")])
    assert outcome.error is not None
    return str(outcome.error["code"])


@task(max_attempts=2)
def shaken(values: list[Any]) -> list[Any]:
    """Submit children by key, die in the first attempt, wait for them in the second."""
    run = current_run()
    children = [run.submit(leaf, [value], key=f"leaf-{value}") for value in values]
    if run.attempt == 1:
        run.wait(children[:1])
        os.kill(os.getpid(), signal.SIGKILL)
    return [outcome.result for outcome in run.wait(children)]
