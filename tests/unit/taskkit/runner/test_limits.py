"""The kernel's limits, each set in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers import ROOT

_LOOK = """
import json, os, resource, sys
from taskkit.runner.limits import limit_memory, protect
from taskkit.wire.messages import RunnerSpec
protect(RunnerSpec(id="u", **json.loads(sys.argv[1])))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "cpu": resource.getrlimit(resource.RLIMIT_CPU),
    "nice": os.nice(0),
    "oom": open("/proc/self/oom_score_adj").read().strip(),
    "privileges": status["NoNewPrivs"].strip(),
}))
"""


def _run(code: str, *args: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def _look(**spec: Any) -> dict[str, Any]:
    done = _run(_LOOK, json.dumps(spec))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_runner_writes_no_core_is_the_oom_killers_first_choice_and_gains_no_privileges() -> None:
    found = _look()
    assert found["core"] == [0, 0]
    assert found["oom"] == "500"
    assert found["privileges"] == "1"
    assert found["cpu"] == [-1, -1]


def test_nice_and_cpu_limit_come_from_the_spec() -> None:
    found = _look(nice=7, cpu_limit=30)
    assert found["nice"] == os.nice(0) + 7
    assert found["cpu"] == [30, 32], "soft below hard: SIGXCPU can be named, SIGKILL cannot"


def test_a_burnt_cpu_limit_is_sigxcpu() -> None:
    code = """
from taskkit.runner.limits import protect
from taskkit.wire.messages import RunnerSpec
protect(RunnerSpec(id="u", cpu_limit=1))
while True: pass
"""
    assert _run(code).returncode == -24


@pytest.mark.parametrize(("size", "fits"), [(None, True), (200 * 1024 * 1024, False)])
def test_a_memory_limit_is_a_memory_error_and_is_lifted_again(size: int | None, fits: bool) -> None:
    code = f"""
from taskkit.runner.limits import limit_memory
limit_memory({size})
try:
    bytearray(300 * 1024 * 1024); print("fits")
except MemoryError:
    print("refused")
limit_memory(None)
bytearray(300 * 1024 * 1024)
print("fits")
"""
    done = _run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["fits" if fits else "refused", "fits"]
