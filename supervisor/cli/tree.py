"""The commands that start, stop, show the process tree."""

from __future__ import annotations

import json as json_module
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from supervisor import detach
from supervisor.cli import connect, exits, operate
from supervisor.cli.foreground import Foreground, next_steps, plain
from supervisor.cli.options import Json, SettingsModule, StateDir
from supervisor.cli.output import print_error, print_json, print_table, seconds
from supervisor.cli.project import flags_of, place_demo_database, state_dir_for
from supervisor.config import Config
from taskkit.errors import AlreadyRunning, NeverReady, SettingsError
from taskkit.settings import parse_bind
from taskkit.wire.messages import Status

#: What a tree was started with, beside its store: `restart` starts it the same way.
_START_FILE: Final = "start.json"

#: Seconds until READY: a large project imports in a few; a slow disk and a cold cache take ten times as long.
_READY_DEADLINE: Final = 60.0

#: Seconds for a tree to stop: stop_grace_seconds 10 + kill_grace_seconds 2 + the drain, doubled for settings.
_STOP_DEADLINE: Final = 30.0

#: Seconds for an operation that imports the project: 120 until the new zygote must be READY, 30 each for gateway and
#: pools.
_OPERATION_DEADLINE: Final = 200.0

Bind = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Listen here; port 0 takes a free one.")]
Uds = Annotated[Path | None, typer.Option(metavar="PATH", help="Listen on this Unix socket instead.")]
Runners = Annotated[int | None, typer.Option(min=1, metavar="N", help="Runs at once in the pool 'default'.")]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for it.")]
Now = Annotated[bool, typer.Option("--now", help="Kill what runs instead of asking it to stop.")]


def overrides(
    bind: str | None, uds: Path | None, state_dir: Path | None, runners: int | None
) -> dict[str, Any]:
    """Return the settings that the flags of `run` stand for.

    Raises:
      SettingsError: flags contradict each other, or an address is none.
    """
    if bind is not None and uds is not None:
        raise SettingsError(f"--bind {bind} and --uds {uds}: give one of them")
    if bind is not None:
        parse_bind(bind)
    given = {
        "BIND": bind,
        "UDS": None if uds is None else str(uds.expanduser().absolute()),
        "STATE_DIR": None if state_dir is None else str(state_dir.expanduser().absolute()),
        "POOLS": None if runners is None else {"default": {"runners": runners}},
    }
    return {key: value for key, value in given.items() if value is not None}


def run(
    context: typer.Context,
    settings: SettingsModule = None,
    bind: Bind = None,
    uds: Uds = None,
    state_dir: StateDir = None,
    runners: Runners = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing on standard output.")] = False,
    ready_fd: Annotated[int | None, typer.Option(hidden=True, min=3)] = None,
    json: Json = False,
) -> None:
    """Run the tree in the foreground, until Ctrl-C or TERM."""
    project = connect.choose(settings, state_dir)
    if project.demo:
        place_demo_database(state_dir)
    config = Config(
        settings_module=project.settings_module,
        overrides=overrides(bind, uds, state_dir, runners),
        path=project.path,
        demo=project.demo,
        ready_fd=ready_fd,
        quiet=quiet,
    )
    context.obj(Foreground(config, flags_of(project, state_dir), json))


def _launch(arguments: Sequence[str], cwd: str, state_dir: Path, timeout: float) -> Status:
    """Start a tree in the background; return its status once it is READY.

    Raises:
      NeverReady: it died, or was not READY in time and was ended; the message has the end of its log.
      AlreadyRunning: it says so.
    """
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    background = detach.spawn([*detach.COMMAND, *arguments], state_dir / detach.LOG_NAME, cwd=cwd)
    if not background.wait_ready(timeout):
        code = background.end(_STOP_DEADLINE) if background.late else background.reap(_STOP_DEADLINE)
        words = f"{background.last_words()}\n(log: {background.log})"
        if code == exits.ALREADY_RUNNING:
            raise AlreadyRunning(words)
        late = (
            f"it was not READY within {timeout:.0f} s, and was ended"
            if background.late
            else f"exit code {code}"
        )
        error = NeverReady(f"the tree did not start ({late}):\n{words}")
        error.exit_code = code if code in (exits.FAILED, exits.GAVE_UP) else exits.BAD_CONFIGURATION
        raise error
    operator = operate.connect(state_dir)
    if operator is None:
        raise NeverReady(f"the tree was READY, and is gone:\n{background.last_words()}")
    with operator:
        return operator.ask("status")


