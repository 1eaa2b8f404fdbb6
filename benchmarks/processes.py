"""Commands as child processes, several at a time, that end well when the program is told to end."""

if __name__ == "__main__":
    raise SystemExit("this file is a part of another program: python benchmarks/ablation.py --help")

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

from dataset.workers import cores
from device.signals import FORWARDED
from errors import CheckpointError, Failure

TAIL = 12       # lines of a failed command's output that are shown
FOREVER = 10**9     # --total_step of a training that its time ends


class Stopped(Exception):
    """The program is ending: by a signal, or because another run failed."""


class Children:
    """Runs commands, several at a time, and ends all of them when told to."""

    def __init__(self, jobs):
        self.env = dict(os.environ)
        if jobs > 1:
            self.env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
        self.signal, self._since = None, 0.0
        self._stopped = False
        self._running = set()
        self._lock = threading.RLock()      # a signal's handler may come while this thread holds it

    def run(self, name, command, log, capture=False, seconds=None):
        """Run `command` to its end, with its output appended to the file `log`; with `capture`, return its stdout.

        After so many `seconds` a training is asked to save and end. Raises Stopped, or a Failure with the command's own
        exit code after showing the end of its output.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab+") as output:
            output.write(f"$ {shlex.join(map(str, command))}\n".encode())
            output.flush()
            start = output.seek(0, os.SEEK_END)
            with self._lock:
                self.check()
                try:
                    # In a session of its own, or a terminal's Ctrl-C would reach it beside ours, and the second
                    # signal ends a training without saving.
                    process = subprocess.Popen(
                        [str(word) for word in command], env=self.env, stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE if capture else output, stderr=output, start_new_session=True)
                except OSError as error:
                    raise Failure(f"{name}: cannot run {command[0]} ({error.strerror})") from None
                self._running.add(process)
            try:
                printed, expected = wait_for(process, seconds, self._interrupt)
            finally:
                with self._lock:
                    self._running.discard(process)
            self.check()
            printed = printed or b""
            if process.returncode not in (0, expected):
                output.seek(start)
                raise self._failure(name, process.returncode, output.read() + printed, log)
        return printed.decode(errors="replace")

    def _interrupt(self, process):
        with self._lock:
            if not self._stopped:                       # else it was asked, and a second signal ends it unsaved
                process.send_signal(signal.SIGINT)

    @staticmethod
    def _failure(name, code, output, log):
        lines = [line for line in re.split(r"[\r\n]+", output.decode(errors="replace")) if line.strip()]
        code = 128 - code if code < 0 else code
        tail = "".join(f"    {line}\n" for line in lines[-TAIL:])
        failure = Failure(f"{name} ended with exit code {code}; all of its output is in {log}")
        failure.code, failure.output = code, tail
        return failure

    def check(self):
        """Raise Stopped if that was asked for."""
        if self._stopped:
            raise Stopped

    def stop(self, kill=False):
        """Start no more; ask those that run to save and end, once, or end them at once."""
        with self._lock:
            asked, self._stopped = self._stopped, True
            for process in self._running:
                if kill:
                    process.kill()
                elif not asked:                         # the second signal ends a training without saving
                    process.send_signal(signal.SIGINT)

    @contextmanager
    def signals_handled(self):
        """In this block the first signal lets trainings save; a later one, that is no copy of it, does not wait."""
        names = (name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
        numbers = [number for number in map(signal.Signals.__getitem__, names)
                   if (number.name, signal.getsignal(number)) != ("SIGHUP", signal.SIG_IGN)]      # under nohup
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
            self.stop()
        elif time.monotonic() - self._since > FORWARDED:
            self.stop(kill=True)


def wait_for(process, seconds, interrupt):
    """Wait for a process, that `interrupt(process)` asks to end after so many seconds; None: it is not asked.

    Return (its stdout, None without a pipe; the exit code to expect: 0, or 130 of one that was asked).
    """
    try:
        return process.communicate(timeout=seconds)[0], 0
    except subprocess.TimeoutExpired:
        interrupt(process)
        return process.communicate()[0], 128 + signal.SIGINT


def exit_code_of(action, flag=""):
    """Return action()'s exit code; for a Failure, Ctrl-C or a disk error print a line and return its code.

    `flag`, such as "--out: ", begins the line of a disk error.
    """
    try:
        return action()
    except Failure as failure:
        print(getattr(failure, "output", ""), end="", file=sys.stderr)
        print(f"error: {failure}", file=sys.stderr)
        return failure.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {flag}{error.filename or 'the disk'}: {error.strerror or error}", file=sys.stderr)
        return CheckpointError.code
