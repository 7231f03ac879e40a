"""Every way to die has one cause."""

from __future__ import annotations

import dataclasses
import signal

import pytest

from supervisor.causes import Death, classify, signal_name
from taskkit.wire.messages import Cause
from tests.conftest import DjangoProject


def exited(code: int) -> int:
    """The wait status of a process that left with `code`."""
    return code << 8


DUMPED = 0x80  # WCOREDUMP

#: death, kind, signal, exit code
DEATHS = [
    (Death(signal.SIGSEGV), "signal", "SIGSEGV", None),
    (Death(signal.SIGSEGV | DUMPED), "signal", "SIGSEGV", None),
    (Death(signal.SIGABRT), "signal", "SIGABRT", None),
    (Death(signal.SIGTERM), "signal", "SIGTERM", None),
    (Death(signal.SIGKILL), "signal", "SIGKILL", None),
    (Death(signal.SIGXCPU), "cpu_limit", "SIGXCPU", None),
    (Death(signal.SIGRTMIN + 5), "signal", f"SIG{signal.SIGRTMIN + 5}", None),
    (Death(99), "signal", "SIG99", None),
    (Death(exited(0)), "no_result", None, 0),
    (Death(exited(1)), "exit", None, 1),
    (Death(exited(255)), "exit", None, 255),
    (Death(exited(70)), "boot", None, 70),
    (Death(exited(71)), "descriptors", None, 71),
    (Death(exited(75)), "lost", None, 75),
    # Memory: the kernel's counter is a fact, pressure without a counter is a suspicion.
    (Death(signal.SIGKILL, oom_kills=1), "oom", "SIGKILL", None),
    (Death(signal.SIGKILL, oom_kills=3, memory_pressure=True), "oom", "SIGKILL", None),
    (Death(signal.SIGKILL, oom_kills=0), "signal", "SIGKILL", None),
    (Death(signal.SIGKILL, oom_kills=0, memory_pressure=True), "signal", "SIGKILL", None),
    (Death(signal.SIGKILL, memory_pressure=True), "oom_suspected", "SIGKILL", None),
    (Death(signal.SIGSEGV, oom_kills=1), "signal", "SIGSEGV", None),
    (Death(exited(1), oom_kills=1), "exit", None, 1),
    (Death(signal.SIGTERM, memory_pressure=True), "signal", "SIGTERM", None),
    # CPU time: the soft limit's signal can be ignored, the hard one's cannot.
    (Death(signal.SIGKILL, cpu=12.0, cpu_limit=10), "cpu_limit", "SIGKILL", None),
    (Death(signal.SIGKILL, cpu=9.0, cpu_limit=10), "signal", "SIGKILL", None),
    (Death(signal.SIGKILL, cpu=99.0), "signal", "SIGKILL", None),
    (Death(signal.SIGKILL, cpu=12.0, cpu_limit=10, oom_kills=1), "oom", "SIGKILL", None),
    (Death(signal.SIGXFSZ), "signal", "SIGXFSZ", None),
]


@pytest.mark.parametrize(("death", "kind", "name", "code"), DEATHS, ids=lambda value: str(value)[:60])
def test_the_cause(death: Death, kind: str, name: str | None, code: int | None) -> None:
    cause = classify(death)
    assert (cause.kind, cause.signal, cause.exit_code) == (kind, name, code)
    assert cause.detail, "a sentence for people"


@pytest.mark.parametrize(
    "ordered", ["timeout", "cancelled", "stopped", "corrupt", "operator", "something new"]
)
@pytest.mark.parametrize("death", [row[0] for row in DEATHS], ids=str)
def test_what_was_ordered_stands_over_what_the_kernel_says(death: Death, ordered: str) -> None:
    cause = classify(dataclasses.replace(death, ordered=ordered))
    assert cause.kind == ordered
    assert cause.detail
    # How it happened stays visible all the same.
    plain = classify(death)
    assert (cause.signal, cause.exit_code) == (plain.signal, plain.exit_code)


def test_a_file_that_grew_too_large_is_named() -> None:
    assert "RLIMIT_FSIZE" in classify(Death(signal.SIGXFSZ)).detail


def test_a_failed_start_says_why_in_one_line() -> None:
    traceback = "Traceback (most recent call last):\n  File …\nValueError: not allowed\n"
    assert classify(Death(exited(70), faults=traceback)).detail == (
        "the runner could not start: ValueError: not allowed"
    )
    assert classify(Death(exited(70))).detail == "the runner could not start"


def test_the_word_of_whoever_ordered_it_stands_over_ours() -> None:
    cause = classify(Death(signal.SIGKILL, ordered="corrupt", detail="a frame of 3 GB"))
    assert cause == Cause(kind="corrupt", signal="SIGKILL", detail="a frame of 3 GB")


def test_figures_and_the_traceback_are_passed_on() -> None:
    cause = classify(Death(signal.SIGSEGV, max_rss=7_000_000, cpu=1.5, faults="Fatal Python error"))
    assert (cause.max_rss, cause.cpu, cause.traceback) == (7_000_000, 1.5, "Fatal Python error")


@pytest.mark.parametrize("number", sorted(signal.valid_signals()))
def test_every_signal_has_a_name(number: int) -> None:
    assert signal_name(number).startswith("SIG")


def test_the_codes_are_those_that_a_child_leaves_with(django_project: DjangoProject) -> None:
    from taskkit.zygote import roles  # needs Django, which the room under test must not import

    assert classify(Death(exited(roles.BOOT_FAILED))).kind == "boot"
    assert classify(Death(exited(roles.ORPHANED))).kind == "lost"
