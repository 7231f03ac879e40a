"""Settings of the tests' project; one SQLite file, no server needed.

Every process of a tree must see the same file, so its path comes from the environment: BULKHEAD_TEST_DB. Another
database altogether comes as BULKHEAD_TEST_DATABASE, in JSON.
"""

import json
import os
import tempfile
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent
SECRET_KEY = "for tests only"
DEBUG = False
USE_TZ = True
TIME_ZONE = "UTC"
ALLOWED_HOSTS = ["testserver", "localhost", "127.0.0.1", "[::1]"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "taskkit",
    "tests.project.apps.ProjectConfig",
]

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("BULKHEAD_TEST_DB")
        or os.path.join(tempfile.gettempdir(), f"bulkhead-tests-{os.getuid()}.sqlite3"),
        "OPTIONS": {
            "timeout": 5,
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
        },
    }
}

if other := os.environ.get("BULKHEAD_TEST_DATABASE"):
    DATABASES["default"] = json.loads(other)

# Short graces: a test that kills something stubborn should not wait the seconds that real work deserves.
# No task is held back for crashing: chaos kills runners by the hundred. The tests of crash loops switch it on.
TASKKIT = {
    "LIMITS": {"cancel_grace_seconds": 1.0, "kill_grace_seconds": 0.5, "stop_grace_seconds": 3.0},
    "BREAKER": {"crashes": 0},
}
