"""The state of one events pipe, which says what is to be done with the next frame.

One session per runner, in the gateway. It knows the attempts that were ordered (`expect`), and judges each frame:

    NEW ──Hello──► OPEN ──(Started, Event*, Finished, or GivenBack, per attempt)──► OPEN ──close──► CLOSED

Frames already stored are duplicates after a takeover; frames for an attempt that is not open here are strays
(fenced). Both are consumed, counted and not stored. Anything else out of order breaks the protocol.
"""

from __future__ import annotations

import enum
from typing import Final

from taskkit.errors import UnexpectedMessage
from taskkit.wire.messages import Created, Event, Finished, GivenBack, Hello, Progress, RunnerMessage, Started


class SessionState(enum.Enum):
    """State of the pipe."""

    NEW = enum.auto()
    OPEN = enum.auto()
    #: broke the protocol, or its runner is gone and drained
    CLOSED = enum.auto()


class AttemptState(enum.Enum):
    """State of one attempt on this pipe."""

    #: ordered; the runner has not said `Started`
    ORDERED = enum.auto()
    STARTED = enum.auto()


class Judgement(enum.Enum):
    """What to do with a frame."""

    #: store it and act on it
    STORE = enum.auto()
    #: it is in the store already
    DUPLICATE = enum.auto()
    #: it belongs to no attempt that is open here
    STRAY = enum.auto()


#: By names of their own, for the one look: 0.2 against 1.5 µs of the whole judgement.
_OPEN: Final = SessionState.OPEN
_STARTED: Final = AttemptState.STARTED
_STORE: Final = Judgement.STORE


class RunnerSession:
    """Judges the frames of one runner's pipe, in the order of their numbers.

    Args:
      stored_seq: number of the last frame in the store; 0 for a new pipe.
    """

    def __init__(self, stored_seq: int = 0) -> None:
        self.seq = stored_seq
        self.state = SessionState.NEW if stored_seq == 0 else SessionState.OPEN
        self.attempts: dict[str, AttemptState] = {}
        self.duplicates = 0
        self.strays = 0

    def expect(self, token: str, state: AttemptState = AttemptState.ORDERED) -> None:
        """An attempt with this token is ordered from the runner, or was before a takeover."""
        self.attempts[token] = state

    def forget(self, token: str) -> None:
        """The attempt was ended from outside: later frames of it are strays."""
        self.attempts.pop(token, None)

    def close(self) -> None:
        """No further frame is accepted."""
        self.state = SessionState.CLOSED

    def receive(self, seq: int, message: RunnerMessage) -> Judgement:
        """Judge `message`, which came as frame number `seq`.

        Raises:
          UnexpectedMessage: the number leaves a hole, or the message does not fit the state. The runner's fault;
            the session is closed.
        """
        if (
            type(message) is Event  # most of all frames, and judged in one look
            and seq == self.seq + 1
            and self.state is _OPEN
            and self.attempts.get(message.token) is _STARTED
        ):
            self.seq = seq
            return _STORE
        if self.state is SessionState.CLOSED:
            raise UnexpectedMessage(f"frame {seq} after the end")
        if seq <= self.seq:
            self.duplicates += 1
            return Judgement.DUPLICATE
        if seq != self.seq + 1:
            self.close()
            raise UnexpectedMessage(f"frame {seq} follows frame {self.seq}")
        try:
            judgement = self._judge(message)
        except UnexpectedMessage:
            self.close()
            raise
        self.seq = seq
        self.strays += judgement is Judgement.STRAY
        return judgement

    def _judge(self, message: RunnerMessage) -> Judgement:
        name = type(message).__name__
        if isinstance(message, Hello):
            if self.state is not SessionState.NEW:
                raise UnexpectedMessage("a second Hello")
            self.state = SessionState.OPEN
            return Judgement.STORE
        if self.state is SessionState.NEW:
            raise UnexpectedMessage(f"{name} before Hello")
        if isinstance(message, Created):
            return Judgement.STORE
        attempt = self.attempts.get(message.token)
        if attempt is None:
            return Judgement.STRAY
        if isinstance(message, Started):
            if attempt is AttemptState.STARTED:
                raise UnexpectedMessage("Started twice for one attempt")
            self.attempts[message.token] = AttemptState.STARTED
            return Judgement.STORE
        if isinstance(message, GivenBack):
            if attempt is AttemptState.STARTED:
                raise UnexpectedMessage("an attempt that has begun is given back")
            del self.attempts[message.token]
            return Judgement.STORE
        if attempt is AttemptState.ORDERED:
            raise UnexpectedMessage(f"{name} before Started")
        if isinstance(message, Finished):
            del self.attempts[message.token]
        else:
            assert isinstance(message, Event | Progress)
        return Judgement.STORE
