"""The admin, and a page for a run."""

from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path
from django.views.decorators.cache import never_cache

from taskkit.conf import gateway_url


@never_cache
def run_page(request: HttpRequest, run: str) -> HttpResponse:
    """Serve a page that shows a run, `?log` with what it prints, `?csp` under the policy that the README has."""
    response = render(
        request, "run.html", {"run": run, **{name: name in request.GET for name in ("log", "csp")}}
    )
    if "csp" in request.GET:
        gateway = gateway_url()
        response["Content-Security-Policy"] = (
            f"default-src 'self'; script-src 'self' {gateway}; connect-src {gateway}"
        )
    return response


_kept: dict[str, HttpResponse] = {}


def kept_page(request: HttpRequest, run: str) -> HttpResponse:
    """Serve the page as a cache does: what somebody got before, but to whoever asks past it."""
    if "no-cache" in request.headers.get("Cache-Control", ""):
        return run_page(request, run)
    return _kept.setdefault(str(run), run_page(request, run))


urlpatterns = [
    path("admin/", admin.site.urls),
    path("runs/<uuid:run>/", run_page),
    path("kept/<uuid:run>/", kept_page),
]
