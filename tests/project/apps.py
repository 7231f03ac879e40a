"""The app `proj`, home of the tests' tasks."""

from django.apps import AppConfig


class ProjectConfig(AppConfig):
    """Settings, models, tasks in one folder: this project is its own only app."""

    name = "tests.project"
    label = "proj"
    default_auto_field = "django.db.models.BigAutoField"
