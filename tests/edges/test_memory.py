"""Much goes through the gateway, past a subscriber that reads, one that does not: it stays as large as it was."""

from __future__ import annotations

import pytest

from tests.bench import memory
from tests.bench.figures import table

#: Bytes of events. The acceptance line, less than 20 MB over 200 MB, is what `python -m tests.bench memory` measures in
#: half a minute; a gateway that kept what goes through it would fail here, too.
EVENTS = 30_000_000

#: MB; the seed kept all.
MOST = 10.0


def test_the_gateway_keeps_nothing_of_what_goes_through(capsys: pytest.CaptureFixture[str]) -> None:
    figures = memory.measure(1, EVENTS)
    with capsys.disabled():
        print(f"\nRECORD {EVENTS / 1e6:.0f} MB of events\n{table(figures)}")
    assert figures[0].samples[0] < MOST
