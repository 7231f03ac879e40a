"""What an operator is told of crash loops, and what the queues and the store are."""

from __future__ import annotations

from gateway.casualties import Casualties
from gateway.dispatch import Queues
from gateway.store.rows import MAX_QUARANTINED, Batch, Opened, QuarantinedRow, RunRow
from taskkit.lifecycle import Ending
from taskkit.settings import BreakerSettings

SETTINGS = BreakerSettings(crashes=2, pause=10.0)


class Desk:
    """Casualties over two open runs of one task, tripped at moment 0 (Unix time 1000)."""

    def __init__(self) -> None:
        self.queues = Queues()
        self.runs = {no: RunRow(no=no, id=f"run-{no}", task="t.f") for no in (1, 2, 3)}
        self.casualties = Casualties(SETTINGS, self.queues, self.runs)
        self.batch = Batch()

    def end(self, no: int, ending: Ending, moment: float) -> None:
        self.casualties.ended(
            self.runs[no], ending, "it died of SIGSEGV", moment, 1000.0 + moment, self.batch
        )

    def trip(self) -> None:
        self.end(1, Ending.CRASHED, 0.0)
        self.end(2, Ending.CRASHED, 0.0)


def test_nothing_has_happened() -> None:
    desk = Desk()
    assert desk.casualties.notes() == []
    assert desk.casualties.statistics(0.0) == {"held": [], "quarantined": []}
    assert not desk.batch


def test_a_tripped_task_waits_is_named_and_written_down() -> None:
    desk = Desk()
    desk.trip()
    desk.queues.add(desk.runs[3], 0.0)
    assert desk.queues.take("default", 0.0) is None
    assert desk.batch.breakers["t.f"]
    assert desk.batch.full
    (note,) = desk.casualties.notes()
    assert "task t.f is held back: 2 runs of it crashed" in note
    assert "it died of SIGSEGV" in note
    assert "1970-01-01T00:16:50Z" in note
    assert "bulkhead reset t.f" in note
    (held,) = desk.casualties.statistics(4.0)["held"]
    assert (held["task"], held["remaining"], held["crashes"], held["trial"]) == ("t.f", 6.0, 2, None)


def test_the_run_on_trial_is_named_and_its_success_lets_all_go() -> None:
    desk = Desk()
    desk.trip()
    desk.queues.add(desk.runs[3], 0.0)
    run = desk.queues.take_alone("default", 0.0, desk.casualties.trials(10.0))
    assert run is desk.runs[3]
    desk.casualties.claimed(run, 10.0, 1010.0, desk.batch)
    assert "run run-3 is on trial" in desk.casualties.notes()[0]
    assert desk.casualties.statistics(10.0)["held"][0]["trial"] == "run-3"
    desk.end(3, Ending.RETURNED, 11.0)
    assert desk.casualties.notes() == []
    assert desk.batch.breakers == {"t.f": None}
    desk.queues.add(desk.runs[1], 0.0)
    assert desk.queues.take("default", 0.0) is desk.runs[1]


def test_a_reset_lets_all_go_and_says_whether_there_was_anything() -> None:
    desk = Desk()
    desk.trip()
    assert desk.casualties.reset("t.f", 1.0, 1001.0, desk.batch)
    assert not desk.casualties.reset("t.f", 1.0, 1001.0, desk.batch)
    assert desk.batch.breakers == {"t.f": None}


def test_what_the_gateway_before_knew_is_known() -> None:
    before = Desk()
    before.trip()
    record = before.batch.breakers["t.f"]
    assert record is not None
    opened = Opened({}, [], {}, 1, 1, {"t.f": record}, [QuarantinedRow("run-9", "t.g", 1000.0)])
    desk = Desk()
    desk.casualties.load(opened, (), 77.0, 1003.0, desk.batch)
    desk.queues.add(desk.runs[1], 0.0)
    assert desk.queues.take("default", 0.0) is None
    held, quarantined = desk.casualties.notes()
    assert "t.f is held back" in held
    assert "quarantine: 1 run since" in quarantined
    assert desk.casualties.next_trial(77.0) == 84.0


def test_quarantined_runs_are_named_newest_first_until_they_are_released() -> None:
    desk = Desk()
    for no in (1, 2, 3):
        desk.casualties.quarantine(desk.runs[no], 1000.0 + no)
    (note,) = desk.casualties.notes()
    assert "3 runs since 1970-01-01T00:16:41Z, the newest: run-3 (t.f), run-2 (t.f), run-1" in note
    desk.casualties.released("run-3")
    assert [row["run"] for row in desk.casualties.statistics(0.0)["quarantined"]] == ["run-2", "run-1"]


def test_the_memory_of_them_is_bounded() -> None:
    desk = Desk()
    for no in range(MAX_QUARANTINED + 50):
        desk.casualties.quarantine(RunRow(no=no, id=f"r{no}", task="t.f"), 0.0)
    assert f"at least {MAX_QUARANTINED} runs" in desk.casualties.notes()[0]
    assert len(desk.casualties.statistics(0.0)["quarantined"]) == MAX_QUARANTINED
