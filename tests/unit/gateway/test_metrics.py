"""What Prometheus is told."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from gateway.auth import Authenticator
from gateway.families import FAMILIES
from gateway.grants import Revocation
from gateway.metrics import Gathered
from gateway.tally import DoorTally, Histogram
from taskkit import tokens
from tests.helpers import ROOT
from tests.unit.gateway.fakes import KEY, StubEngine, View, client_of, token
from tests.unit.gateway.gate import HandRunner, gate
from tests.unit.gateway.test_batch import served

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scrape(client: Any, **headers: str) -> Samples:
    """Return the samples of one scrape by name and labels."""
    response = await client.get("/metrics", headers=headers)
    assert response.status_code == 200, response.text
    families = parse_plain(response.text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def names(samples: Samples) -> set[str]:
    return {name for name, _ in samples}


async def test_every_family_is_there_with_help_and_kind() -> None:
    engine = StubEngine(views=[View("r1", 1)])
    async with client_of(engine) as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {family.name: family for family in parse_plain(response.text)}
    for family in FAMILIES:
        name = family.name.removesuffix("_total")
        assert name in found, family.name
        assert (found[name].type, found[name].documentation) == (family.kind, family.doc)
        assert found[name].samples, f"{family.name} has no value from the beginning"


def test_nothing_is_gathered_that_is_no_family() -> None:
    engine = StubEngine()
    authenticator = Authenticator(KEY, [], desk=engine)
    gathered = Gathered(engine, DoorTally(), authenticator, engine.statistics(), [], None, None)
    assert set(gathered.figures()) == {family.name for family in FAMILIES}


def test_names_follow_prometheus_conventions() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert family.name.startswith("bulkhead_")
        assert family.name.endswith("_total") == (family.kind == "counter")
        assert family.doc.endswith(".")


def test_the_readme_lists_every_metric_once() -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("**Metrics.**")[2].partition("**Actions")[0]
    for family in FAMILIES:
        shown = f"`{family.name}{{{','.join(family.labels)}}}`" if family.labels else f"`{family.name}`"
        assert section.count(shown) == 1, shown
    assert section.count("`bulkhead_") == len(FAMILIES)


async def test_openmetrics_when_asked_for() -> None:
    async with client_of(StubEngine()) as client:
        response = await client.get(
            "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
        )
        assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        assert response.text.endswith("# EOF\n")
        found = {family.name for family in parse_openmetrics(response.text)}
        assert {"bulkhead_runs_ended", "bulkhead_commit_seconds"} <= found
        assert (await client.get("/metrics", headers={"Accept": "image/png"})).status_code == 406
        strange = await client.get("/metrics", headers={"Accept": "text/plain; version=x; escaping=x"})
        assert strange.status_code == 200


async def test_it_needs_sight_of_all_runs() -> None:
    for claims, status in (
        ({"actions": ["read"], "runs": "*"}, 200),
        ({"actions": ["operate"], "runs": ()}, 200),
        ({"actions": ["read"], "runs": ["00000000-0000-7000-8000-000000000000"]}, 403),
        ({"actions": ["submit", "logs", "cancel"], "runs": "*"}, 403),
    ):
        async with client_of(StubEngine(), token(**claims)) as client:
            assert (await client.get("/metrics")).status_code == status


async def test_bad_tokens_are_counted_by_what_was_wrong() -> None:
    engine = StubEngine()
    revoked = token(subject="bob")
    await engine.revoke(Revocation("sub", "bob", time.time()))
    async with client_of(engine) as client:
        await client.get("/api/v1/runs", headers={"Authorization": "Bearer nonsense"})
        await client.get("/api/v1/runs", headers={"Authorization": "Basic x"})
        await client.get("/api/v1/runs", headers={"Authorization": f"Bearer {revoked}"})
        for _ in range(8):  # the last of them is the eleventh of this address within a minute
            answer = await client.get("/api/v1/runs", headers={"Authorization": "Bearer x"})
        samples = await scrape(client)
    assert answer.status_code == 429
    assert samples["bulkhead_bad_tokens_total", (("reason", "malformed"),)] == 10
    assert samples["bulkhead_bad_tokens_total", (("reason", "revoked"),)] == 1
    assert samples["bulkhead_bad_tokens_total", (("reason", "expired"),)] == 0


async def test_a_store_that_does_not_answer_takes_its_own_figures_along() -> None:
    engine = StubEngine()
    async with client_of(engine) as client:
        whole = names(await scrape(client))
        engine.store.broken = True
        left = names(await scrape(client))
    assert whole - left == {"bulkhead_runs", "bulkhead_store_bytes"}


async def test_runs_and_events_are_counted_as_they_end(tmp_path: Path) -> None:
    async with served(tmp_path) as (_, client):
        before = await scrape(client)
        await client.post("/api/v1/runs", json={"task": "t.f"})
        run = (await client.post("/api/v1/runs", json={"task": "t.f"})).json()["id"]
        await client.post(f"/api/v1/runs/{run}/cancel")
        after = await scrape(client)
    grown = {key: value - before[key] for key, value in after.items() if value != before[key]}
    assert grown["bulkhead_runs_accepted_total", (("origin", "http"),)] == 2
    assert grown["bulkhead_runs_ended_total", (("status", "CANCELLED"),)] == 1
    assert grown["bulkhead_runs", (("status", "READY"),)] == 1
    assert grown["bulkhead_events_stored_total", ()] == 1
    assert grown["bulkhead_commit_seconds_count", ()] == 3
    assert grown["bulkhead_commit_seconds_bucket", (("le", "+Inf"),)] == 3
    assert grown["bulkhead_commit_seconds_sum", ()] > 0
    assert grown["bulkhead_queued_runs", (("pool", "default"),)] == 1


async def test_attempts_and_runners_are_counted_by_their_ends(tmp_path: Path) -> None:
    one, other = HandRunner("r1"), HandRunner("r2")
    try:
        async with gate(tmp_path) as g:
            for runner in (one, other):
                runner.up(g.engine)
                runner.hello()
            first, token = await g.ran(one)
            one.finish(token)
            await g.ended(first)
            one.die(g.engine, "no_result", exit_code=0)
            await g.drained(one)
            second, _ = await g.ran(other)
            other.die(g.engine, "signal", signal="SIGSEGV")
            await g.ended(second)
            await g.drained(other)
            tally = g.engine.run_tally
            assert tally.attempts == {"returned": 1, "crashed": 1}
            assert tally.ended == {"SUCCESSFUL": 1, "FAILED": 1}
            assert tally.exits == {"left": 1, "signal": 1}
            assert g.engine.statistics()["restarts"] == {"courier": 0, "runners": 1}
    finally:
        one.close()
        other.close()


async def test_deliveries_and_resets_are_counted() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("tick", {}), ("tick", {}))
    engine.end(run)
    path = f"/api/v1/runs/{run.id}/events"
    async with client_of(engine) as client:
        await client.get(path, headers={"Accept": "text/event-stream"})
        await client.get(path, headers={"Accept": "application/json"})
        await client.get(f"{path}?after=e7-1", headers={"Accept": "text/event-stream"})
    tally = engine.hub.tally
    assert tally.delivered == 3 + 3 + 4
    assert tally.resets == {"ahead": 1}


async def test_what_the_fast_path_delivers_and_who_listens_is_shown() -> None:
    engine = StubEngine()
    authenticator = Authenticator(KEY, [], desk=engine)
    engine.hub.broadcast.events, engine.hub.tally.delivered = 5, 2
    with authenticator.sessions.new(tokens.verify(KEY, token())):
        gathered = Gathered(engine, DoorTally(), authenticator, engine.statistics(), [], None, None)
        figures = gathered.figures()
    assert figures["bulkhead_deliveries_total"] == 7
    assert figures["bulkhead_sessions"] == 1


def test_nothing_of_ours_is_in_the_global_registry() -> None:
    assert not [metric for metric in REGISTRY.collect() if metric.name.startswith("bulkhead")]


def test_a_histogram_counts_up_to_each_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]
    assert histogram.sum == pytest.approx(12.0)
