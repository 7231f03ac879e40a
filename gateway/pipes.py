"""All runners' pipes: what they have said goes to the book, what is committed is taken out."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Final

import trio

from gateway.book import Book
from gateway.ingest import PEEK_SIZE, SMALL_PEEK_SIZE, Poller, RunnerPipes, Scratch
from gateway.state import RunnerState
from taskkit.errors import RemoteWireError
from taskkit.wire.codec import unpack_runner_frame
from taskkit.wire.framing import Frame
from taskkit.wire.messages import Finished, Order, RunnerSpec

logger = logging.getLogger("bulkhead.gateway")

#: Seconds that a pipe rests when a round found no whole frame in it, first and longest: it stays readable, and
#: asking again at once would burn a core.
_REST: Final = (0.005, 0.05)

#: Seconds after which a runner that has said little is forgotten. Two events a tenth of a second apart are for somebody
#: who watches; beside a run that says less, a round of 64 KiB costs nobody a noticeable part of its pause.
_CALM: Final = 0.1

#: Seconds until an order that a runner's socket did not take is given again.
_AGAIN: Final = 0.05


@dataclass(slots=True)
class _Rest:
    """A pipe that is not watched until `until`; the next rest is longer than `seconds`."""

    until: float
    seconds: float


class Pipes:
    """The near ends of every runner that is not drained.

    Args:
      lines_per_second: output lines kept per runner.
    """

    def __init__(self, book: Book, *, lines_per_second: int) -> None:
        self._book = book
        self._lines_per_second = lines_per_second
        self._all: dict[str, RunnerPipes] = {}
        self._by_fd: dict[int, str] = {}
        self._resting: dict[str, _Rest] = {}
        self._unsent: dict[str, deque[Order]] = {}
        self._calm_until = 0.0
        self._poller = Poller()
        self._scratch = Scratch()

    def add(self, spec: RunnerSpec, fds: list[int], *, adopted: bool) -> None:
        """Watch a runner's ends; takes ownership of the descriptors."""
        pipes = RunnerPipes(spec, fds, adopted=adopted, lines_per_second=self._lines_per_second)
        self._all[spec.id] = pipes
        if (
            adopted and spec.concurrency == 1
        ):  # the marker that told whose plain lines are may have been read before
            of_it = [a.row.token for a in self._book.attempts.values() if a.row.runner == spec.id]
            pipes.parser.plain = next(iter(of_it), "")
        for fd in (pipes.events, pipes.output):
            self._by_fd[fd] = spec.id
            self._poller.watch(fd)

    async def wait(self) -> None:
        """Return when some pipe has something to read or has ended, or `wake` was called since the last `look`."""
        await trio.lowlevel.wait_readable(self._poller.fileno())

    def wake(self) -> None:
        """End the wait: something else is there for the next round."""
        self._poller.ring()

    def next_look(self) -> float | None:
        """Return when a resting pipe has to be looked at again, or an order has to be given again (trio time)."""
        again = [trio.current_time() + _AGAIN] if self._unsent else []
        return min((*again, *(rest.until for rest in self._resting.values())), default=None)

    # --- looking -------------------------------------------------------------------------------------------

    def look(self) -> list[tuple[str, int]]:
        """Read what runners have said into the book; return how many bytes of whose pipe that were."""
        now = trio.current_time()
        self._give_again()
        for id, rest in self._resting.items():
            if rest.until <= now:
                rest.until = float("inf")
                self._poller.watch(self._all[id].events)
        ready = self._poller.ready()
        dead = {id for id, runner in self._book.runners.items() if runner.exited is not None}
        ids = {self._by_fd[fd] for fd in ready if fd in self._by_fd} | dead
        share = SMALL_PEEK_SIZE if now < self._calm_until else PEEK_SIZE
        taken = [(id, self._look_at(id, ready, share)) for id in sorted(ids)]
        if any(0 < size < SMALL_PEEK_SIZE // 2 for _, size in taken):
            self._calm_until = now + _CALM
        return taken

    def _look_at(self, id: str, ready: set[int], share: int) -> int:
        pipes, runner = self._all[id], self._book.runners[id]
        if (pipes.output in ready or runner.exited is not None) and not self._look_at_output(pipes):
            self._poller.rest(pipes.output)  # its last writer has gone
        try:
            frames, size = self._take_in(pipes, runner, share)
        except (
            OSError
        ) as error:  # no descriptor is left to look with; nothing was taken in, nothing is judged
            logger.error("cannot look at what runner %s has said: %s; trying again", id, error)
            self._rest(pipes)
            return 0
        if runner.exited is not None:
            if frames:
                self.wake()  # there may be more than one round holds
            else:
                self._book.runner_drained(id, time.time())
        elif frames:
            self._resting.pop(id, None)
        elif pipes.events in ready:
            self._rest(pipes)
        return size

    def _take_in(self, pipes: RunnerPipes, runner: RunnerState, share: int) -> tuple[int, int]:
        """Return how many frames were taken in, and their bytes. Nothing is read behind what is broken."""
        if runner.corrupt:
            return 0, 0
        frames, size, broken = pipes.peek(self._scratch, runner.session.seq, share)
        try:
            self._take_frames(runner, pipes, frames)
        except RemoteWireError as error:
            broken = error
        if broken is not None:
            self._book.runner_corrupt(runner.spec.id, broken)
        return len(frames), size

    def _take_frames(self, runner: RunnerState, pipes: RunnerPipes, frames: list[Frame]) -> None:
        now = time.time()
        for frame in frames:
            message = unpack_runner_frame(frame)
            if isinstance(message, Finished):
                # Its output is in the pipe already: the runner writes the end marker before this frame.
                self._look_at_output(pipes)
                pipes.parser.forget(message.token)
            self._book.frame(runner, frame.seq, message, now)

    def _look_at_output(self, pipes: RunnerPipes) -> bool:
        """Take in what was printed; return whether there was any."""
        data = pipes.read_output()
        if data:
            for token, lines in pipes.parser.receive(data, trio.current_time()).items():
                self._book.output(token, lines, time.time())
        return bool(data)

    def _rest(self, pipes: RunnerPipes) -> None:
        before = self._resting.get(pipes.id)
        seconds = _REST[0] if before is None else min(before.seconds * 2, _REST[1])
        self._resting[pipes.id] = _Rest(trio.current_time() + seconds, seconds)
        self._poller.rest(pipes.events)

    # --- acting --------------------------------------------------------------------------------------------

    def consume(self, id: str, size: int) -> None:
        """Take out what `look` has returned for this runner: it is committed."""
        self._all[id].consume(size)

    def order(self, id: str, order: Order) -> bool:
        """Give an order; return whether the runner's socket took it."""
        pipes = self._all.get(id)
        return pipes is not None and id not in self._unsent and pipes.order(order)

    def give(self, id: str, order: Order) -> bool:
        """Give an order now, or when there is room for it; return whether the runner's socket took it.

        A large order needs a descriptor, and there may be none; what is not taken until the runner has gone is void.
        """
        if self.order(id, order):
            return True
        if id in self._all:
            self._unsent.setdefault(id, deque()).append(order)
        return False

    def _give_again(self) -> None:
        for id, orders in list(self._unsent.items()):
            while orders and self._all[id].order(orders[0]):
                orders.popleft()
            if not orders:
                del self._unsent[id]

    def drop(self, id: str) -> None:
        """A dead runner has nothing left to say: let go of its ends."""
        pipes = self._all.pop(id)
        self._resting.pop(id, None)
        self._unsent.pop(id, None)
        for fd in (pipes.events, pipes.output):
            self._poller.rest(fd)
            self._by_fd.pop(fd, None)
        pipes.close()

    def at_end(self) -> bool:
        """Whether every events pipe is empty, and nobody can write to it any more."""
        return all(pipes.at_end() for pipes in self._all.values())

    def close(self) -> None:
        """Let go of every descriptor."""
        for pipes in self._all.values():
            pipes.close()
        self._all.clear()
        self._poller.close()
        self._scratch.close()
