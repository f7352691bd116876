"""HTTP/2 on a line: a thread sends one request and receives its answer, inside one absolute deadline.

A connection whose call was given up stays open until that call's answer has come (`settled`): to close it would be to
cancel the call.
"""

from __future__ import annotations

from socket import socket

from tickserve.client._h2 import OUR_FRAME_SIZE, Answer, Conversation
from tickserve.client._socket import RECEIVE_BYTES, DeadlinePassedError, Line, WireError


class Stream(Line):
    """A line that speaks HTTP/2, one stream at a time."""

    __slots__ = ("_problem", "_sent", "_talk", "_torn")

    def __init__(self, sock: socket, busy: set[Line]) -> None:
        super().__init__(sock, busy)
        self._talk = Conversation()
        self._problem: WireError | None = None
        self._sent = False  # whether the request was sent to its end
        self._torn = False  # whether reading was cut off between two frames' ends: what follows cannot be told

    def exchange(self, head: bytes, payload: bytes, deadline_ns: int) -> Answer:
        """Send a request (its header block, its data), receive its answer. Raises WireError: close it then."""
        self.send(head, payload, deadline_ns)
        return self.receive(deadline_ns)

    def send(self, head: bytes, payload: bytes, deadline_ns: int) -> None:
        """Send a request. Raises WireError; the connection must then be closed."""
        talk = self._talk
        self.heard = self._sent = False
        self._problem = None
        self.put(talk.request(head, payload), deadline_ns)
        while talk.rest is not None and not talk.ended:  # it may be answered before it has heard everything
            part = talk.part()
            if part is None:
                self._step(deadline_ns)
            else:
                self.put(part, deadline_ns)
        self._sent = True

    def receive(self, deadline_ns: int) -> Answer:
        """The answer to what was sent. Raises WireError; the connection must then be closed."""
        if self._problem is not None:
            raise self._problem
        talk = self._talk
        while not talk.ended or talk.whole():
            self._step(deadline_ns)
        self.used, answer = True, talk.answer()
        self._say(deadline_ns)
        if talk.left:
            self.reusable = False
        return answer

    def readable(self, until_ns: int) -> bool:
        """Whether the answer has begun, or the connection ended, before `until_ns`; 0 does not wait.

        Settings, pings and window updates come unasked: taken for an answer they would cost a call its hedge.
        """
        while not (self._talk.begun or self._problem is not None):
            if not super().readable(until_ns):
                return False
            try:
                self._take_in(until_ns)
            except WireError as error:
                self._problem = error  # which `receive` raises
        return True

    @property
    def owed(self) -> bool:
        """Whether a request was begun whose answer has not ended."""
        return not self._talk.ended and self._problem is None

    def settled(self) -> bool:
        """Whether nothing is owed any more; reads what has come and waits for nothing. Then `reusable` holds."""
        talk = self._talk
        if self._torn or not self._sent:
            return False  # its answer cannot be read: whoever keeps it ends it in time
        try:
            while not talk.ended and super().readable(0):
                self._take(0)
                while talk.whole():
                    self._step(0)
                    talk.forget()
            if talk.ended:
                talk.answer()
                self._say(0)
        except DeadlinePassedError:
            return False
        except WireError:
            self.reusable = False
            return True
        if talk.left:
            self.reusable = False
        self.used = True
        return talk.ended

    def _take_in(self, until_ns: int) -> None:
        """Do what the whole frames say that are there, up to the first of the answer."""
        heard, talk = self.heard, self._talk
        try:
            self._take(until_ns)
        except DeadlinePassedError:  # woken without data
            return
        self.heard = heard
        while talk.whole() and not talk.begun:
            self._step(until_ns)

    def _take(self, deadline_ns: int) -> None:
        """Feed the conversation with what has come, as soon as there is something. Raises WireError."""
        torn, self._torn = self._torn, True  # until it is there, by whatever this may be interrupted
        try:
            came = self.more(deadline_ns, min(max(RECEIVE_BYTES, self._talk.short), OUR_FRAME_SIZE))
        except DeadlinePassedError:
            self._torn = torn
            raise
        self._talk.feed(came)
        self._torn = torn

    def _step(self, deadline_ns: int) -> None:
        """Read one frame and do what it says."""
        talk = self._talk
        answered = self.heard and talk.begun
        while not talk.whole():
            self._take(deadline_ns)
        self._torn = True
        talk.step()
        self._say(deadline_ns)
        self._torn = False
        self.heard = answered or talk.heard

    def _say(self, deadline_ns: int) -> None:
        """Send what the conversation wants sent."""
        talk = self._talk
        if talk.out:
            torn, self._torn = self._torn, True
            self.put(talk.out, deadline_ns)
            talk.out, self._torn = b"", torn
