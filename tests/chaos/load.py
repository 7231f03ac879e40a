"""Submitters: everything the tree is asked to perform while it is being broken."""

from __future__ import annotations

import random
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import trio

from taskkit.identifiers import new_run_id
from tests.chaos.clients import Clients
from tests.chaos.django_link import DjangoLink
from tests.chaos.exchange import BROKEN, ask
from tests.chaos.history import History, Submission

_GOOD: Final = frozenset({"SUCCESSFUL"})
_BAD: Final = frozenset({"FAILED"})
_STOPPED: Final = frozenset({"CANCELLED", "SUCCESSFUL"})


@dataclass(frozen=True, slots=True)
class Sort:
    """One sort of run.

    Attributes:
      weight: how often it is drawn.
      n: least and most events; pause: seconds between them, at most.
      scale: of the events' size.
      cancel: whether somebody cancels it while it runs.
    """

    task: str
    weight: float
    n: tuple[int, int]
    pause: float = 0.0
    scale: int = 1
    expected: frozenset[str] = _GOOD
    cancel: bool = False


SORTS: Final = (
    Sort("chaos_ticks", 6, (3, 40), 0.08),
    Sort("chaos_ticks", 2, (100, 400), 0.01),
    Sort("chaos_ticks", 1.5, (1, 5), 0.1, scale=40),
    Sort("chaos_ticks", 1, (40, 80), 0.2, expected=_STOPPED, cancel=True),
    Sort("chaos_aticks", 4, (3, 40), 0.08),
    Sort("chaos_aticks", 1, (40, 80), 0.2, expected=_STOPPED, cancel=True),
    Sort("chaos_yields", 2, (3, 40), 0.05),
    Sort("chaos_talks", 2, (5, 60), 0.05),
    Sort("chaos_fails", 1, (1, 10), 0.02, expected=_BAD),
    Sort("chaos_retries", 1, (1, 10), 0.02),
    Sort("chaos_segfaults", 0.6, (1, 60), 0.0, expected=_BAD),
    Sort("chaos_forks", 1, (3, 20), 0.05),
    Sort("ARow", 1.5, (3, 20), 0.05),
)

#: FAILED as corrupt; but a gateway that takes over within the five seconds skips what is no frame, since it may be the
#: rest of one that its predecessor has consumed, and then the task's own end counts.
SCRIBBLE: Final = Sort("chaos_scribbles", 0, (1, 60), 0.0, expected=_BAD | _GOOD)
FLOOD: Final = Sort("chaos_ticks", 0, (800, 2_000), 0.0)

#: How a submission reaches the tree, by weight; see history.Submission.
WAYS: Final = {"key": 6, "id": 2, "once": 1, "django": 3}

#: Clients that may follow open runs before another run is submitted; two follow each.
_MOST: Final = 120

#: Seconds between the tries of one submitter, at most.
_PATIENCE: Final = 0.5


