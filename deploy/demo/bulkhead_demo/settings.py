"""Settings of the demo project: an ordinary Django project with `taskkit` among its apps.

What it keeps (database, secret key) lies in $BULKHEAD_DEMO_DIR, by default the state directory of Bulkhead.
"""

import os
import secrets
import sys
from pathlib import Path

from taskkit.settings import default_state_dir

BASE_DIR = Path(__file__).resolve().parent.parent
DATA_DIR = Path(
    os.environ.get("BULKHEAD_DEMO_DIR") or default_state_dir("bulkhead_demo.settings", os.environ)
)
DATA_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)


def _secret_key() -> str:
    """Return the key of this installation, made at first use; `os.link` lets one of two first users win."""
    path = DATA_DIR / "secret_key"
    if not path.exists():
        draft = DATA_DIR / f"secret_key.{os.getpid()}"
        draft.touch(mode=0o600)
        draft.write_text(secrets.token_urlsafe(50))
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text()


SECRET_KEY = _secret_key()

# Only Django's own development server shows tracebacks in pages and serves the admin's style sheets by
# itself.
DEBUG = "runserver" in sys.argv
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]"]

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "taskkit",
    "demo",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

ROOT_URLCONF = "bulkhead_demo.urls"
WSGI_APPLICATION = "bulkhead_demo.wsgi.application"
STATIC_URL = "static/"

# Several processes write to this file: runners, the courier, a web server. WAL lets readers go on beside a
# writer; IMMEDIATE makes a transaction wait for its turn at its start, where waiting works, not at its
# first write, where SQLite can only fail it.
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": DATA_DIR / "demo.sqlite3",
        "OPTIONS": {
            "timeout": 20,
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
        },
    },
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

USE_TZ = True
TIME_ZONE = "UTC"

# Bulkhead's own settings; everything has a default. Two runners wait for work, already forked.
# `demo.crash` is there to crash, as often as people like: it is never held back.
TASKKIT = {"POOLS": {"default": {"standby": 2}}, "BREAKER": {"exempt": ["demo.crash"]}}

# What a task logs at INFO or above shows up beside what it prints.
LOGGING = {"version": 1, "disable_existing_loggers": False, "root": {"level": "INFO"}}
