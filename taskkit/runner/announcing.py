"""Tells receivers of signals, ours as well as those of Django's Tasks, of an attempt's begin, of a run's end.

Receivers are the project's code, so they are called where the task is: in its process, in a thread that may use the
database. One that raises is logged by Django, and changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from taskkit.lifecycle import RunStatus
from taskkit.signals import ANNOUNCE, run_finished, run_started
from taskkit.wire.messages import Finished

if TYPE_CHECKING:
    from taskkit.runner.attempt import Attempt
    from taskkit.runner.performance import Performance


class Audience:
    """Who listens to one attempt.

    Args:
      performance: its side of Django's own Tasks interface, for a task that came by it.
    """

    def __init__(self, attempt: Attempt, target: Any, performance: Performance | None) -> None:
        self._attempt = attempt
        self._target = target
        self._performance = performance

    @property
    def is_empty(self) -> bool:
        """Whether nobody listens: then nothing has to be said, and no thread be entered for it."""
        if self._attempt.task == ANNOUNCE:
            return True
        return self._performance is None and not (run_started.receivers or run_finished.receivers)

    def begun(self) -> None:
        """The task is about to be called. Blocks on whatever the receivers do."""
        if self.is_empty:
            return
        run_started.send_robust(sender=self._target, run=self._attempt)
        if self._performance is not None:
            self._performance.begun()

    def ended(self, finished: Finished, error: BaseException | None) -> None:
        """The attempt has ended; `error` is what the task raised. Says nothing if another attempt follows."""
        if self.is_empty or finished.ending == "cancelled" or finished.retry_in is not None:
            return  # of a cancelled run another process tells: whether it is over is not known here
        failure = finished.failure
        failed = failure is not None
        said = (
            None
            if failure is None
            else {
                "code": "raised",
                "message": failure.message,
                "exception": failure.exception,
                "traceback": failure.traceback,
            }
        )
        status = RunStatus.FAILED if failed else RunStatus.SUCCESSFUL
        run_finished.send_robust(sender=self._target, run=self._attempt, status=status.value, error=said)
        if self._performance is None:
            return
        if said is not None:
            self._performance.failed(said, error)
        else:
            self._performance.succeeded(msgspec.json.decode(finished.result or b"null"))
