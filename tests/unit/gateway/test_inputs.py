"""What runs are told: numbered, kept, bounded, repeated to whoever takes over."""

from __future__ import annotations

import pytest

from gateway.inputs import MOST, MOST_BYTES, Inputs
from gateway.store.rows import Batch, InputRow
from taskkit.errors import IdempotencyConflict, QueueFull


def test_inputs_are_numbered_per_run() -> None:
    inputs, batch = Inputs([]), Batch()
    told = [inputs.add(run, "a", b"{}", "", 1.0, batch)[0] for run in (7, 7, 8)]
    assert [(row.run, row.number) for row in told] == [(7, 1), (7, 2), (8, 1)]
    assert batch.inputs == told
    assert list(inputs.of(7)) == told[:2]
    assert bool(batch)


def test_what_the_store_has_goes_on() -> None:
    inputs = Inputs([InputRow(7, 1, "a", b"{}", "k", 1.0)])
    assert inputs.add(7, "b", b"{}", "", 2.0, Batch())[0].number == 2


def test_a_repeat_is_told_once() -> None:
    inputs, batch = Inputs([]), Batch()
    first = inputs.add(7, "a", b'{"x":1}', "k", 1.0, batch)
    assert inputs.add(7, "a", b'{"x":1}', "k", 2.0, batch) == (first[0], True)
    assert inputs.add(8, "a", b'{"x":1}', "k", 2.0, batch)[1] is False, "a key is one run's"
    with pytest.raises(IdempotencyConflict):
        inputs.add(7, "a", b'{"x":2}', "k", 2.0, batch)
    with pytest.raises(IdempotencyConflict):
        inputs.add(7, "b", b'{"x":1}', "k", 2.0, batch)
    assert len(batch.inputs) == 2


@pytest.mark.parametrize(("count", "size"), [(MOST, 2), (4, MOST_BYTES // 4)])
def test_a_run_is_told_so_much_and_no_more(count: int, size: int) -> None:
    inputs, batch = Inputs([]), Batch()
    for _ in range(count):
        inputs.add(7, "a", b" " * size, "", 1.0, batch)
    with pytest.raises(QueueFull) as refused:
        inputs.add(7, "a", b"{}", "", 1.0, batch)
    assert refused.value.retry_after
    assert len(batch.inputs) == count, "nothing is half done"
    inputs.add(8, "a", b"{}", "", 1.0, batch)


def test_an_ended_run_leaves_nothing() -> None:
    inputs, batch = Inputs([InputRow(7, 1, "a", b"{}", "", 1.0)]), Batch()
    inputs.forget(7, batch)
    inputs.forget(9, batch)
    assert batch.told_enough == [7], "only what the store has"
    assert list(inputs.of(7)) == []
