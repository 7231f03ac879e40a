"""Much goes through the gateway, past a subscriber that reads, one that does not: it stays as large as it was."""

from __future__ import annotations

import pytest

from tests.bench import memory
from tests.bench.figures import table

#: Bytes of events. `python -m tests.bench memory` sends 200 MB, which takes a small machine half a minute; a gateway
#: that kept what goes through it would be found out by a quarter of that, too.
EVENTS = 50_000_000

#: MB; the acceptance line. The seed kept all.
MOST = 20.0


def test_the_gateway_keeps_nothing_of_what_goes_through(capsys: pytest.CaptureFixture[str]) -> None:
    figures = memory.measure(1, EVENTS)
    with capsys.disabled():
        print(f"\nRECORD {EVENTS / 1e6:.0f} MB of events\n{table(figures)}")
    assert figures[0].samples[0] < MOST
