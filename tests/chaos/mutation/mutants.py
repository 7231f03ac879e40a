"""Which line is which guard: what a mutant does without. Imported by tests, by itself in every mutated process.

A mutant may widen the window that its guard closes (a pause before a moment), so that one try shows the harm. The same
scenario passes on a tree that has the guard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple


class Change(NamedTuple):
    """One text in the source of a module, which must be there exactly once, with what stands there instead."""

    module: str
    old: str
    new: str


_LOOK: Final = "        data = scratch.copy(self.events, self._reach if self._unsynced else share)\n"

_DECIDED: Final = '        pass_round("decided", batch)\n'

MUTANTS: Final[Mapping[str, tuple[Change, ...]]] = {
    # What is looked at is out of the pipe: it dies with the gateway that has looked.
    "plain read": (
        Change(
            "gateway.ingest",
            _LOOK,
            "        data = self.__dict__.get('held', b'')\n"
            "        if linux.bytes_to_read(self.events):\n"
            "            data += os.read(self.events, self._reach)\n"
            "        self.held = data\n",
        ),
        Change(
            "gateway.ingest",
            "            taken = os.readv(self.events, [memoryview(self._buffer)[:size]])\n",
            "            taken, self.held = size, self.held[size:]\n",
        ),
    ),
    # Nobody remembers how far a pipe was stored.
    "no source row": (
        Change(
            "gateway.book",
            "self._sources[id] = self._plan.batch.sources[id] = seq",
            "self._sources[id] = seq",
        ),
    ),
    # A frame that is stored already is stored again.
    "no skipping": (
        Change("taskkit.wire.session", "        if seq <= self.seq:\n", "        if seq < 0:\n"),
        Change(
            "taskkit.wire.session", "        if seq != self.seq + 1:\n", "        if seq > self.seq + 1:\n"
        ),
    ),
    # Two gateways may write one store.
    "no store lock": (
        Change(
            "gateway.store.sqlite",
            "            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
            "            pass\n",
        ),
    ),
    # Two supervisors may use one state directory.
    "no state lock": (
        Change(
            "supervisor.state",
            "            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
            "            pass\n",
        ),
    ),
    # What a runner says is believed to be of the attempt that is open on it, whatever its token.
    "no fence": (
        Change(
            "gateway.book",
            "        if judgement is Judgement.STRAY:\n            return\n",
            "        if judgement is Judgement.STRAY:\n"
            "            message = msgspec.structs.replace(message, token=next(iter(runner.tokens)))\n",
        ),
    ),
    # A gateway that does not beat is left to itself; nobody looks for it afterwards either.
    "no kill and confirm": (
        Change(
            "supervisor.gateway_client",
            "                    left = await child.end(5.0 if self.stopping else 0.0)\n"
            "                self.last_exit, self._may_pass = str(left), left.may_pass\n",
            "                    self.last_exit = 'left to itself'\n"
            "                    if self.stopping:\n"
            "                        self.last_exit = str(await child.end(5.0))\n",
        ),
        Change("supervisor.strays", "for pid in linux.children() - self._known():", "for pid in ():"),
    ),
    # Orders leave before anybody could know that they were given.
    "Start before assignment": (
        Change(
            "gateway.engine",
            _DECIDED,
            "        for id, order in after.orders:\n"
            "            self._pipes.order(id, order)\n"
            "        starts, after.orders = any(isinstance(o, Start) for _, o in after.orders), []\n"
            "        await trio.sleep(0.2 if starts else 0)\n" + _DECIDED,
        ),
    ),
    # Clients see what is not in the store.
    "broadcast before commit": (
        Change(
            "gateway.engine",
            _DECIDED,
            "        early = not batch.runs\n"
            "        if early:\n"
            "            await self._publish(batch)\n"
            "            await trio.sleep(0.1 if batch.ends else 0)\n" + _DECIDED,
        ),
        Change(
            "gateway.engine",
            '        await self._publish(batch)\n        pass_round("published"',
            '        if not early:\n            await self._publish(batch)\n        pass_round("published"',
        ),
    ),
    # Submitters are told before the disk is.
    "answer before commit": (
        Change(
            "gateway.engine",
            _DECIDED,
            "        for request in requests:\n            request.settle()\n"
            "        await trio.sleep(0.1 if batch.runs else 0)\n" + _DECIDED,
        ),
    ),
    # Where nobody can write any more, the runner is taken for dead.
    "EOF as the end": (
        Change(
            "gateway.pipes",
            "        pipes, runner = self._all[id], self._book.runners[id]\n",
            "        pipes, runner = self._all[id], self._book.runners[id]\n"
            "        if runner.exited is None and pipes.at_end():\n"
            "            from taskkit.wire.messages import Cause\n"
            "            runner.exited = Cause(kind='lost', detail='its pipe has ended')\n",
        ),
    ),
    # A dead runner has nothing more to say.
    "death as the end": (
        Change(
            "gateway.pipes",
            "            if frames:\n                self.wake()  # there may be more than one round holds\n"
            "            else:\n                self._book.runner_drained(id, time.time())\n",
            "            self._book.runner_drained(id, time.time())\n",
        ),
    ),
    # The new gateway takes an order for given because it was planned.
    "Start not repeated": (
        Change(
            "gateway.book",
            "        else:\n            self._order.start(run, row,",
            "        elif run.no < 0:\n            self._order.start(run, row,",
        ),
    ),
    # What the runners of a dead supervisor had begun is left open.
    "nothing is lost": (
        Change(
            "gateway.book", "            if attempt.row.runner not in adopting:\n", "            if False:\n"
        ),
    ),
    # An outbox entry is taken for submitted as soon as it is read.
    "outbox settled unanswered": (
        Change(
            "taskkit.courier.database",
            '            failpoints.hit("courier.read")\n',
            "            for submission in submissions:\n"
            "                outbox_reader.Outbox.objects.using(self.alias).filter(pk=submission.id).delete()\n"
            '            failpoints.hit("courier.read")\n',
        ),
    ),
}
