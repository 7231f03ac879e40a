"""`manage.py runserver_stream`: the tree, by the flags of django-streaming-coordinator's server."""

from __future__ import annotations

from typing import Any, Final

from django.core.management import BaseCommand, CommandError, CommandParser

from taskkit.management import launching

#: Where that server listens.
_HOST: Final = "127.0.0.1"


class Command(BaseCommand):
    """Runs the tree; its gateway serves `/stream/…` as that server does."""

    help = (
        "Run Bulkhead in the foreground and serve streams; without --port or --socket where the settings say."
    )
    requires_system_checks = []  # the tree makes its own, and says what to do

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the flags."""
        parser.add_argument("--socket", metavar="PATH", help="Listen on this Unix socket.")
        parser.add_argument("--host", help=f"Listen on this address; default with --port: {_HOST}.")
        parser.add_argument("--port", type=int, help="Listen on this port; 0 takes a free one.")
        launching.add_arguments(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        """Start it."""
        host, port, socket = options["host"], options["port"], options["socket"]
        if host is not None and port is None:
            raise CommandError("--host wants --port as well")
        if port is not None and socket is not None:
            raise CommandError("give --port or --socket, not both")
        named = f"[{host}]" if host and ":" in host else host or _HOST
        launching.become_tree(None if port is None else f"{named}:{port}", socket, options)
