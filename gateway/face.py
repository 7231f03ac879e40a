"""What the HTTP rooms need of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from gateway.accepting import Outcome
from gateway.changes import Changes
from gateway.documents import Picture
from gateway.fanout import Hub
from gateway.grants import Revocation
from gateway.store.protocol import Store
from gateway.store.rows import RunRow
from gateway.submission import Catalogue, Submission
from gateway.tally import RunTally, StoreTally
from taskkit.settings import Settings
from taskkit.tokens import Claims, Ticket
from taskkit.wire.messages import Answer, Created, Located, ScheduleAnswer, ScheduleOrder


class RunnerView(Protocol):
    """A runner as it stands; `started_at` is in Unix seconds, `runs` are ids of the runs open on it."""

    @property
    def id(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def pool(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def runs(self) -> tuple[str, ...]: ...
    @property
    def started_at(self) -> float: ...
    @property
    def runs_done(self) -> int: ...
    @property
    def last_ending(self) -> str | None: ...


class Engine(Protocol):
    """The part of the gateway that decides what becomes of runs."""

    @property
    def store(self) -> Store: ...
    @property
    def hub(self) -> Hub: ...
    @property
    def changes(self) -> Changes: ...
    @property
    def catalogue(self) -> Catalogue: ...
    @property
    def settings(self) -> Settings: ...
    @property
    def versions(self) -> Mapping[str, str]: ...

    async def submit(self, submission: Submission) -> tuple[RunRow, bool]:
        """Return the run, on disk, and whether it existed before. Raises SubmitError, StoreError."""

    async def submit_all(self, submissions: Sequence[Submission]) -> list[Outcome]:
        """Return what became of each submission, in one commit. Never raises what concerns them all: each says it."""

    async def cancel(self, run: RunRow, grace: float | None) -> RunRow:
        """Ask the run to stop. Raises LifecycleError when it has ended."""

    async def input(self, run: RunRow, name: str, data: bytes, key: str) -> tuple[int, bool]:
        """Tell the run something; return its number, and whether that was said before. Raises LifecycleError."""

    async def create_row(self, submission: Submission, fields: dict[str, Any]) -> Created:
        """Have an intake runner save a task row, its submission with it. Raises SubmitError."""

    async def ask(self, app: str, model: str, pk: str) -> Answer:
        """Ask the courier about a task row. Raises NotWritable when it is away."""

    async def locate(self, id: str) -> Located | None:
        """Return which other node has a run, if there can be any. Raises NotWritable when nobody can tell."""

    async def schedule(self, order: ScheduleOrder) -> ScheduleAnswer:
        """Have the courier do what is wanted with schedules. Raises NotWritable when it is away."""

    async def end_runner(self, id: str, *, now: bool) -> bool:
        """Have a runner leave, with or without its runs; return whether one lives by this id. Raises NotWritable."""

    async def reset_task(self, task: str) -> bool:
        """Let the runs of a held task go; return whether it was held. Raises NotWritable."""

    async def redeem(self, ticket: Ticket) -> bool:
        """Use a ticket up; return whether this was the first time. Raises NotWritable."""

    def is_used(self, ticket: Ticket) -> bool:
        """Whether a ticket was used."""

    async def revoke(self, revocation: Revocation) -> None:
        """Take tokens back. Raises TooManyRevocations, NotWritable."""

    def is_revoked(self, claims: Claims) -> bool:
        """Whether a token with these claims was taken back."""

    def runners(self) -> Sequence[RunnerView]:
        """Return every runner."""

    def statistics(self) -> Picture:
        """Return a picture of now."""

    @property
    def run_tally(self) -> RunTally: ...
    @property
    def store_tally(self) -> StoreTally: ...
