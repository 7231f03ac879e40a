"""A minute of everything dying, with nothing lost."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT

#: Seconds that a run may take beyond its attack, to come to rest: see SETTLE_SECONDS and what follows in run.py.
BEYOND = 240.0


def test_nothing_is_lost_whatever_dies(tmp_path: Path) -> None:
    seed = os.environ.get("BULKHEAD_CHAOS_SEED") or str(random.SystemRandom().randrange(2**32))
    seconds = os.environ.get("BULKHEAD_CHAOS_SECONDS") or "60"
    print(f"BULKHEAD_CHAOS_SEED={seed}")
    report, log = tmp_path / "report.json", tmp_path / "tree.log"
    # A process of its own: it becomes a subreaper, and counts what it has open.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.chaos", "--seed", seed, "--seconds", seconds),
            *("--json", str(report), "--log", str(log)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=float(seconds) + BEYOND,
        check=False,
    )
    tail = log.read_text(errors="replace")[-6_000:] if log.exists() else ""
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\nend of the tree's log:\n{tail}"
    found = json.loads(report.read_text())
    print(done.stdout)
    assert found["sound"]
    assert found["faults_total"] >= float(seconds) / 2, "hardly anything was attacked"
    assert found["figures"]["ok"] == found["figures"]["acknowledged"] > float(seconds)
