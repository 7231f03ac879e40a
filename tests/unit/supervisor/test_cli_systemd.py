"""The systemd unit: systemd's own opinion of it, the lines that a tree depends on."""

from __future__ import annotations

import subprocess

from tests.helpers import ROOT

UNIT = ROOT / "deploy" / "systemd" / "bulkhead.service"


def test_systemd_accepts_the_unit() -> None:
    done = subprocess.run(["systemd-analyze", "verify", UNIT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_says_what_the_tree_needs() -> None:
    lines = [line for line in UNIT.read_text().splitlines() if line and line[0] not in "#["]
    needed = {
        "Type=notify",
        "NotifyAccess=main",
        "KillMode=mixed",
        "OOMPolicy=continue",
        "Delegate=yes",
        "Restart=always",
    }
    assert needed <= set(lines)
    assert any(line.startswith("TimeoutStopSec=") for line in lines)
