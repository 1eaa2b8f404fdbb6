"""Requests to end: SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGXCPU, from a person, a scheduler or torchrun.

Outside of training a request ends the program at once: nothing would be lost. While a `deferred` block runs, it is only
noted, and the loop saves at the end of the step. Imports nothing but the standard library.
"""

import os
import signal
import threading
import time
from contextlib import contextmanager, suppress

_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGXCPU")      # those that a system lacks are left out
FORWARDED = 5           # seconds: torchrun and job schedulers repeat a signal that a process group has already received
_NOTE = f"\nfinishing this step and saving; Ctrl-C after {FORWARDED} s or more ends without saving\n".encode()


class Interrupted(BaseException):
    """A request to end that came in outside of training. `number` is the signal's."""

    def __init__(self, number):
        super().__init__(f"signal {number}")
        self.number = number


class Interrupt:
    """The first request to end, in `signal`, or None. `with Interrupt() as interrupt:` handles signals in its block.

    A second Ctrl-C ends at once, with KeyboardInterrupt, unless it follows within FORWARDED seconds: then it is a copy.
    """

    def __init__(self):
        self.signal, self._since, self._deferred, self._raised, self._before = None, 0.0, False, False, {}

    @contextmanager
    def deferred(self):
        """In this block a request is only noted. One that came before it ends the program here."""
        self.check()
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self):
        """Raise Interrupted if a request came in and was not acted on, as inside a library's callback."""
        if self.signal is not None and not self._deferred:
            self._raised = True
            raise Interrupted(self.signal)

    def _handle(self, number, frame):
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
            self.check()
            if os.environ.get("RANK", "0") == "0":
                with suppress(OSError):                 # not print: it may be what was interrupted
                    os.write(2, _NOTE)
        elif number == signal.SIGINT and time.monotonic() - self._since > FORWARDED:
            raise KeyboardInterrupt("what was trained since the last checkpoint is not saved" * self._deferred)

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self                                 # only the main thread may handle signals
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            before = signal.getsignal(number)
            if number == getattr(signal, "SIGHUP", None) and before == signal.SIG_IGN:
                continue                                # started under nohup: the terminal may go away
            self._before[number] = before
            signal.signal(number, self._handle)
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._raised and isinstance(error, Exception):
            raise Interrupted(self.signal) from None    # a library caught it, and failed by what it left half done
