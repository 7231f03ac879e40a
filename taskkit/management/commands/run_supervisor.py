"""`manage.py run_supervisor`: the tree, in the foreground."""

from __future__ import annotations

from typing import Any

from django.core.management import BaseCommand, CommandParser

from taskkit.management import launching


class Command(BaseCommand):
    """Runs what `bulkhead run` does, with the settings of this manage.py."""

    help = "Run Bulkhead's process tree in the foreground, until Ctrl-C or TERM: `bulkhead run` for this project."
    requires_system_checks = []  # the tree makes its own, and says what to do

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the flags."""
        parser.add_argument("--bind", metavar="HOST:PORT", help="Listen here; default: TASKKIT['BIND'].")
        parser.add_argument("--uds", metavar="PATH", help="Listen on this Unix socket instead.")
        launching.add_arguments(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        """Start it."""
        launching.become_tree(options["bind"], options["uds"], options)
