"""The seed's coordinator: starting rows, asking about rows, from any process or loop."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.unit.taskkit import under_asyncio

pytestmark = pytest.mark.usefixtures("django_project")


def _row(**fields: Any) -> Any:
    from tests.project.models import Row

    return Row.objects.create(message="hi", **fields)


def test_starting_a_running_row_returns_its_run() -> None:
    from taskkit.coordinator import coordinator
    from taskkit.models import Outbox, Run

    row = _row()
    first = coordinator.start_task_sync(row)
    second = coordinator.start_task_sync(row, "proj", "row")
    third = coordinator.start_task_sync(row, "Row")
    assert first.new
    assert [handle.id for handle in (second, third)] == [first.id] * 2
    assert not second.new
    assert Run.objects.get().row_key == f"proj.row:{row.pk}"
    assert Outbox.objects.get().payload["row"] == {"app": "proj", "model": "Row", "pk": row.pk}


def test_a_row_whose_run_has_ended_starts_anew() -> None:
    from taskkit.coordinator import coordinator
    from taskkit.models import Run

    row = _row()
    first = coordinator.start_task_sync(row)
    Run.objects.update(status="FAILED")
    assert coordinator.start_task_sync(row).id != first.id


def test_twenty_parallel_starts_are_one_run() -> None:
    from taskkit.coordinator import coordinator
    from taskkit.models import Outbox, Run
    from taskkit.threads import with_own_connections

    row = _row()
    with ThreadPoolExecutor(20) as pool:
        starts = [
            pool.submit(with_own_connections, lambda: coordinator.start_task_sync(row)) for _ in range(20)
        ]
        handles = [start.result(timeout=60) for start in starts]
    assert len({handle.id for handle in handles}) == 1
    assert sum(handle.new for handle in handles) == 1
    assert Run.objects.count() == Outbox.objects.count() == 1


def test_a_lost_race_finds_the_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkit import outbox

    row = _row()
    first = outbox.submit(row)
    looks = iter([None])
    real = outbox.open_run
    monkeypatch.setattr(outbox, "open_run", lambda *args: next(looks, real(*args)))
    second = outbox.submit(row)
    assert (second.id, second.new) == (first.id, False)


def test_wrong_names_and_unsaved_rows_are_refused() -> None:
    from taskkit.coordinator import coordinator
    from tests.project.models import Row

    wrong: Any = "Row"
    with pytest.raises(ValueError, match="save this Row"):
        coordinator.start_task_sync(Row(message="x"))
    with pytest.raises(ValueError, match=r"proj\.Row"):
        coordinator.start_task_sync(_row(), "ARow")
    with pytest.raises(TypeError, match="no StreamTask"):
        coordinator.start_task_sync(wrong)


def test_from_asyncio() -> None:
    from taskkit.coordinator import coordinator

    row = _row()

    async def main() -> tuple[Any, ...]:
        before = coordinator.is_task_running("proj", "Row", row.pk)
        handle = await coordinator.start_task(row, "proj", "Row")
        after = coordinator.is_task_running("ROW", row.pk), coordinator.is_task_running("proj", "Row", row.pk)
        return before, handle.new, after, await coordinator.get_task_instance("Row", row.pk)

    assert under_asyncio.run(main()) == (False, True, (True, True), row)


async def test_from_trio() -> None:
    from taskkit.coordinator import coordinator

    row = _row()
    handle = await coordinator.start_task(row)
    assert handle.new
    assert coordinator.is_task_running("proj", "row", str(row.pk))
    assert await coordinator.get_task_instance("proj", "Row", row.pk) == row


def test_a_finished_run_is_not_running() -> None:
    from taskkit.coordinator import coordinator
    from taskkit.models import Run

    row = _row()
    coordinator.start_task_sync(row)
    Run.objects.update(status="SUCCESSFUL")
    assert not coordinator.is_task_running("proj", "Row", row.pk)


@pytest.mark.parametrize(
    "names", [("Nothing", 1), ("auth", "User", 1), ("proj", "Row", "x"), ("proj", "Row", 99)]
)
async def test_unknown_rows_are_none_and_do_not_run(names: tuple[Any, ...]) -> None:
    from taskkit.coordinator import coordinator

    assert await coordinator.get_task_instance(*names) is None
    assert coordinator.is_task_running(*names) is False


def test_get_task_instance_starts_nothing() -> None:
    from taskkit.coordinator import coordinator
    from taskkit.models import Outbox

    row = _row()
    assert coordinator.get_task_instance_sync("proj", "Row", row.pk) == row
    assert not Outbox.objects.exists()
    with pytest.raises(TypeError, match="not 1 arguments"):
        coordinator.get_task_instance_sync("Row")


@pytest.mark.parametrize(
    "order",
    [
        "from taskkit import coordinator as a; from taskkit.coordinator import coordinator as b",
        "from taskkit.coordinator import coordinator as b; from taskkit import coordinator as a",
    ],
)
def test_both_imports_work_in_either_order_without_django_set_up(order: str) -> None:
    names = "start_task", "get_task_instance", "is_task_running"
    check = (
        f"{order}; assert all(getattr(a, n) == getattr(b, n) for n in {names!r}); assert a.coordinator is b"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
