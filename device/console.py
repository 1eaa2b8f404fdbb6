"""Make stdout and stderr safe to write to: what the console cannot take is lost text, never a lost run.

A reader may go away (`| head`, a closed terminal), the disk behind `> log` may be full, and a console may lack a
character. Imports nothing but the standard library, so that it can run first of all.
"""

import contextlib
import errno
import json
import os
import sys
import time

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET)      # no later write can succeed


class TolerantStream:
    """A text stream whose `write` and `flush` never raise OSError; everything else is the wrapped stream's.

    If the reader is gone for good, its file descriptor is pointed at os.devnull: then child processes and the
    interpreter's own flush at exit do not fail either.
    """

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def flush(self):
        self._attempt(self._stream.flush)

    def finish(self):
        """Flush for the last time; what cannot be written is discarded, so that the exit code stays ours."""
        self._attempt(self._stream.flush, last=True)

    def _attempt(self, action, last=False):
        try:
            action()
        except OSError as error:
            if last or error.errno in _GONE:
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, self._stream.fileno())
                os.close(devnull)

    def __getattr__(self, name):
        return getattr(self._stream, name)


def protect():
    """Wrap sys.stdout and sys.stderr for the rest of the process. Return the two TolerantStreams."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:                                      # closed before we started, as by `>&-`
            stream = open(os.devnull, "w", encoding="utf-8")    # noqa: SIM115 - stays open while the program runs
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")       # cp1252; file names that are not UTF-8
        setattr(sys, name, TolerantStream(stream))
    return sys.stdout, sys.stderr


def report(message):
    """Print an error; under torchrun, also let the report with which torchrun ends give it as the cause."""
    print(f"error: {message}", file=sys.stderr)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        cause = {"message": str(message), "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as written:
            json.dump({"message": cause}, written)


def run(main):
    """Exit with the code of `main(argv)`, whatever becomes of stdout and stderr: the last line of a program."""
    streams = protect()                 # a library may put others in their places meanwhile
    code = main(sys.argv[1:])
    for stream in streams:
        stream.finish()
    sys.exit(code)
