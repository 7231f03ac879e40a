"""What a token says, or a ticket: who may do what with which runs. Pure.

Rule: a missing claim grants nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Literal

#: Everything a token can allow. `operate` drains and kills runners, `logs` shows what a run printed.
ACTIONS: Final = frozenset({"submit", "read", "cancel", "operate", "logs"})

#: Seconds that a token can be valid: what a revocation covers has expired when it is forgotten. 400 days is also the
#: longest life of a cookie (RFC 6265bis §5.5).
MAX_LIFE: Final = 400 * 86_400.0

#: `runs` of a token that reaches the runs submitted for its own `sub`.
OWN: Final = "own"


@dataclass(frozen=True, slots=True)
class Claims:
    """What a verified token says.

    Attributes:
      subject: on whose behalf.
      expires_at: Unix seconds; a connection ends then.
      id: `jti`, names the token in a log.
      actions: subset of ACTIONS.
      runs: ids of runs, "*" for every run, "own" for those submitted for `subject`.
      tasks: shell patterns of task names, such as "demo.*".
      issued_at: Unix seconds; 0 when the token does not say.
    """

    subject: str
    expires_at: float
    id: str
    actions: frozenset[str]
    runs: frozenset[str] | Literal["*", "own"]
    tasks: tuple[str, ...]
    issued_at: float = 0.0

    def may(self, action: str) -> bool:
        """Whether the token allows `action` at all; on which runs is `sees_run`'s business."""
        return action in self.actions

    def sees_run(self, run_id: str, task_name: str, subject: str = "") -> bool:
        """Whether the run is within the token's reach: by its id, its task's name, or whom it was submitted for."""
        if self.runs == OWN:
            mine = bool(subject) and subject == self.subject
        else:
            mine = self.runs == "*" or run_id in self.runs
        return mine or self.matches_task(task_name)

    def may_submit(self, task_name: str) -> bool:
        """Whether the token allows to submit this task."""
        return self.may("submit") and self.matches_task(task_name)

    def matches_task(self, task_name: str) -> bool:
        """Whether one of the patterns of tasks fits this name."""
        return any(fnmatchcase(task_name, pattern) for pattern in self.tasks)


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a verified ticket says.

    Attributes:
      id: its own `jti`, by which the store remembers that it was used.
      claims: of the session that it opens; `id` is that of the token it was made from, or the ticket's own, and
        `expires_at` when the session ends.
      valid_until: Unix seconds until which it opens one.
    """

    id: str
    claims: Claims
    valid_until: float
