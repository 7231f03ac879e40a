"""The commands about runs: submit, follow, list, cancel, read."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supervisor.cli import exits
from supervisor.cli.connect import Search, Tree, connected
from supervisor.cli.options import Json, Pairs, SettingsModule, StateDir, parse_duration, parse_pairs
from supervisor.cli.output import between, clean, compact, print_json, print_table, seconds
from taskkit.errors import GatewayError, SettingsError

if TYPE_CHECKING:
    from supervisor.cli.view import View
    from taskkit.client import Client
    from taskkit.following import StreamEvent

Run = Annotated[str, typer.Argument(metavar="RUN", help="Id of the run.")]


def submit_pairs(client: Client, task: str, arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Submit a run of `task`; a model task takes the arguments as its fields."""
    try:
        model = client.task(task).get("kind") == "model"
    except GatewayError as error:
        if not _is_problem(error, "unknown-task"):
            raise
        close = difflib.get_close_matches(
            task, [str(known["name"]) for known in client.tasks()["tasks"]], n=1
        )
        hint = (
            f"did you mean {close[0]}? `bulkhead tasks` lists them"
            if close
            else "`bulkhead tasks` lists them"
        )
        words = str(error).replace("GET /api/v1/tasks lists them", hint)
        raise GatewayError(words, error.problem) from None
    if model:
        return client.submit(task, fields=arguments, **options)
    return client.submit(task, kwargs=arguments, **options)


def _is_problem(error: GatewayError, code: str) -> bool:
    return str(error.problem.get("type", "")).rpartition(":")[2] == code


def watch(
    client: Client,
    run: str,
    view: View,
    *,
    after: str = "",
    search: Callable[[Callable[[str], None]], Search] | None = None,
) -> StreamEvent | None:
    """Show the run's events until it has ended; return `stream.end`, or None if it was over before `after`.

    Args:
      search: makes what looks for the gateway when it is gone, from what it says so with.

    Raises:
      KeyboardInterrupt: somebody has seen enough; the run goes on.
    """
    last = None
    locate = None if search is None else search(view.notice)
    options: dict[str, Any] = {} if locate is None else {"locate": locate}
    with view:
        for event in client.follow(run, after=after, **options):
            if locate is not None:
                locate.found()
            view.event(event)
            last = event
    return last if last is not None and last.type == "stream.end" else None


def follow_to_the_end(
    client: Client,
    run: str,
    title: str,
    *,
    after: str,
    json: bool,
    tree: Tree | None = None,
    submitted: bool = False,
) -> int:
    """Follow a run on the terminal; return the exit code for its outcome, or for a follower who left.

    Args:
      tree: where to look for the gateway when it goes away.
      submitted: the run is new, so its id is shown first.
    """
    from supervisor.cli.view import choose_view, was_successful

    flags = "" if tree is None else tree.flags
    back = f"bulkhead follow {run}{flags}"

    def search(notice: Callable[[str], None]) -> Search:
        assert tree is not None
        remedy = f"; run {run} is in its store.\nStart it: bulkhead start{flags}\nBack:     {back}"
        return Search(tree.state_dir, notice, remedy)

    view = choose_view(title, json=json)
    if submitted and not json:
        view.notice(f"run {run}")
    try:
        end = watch(client, run, view, after=after, search=None if tree is None else search)
    except KeyboardInterrupt:
        view.notice(f"Left; run {run} goes on.")
        view.notice(f"Back:   {back}")
        view.notice(f"End it: bulkhead cancel {run}{flags}")
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
    tag: Annotated[list[str] | None, typer.Option(help="Tag to find it by; may be repeated.")] = None,
    settings: SettingsModule = None,
    state_dir: StateDir = None,
    json: Json = False,
) -> None:
    """Submit a run of TASK; print its id."""
    values = parse_pairs(arguments)
    limit = None if timeout is None else parse_duration(timeout)
    tree = Tree(settings, state_dir)
    client = tree.client
    answer = submit_pairs(
        client,
        task,
        values,
        pool=pool,
        priority=priority,
        timeout=limit,
        idempotency_key=key,
        tags=tag or None,
    )
    run = str(answer["id"])
    if json:
        print_json(answer)
    elif not follow:
        print(f"{run}\nFollow it: bulkhead follow {run}{tree.flags}")
    if follow:
        title = str(answer.get("task", task))
        raise typer.Exit(
            follow_to_the_end(client, run, title, after="", json=json, tree=tree, submitted=True)
        )


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
    tree = Tree(settings, state_dir)
    task = str(tree.client.status(run).get("task", run))
    raise typer.Exit(follow_to_the_end(tree.client, run, task, after=after, json=json, tree=tree))


