"""Tasks in a project's own tests: performed in the test's process, with the events that a stream would have.

    from taskkit.testing import perform, perform_submitted, wait_for_run

    def test_report(self):
        done = perform(build, year=2026)
        assert done.result == {"rows": 12}
        assert [event.data["month"] for event in done.of("month")] == list(range(1, 13))

    def test_page(self):
        self.client.post("/reports", {"year": 2026})
        (done,) = perform_submitted()
        assert done.status == "SUCCESSFUL"

    def test_an_approval(self):
        with inputs(approval=[{"by": "ann"}]):
            assert perform(publish).result == "published"

Arguments, events, results and errors pass the same code as in a runner, so what JSON cannot express fails here as well.
The database is that of the test, its open transaction included. What only processes can show (crashes, time limits,
memory) needs a real tree; `wait_for_run` waits for one.

    def test_a_crash(self):  # a TransactionTestCase: the tree has connections of its own
        with live_tree():
            assert wait_for_run(submit(crash)).error["code"] == "crashed"

With pytest the fixtures `perform_submitted` and `bulkhead_tree` are there when the package is installed.
"""

from __future__ import annotations

from taskkit.testing.live import LiveTree, live_tree, wait_for_run
from taskkit.testing.performing import Event, PerformedRun, inputs, perform, perform_submitted

__all__ = [
    "Event",
    "LiveTree",
    "PerformedRun",
    "inputs",
    "live_tree",
    "perform",
    "perform_submitted",
    "wait_for_run",
]
