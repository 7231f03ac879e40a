"""Routes for a Django site: `path("bulkhead/", include("taskkit.urls"))`."""

from __future__ import annotations

from django.urls import path

from taskkit import views
from taskkit.async_request.views import result

app_name = "taskkit"

urlpatterns = [
    path("token/", views.token, name="token"),
    path("async_request_response/<uuid:id>/", result, name="async_request_response"),
    path("async_background_response/<uuid:id>/", result, name="async_background_response"),
]