def tasks(settings: SettingsModule = None, state_dir: StateDir = None, json: Json = False) -> None:
    """List the tasks that can be submitted."""
    page = connected(settings, state_dir).tasks()
    if json:
        print_json(page)
        return
    rows = [
        (row.get("name"), _parameters(row.get("parameters") or {}), (row.get("doc") or "").partition("\n")[0])
        for row in page.get("tasks", ())
    ]
    print_table(("TASK", "ARGUMENTS", "DOES"), rows)


def _parameters(schema: dict[str, Any]) -> str:
    """Return a JSON Schema's properties as one would type them: `how`, `n=10`; `[x]` is optional."""
    required = schema.get("required") or ()
    words = []
    for name, about in (schema.get("properties") or {}).items():
        default = about.get("default") if isinstance(about, dict) else None
        if name in required:
            words.append(name)
        else:
            words.append(f"[{name}]" if default is None else f"{name}={shlex.quote(compact(default))}")
    return " ".join(words)


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


def runners(
    drain: Annotated[
        str | None, typer.Option(metavar="ID", help="Have this runner finish its runs, then leave.")
    ] = None,
    kill: Annotated[
        str | None, typer.Option(metavar="ID", help="End this runner now; its runs begin again elsewhere.")
    ] = None,
    settings: SettingsModule = None,
    state_dir: StateDir = None,
    json: Json = False,
) -> None:
    """List the runner processes, or replace one."""
    if drain is not None and kill is not None:
        raise SettingsError("--drain and --kill: give one of them")
    client = connected(settings, state_dir)
    chosen = kill or drain
    if chosen is not None:
        ordered = client.end_runner(chosen, now=kill is not None)
        if json:
            print_json(ordered)
        else:
            print(
                f"Runner {clean(chosen)} is ended."
                if kill
                else f"Runner {clean(chosen)} leaves after its runs."
            )
        return
    page = client.runners()
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
    client = connected(settings, state_dir)
    try:
        snapshot = client.cancel(run, grace=seconds_left)
    except GatewayError as error:
        if not _is_problem(error, "run-finished"):
            raise
        status = client.status(run).get("status")
        raise GatewayError(
            f"run {run} has ended already ({status}); nothing to cancel", error.problem
        ) from None
    if json:
        print_json(snapshot)
    else:
        print(f"Cancelling {run} ({compact(snapshot.get('status', 'asked'))}).")


def release(
    run: Run, settings: SettingsModule = None, state_dir: StateDir = None, json: Json = False
) -> None:
    """Perform a quarantined run again, as a new run; print its id. A second time it is the same new run."""
    tree = Tree(settings, state_dir)
    snapshot = tree.client.status(run)
    error = snapshot.get("error")
    if not isinstance(error, dict) or error.get("code") != "quarantined":
        status = compact(snapshot.get("status", "unknown"))
        raise GatewayError(f"run {run} is {status}, not in quarantine; `bulkhead submit` makes new runs")
    made = tree.client.replay(run, idempotency_key=f"release-{snapshot['id']}")
    if json:
        print_json(made)
    else:
        print(f"{made['id']}\nFollow it: bulkhead follow {made['id']}{tree.flags}")


def reset(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Name of the task, such as demo.count.")],
    settings: SettingsModule = None,
    state_dir: StateDir = None,
    json: Json = False,
) -> None:
    """Let the runs of a task go that is held back because it kept crashing."""
    done = connected(settings, state_dir).reset_task(task)
    if json:
        print_json(done)
    else:
        name = compact(done.get("task", task))
        print(f"Task {name} is held no longer." if done.get("was_held") else f"Task {name} was not held.")


def logs(run: Run, settings: SettingsModule = None, state_dir: StateDir = None, json: Json = False) -> None:
    """Print what a run prints, line by line, until it ends."""
    for line in connected(settings, state_dir).lines(run):
        if json:
            print_json({"line": line})
        else:
            print(clean(line), flush=True)