def _write_recipe(place: Path, arguments: Sequence[str], cwd: str, pid: int | None) -> None:
    """Keep what `restart` needs; `pid` tells this tree from one that somebody else has started here since."""
    recipe = {"arguments": list(arguments), "cwd": cwd, "pid": pid}
    (place / _START_FILE).write_text(json_module.dumps(recipe) + "\n")


def _report_started(status: Status, state_dir: Path, flags: str, *, json: bool) -> None:
    if json:
        print_json(plain(status))
        return
    print(f"Bulkhead runs at {status.url} (pid {status.pid}, log {state_dir / detach.LOG_NAME}).")
    print(f"{next_steps(status, flags)}\nStop:   bulkhead stop{flags}")


def start(
    settings: SettingsModule = None,
    bind: Bind = None,
    uds: Uds = None,
    state_dir: StateDir = None,
    runners: Runners = None,
    timeout: Timeout = _READY_DEADLINE,
    json: Json = False,
) -> None:
    """Start the tree in the background; return when it is READY."""
    overrides(bind, uds, state_dir, runners)  # refuse contradictions here, not in a log
    project = connect.choose(settings, state_dir)
    place = state_dir_for(project, state_dir, exactly=True)
    if (operator := operate.connect(place)) is not None:
        operator.close()
        raise AlreadyRunning(
            f"a tree runs on {place} already (pid {operator.pid}); "
            f"see: bulkhead status{flags_of(project, state_dir)}"
        )
    arguments = ["run", "--quiet", "--settings", project.settings_module, "--state-dir", str(place)]
    for flag, value in (("--bind", bind), ("--uds", uds and uds.absolute()), ("--runners", runners)):
        arguments += [] if value is None else [flag, str(value)]
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write_recipe(place, arguments, os.getcwd(), None)
    status = _launch(arguments, os.getcwd(), place, timeout)
    _write_recipe(place, arguments, os.getcwd(), status.pid)
    _report_started(status, place, flags_of(project, state_dir), json=json)


def _stop_tree(place: Path, *, now: bool, timeout: float) -> tuple[bool, dict[int, str]]:
    operator = operate.connect(place)
    if operator is None:
        return False, {}
    with operator:
        return True, operate.stop(operator, now=now, timeout=timeout)


def _say_left(left: dict[int, str]) -> None:
    names = ", ".join(f"{name} (pid {pid})" for pid, name in left.items())
    pids = " ".join(map(str, left))
    print_error(f"still there: {names}; stop it with --now, or in the end: kill -KILL {pids}")


def stop(
    settings: SettingsModule = None,
    state_dir: StateDir = None,
    now: Now = False,
    timeout: Timeout = _STOP_DEADLINE,
    json: Json = False,
) -> None:
    """Stop the tree; return when all of it is gone."""
    place = state_dir_for(connect.choose(settings, state_dir), state_dir, exactly=False)
    was_running, left = _stop_tree(place, now=now, timeout=timeout)
    if json:
        print_json({"was_running": was_running, "left": [{"pid": p, "name": n} for p, n in left.items()]})
    elif left:
        _say_left(left)
    else:
        print("Stopped." if was_running else f"No tree runs on {place}.")
    if left:
        raise typer.Exit(exits.FAILED)


def _operator(settings: str | None, state_dir: Path | None) -> operate.Operator:
    """Return a connection to the running tree.

    Raises:
      NotRunning: there is none.
    """
    project = connect.choose(settings, state_dir)
    place = state_dir_for(project, state_dir, exactly=False)
    operator = operate.connect(place)
    if operator is None:
        raise connect.not_running(project, place, state_dir)
    return operator


def _operate(settings: str | None, state_dir: Path | None, name: str, *, json: bool, done: str) -> None:
    """Have the running tree carry out an operation that takes its time; say `done`, or what went wrong."""
    with _operator(settings, state_dir) as operator:
        found = operator.ask(name, timeout=_OPERATION_DEADLINE)
    if json:
        print_json(plain(found))
    elif found.error:
        print_error(f"{name}: {found.error}")
    else:
        print("\n".join([done, *found.notes]))
    if found.error:
        raise typer.Exit(exits.BAD_CONFIGURATION)


