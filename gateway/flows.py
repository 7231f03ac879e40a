"""Runs that belong together: a parent with its children, a run that comes after others. Pure.

A run may have a *parent*: while that is open, its stream tells of the child (`run.child.submitted`,
`run.child.started`, `run.child.ended`), and when it is cancelled, so is the child. A run may come *after* others: it
waits in no queue until all of them have succeeded, and ends unstarted as soon as one of them has not.

Nothing is kept twice. Who belongs to whom is in the rows of the runs; that a run has ended is an input of those whom it
concerns (`gateway.inputs`), of the same transaction as its end. So what a run still waits for is what its row names and
it was not told of, and every attempt of a parent hears of all its children. Whoever dies in between, it is told once.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from gateway.inputs import ENDED, Inputs
from gateway.plan import Plan
from gateway.store.rows import InputRow, RunRow
from taskkit.errors import InvalidArguments, QueueFull
from taskkit.lifecycle import RunEvent, RunStatus

#: Children of one run, whatever has become of them: the gateway remembers the ends of all while the run is open.
MOST_CHILDREN: Final = 1_000

#: Runs that one run may come after.
MOST_AFTER: Final = 1_000

#: Pairs of a run that waits and one that it waits for, in all: 300 bytes each.
MOST_TIES: Final = 100_000

#: Error code of a run that comes after one that did not succeed.
DEPENDENCY: Final = "dependency_failed"

#: Refused submissions that are remembered: whoever comes after one of them need not be waited for.
_REFUSED: Final = 1_000

#: Largest result that is told along with an end; of a larger one only that there is one.
_RESULT: Final = 64 * 1024


#: `RunRow.after` of a run that comes after none, as most do.
_NOBODY: Final = b"[]"


class Flows:
    """What open runs have to do with one another.

    Args:
      runs: every open run by number.
    """

    def __init__(self, runs: Mapping[int, RunRow], inputs: Inputs, plan: Plan) -> None:
        self._runs = runs
        self._inputs = inputs
        self._plan = plan
        self._children: dict[str, dict[int, None]] = {}
        self._pending: dict[int, set[str]] = {}
        self._after: dict[str, dict[int, None]] = {}
        self._ties = 0
        self._refused: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        """Return how many runs wait for others."""
        return len(self._pending)

    # --- coming and leaving ---------------------------------------------------------------------------------

    def check(self, parent: RunRow | None, after: Iterable[str], child: str) -> None:
        """Refuse a submission for which there is no room.

        Raises:
          InvalidArguments: its parent has too many children.
          QueueFull: too many runs wait for others.
        """
        if parent is not None and parent.children >= MOST_CHILDREN:
            message = f"a run has {MOST_CHILDREN:,} children at most, and run {parent.id} has them"
            raise InvalidArguments(f"run {child}: {message}", errors={"parent": message})
        if self._ties + sum(1 for _ in after) > MOST_TIES:
            raise QueueFull(f"runs wait for {MOST_TIES:,} others already", retry_after=5)

    def add(self, run: RunRow) -> None:
        """A run is open: it is new, or was found in the store."""
        if run.parent is not None:
            self._children.setdefault(run.parent, {})[run.no] = None
        pending = {id for id in after_of(run) if not self._inputs.has_heard(run.no, _name(id))}
        if pending:
            self._pending[run.no] = pending
            self._ties += len(pending)
            for id in pending:
                self._after.setdefault(id, {})[run.no] = None

    def remove(self, run: RunRow) -> None:
        """A run has ended."""
        if run.parent is not None:
            _discard(self._children, run.parent, run.no)
        for id in self._pending.pop(run.no, ()):
            self._ties -= 1
            _discard(self._after, id, run.no)

    def refused(self, id: str) -> None:
        """A submission was refused for good: no run will have this id."""
        self._refused[id] = None
        while len(self._refused) > _REFUSED:
            self._refused.popitem(last=False)

    def is_hopeless(self, ids: Iterable[str]) -> bool:
        """Whether one of these runs will never be."""
        return not self._refused.keys().isdisjoint(ids)

    # --- what is the case -----------------------------------------------------------------------------------

    def holds(self, no: int) -> bool:
        """Whether a run waits for others."""
        return no in self._pending

    def waits_for(self, id: str) -> list[RunRow]:
        """Return the runs that come after this one."""
        return [self._runs[no] for no in self._after.get(id, ())]

    def family(self, run: RunRow) -> list[RunRow]:
        """Return a run and all its open descendants, the older generation first."""
        found, look = [run], deque([run.id])
        while look:
            children = [self._runs[no] for no in self._children.get(look.popleft(), ())]
            found += children
            look += [child.id for child in children]
        return found

    # --- what is told ---------------------------------------------------------------------------------------

    def born(self, parent: RunRow, child: RunRow, now: float) -> None:
        """Tell an open parent of a new child."""
        parent.children += 1
        self._say(parent, "run.child.submitted", child, now)

    def began(self, parent: RunRow, child: RunRow, number: int, now: float) -> None:
        """Tell an open parent that an attempt of a child begins."""
        self._say(parent, "run.child.started", child, now, attempt=number)

    def ended(self, parent: RunRow, child: RunRow, now: float) -> InputRow | None:
        """Tell an open parent of a child's end; return what it hears. None: it has heard it."""
        heard = self.tell(parent, child, now)
        if heard is not None:
            parent.children_ended += 1
            parent.children_failed += child.status is not RunStatus.SUCCESSFUL
            error = {} if child.error is None else {"error": _in_short(child.error)}
            self._say(parent, "run.child.ended", child, now, status=child.status.value, **error)
        return heard

    def denied(self, parent: RunRow, child: RunRow, now: float) -> InputRow | None:
        """Tell an open parent of a child that was refused; return what it hears, as `ended`."""
        if parent.children >= 2 * MOST_CHILDREN or self._inputs.has_heard(parent.no, _name(child.id)):
            return None
        parent.children += 1
        return self.ended(parent, child, now)

    def _say(self, parent: RunRow, type: str, child: RunRow, now: float, **more: Any) -> None:
        counts = {"total": parent.children, "ended": parent.children_ended, "failed": parent.children_failed}
        self._plan.say(parent, type, now, child=child.id, task=child.task, **more, children=counts)

    def tell(self, run: RunRow, ended: RunRow, now: float) -> InputRow | None:
        """Have a run hear that another one has ended; None: it has heard it."""
        outcome: dict[str, Any] = {"run": ended.id, "task": ended.task, "status": ended.status.value}
        if ended.error is not None:
            outcome["error"] = msgspec.Raw(ended.error)
        elif ended.result is not None and len(ended.result) <= min(_RESULT, self._inputs.room(run.no)):
            outcome["result"] = msgspec.Raw(ended.result)
        return self._inputs.tell(run.no, _name(ended.id), msgspec.json.encode(outcome), now, self._plan.batch)

    def heard(self, run: RunRow, ended: RunRow) -> bool:
        """A run has heard that one which it waits for has succeeded; return whether it waits for no other."""
        pending = self._pending.get(run.no)
        if pending is None or ended.id not in pending:
            return False
        pending.discard(ended.id)
        self._ties -= 1
        _discard(self._after, ended.id, run.no)
        if not pending:
            del self._pending[run.no]
        return not pending

    def outcomes(self, run: RunRow) -> bytes:
        """Return what a run has heard of those that it comes after, in their order, as JSON."""
        if run.after == _NOBODY:
            return _NOBODY
        told = {row.name: row.data for row in self._inputs.of(run.no)}
        return b"[%b]" % b",".join(told[_name(id)] for id in after_of(run) if _name(id) in told)


