"""`manage.py cleanup_old_tasks`: removes what has ended long ago from the project's database."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

from django.core.management import BaseCommand, CommandError, CommandParser
from django.db import connections, router
from django.db.models import QuerySet
from django.utils import timezone

from taskkit.models import OPEN, Run
from taskkit.rows import row_address, task_models
from taskkit.stream_task import StreamTask

#: Rows that are removed at once: between two of these, others write.
_SLICE: Final = 500


class Command(BaseCommand):
    """Removes rows of task models that are completed; with --runs also what is kept of ended runs."""

    help = "Delete task rows that were completed a while ago, and with --runs rows of runs that ended a while ago."

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the flags."""
        parser.add_argument("--hours", type=float, default=1.0, help="Completed so long ago; default: 1.")
        parser.add_argument(
            "--runs",
            type=float,
            metavar="HOURS",
            help="Also runs that ended so long ago: the admin's list, and what get_result finds.",
        )
        parser.add_argument("--dry-run", action="store_true", help="Only say how many.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Remove them."""
        dry = options["dry_run"]
        before = _ago(options["hours"], "--hours")
        total = 0
        for model in task_models():
            total += self._report(model._meta.label, _remove_rows(model, before, dry=dry), dry=dry)
        if options["runs"] is not None:
            before = _ago(options["runs"], "--runs")
            for using in _homes():
                ended = Run.objects.using(using).exclude(status__in=OPEN).filter(finished_at__lt=before)
                total += self._report(f"{Run._meta.label} in {using!r}", _remove(ended, dry=dry), dry=dry)
        self.stdout.write(f"Total {'to delete' if dry else 'deleted'}: {total}")

    def _report(self, what: str, count: int, *, dry: bool) -> int:
        if count:
            self.stdout.write(f"{'Would delete' if dry else 'Deleted'} {count} {what}")
        return count


def _ago(hours: float, flag: str) -> datetime:
    try:
        if hours < 0:
            raise OverflowError
        return timezone.now() - timedelta(hours=hours)
    except (OverflowError, ValueError):
        raise CommandError(f"{flag} {hours:g}: give hours, at least 0") from None


def _homes() -> list[str]:
    """Return the databases that have our tables."""
    return [alias for alias in connections if router.allow_migrate_model(alias, Run)]


def _remove_rows(model: type[StreamTask], before: datetime, *, dry: bool) -> int:
    using = router.db_for_write(model)
    rows = model._base_manager.using(using).filter(completed_at__lt=before)
    open_keys = {
        key
        for alias in _homes()
        for key in Run.objects.using(alias).filter(status__in=OPEN).values_list("row_key", flat=True)
        if key
    }
    # One that was completed, and started again since.
    running = [
        pk for pk in rows.values_list("pk", flat=True) if row_address(model, pk, using).key in open_keys
    ]
    return _remove(rows.exclude(pk__in=running) if running else rows, dry=dry)


def _remove(rows: QuerySet[Any], *, dry: bool) -> int:
    if dry:
        return rows.count()
    count = 0
    while keys := list(rows.values_list("pk", flat=True)[:_SLICE]):
        count += len(keys)
        rows.model._base_manager.using(rows.db).filter(pk__in=keys).delete()
    return count
