"""The Django project that runs under Daphne: django-eventstream's own view, and one that publishes."""

from __future__ import annotations

import json

import django
from django.conf import settings

settings.configure(
    SECRET_KEY="of a benchmark",
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    INSTALLED_APPS=["daphne", "django_eventstream"],
    ASGI_APPLICATION=f"{__name__}.application",
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
django.setup()

import django_eventstream  # noqa: E402
from django.core.asgi import get_asgi_application  # noqa: E402
from django.http import HttpRequest, HttpResponse  # noqa: E402
from django.urls import include, path  # noqa: E402


def publish(request: HttpRequest, channel: str) -> HttpResponse:
    django_eventstream.send_event(channel, "paced", json.loads(request.body))
    return HttpResponse(status=204)


urlpatterns = [
    path("events/<channel>/", include(django_eventstream.urls)),
    path("publish/<channel>/", publish),
]
application = get_asgi_application()