def _name(id: str) -> str:
    """Return the name of the input that tells of a run's end."""
    return ENDED + id


def _discard(groups: dict[str, dict[int, None]], id: str, no: int) -> None:
    group = groups.get(id)
    if group is not None:
        group.pop(no, None)
        if not group:
            del groups[id]


def _in_short(error: bytes) -> dict[str, Any]:
    """Return an error without its traceback: the child's own stream has it."""
    found = msgspec.json.decode(error)
    return {name: found[name] for name in ("code", "message", "exception") if name in found}


def after_of(run: RunRow) -> list[str]:
    """Return the ids of the runs that a run comes after."""
    return [] if run.after == _NOBODY else msgspec.json.decode(run.after, type=list[str])


def failed_with(ended: RunRow) -> tuple[RunEvent, dict[str, Any]]:
    """Return what becomes of a run that comes after one that did not succeed, and its error."""
    event = RunEvent.CANCEL if ended.status is RunStatus.CANCELLED else RunEvent.FAIL
    message = f"run {ended.id} of {ended.task}, which this one comes after, ended {ended.status.value}"
    return event, {"code": DEPENDENCY, "message": message, "run": ended.id}


def refusal_of(id: str, task: str, code: str, message: str) -> RunRow:
    """Return a submission that was refused as its parent sees it: a run that has failed."""
    error = msgspec.json.encode({"code": code, "message": message})
    return RunRow(no=0, id=id, task=task, status=RunStatus.FAILED, error=error)
