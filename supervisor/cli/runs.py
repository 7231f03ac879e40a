"""The commands about runs: submit, follow, list, cancel, read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from supervisor.cli import exits
from supervisor.cli.connect import connected
from supervisor.cli.options import Json, Pairs, SettingsModule, StateDir, parse_duration, parse_pairs
from supervisor.cli.output import between, clean, compact, print_json, print_table, seconds

if TYPE_CHECKING:
    from supervisor.cli.view import View
    from taskkit.client import Client
    from taskkit.following import StreamEvent

Run = Annotated[str, typer.Argument(metavar="RUN", help="Id of the run.")]


def submit_pairs(client: Client, task: str, arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Submit a run of `task`; a model task takes the arguments as its fields."""
    model = client.task(task).get("kind") == "model"
    if model:
        return client.submit(task, fields=arguments, **options)
    return client.submit(task, kwargs=arguments, **options)


def watch(client: Client, run: str, view: View, *, after: str = "") -> StreamEvent | None:
    """Show the run's events until it has ended; return `stream.end`, or None if it was over before `after`.

    Raises:
      KeyboardInterrupt: somebody has seen enough; the run goes on.
    """
    last = None
    with view:
        for event in client.follow(run, after=after):
            view.event(event)
            last = event
    return last if last is not None and last.type == "stream.end" else None


def follow_to_the_end(client: Client, run: str, title: str, *, after: str, json: bool) -> int:
    """Follow a run on the terminal; return the exit code for its outcome, or for a follower who left."""
    from supervisor.cli.view import choose_view, was_successful

    view = choose_view(title, json=json)
    try:
        end = watch(client, run, view, after=after)
    except KeyboardInterrupt:
        view.notice(f"Left; run {run} goes on. Back: bulkhead follow {run}    End it: bulkhead cancel {run}")
        return exits.FAILED
    if end is None:  # joined behind the end: the outcome is in the snapshot
        status = client.status(run).get("status")
        view.notice(f"Run {run} has ended: {status}")
        return exits.OK if status == "SUCCESSFUL" else exits.FAILED
    return exits.OK if was_successful(end) else exits.FAILED


def submit(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Name of the task, such as demo.count.")],
    arguments: Pairs = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the run to its end.")] = False,
    pool: Annotated[str | None, typer.Option(help="Pool that performs it.")] = None,
    priority: Annotated[int | None, typer.Option(min=-100, max=100, help="Higher comes first.")] = None,
    timeout: Annotated[str | None, typer.Option(metavar="DURATION", help="Per attempt, such as 15m.")] = None,
    key: Annotated[str | None, typer.Option(help="Idempotency key: the same again is the same run.")] = None,
    settings: SettingsModule = None,
    state_dir: StateDir = None,
    json: Json = False,
) -> None:
    """Submit a run of TASK; print its id."""
    values = parse_pairs(arguments)
    limit = None if timeout is None else parse_duration(timeout)
    client = connected(settings, state_dir)
    answer = submit_pairs(
        client, task, values, pool=pool, priority=priority, timeout=limit, idempotency_key=key
    )
    run = str(answer["id"])
    if json:
        print_json(answer)
    elif not follow:
        print(f"{run}\nFollow it: bulkhead follow {run}")
    if follow:
        raise typer.Exit(follow_to_the_end(client, run, str(answer.get("task", task)), after="", json=json))


def follow(
    run: Run,
    after: Annotated[
        str, typer.Option(metavar="CURSOR", help="Continue after this event id; or latest, or now.")
    ] = "",
    settings: SettingsModule = None,
    state_dir: StateDir = None,
    json: Json = False,
) -> None:
    """Show a run's events until it ends; exit code 0 when it was successful. Ctrl-C leaves it running."""
    client = connected(settings, state_dir)
    task = str(client.status(run).get("task", run))
    raise typer.Exit(follow_to_the_end(client, run, task, after=after, json=json))


def runs(
    status: Annotated[
        str | None, typer.Option(help="READY, RUNNING, SUCCESSFUL, FAILED or CANCELLED.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only runs of this task.")] = None,
    tag: Annotated[str | None, typer.Option(help="Only runs with this tag.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many.")] = 20,
    settings: SettingsModule = None,
    state_dir: StateDir = None,
    json: Json = False,
) -> None:
    """List runs, newest first."""
    client = connected(settings, state_dir)
    page = client.runs(status=None if status is None else status.upper(), task=task, tag=tag, limit=limit)
    if json:
        print_json(page)
        return
    rows = [
        (
            row.get("id"),
            row.get("task"),
            row.get("status"),
            row.get("created_at"),
            between(row.get("started_at"), row.get("finished_at")),
        )
        for row in page.get("runs", ())
    ]
    print_table(("RUN", "TASK", "STATUS", "CREATED", "TOOK"), rows)


def runners(settings: SettingsModule = None, state_dir: StateDir = None, json: Json = False) -> None:
    """List the runner processes."""
    page = connected(settings, state_dir).runners()
    if json:
        print_json(page)
        return
    rows = [
        (
            row.get("id"),
            row.get("pid"),
            row.get("pool"),
            row.get("role"),
            row.get("state"),
            ",".join(row.get("runs") or ()),
            _mebibytes(row.get("rss")),
            seconds(row["age"]) if isinstance(row.get("age"), int | float) else "",
            row.get("runs_done"),
            row.get("last_ending"),
        )
        for row in page.get("runners", ())
    ]
    print_table(("RUNNER", "PID", "POOL", "ROLE", "STATE", "RUNS", "RSS", "AGE", "DONE", "LAST"), rows)


def _mebibytes(size: Any) -> str:
    return f"{size / 2**20:.1f} MiB" if isinstance(size, int) else ""


def cancel(
    run: Run,
    grace: Annotated[str | None, typer.Option(metavar="DURATION", help="Before TERM, such as 10s.")] = None,
    settings: SettingsModule = None,
    state_dir: StateDir = None,
    json: Json = False,
) -> None:
    """Ask a run to stop; then it is terminated, then killed."""
    seconds_left = None if grace is None else parse_duration(grace)
    snapshot = connected(settings, state_dir).cancel(run, grace=seconds_left)
    if json:
        print_json(snapshot)
    else:
        print(f"Cancelling {run} ({compact(snapshot.get('status', 'asked'))}).")


def logs(run: Run, settings: SettingsModule = None, state_dir: StateDir = None, json: Json = False) -> None:
    """Print what a run prints, line by line, until it ends."""
    for line in connected(settings, state_dir).lines(run):
        if json:
            print_json({"line": line})
        else:
            print(clean(line), flush=True)
