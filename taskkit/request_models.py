"""Requests that run as tasks, in the project's own database."""

from __future__ import annotations

from django.core.serializers.json import DjangoJSONEncoder
from django.db import models


class StoredRequest(models.Model):
    """What a run needs to perform a view, kept until ASYNC_REQUEST.kept_seconds are over.

    Attributes:
      run: its run's id; replayed, a request has others as well.
      owner: the run's `subject`: a user's primary key, or `anon:` with the name of a channel.
      user: primary key of the user; "" for a client without credentials.
      named: whether ASYNC_REQUEST.user has named the user.
      meta: WSGI's variables of the request (PEP 3333), without credentials.
      path: behind the site's own prefix, without the query, decoded.
      endpoint: as the client wrote it, for people.
      body: as it came; None when the view has answered.
    """

    id = models.UUIDField(primary_key=True)
    run = models.UUIDField(unique=True)
    owner = models.CharField(max_length=255)
    user = models.CharField(max_length=255, blank=True, default="")
    named = models.BooleanField(default=False)
    method = models.TextField()
    path = models.TextField()
    endpoint = models.TextField()
    meta = models.JSONField(encoder=DjangoJSONEncoder)
    body = models.BinaryField(null=True)
    created_at = models.DateTimeField(db_index=True)

    class Meta:
        verbose_name = "stored request"
        verbose_name_plural = "stored requests"

    def __str__(self) -> str:
        return f"{self.method} {self.path[:80]}"
