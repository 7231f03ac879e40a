"""What the kernel says about memory, read from files made here and from the real ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from supervisor import memory


def own_cgroup(controllers: str) -> str | None:
    """Return this process's path below the hierarchy of that name, if it is in one."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if names == controllers:
            return path.lstrip("/")
    return None


@pytest.fixture
def counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the file that has this process's count, in a made-up cgroup tree; it does not exist yet."""
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    path = own_cgroup("memory")
    if path is not None:
        file = tmp_path / "memory" / path / "memory.oom_control"
    else:
        file = tmp_path / (own_cgroup("") or "") / "memory.events"
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def test_kills_are_counted_since_the_last_call(counter: Path) -> None:
    counter.write_text("low 0\noom 9\noom_kill 4\n")
    kills = memory.OomCounter()
    assert kills.since_last() == 0, "those before our time are nobody's of ours"
    counter.write_text("low 0\noom 9\noom_kill 6\n")
    assert kills.since_last() == 2
    assert kills.since_last() == 0


def test_without_a_counter_nothing_is_said(counter: Path) -> None:
    assert not counter.exists()
    kills = memory.OomCounter()
    assert kills.since_last() is None


@pytest.mark.parametrize("text", ["", "oom 3\n", "oom_kill many\n", "oom_kill_disable 0\n"])
def test_a_file_without_the_number_says_nothing(counter: Path, text: str) -> None:
    counter.write_text(text)
    assert memory.OomCounter().since_last() is None


def test_a_counter_that_vanishes_says_nothing_until_it_is_back(counter: Path) -> None:
    counter.write_text("oom_kill 1\n")
    kills = memory.OomCounter()
    counter.unlink()
    assert kills.since_last() is None
    counter.write_text("oom_kill 5\n")
    assert kills.since_last() is None, "how many came in between is not known"
    counter.write_text("oom_kill 6\n")
    assert kills.since_last() == 1


def test_this_machine_answers() -> None:
    assert memory.OomCounter().since_last() in (None, 0)


@pytest.mark.parametrize(
    ("available", "scarce"), [(0, True), (49, True), (50, False), (500, False), (1000, False)]
)
def test_less_than_a_twentieth_is_scarce(
    monkeypatch: pytest.MonkeyPatch, available: int, scarce: bool
) -> None:
    facts = SimpleNamespace(available=available, total=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: facts)
    assert memory.is_scarce() is scarce
