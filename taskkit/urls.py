"""Routes for a Django site: `path("bulkhead/", include("taskkit.urls"))`."""

from __future__ import annotations

from django.urls import path

from taskkit import views

app_name = "taskkit"

urlpatterns = [path("token/", views.token, name="token")]
