"""The shop's only page: what it imports is what a web process imports."""

from django.http import HttpRequest, HttpResponse
from django.urls import path

from tests.interface import orders


def buy(request: HttpRequest) -> HttpResponse:
    """Confirm an order by mail, later."""
    result = orders.confirm.enqueue(7, to="someone@example.org")
    return HttpResponse(result.id)


urlpatterns = [path("buy", buy)]
