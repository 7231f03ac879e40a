"""The browser's module in node: its own tests, with a gateway, locks and channels in memory."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

TESTS = Path(__file__).with_name("tasks.test.mjs")


def test_the_browsers_module_passes_its_own_tests() -> None:
    command = ["node", "--test", "--test-reporter=tap", str(TESTS)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout
    counts = {name: int(number) for name, number in re.findall(r"^# (\w+) (\d+)$", told, re.MULTILINE)}
    failed = re.findall(r"^not ok .*?^  \.\.\.$", told, re.MULTILINE | re.DOTALL)
    assert counts.get("fail") == 0, "\n".join(failed) or told
    assert counts["pass"] == counts["tests"] >= 25, "none is skipped"
