"""What the API shows of runners."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from gateway import face
from gateway.documents import Runner
from gateway.snapshot import rfc3339
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


def measure(views: Sequence[face.RunnerView]) -> list[Runner]:
    """Return the runners with RSS in bytes, CPU and age in seconds. Reads /proc: call it in a thread."""
    return [_runner(view) for view in views]


def _runner(view: face.RunnerView) -> Runner:
    rss, cpu = (None, None) if view.state == "EXITED" else _usage(view.pid)
    return {
        "id": view.id,
        "pid": view.pid,
        "pool": view.pool,
        "role": view.role,
        "state": view.state,
        "runs": view.runs,
        "rss": rss,
        "cpu": cpu,
        "started_at": rfc3339(view.started_at),
        "age": round(max(0.0, time.time() - view.started_at), 3),
        "runs_done": view.runs_done,
        "last_ending": view.last_ending,
    }


def _usage(pid: int) -> tuple[int | None, float | None]:
    """Return RSS and CPU of a process; nothing of one that has just gone, or is no longer ours to see."""
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        return process.memory_info().rss, round(times.user + times.system, 3)
    except (psutil.Error, ValueError):
        return None, None
