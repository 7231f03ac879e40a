"""How another run has ended, as a task hears of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from taskkit.errors import ENDINGS, RunFailed

#: Children of one run, at most; the gateway has the same number (gateway.flows.MOST_CHILDREN).
MOST_CHILDREN = 1_000

#: What the inputs are called that tell of an end, before the run's id.
ENDED = "ended/"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run has ended.

    Attributes:
      id: of the run.
      task: its task's name.
      status: "SUCCESSFUL", "FAILED" or "CANCELLED".
      error: `{code, message, …}` of one that did not succeed, else None.
    """

    id: str
    task: str
    status: str
    error: Mapping[str, Any] | None
    _told: Mapping[str, Any]

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        """Return the outcome that the gateway tells of."""
        return cls(told["run"], told["task"], told["status"], told.get("error"), told)

    @property
    def ok(self) -> bool:
        """Whether the run has succeeded."""
        return self.status == "SUCCESSFUL"

    @property
    def result(self) -> Any:
        """What the task returned.

        Raises:
          RunError: it did not succeed: RunFailed, RunCrashed, RunTimedOut, RunWasCancelled or RunLost.
          LookupError: it is too large to be carried along (64 KiB; 4 MiB for all that one run hears); it is the
            `result` of the run, in Django (`Run.objects.get(id=…)`) as over HTTP.
        """
        if not self.ok:
            error = dict(self.error or {})
            kind = ENDINGS.get(
                "cancelled" if self.status == "CANCELLED" else error.get("code", ""), RunFailed
            )
            text = error.get("message") or f"ended as {self.status}"
            raise kind(
                f"run {self.id} of {self.task}: {text}",
                {"id": self.id, "status": self.status, "error": error},
            )
        if "result" not in self._told:
            raise LookupError(
                f"the result of run {self.id} is too large to be carried along: read it from the run"
            )
        return self._told["result"]
