"""What Bulkhead keeps in the project's own database: outbox, projection of runs, nodes, schedules.

The store of the gateway is the truth about a run. `Run` follows it, for the admin, the ORM and results; only
the courier moves it on, apart from its first row, which a submission inserts in the caller's transaction.
"""

from __future__ import annotations

from typing import Final

from django.core.serializers.json import DjangoJSONEncoder
from django.db import models
from django.db.models import Q

from taskkit import conf
from taskkit.lifecycle import TERMINAL, RunStatus
from taskkit.request_models import StoredRequest
from taskkit.schedule_models import Schedule, Slot
from taskkit.stream_task import StreamTask

__all__ = [
    "OPEN",
    "TOGETHER",
    "Node",
    "Outbox",
    "Run",
    "Schedule",
    "Slot",
    "StoredRequest",
    "StreamTask",
    "Takeover",
]

#: States of a run that has not ended.
OPEN: Final = tuple(status.value for status in RunStatus if status not in TERMINAL)

_STATUS_CHOICES: Final = [(status.value, status.value) for status in RunStatus]

#: Longest `Row.key`, characters: two identifiers of Django's usual 100 and a text key of 255 fit. Four bytes
#: each, this stays below InnoDB's 3,072 bytes per index entry.
ROW_KEY_LENGTH: Final = 500


class Outbox(models.Model):
    """A submission that waits to become a run; inserted in the caller's transaction, deleted when it is one.

    Attributes:
      id: the run's id.
      payload: the fields of taskkit.wire.messages.Submit, without `id` and `using`.
      attempts: how often the gateway put it off (queue full, store not writable).
      error: why it was put off or refused.
    """

    class State(models.TextChoices):
        """What has become of the submission so far."""

        #: not yet accepted
        PENDING = "pending", "pending"
        #: can never become a run; kept for people to see
        REFUSED = "refused", "refused"

    id = models.UUIDField(primary_key=True)
    payload = models.JSONField(encoder=DjangoJSONEncoder)
    row_key = models.CharField(max_length=ROW_KEY_LENGTH, null=True, blank=True)
    created_at = models.DateTimeField()
    state = models.CharField(max_length=10, choices=State.choices, default=State.PENDING)
    attempts = models.PositiveIntegerField(default=0)
    error = models.TextField(blank=True, default="")

    class Meta:
        verbose_name = "outbox entry"
        verbose_name_plural = "outbox"
        ordering = ("id",)  # UUIDv7: by time
        indexes = [models.Index(fields=("state", "id"), name="taskkit_outbox_pending")]

    def __str__(self) -> str:
        return f"{self.id} ({self.state})"


