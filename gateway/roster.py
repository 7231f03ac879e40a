"""What the API shows of runners."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.state import OpenAttempt, RunnerState


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerView:
    """One runner as `/api/v1/runners` shows it: "STARTING", "IDLE", "BUSY", "RETIRING" or "EXITED"."""

    id: str
    pid: int
    pool: str
    role: str
    state: str
    runs: tuple[str, ...]
    started_at: float
    runs_done: int
    last_ending: str | None


def view_of(runner: RunnerState, attempts: Mapping[str, OpenAttempt]) -> RunnerView:
    """Return a runner as the API shows it; `attempts` are the open ones by token."""
    ids = tuple(attempts[token].run.id for token in runner.tokens)
    return RunnerView(
        id=runner.spec.id,
        pid=runner.pid,
        pool=runner.spec.pool,
        role=runner.spec.role,
        state=_state_of(runner),
        runs=ids,
        started_at=runner.started_at,
        runs_done=runner.runs_done,
        last_ending=runner.last_ending,
    )


def _state_of(runner: RunnerState) -> str:
    if runner.exited is not None:
        return "EXITED"
    if runner.session.seq == 0:
        return "STARTING"
    if runner.tokens:
        return "BUSY"
    return "RETIRING" if runner.retiring else "IDLE"
