"""Django's entry to this package.

It connects to nothing and reads no setting: a Django process that never submits pays for nothing.
"""

from __future__ import annotations

from django.apps import AppConfig


class TaskkitConfig(AppConfig):
    """Registers models and system checks."""

    name = "taskkit"
    label = "taskkit"
    verbose_name = "Bulkhead"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the checks; importing them is all it takes."""
        from taskkit import checks  # noqa: F401