class Run(models.Model):
    """A run as Django sees it: the newest state that the courier was told.

    Attributes:
      version: grows with every change; 0 until the gateway has accepted the run. Older news never overwrite
        newer.
      row_key: taskkit.wire.messages.Row.key of a model task's row. At most one open run has it.
      result: what the task returned; None while it runs, or when the value could not be stored here.
      error: `{code, message, …}` of a run that failed.
      errors: the same of each attempt that ended badly, oldest first; of coalesced news the newest only.
      worker_ids: the runner of each attempt; "" where the news of it was coalesced.
      attempted_at: when the newest attempt began.
      node: name of the node that has it, "" while none has (taskkit.courier.lease).
      fence: random name of that node's claim; what comes with another is void.
      moves: how often it was taken from a node that was dead.
      options: what else the submission said, which another node would need; None: it cannot be taken over.
      backend, queue: of Django's own Tasks interface, when it made the submission.
    """

    id = models.UUIDField(primary_key=True)
    task = models.CharField(max_length=255)
    status = models.CharField(max_length=10, choices=_STATUS_CHOICES, default=RunStatus.READY.value)
    version = models.BigIntegerField(default=0)
    attempt = models.PositiveIntegerField(default=0)
    args = models.JSONField(encoder=DjangoJSONEncoder, default=list, blank=True)
    kwargs = models.JSONField(encoder=DjangoJSONEncoder, default=dict, blank=True)
    row_key = models.CharField(max_length=ROW_KEY_LENGTH, null=True, blank=True)
    result = models.JSONField(encoder=DjangoJSONEncoder, null=True, blank=True)
    error = models.JSONField(encoder=DjangoJSONEncoder, null=True, blank=True)
    metadata = models.JSONField(encoder=DjangoJSONEncoder, default=dict, blank=True)
    tags = models.JSONField(encoder=DjangoJSONEncoder, default=list, blank=True)
    errors = models.JSONField(encoder=DjangoJSONEncoder, default=list, blank=True)
    worker_ids = models.JSONField(encoder=DjangoJSONEncoder, default=list, blank=True)
    backend = models.CharField(max_length=255, blank=True, default="")
    queue = models.CharField(max_length=255, blank=True, default="")
    node = models.CharField(max_length=255, blank=True, default="")
    fence = models.CharField(max_length=32, blank=True, default="")
    moves = models.PositiveIntegerField(default=0)
    options = models.JSONField(encoder=DjangoJSONEncoder, null=True, blank=True)
    priority = models.SmallIntegerField(default=0)
    run_after = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField()
    attempted_at = models.DateTimeField(null=True, blank=True)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        verbose_name = "run"
        verbose_name_plural = "runs"
        # What the admin can have the gateway do; `change_run` would be another's: nobody edits a run.
        permissions = [
            ("cancel_run", "Can cancel run"),
            ("replay_run", "Can perform run again"),
            ("release_run", "Can release run from quarantine"),
        ]
        ordering = ("-id",)  # UUIDv7: newest first, served by the primary key
        indexes = [
            models.Index(fields=("task", "-id"), name="taskkit_run_task"),
            models.Index(fields=("status", "-id"), name="taskkit_run_status"),
        ]
        constraints = [
            models.UniqueConstraint(
                fields=("row_key",),
                condition=Q(row_key__isnull=False, status__in=OPEN),
                name="taskkit_one_open_run_per_row",
            )
        ]

    def __str__(self) -> str:
        return f"{self.task} {self.id} ({self.status})"

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended for good."""
        return self.status not in OPEN

    @property
    def stream_url(self) -> str:
        """Absolute URL of its events, without a ticket: see `{% stream %}` for one that a page can follow.

        Raises:
          TaskkitImproperlyConfigured: the settings have no URL that browsers reach the gateway by.
        """
        return conf.stream_url(str(self.id))


class Node(models.Model):
    """A Bulkhead tree that serves this database: where to poke it, until when it may be believed to live.

    All times are the database's, no clock of a tree's machine counts.

    Attributes:
      name: host name and digest of the state directory, which keeps it.
      poke_address: path of a Unix datagram socket, or `@name` in the abstract namespace.
      seen_at: when its courier was here last.
      expires_at: end of its lease; from then on its runs may be taken over.
      url: NODE_URL, by which other nodes' clients reach its gateway.
    """

    name = models.CharField(max_length=255, primary_key=True)
    poke_address = models.CharField(max_length=1024)
    pid = models.PositiveIntegerField()
    seen_at = models.DateTimeField()
    expires_at = models.DateTimeField(null=True, blank=True)
    url = models.CharField(max_length=255, blank=True, default="")

    class Meta:
        verbose_name = "node"
        verbose_name_plural = "nodes"
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name


class Takeover(models.Model):
    """A run that a node has to forget, since another has it now; goes when that node has.

    Attributes:
      fence: of the node's claim, which is void.
    """

    id = models.BigAutoField(primary_key=True)
    run = models.UUIDField()
    node = models.CharField(max_length=255)
    fence = models.CharField(max_length=32, blank=True)
    at = models.DateTimeField()

    class Meta:
        verbose_name = "takeover"
        verbose_name_plural = "takeovers"
        indexes = [models.Index(fields=("node", "id"), name="taskkit_takeover_node")]

    def __str__(self) -> str:
        return f"{self.run} from {self.node}"


#: What one transaction has to reach, so that it has to be in one database.
TOGETHER: Final = (Outbox, Run, Node, Takeover, StoredRequest)
