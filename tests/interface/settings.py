"""The tests' settings with Django's Tasks: the backend's name is all that ties this project to Bulkhead."""

import importlib.util
import os

from tests.project.settings import *  # noqa: F403
from tests.project.settings import INSTALLED_APPS, TASKKIT

INSTALLED_APPS = [
    *INSTALLED_APPS,
    *([] if importlib.util.find_spec("django.tasks") else ["django_tasks"]),
    "tests.interface.apps.ShopConfig",
]
ROOT_URLCONF = "tests.interface.urls"
TASKS = {
    "default": {
        "BACKEND": os.environ.get("SHOP_BACKEND", "taskkit.backend.BulkheadBackend"),
        "QUEUES": ["default", "mail", "slow"],
    },
}
TASKKIT = {**TASKKIT, "POOLS": {"slow": {"runners": 1}}}
