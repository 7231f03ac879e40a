"""The route for results of views that ran as tasks, on the Django site; the gateway has the same one."""

from __future__ import annotations

import uuid

from django.http import HttpRequest, HttpResponse, JsonResponse

from taskkit import background, outbox
from taskkit.async_request.owners import HERE, Unknown, owner_of
from taskkit.conf import get_settings
from taskkit.lifecycle import RunStatus
from taskkit.models import Run
from taskkit.problems import private, problem
from taskkit.request_models import StoredRequest


def result(request: HttpRequest, id: uuid.UUID) -> HttpResponse:
    """Serve GET: `{task_id, status, endpoint, headers, response}`, or `{"status": "not ready"}`.

    With `?full_response=true`: `{status, channel_name, response}`, where `status` is pending, processing, completed or
    failed. 401: nobody is known who asks. 403: it is another's. 404: there is no such request.
    """
    if request.method not in ("GET", "HEAD"):
        return problem(405, "method-not-allowed", "send a GET", Allow="GET, HEAD")
    try:
        owner = owner_of(request, get_settings().async_request)
    except Unknown as error:
        return problem(401, "login-needed", str(error), **{"WWW-Authenticate": 'Session realm="django"'})
    alias = outbox.alias_of(None)
    stored = StoredRequest.objects.using(alias).filter(run=id).defer("body").first()
    run = None if stored is None else Run.objects.using(alias).filter(id=id).first()
    if stored is None or run is None:
        return problem(404, "unknown-run", "there is no such request, or it is not kept any more")
    if stored.owner != owner.subject:
        return problem(403, "forbidden", "the request is another user's")
    status = RunStatus(run.status)
    found = background.outcome(str(id), status, run.result, run.error, stored.endpoint)
    if request.GET.get("full_response", "").lower() in ("true", "1"):
        found = background.full(status, stored.owner, found)
    return private(JsonResponse(dict(found)))


setattr(result, HERE, True)