class Load:
    """All submitters of one chaos run."""

    def __init__(
        self,
        history: History,
        clients: Clients,
        django: DjangoLink,
        port: int,
        token: str,
        nursery: trio.Nursery,
        seed: int,
    ) -> None:
        self._history = history
        self._clients = clients
        self._django = django
        self._port = port
        self._headers = {"Authorization": f"Bearer {token}"}
        self._nursery = nursery
        self._rng = random.Random(f"load {seed}")
        self.under_way = 0
        self.answers: Counter[int] = Counter()

    async def run(self, rate: float) -> None:
        """Submit `rate` runs a second on average, until cancelled. What has begun goes on by itself.

        Fewer while much is open: a tree that is down half of the time would end the attack with an hour of work.
        """
        while True:
            await trio.sleep(self._rng.expovariate(rate))
            while self._clients.following > _MOST:
                await trio.sleep(0.1)
            (sort,) = self._rng.choices(SORTS, [sort.weight for sort in SORTS])
            self.submit(sort)

    def submit(self, sort: Sort) -> None:
        """Begin one submission."""
        (way,) = self._rng.choices(list(WAYS), list(WAYS.values()))
        it = Submission(
            no=len(self._history.submissions) + 1,
            task=f"proj.{sort.task}",
            salt=self._rng.randrange(1, 2**40),
            n=self._rng.randint(*sort.n),
            scale=sort.scale,
            expected=sort.expected,
            way=way,
        )
        self._history.submissions.append(it)
        pause = round(self._rng.uniform(0, sort.pause), 3)
        rng = random.Random(self._rng.random())
        self._nursery.start_soon(self._perform, it, sort, pause, rng)

    async def _perform(self, it: Submission, sort: Sort, pause: float, rng: random.Random) -> None:
        self.under_way += 1
        try:
            if it.way == "django":
                await self._by_django(it, pause, rng)
            else:
                await self._by_http(it, pause, rng)
            if it.run is not None and sort.cancel and it.must_exist:
                await self._cancel(it.run, rng)
        finally:
            self.under_way -= 1

    # --- HTTP ----------------------------------------------------------------------------------------------

    async def _by_http(self, it: Submission, pause: float, rng: random.Random) -> None:
        body = self._body(it, pause)
        headers = dict(self._headers)
        if it.way == "key":
            headers["Idempotency-Key"] = str(uuid.UUID(int=rng.getrandbits(128)))
        else:
            it.run = body["id"] = new_run_id()
        while True:
            it.tries += 1
            try:
                status, answer = await ask(
                    self._port, "POST", "/api/v1/runs", headers=headers, body=body, timeout=rng.uniform(2, 10)
                )
            except BROKEN:
                status, answer = 0, None
            self.answers[status] += 1
            if status in (200, 202) and isinstance(answer, dict):
                self._acknowledged(it, answer["id"], replayed=status == 200)
                return
            if status not in (0, 429, 502, 503):
                it.outcome, it.detail = "refused", f"{status} {answer!r:.200}"
                return
            it.unknown = it.unknown or status != 429
            if it.way == "once":
                return
            await trio.sleep(rng.uniform(0.05, _PATIENCE))

    def _acknowledged(self, it: Submission, run: str, *, replayed: bool) -> None:
        it.run, it.outcome, it.replayed = run, "acknowledged", replayed
        self._clients.follow(run)

    def _body(self, it: Submission, pause: float) -> dict[str, Any]:
        body: dict[str, Any] = {"task": it.task, "tags": [it.tag]}
        return body | {"fields" if it.task == "proj.ARow" else "kwargs": arguments(it, pause)}

    # --- Django --------------------------------------------------------------------------------------------

    async def _by_django(self, it: Submission, pause: float, rng: random.Random) -> None:
        commit = rng.random() < 0.8
        answer = await self._django.submit(it.task, arguments(it, pause), it.tag, commit=commit)
        it.run = answer.get("run")
        it.outcome = answer["outcome"]
        if it.outcome == "committed" and it.run is not None:
            self._clients.follow(it.run, maybe_absent=True)

    # --- cancelling ----------------------------------------------------------------------------------------

    async def _cancel(self, run: str, rng: random.Random) -> None:
        """Ask until somebody says that it is done, or too late."""
        await trio.sleep(rng.uniform(0.1, 3.0))
        while True:
            try:
                status, _ = await ask(
                    self._port,
                    "POST",
                    f"/api/v1/runs/{run}/cancel",
                    headers=self._headers,
                    body={"grace": 0.5},
                )
            except BROKEN:
                status = 0
            if status not in (0, 404, 429, 502, 503):
                return
            if run in self._clients.ended:
                return
            await trio.sleep(rng.uniform(0.1, 0.5))


def arguments(it: Submission, pause: float) -> dict[str, Any]:
    """Return what a submission's task is called with."""
    if it.task == "proj.ARow":
        return {"message": f"salt {it.salt}", "steps": it.n, "pause": pause}
    scale = {"scale": it.scale} if it.scale != 1 else {}
    return {"salt": it.salt, "n": it.n, "pause": pause, **scale}
