"""The demo's tasks: ordinary functions under `@task`.

Each is called `demo.<function>`. What it returns is the run's result; `emit` and `progress` are heard by
everybody who follows the run, while it runs or later. What a parameter's annotation says is checked before
a run is accepted.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import os
import sys
import sysconfig
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
from msgspec import Meta

from demo.complexity import Function, measure, python_files
from demo.crashes import MIB, WAYS
from taskkit import emit, progress, task

Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]

#: How many functions `audit` lists, and the complexity from which a function is worth an event.
WORST = 10
COMPLEX = 15

#: (complexity, file, line, function), so that the least complex one is the smallest.
Finding = tuple[int, str, int, str]


@task
def count(n: Count = 10, delay: Seconds = 0.5) -> int:
    """Count to `n`, one `progress` event per step, `delay` seconds after each."""
    for i in range(1, n + 1):
        emit("progress", {"step": i, "total": n})
        time.sleep(delay)
    return n


@task
def audit(path: str | None = None) -> dict[str, Any]:
    """Measure every Python function below `path`, by default Python's standard library.

    Real work for one core. A function that is among the ten most complex ones so far is told at once, as an
    event `finding`; a file that cannot be parsed is told as `unreadable` and counted, the rest goes on.
    """
    top = Path(path or sysconfig.get_path("stdlib"))
    files = python_files(top)
    if not files:
        raise ValueError(f"there is no Python file at {top}")
    lines = functions = errors = 0
    worst: list[Finding] = []
    for done, file in enumerate(files, start=1):
        name = str(file.relative_to(top)) if file != top else file.name
        try:
            measured = measure(file)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            errors += 1
            emit("unreadable", {"file": name, "reason": f"{type(error).__name__}: {error}"})
        else:
            lines += measured.lines
            functions += len(measured.functions)
            _report(worst, name, measured.functions)
        progress(done, len(files), name)
    return {
        "path": str(top),
        "files": len(files),
        "lines": lines,
        "functions": functions,
        "errors": errors,
        "worst": [
            {"complexity": complexity, "file": file, "line": line, "function": function}
            for complexity, file, line, function in sorted(worst, reverse=True)
        ],
    }


def _report(worst: list[Finding], file: str, functions: list[Function]) -> None:
    """Keep the WORST most complex functions in the heap `worst`; emit those that get in."""
    for function in functions:
        entry = (function.complexity, file, function.line, function.name)
        if len(worst) < WORST:
            heapq.heappush(worst, entry)
        elif heapq.heappushpop(worst, entry) == entry:
            continue
        if function.complexity >= COMPLEX:
            emit("finding", {"file": file, **asdict(function)})


@task
def burn(seconds: Seconds = 5.0) -> int:
    """Keep one core busy without ever waiting; return how many hashes that made."""
    end = time.monotonic() + seconds
    rounds = 0
    digest = b""
    while time.monotonic() < end:
        digest = hashlib.sha256(digest).digest()
        rounds += 1
    return rounds


@task
async def quiet(seconds: Seconds = 5.0) -> None:
    """Say nothing for a while. An async task: it can be cancelled at every `await`."""
    await anyio.sleep(seconds)


@task
def flood(n: Count = 10_000, size: Annotated[int, Meta(ge=1)] = 200) -> int:
    """Emit `n` events of `size` bytes as fast as they are taken; return how many bytes that were."""
    for i in range(1, n + 1):
        frame = len(json.dumps({"i": i, "fill": ""}, separators=(",", ":")))
        emit("flood", {"i": i, "fill": "x" * max(0, size - frame)})
    return n * size


@task
def noisy(lines: Count = 3) -> None:
    """Speak in four ways that know nothing of tasks; followers who may see `log` events get each line."""
    for i in range(1, lines + 1):
        print(f"print: line {i}")
        print(f"stderr: line {i}", file=sys.stderr)
        logging.getLogger(__name__).info("logging: line %d", i)
        sys.stdout.flush()
        os.write(1, f"os.write: line {i}\n".encode())  # as a C library or a child process would


@task(memory_limit=512 * MIB)
def crash(
    how: Literal[
        "segv",
        "abort",
        "exit",
        "kill",
        "oom",
        "raise",
        "recursion",
        "close_fds",
        "garbage",
        "fork_orphan",
    ],
) -> Any:
    """Go wrong, in the way that `how` names; see `demo/crashes.py`. Nobody else notices."""
    return WAYS[how]()
