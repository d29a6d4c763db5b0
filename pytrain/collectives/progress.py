"""Operations under way, and who moves them on: the caller between other work, or a thread."""

import threading
import time
from typing import Any

from pytrain.collectives.copies import Copies
from pytrain.collectives.counters import Counters
from pytrain.collectives.journal import Entry, Journal
from pytrain.collectives.turns import OnCaller, Turn
from pytrain.collectives.wire import Request, Steps, Transport, Wire

TURNS = (Turn, OnCaller)
NO_MESSAGES = (Copies, *TURNS)  # what this process sees for itself; a union would be made anew at every look
PAUSE = 50e-6  # seconds between two looks of the progress thread while nothing moves


class Done:
    """The handle of an operation that was waited for at once."""

    __slots__ = ("result",)

    def __init__(self, result: Any) -> None:
        self.result = result

    def test(self) -> bool:
        """Yes."""
        return True

    def wait(self) -> Any:
        """The result, if the operation has one."""
        return self.result


class Running:
    """An operation that was started; its array may be touched again when it is done."""

    def __init__(self, progress: "Progress", wire: Wire, steps: Steps, entry: Entry) -> None:
        self.requests: list[Request] = []
        self.done = False
        self.result: Any = None
        self.wire = wire
        self.started = time.perf_counter()
        self._progress = progress
        self._steps = steps
        self._entry = entry
        self._error: BaseException | None = None

    def test(self) -> bool:
        """Whether the operation is done; moves it on if it can, without waiting.

        Raises:
            CollectiveMismatchError: members are at different operations.
        """
        if not self.done:
            self._progress.poll()
        self._raise()
        return self.done

    def wait(self) -> Any:
        """Return when the operation is done, with its result if it has one (operations on objects).

        Raises:
            CollectiveMismatchError: members are at different operations.
        """
        if not self.done:
            started = time.perf_counter()
            self._progress.wait(self)
            self.wire.counters.waited_seconds += time.perf_counter() - started
        self._raise()
        return self.result

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def advance(self, journal: Journal, counters: Counters) -> None:
        """Go on to the next messages that must be waited for: those of the last step are complete."""
        journal.last_move = journal.clock()
        try:
            requests = next(self._steps)
            while not requests:
                requests = next(self._steps)
            self.requests = requests
            return
        except StopIteration as stop:
            self.result = stop.value
        except Exception as error:
            self._error = error
        self.requests = []
        self.done = True
        counters.open_seconds += time.perf_counter() - self.started
        self.wire.release()
        journal.end(self._entry)


class Progress:
    """All operations of a process that are under way.

    Whoever waits for one operation moves all of them on: another rank may need that before it comes to ours.

    Args:
        transport: waits for messages of all groups.
        journal: told of every movement.
        threaded: a thread moves operations on while the caller computes; else `poll` between other work does.
    """

    def __init__(self, transport: Transport, journal: Journal, threaded: bool = False) -> None:
        self.transport = transport
        self.journal = journal
        self._active: list[Running] = []
        self._lock = threading.Lock()
        self._closed = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        if threaded:
            self.start_thread()

    def start_thread(self) -> None:
        """Let a thread move operations on from here on."""
        self._thread = threading.Thread(target=self._run, name="pytrain progress", daemon=True)
        self._thread.start()

    def start(self, wire: Wire, steps: Steps, entry: Entry) -> Running:
        """Post the first messages of an operation."""
        handle = Running(self, wire, steps, entry)
        with self._lock:
            handle.advance(self.journal, wire.counters)
            if not handle.done:
                self._active.append(handle)
        if self._thread is not None and not handle.done:
            self._wake.set()
        return handle

    def run(self, wire: Wire, steps: Steps, entry: Entry) -> Done:
        """As `start` and then `wait`; where nothing else is under way a way without detours.

        Raises:
            CollectiveMismatchError: members are at different operations.
        """
        if self._active:
            return Done(self.start(wire, steps, entry).wait())
        wire.alone = True
        started = time.perf_counter()
        journal, result = self.journal, None
        try:
            with self._lock:
                while True:
                    requests = next(steps)
                    if requests:
                        self._wait_all(requests)
                        journal.last_move = journal.clock()
        except StopIteration as stop:
            result = stop.value
        finally:
            elapsed = time.perf_counter() - started
            wire.counters.waited_seconds += elapsed
            wire.counters.open_seconds += elapsed
            wire.release()
            journal.end(entry)
        return Done(result)

    def poll(self) -> bool:
        """Move on what can be without waiting; whether anything moved."""
        with self._lock:
            return self._poll()

    def _poll(self) -> bool:
        moved = False
        for handle in self._active:
            while not handle.done and self._test_all(handle.requests):
                handle.advance(self.journal, handle.wire.counters)
                moved = True
        if moved:
            self._active = [handle for handle in self._active if not handle.done]
        return moved

    def wait(self, handle: Running) -> None:
        """Return when `handle` is done."""
        with self._lock:
            while not handle.done:
                if len(self._active) == 1:
                    self._wait_all(handle.requests)
                    handle.advance(self.journal, handle.wire.counters)
                    if handle.done:
                        self._active.clear()
                else:
                    self._wait_some()
                    self._poll()

    def until(self, turn: Turn | None, counters: Counters) -> None:
        """Return when a turn has come, if one is waited for; moves on what is under way."""
        if turn is None or turn.done():
            return
        started = time.perf_counter()
        with self._lock:
            while not turn.done():
                self._wait_some()
                self._poll()
        counters.waited_seconds += time.perf_counter() - started

    def _wait_some(self) -> None:
        """Return when something of what is under way has arrived: the next copy, which no other rank holds up.

        Who waits for a turn has nothing that could arrive: that comes with what the others wait for.
        """
        waiting = []
        for requests in (active.requests for active in self._active):
            if not isinstance(requests, TURNS):
                waiting.append(requests)
            elif requests.done():  # what the thread saw and left to its caller
                return
        copies = next((requests for requests in waiting if isinstance(requests, Copies)), None)
        if copies is not None:
            copies.wait()
        else:
            self.transport.wait_some([request for requests in waiting for request in requests])

    def _test_all(self, requests: list[Request]) -> bool:
        if isinstance(requests, NO_MESSAGES):
            return requests.done()
        return self.transport.test_all(requests)

    def _wait_all(self, requests: list[Request]) -> None:
        if isinstance(requests, Copies):
            requests.wait()
        elif isinstance(requests, TURNS):
            assert requests.done(), "an operation waits for a buffer that no other has"
        else:
            self.transport.wait_all(requests)

    def close(self) -> None:
        """End the thread. Operations that are under way stay so."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        """The thread: serial code only, as kernels run on the caller's threads."""
        while not self._closed:
            if not self._active:
                self._wake.wait()
                self._wake.clear()
            elif not self.poll():
                time.sleep(PAUSE)
