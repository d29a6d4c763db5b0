"""Turns at buffers that operations share: who starts an operation waits for no buffer, the operation does.

With n buffers an operation has its turn when the one that was started n before it has ended. Nothing can hang in it
that did not before. A group's operations are started in the same order on all its members. Of those that have not
ended everywhere look at the first: on every member all before it have ended, so that it has its turn everywhere,
posts its messages, and meets those of the others. Members may be at different operations meanwhile: messages are told
apart by a tag that an operation gets when it is started. MPI's own collectives are matched by the order in which they
are posted, so that whoever starts one of them waits for its turn first (`Progress.until`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from threading import get_ident
from typing import Any


class Turns:
    """Of operations that share some buffers, in the order in which they are started.

    Args:
        buffers: operations that have their turn at a time, at most.
    """

    def __init__(self, buffers: int) -> None:
        self._last: deque[Turn] = deque(maxlen=buffers)

    def take(self) -> Turn:
        """That of the operation that is started now."""
        before = self._last[0] if len(self._last) == self._last.maxlen else None
        turn = Turn([before])
        self._last.append(turn)
        return turn


class Turn(list["Turn | None"]):
    """What an operation waits for in place of messages: the turn before it at the same buffer, if there was one."""

    ended = False
    """Whether the operation has ended, and its buffer is free."""

    def done(self) -> bool:
        """Whether the turn has come; does not wait."""
        return all(before is None or before.ended for before in self)

    def end(self) -> None:
        """The operation has ended."""
        self.ended = True
        self.clear()  # else every turn would keep all before it


class OnCaller(list[Turn]):
    """A turn that only the thread which starts the operation sees come: what follows is no work for another."""

    def __init__(self, turn: Turn) -> None:
        super().__init__([turn])
        self._thread = get_ident()

    def done(self) -> bool:
        """Whether the turn has come and this is that thread; does not wait."""
        return get_ident() == self._thread and self[0].done()


class Passage:
    """What is done around an operation whose array lies in one of a few buffers, by the thread that starts it.

    Args:
        turn: at that buffer.
        enter: fills the buffer.
        leave: takes the result out of it.
    """

    def __init__(self, turn: Turn, enter: Callable[[], None], leave: Callable[[], None]) -> None:
        self.turn = turn
        self._enter, self._leave = enter, leave
        self._here = OnCaller(turn)

    def around(self, steps: Generator[list[Any], None, Any]) -> Generator[list[Any], None, Any]:
        """The steps of the operation between the two. Kernels of many threads may run in both."""
        try:
            if not self._here.done():
                yield self._here
            self._enter()
            result = yield from steps
            if not self._here.done():
                yield self._here
            self._leave()
        finally:
            self.turn.end()
        return result
