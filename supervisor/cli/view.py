"""What a person sees of one run while it runs.

Three views of the same events: ndjson for programs, plain lines for pipes, a live bar for a terminal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from supervisor.cli.output import clean, compact, print_json, seconds
from taskkit.following import StreamEvent

#: Most characters of a result that a terminal shows: some ten lines. `--json` shows all of it.
_SUMMARY_LIMIT: Final = 800

#: Seconds between lines about progress where there is no bar: an audit of 2,000 files is no 2,000 lines.
_PROGRESS_INTERVAL: Final = 1.0


class View(Protocol):
    """Shows a run; a context manager, left when nothing more is to be shown."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def event(self, event: StreamEvent) -> None:
        """Show the next event."""

    def notice(self, text: str) -> None:
        """Show a word of the command line's own."""


def choose_view(title: str, *, json: bool) -> View:
    """Return the view that fits standard output."""
    if json:
        return JsonView()
    return LiveView(title) if sys.stdout.isatty() else PlainView()


def own_data(data: Any) -> Any:
    """Return what the task itself sent: without the fields that the gateway adds, which begin with `_`."""
    if not isinstance(data, dict):
        return data
    return {key: value for key, value in data.items() if not key.startswith("_")}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def progress_of(event: StreamEvent) -> tuple[float, float | None, str] | None:
    """Return (done, total, message) if the event tells how far the run is.

    `run.progress` does by contract; `progress` by custom, with `step` and `total` or `total_steps`.
    """
    data = event.data
    if not isinstance(data, dict) or event.type not in ("run.progress", "progress"):
        return None
    done = _number(data.get("done", data.get("step")))
    if done is None:
        return None
    total = _number(data.get("total", data.get("total_steps")))
    message = data.get("message")
    return done, total, clean(message) if isinstance(message, str) else ""


def was_successful(end: StreamEvent | None) -> bool:
    """Whether the last event of a stream says that the run succeeded."""
    return end is not None and isinstance(end.data, dict) and end.data.get("status") == "SUCCESSFUL"


def summary(end: StreamEvent) -> str:
    """Return the outcome that `stream.end` tells, as one clean line."""
    data = end.data if isinstance(end.data, dict) else {}
    status = clean(str(data.get("status", "ended")))
    error = data.get("error")
    if isinstance(error, dict):
        return f"{status}: {compact(error.get('message') or error.get('detail') or error)}"
    return f"{status}: {compact(data['result'])}" if data.get("result") is not None else status


def _shortened(text: str) -> str:
    return text if len(text) <= _SUMMARY_LIMIT else text[:_SUMMARY_LIMIT] + "…"


class JsonView:
    """One JSON document per event; notices go to standard error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to put away."""

    def event(self, event: StreamEvent) -> None:
        """Print `{id, type, data}`."""
        print_json({"id": event.id, "type": event.type, "data": event.data})

    def notice(self, text: str) -> None:
        """Print to standard error."""
        print(text, file=sys.stderr, flush=True)


class PlainView:
    """One line per event: id, name, data. Of `run.progress`, which says nothing twice, one line a second.

    Args:
      clock: returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._quiet_until = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to put away."""

    def event(self, event: StreamEvent) -> None:
        """Print one line."""
        if event.type == "run.progress":
            if self._clock() < self._quiet_until:
                return
            self._quiet_until = self._clock() + _PROGRESS_INTERVAL
        text = summary(event) if event.type == "stream.end" else compact(own_data(event.data))
        print(f"{clean(event.id):>6}  {clean(event.type)}  {text}", flush=True)

    def notice(self, text: str) -> None:
        """Print one line."""
        print(text, flush=True)


class LiveView:
    """A progress bar that stays at the bottom while the events scroll by above it."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._began = time.monotonic()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[message]}", markup=False),
            console=self._console,
            refresh_per_second=8,
        )
        self._task = self._bar.add_task(clean(title), total=None, message="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def event(self, event: StreamEvent) -> None:
        """Move the bar, or print the event above it."""
        known = progress_of(event)
        if known is not None:
            done, total, message = known
            self._bar.update(self._task, completed=done, total=total, message=message)
        if event.type == "stream.end":
            self._end(event)
        elif event.type != "run.progress":
            line = Text.assemble((f"{clean(event.id):>6}  ", "dim"), (clean(event.type), "cyan"), "  ")
            line.append(compact(own_data(event.data)))
            self._print(line)

    def notice(self, text: str) -> None:
        """Print a dim line above the bar."""
        self._print(Text(text, style="dim"))

    def _end(self, event: StreamEvent) -> None:
        good = was_successful(event)
        if good and (total := self._bar.tasks[0].total) is not None:
            self._bar.update(self._task, completed=total, message="")
        line = Text(_shortened(summary(event)), style="green" if good else "red")
        line.append(f"  (after {seconds(time.monotonic() - self._began)})", "dim")
        self._console.print(line)

    def _print(self, line: Text) -> None:
        self._console.print(line, no_wrap=True, overflow="ellipsis")
