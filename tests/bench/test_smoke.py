"""Each benchmark runs to its end on a few repetitions; what comes out is complete, how large it is does not matter."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench import __main__ as command
from tests.bench import (
    commits,
    crowd,
    deaths,
    fanout,
    idle,
    ingest,
    latency,
    queues,
    report,
    retention,
    scale,
    start,
    subscribers,
    together,
)
from tests.bench.figures import Figure, at_least, at_most, figure, ratio, table
from tests.bench.pace import Pace, outside, watched
from tests.bench.registry import BENCHMARKS
from tests.bench.rounds import interleave
from tests.helpers import ROOT


def complete(figures: list[Figure]) -> None:
    for one in figures:
        assert one.samples, one.name
        assert all(math.isfinite(sample) and sample > 0 for sample in one.samples), one
    names = [one.name for one in figures]
    assert len(names) == len(set(names))
    print(table(figures))


def test_start() -> None:
    found = start.run(2)
    complete(found)
    names = " ".join(one.name for one in found)
    for part in ("fork -> first byte", "peer: exec", "fork / exec", "submit -> run.started", "idle runner"):
        assert part in names


def test_commits() -> None:
    complete(commits.commits(rounds=1, n=2))


def test_ingest() -> None:
    complete(ingest.measure(rounds=1, seconds=0.3))


def test_latency() -> None:
    complete(latency.measure(rounds=1, events=50))


async def test_retention() -> None:
    complete(await retention.measure(old=3000, quiet=20))


def test_fanout() -> None:
    complete(fanout.measure(repetitions=1, crowd=20, events=20, peers=()))


def test_unpaced() -> None:
    complete(fanout.measure_unpaced(repetitions=1, crowd=20, events={"bulkhead": 100}))


def test_large() -> None:
    complete(scale.measure(repetitions=1, crowd=30, events=5, peers=()))


def test_growth() -> None:
    complete(scale.measure_growth(repetitions=1, sizes={1: 0.1, 10: 0.1}, events=5))


def test_resting() -> None:
    complete(subscribers.measure(repetitions=1, count=200, peers=()))


def test_joining() -> None:
    complete(subscribers.measure_joining(repetitions=1, storm=20, open_streams=10, peers=()))


def test_crowd() -> None:
    complete(crowd.measure(repetitions=1, crowd=20, events=20))


def test_queues() -> None:
    complete(queues.starts(rounds=1, n=2, peers={}))
    complete(queues.rates("a process per run", 1, {}, {}, {queues.OURS: 10, queues.ROWS: 10}))
    complete(queues.rates("2 processes", 1, queues.REUSED, {}, {queues.OURS: 10}))


def test_first_events() -> None:
    complete(queues.firsts(rounds=1, n=2, peers={}))


def test_deaths() -> None:
    complete(deaths.measure(rounds=1, n=2, told=[], untold=[]))


def test_idle() -> None:
    complete(idle.measure(rounds=1, seconds=0.5, peers=[]))


def test_many_together() -> None:
    complete(together.measure_crowd(rounds=1, count=20))
    complete(together.measure_speakers(rounds=1, speakers=(1, 3), events=300))


def test_every_benchmark_is_smoked_here() -> None:
    elsewhere = {"memory"}  # tests/edges/test_memory.py, which also judges it
    assert set(BENCHMARKS) == elsewhere | {
        *("start", "ingest", "latency", "retention", "async", "speakers"),
        *("fanout", "unpaced", "large", "growth", "resting", "joining", "crowd"),
        *("commit", "submit", "first", "fresh", "reuse", "deaths", "idle"),
    }


def test_what_was_late_while_the_machine_stood_still_is_told_apart() -> None:
    probes = [(at / 100, 0.1e-3) for at in range(100)]
    probes[50] = (0.5, 1e-3)
    probes[51] = (0.51, 2e-3)
    slow = Pace(probes).slow()
    assert slow == [(pytest.approx(0.495), pytest.approx(0.532))]
    samples = [(0.49, 1.0), (0.5, 2.0), (0.53, 3.0), (0.54, 4.0)]
    assert outside(samples, slow) == [1.0, 4.0]
    with watched() as pace:
        pass
    assert all(seconds > 0 for _, seconds in pace.probes)


def test_percentiles_are_measured_values() -> None:
    one = figure("x", "ms", [4.0, 1.0, 3.0, 2.0])
    assert [one.percentile(share) for share in (0.0, 0.25, 0.5, 0.95, 1.0)] == [1.0, 1.0, 2.0, 4.0, 4.0]
    assert ratio("r", [4.0, 9.0], [2.0, 3.0]).samples == (2.0, 3.0)


def test_goals_say_by_how_much_they_are_missed() -> None:
    one = figure("x", "ms", [4.0, 1.0, 3.0, 2.0], at_most(2.0), at_most(2.0, 1.0), at_least(3.0))
    assert [goal.miss(one) for goal in one.goals] == [0.0, 1.0, pytest.approx(1 / 3)]
    assert [said["reached"] for said in one.summary()["goals"]] == [True, False, False]
    assert "p50 ≤ 2: reached   p100 ≤ 2: missed by 100%   p50 ≥ 3: missed by 33%" in table([one])


def test_everybody_is_first_in_turn() -> None:
    order: list[str] = []
    contestants = {name: functools.partial(order.append, name) for name in "abc"}
    assert interleave(4, contestants) == {name: [None] * 4 for name in "abc"}
    assert "".join(order) == "abcbcacababc"


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was measured: x"):
        figure("x", "ms", [])


def test_the_command_lists_what_there_is() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--list"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert [line.split()[0] for line in shown.stdout.splitlines()] == list(BENCHMARKS)


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(["nothing"])
    assert left.value.code == 2
    assert f"there are {', '.join(sorted(BENCHMARKS))}" in capsys.readouterr().err


def test_every_sample_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = [figure("x", "ms", [1.0, 2.0], at_most(3.0))]
    entry = BENCHMARKS["start"]

    def fail(repetitions: int) -> list[Figure]:
        raise RuntimeError(f"no peer for {repetitions}")

    monkeypatch.setitem(BENCHMARKS, "start", replace(entry, function=lambda repetitions: made * repetitions))
    monkeypatch.setitem(BENCHMARKS, "crowd", replace(entry, name="crowd", function=fail))
    out = tmp_path / "figures.json"
    assert command.main(["crowd", "start", "--out", str(out), "-n", "2"]) == 1
    kept = json.loads(out.read_text())
    assert [one["samples"] for one in kept["benchmarks"]["start"]["figures"]] == [[1.0, 2.0], [1.0, 2.0]]
    assert kept["failed"] == {"crowd": "RuntimeError: no peer for 2"}, "and the others are measured"
    assert kept["machine"]["cores"] >= 1


def test_what_was_kept_becomes_a_table_with_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [
        figure(f"rate, {queues.OURS}", "1/s", [200.0, 300.0, 250.0], at_least(240.0)),
        figure("rate, RQ", "1/s", [90.0, 100.0, 80.0]),
        figure("rate, ours / RQ", "x", [2.2, 3.0, 3.1], at_least(4.0)),
    ]
    figures = [one.summary() for one in made]
    kept, svg = tmp_path / "figures.json", tmp_path / "picture.svg"
    kept.write_text(json.dumps({"machine": {"cores": 2}, "benchmarks": {"race": {"figures": figures}}}))
    assert report.main([str(kept), "--picture", str(svg)]) == 0
    shown = capsys.readouterr().out
    assert f"| rate, {queues.OURS} | 250 1/s (200 … 300) | ≥ 240 | reached |" in shown
    assert "**missed by 25%**" in shown
    drawn = ElementTree.fromstring(svg.read_text())
    widths = [float(bar.get("width", "0")) for bar in drawn.iter("{http://www.w3.org/2000/svg}rect")]
    assert widths == [report.BAR, pytest.approx(report.BAR * 90 / 250, abs=0.1)]