def reload(settings: SettingsModule = None, state_dir: StateDir = None, json: Json = False) -> None:
    """Load the project's code anew; runs under way finish on the old, streams go on. If it cannot be
    imported, the old code serves on, and the exit code is 2."""
    _operate(
        settings, state_dir, "reload", json=json, done="Reloaded: the next run is performed by the new code."
    )


def upgrade(settings: SettingsModule = None, state_dir: StateDir = None, json: Json = False) -> None:
    """Become the installed version of Bulkhead, in place: runs under way go on, streams come back by themselves."""
    with _operator(settings, state_dir) as operator:
        found = operator.ask_to_leave("upgrade", timeout=_OPERATION_DEADLINE)
    if found is None:  # it is another program by now, which has its own operator socket in the same place
        done = "Upgraded: supervisor, gateway and the code of the next run are of the installed version."
        _operate(settings, state_dir, "upgraded", json=json, done=done)
        return
    if json:
        print_json(plain(found))
    else:
        print_error(f"upgrade: {found.error}")
    raise typer.Exit(exits.FAILED)


def restart(
    settings: SettingsModule = None,
    state_dir: StateDir = None,
    now: Now = False,
    timeout: Timeout = _READY_DEADLINE,
    gateway: Annotated[
        bool, typer.Option("--gateway", help="Only the gateway: runs go on, streams come back by themselves.")
    ] = False,
    json: Json = False,
) -> None:
    """Stop the tree, then start it with the arguments of its last `start`."""
    if gateway:
        _operate(settings, state_dir, "restart-gateway", json=json, done="Another gateway serves.")
        return
    project = connect.choose(settings, state_dir)
    flags = flags_of(project, state_dir)
    place = state_dir_for(project, state_dir, exactly=False)
    recipe = _read_recipe(place, flags)
    _, left = _stop_tree(place, now=now, timeout=_STOP_DEADLINE)
    if left:
        _say_left(left)
        raise typer.Exit(exits.FAILED)
    status = _launch(recipe["arguments"], recipe["cwd"], place, timeout)
    _write_recipe(place, recipe["arguments"], recipe["cwd"], status.pid)
    _report_started(status, place, flags, json=json)


def _read_recipe(place: Path, flags: str) -> dict[str, Any]:
    """Return what the tree on `place` was started with.

    Raises:
      SettingsError: it was not started by `bulkhead start`, or its file is damaged.
    """
    operator = operate.connect(place)
    running = None
    if operator is not None:
        running = operator.pid
        operator.close()
    try:
        recipe: dict[str, Any] = json_module.loads((place / _START_FILE).read_text())
    except FileNotFoundError:
        recipe = {"pid": None}
        if running is None:
            raise SettingsError(
                f"no tree was started on {place} by `bulkhead start{flags}`; use that"
            ) from None
    except ValueError:
        raise SettingsError(f"{place / _START_FILE} is damaged; use `bulkhead start{flags}`") from None
    if running is not None and recipe.get("pid") != running:
        raise SettingsError(
            f"the tree on {place} (pid {running}) runs in the foreground, of a terminal or a service: "
            "restart it there (Ctrl-C, then `bulkhead run` again)"
        )
    return recipe


def status(settings: SettingsModule = None, state_dir: StateDir = None, json: Json = False) -> None:
    """Show the tree; exit code 1 when it does not run."""
    project = connect.choose(settings, state_dir)
    place = state_dir_for(project, state_dir, exactly=False)
    operator = operate.connect(place)
    if operator is None:
        if not json:
            raise connect.not_running(project, place, state_dir)
        print_json({"running": False, "state_dir": str(place)})
        raise typer.Exit(exits.FAILED)
    with operator:
        found = operator.ask("status")
    if json:
        print_json({"running": True, **plain(found)})
    else:
        _show(found)


def _show(status: Status) -> None:
    print(f"{status.state} at {status.url}, pid {status.pid}, up {seconds(status.uptime)}")
    print(f"settings {status.settings_module}, state directory {status.state_dir}")
    rows = [
        (child.name, child.kind, child.state, child.pid or "", child.restarts, seconds(child.age), child.last)
        for child in status.children
    ]
    print_table(("NAME", "KIND", "STATE", "PID", "RESTARTS", "AGE", "LAST"), rows)
    for note in status.notes:
        print(note)
