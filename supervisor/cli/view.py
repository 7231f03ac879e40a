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
    ProgressColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from supervisor.cli.output import clean, print_json, print_table, seconds
from supervisor.cli.wording import describe, error_of, shortened, summary, table_of, traceback_lines
from taskkit.following import StreamEvent

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


def _print_worst(end: StreamEvent) -> None:
    rows = table_of(end)
    if rows:
        print_table([name.upper() for name in rows[0]], [list(row.values()) for row in rows])


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
        print(f"{clean(event.id):>6}  {clean(event.type)}  {describe(event)}", flush=True)
        if event.type == "stream.end":
            for line in traceback_lines(error_of(event)):
                print(line)
            _print_worst(event)

    def notice(self, text: str) -> None:
        """Print one line."""
        print(text, flush=True)


class LiveView:
    """A progress bar that stays at the bottom while the events scroll by above it.

    Until the run tells how far it is there is a spinner only, which leaves no line behind.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._began = time.monotonic()
        self._bar = Progress(*self._columns(), console=self._console, refresh_per_second=8)
        self._bar.live.transient = True
        self._task = self._bar.add_task(clean(title), total=None, message="")

    @staticmethod
    def _columns(*bar: ProgressColumn) -> tuple[ProgressColumn, ...]:
        title = TextColumn("{task.description}", markup=False)
        message = TextColumn("{task.fields[message]}", markup=False)
        return (SpinnerColumn(), title, *bar, TimeElapsedColumn(), message)

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
            if self._bar.live.transient:
                self._bar.live.transient = False
                self._bar.columns = self._columns(BarColumn(), TaskProgressColumn(), MofNCompleteColumn())
            self._bar.update(self._task, completed=done, total=total, message=message)
        if event.type == "stream.end":
            self._end(event)
        elif event.type != "run.progress":
            line = Text.assemble((f"{clean(event.id):>6}  ", "dim"), (clean(event.type), "cyan"), "  ")
            line.append(describe(event))
            if event.type == "run.retrying":  # why it failed is worth a second line
                self._say(line)
            else:
                self._console.print(line, no_wrap=True, overflow="ellipsis")

    def notice(self, text: str) -> None:
        """Print a dim line above the bar, never cut: it may be a command to copy."""
        self._say(Text(text, style="dim"))

    def _end(self, event: StreamEvent) -> None:
        good = was_successful(event)
        if good and (total := self._bar.tasks[0].total) is not None:
            self._bar.update(self._task, completed=total, message="")
        self._bar.stop()  # its last line stands above the outcome
        line = Text(shortened(summary(event)), style="green" if good else "red")
        line.append(f"  (after {seconds(time.monotonic() - self._began)})", "dim")
        self._say(line)
        for frame in traceback_lines(error_of(event)):
            self._say(Text(frame))
        _print_worst(event)

    def _say(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)
