"""Signals about runs, in Django's own form.

Both are sent in the runner, around the task; `run_finished` of a run whose runner could not send it (it crashed, ran
out of time, was cancelled) is sent by another one, as the run `taskkit.announce`. At least once: a runner that dies
between the signal and the outcome has sent it already.

    @receiver(run_finished)
    def tell(sender, run, status, error, **kwargs): ...

`sender` is the task's function or model; `run` has id, task, attempt, metadata (`taskkit.current.Speaker`); `status` is
the run's; `error` is `{code, message, …}` or None. A receiver that raises is logged, and changes nothing.
"""

from __future__ import annotations

from typing import Final

from django.dispatch import Signal

#: The task that sends signals for other runs; nobody wants to hear of itself.
ANNOUNCE: Final = "taskkit.announce"

#: An attempt begins; arguments: run.
run_started = Signal()

#: A run has ended; arguments: run, status, error.
run_finished = Signal()
