"""The demo app, as Django sees it."""

from django.apps import AppConfig


class DemoConfig(AppConfig):
    """Nothing special: an app with a `tasks.py` is all that Bulkhead looks for."""

    name = "demo"
