"""What Django has not been told, within bounds."""

from __future__ import annotations

from gateway.store.rows import RunRow
from gateway.untold import Untold


def run(no: int) -> RunRow:
    return RunRow(no=no, id=f"id{no}", task="t.f")


def test_the_one_that_waits_longest_is_first() -> None:
    untold = Untold()
    for no in (1, 2, 3):
        untold.add(run(no))
    untold.add(untold[1])
    assert list(untold) == [2, 3, 1]
    assert [no for no, _ in untold.items()] == [2, 3, 1]
    untold.told(3)
    untold.told(7)
    assert list(untold) == [2, 1]
    assert 3 not in untold
    assert untold.get(3) is None


def test_what_there_is_no_room_for_is_left_to_the_store() -> None:
    untold = Untold(most=4)
    for no in range(1, 7):
        untold.add(run(no))
    assert (list(untold), untold.more, untold.has_room) == ([1, 2, 3, 4], True, False)
    untold.add(untold[1])  # one that is here may change all the same
    assert list(untold) == [2, 3, 4, 1]
    untold.told(2)
    assert not untold.has_room
    untold.told(3)
    assert untold.has_room


def test_it_is_read_back_once() -> None:
    untold = Untold(most=4)
    for no in range(1, 7):
        untold.add(run(no))
    kept = untold[4]
    untold.told(1)
    untold.told(2)
    untold.told(3)
    untold.recall([run(4), run(5)], complete=False)
    assert untold[4] is kept, "the row of the store is not the one that changes"
    assert (list(untold), untold.more) == ([4, 5], True)
    untold.recall([run(6)], complete=True)
    assert (list(untold), untold.more, untold.has_room) == ([4, 5, 6], False, False)


def test_what_still_finds_no_room_is_not_forgotten() -> None:
    untold = Untold(most=2)
    untold.recall([run(1), run(2), run(3)], complete=True)
    assert (list(untold), untold.more) == ([1, 2], True)
