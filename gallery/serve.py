"""`--mode serve`: the folder of all galleries over HTTP, on the loopback address alone, to read and nothing else.

For runs on another machine: `ssh -L` brings the port to the machine with the browser. No file outside the folder is
served, neither by `..` nor by a symbolic link, and no list of files. Imports no torch, so that it starts at once.
"""

import errno
import functools
import getpass
import mimetypes
import os
import re
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

from errors import UsageError

ADDRESS = "127.0.0.1"
PAGE = "index.html"         # what is shown of a folder
CHUNK = 1 << 18             # bytes that are sent at once
# Any website can name this address. None of them may show these pages in a frame, use a picture, or guess at a type.
# no-cache: browsers revalidate each file, as a run rewrites its pages.
HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "SAMEORIGIN",
           "Cross-Origin-Resource-Policy": "same-origin"}


def serve(config):
    """Serve `--sample_path` on `--port` until a signal ends it. Raise UsageError, or what the signal raises."""
    if not os.path.isdir(config.sample_path):
        raise UsageError(f"--sample_path {config.sample_path}: there is no such folder; train a run first, or name the "
                         "folder of its pictures")
    try:
        server = Server((ADDRESS, config.port), functools.partial(Handler, os.path.realpath(config.sample_path)))
    except OSError as error:
        reason = "another program uses it" if error.errno == errno.EADDRINUSE else error.strerror
        raise UsageError(f"--port {config.port}: {reason}; give another one, or 0 for a free one") from None
    with server:
        port = server.server_address[1]
        print(f"{config.sample_path} is at http://{ADDRESS}:{port}/ until Ctrl-C. From another machine, first run "
              f"there:\nssh -L {port}:{ADDRESS}:{port} {_login()}", flush=True)
        server.serve_forever()
    return 0


def _login():
    """Return user@host of this machine, as far as it knows them."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):             # a number without a name, as in a container
        user = "USER"
    return f"{user}@{socket.gethostname()}"


class Server(ThreadingHTTPServer):
    """A thread for each connection; they end with the program."""

    daemon_threads = True

    def handle_error(self, request, client_address):
        """Say nothing of browsers that go away, or of files that do."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD with the files below `root`, a real path; with a part of a file where that is asked for."""

    protocol_version = "HTTP/1.1"           # a connection serves many requests
    timeout = 60                            # seconds, then an idle one is closed

    def __init__(self, root, *arguments):
        self.root = root
        super().__init__(*arguments)

    def do_GET(self):                       # noqa: N802 - the library's name
        """Answer with a file."""
        self._answer()

    def do_HEAD(self):                      # noqa: N802
        """Answer with a file's headers."""
        self._answer()

    def log_message(self, *_):
        """Say nothing of each request."""

    def end_headers(self):
        """End the headers of any answer."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def _answer(self):
        # a name that a website let point here (DNS rebinding) is not ours
        if self.headers.get("Host", ADDRESS).rsplit(":", 1)[0] not in (ADDRESS, "localhost"):
            return self.send_error(HTTPStatus.FORBIDDEN)
        names = _names(self.path)
        path = names is not None and _find(self.root, names)
        if not path:
            return self.send_error(HTTPStatus.NOT_FOUND)
        if os.path.isdir(path):
            if not urlsplit(self.path).path.endswith("/"):              # else relative links would lead elsewhere
                return self._send(HTTPStatus.MOVED_PERMANENTLY,
                                  {"Location": "/" + "".join(f"{quote(os.fsencode(name))}/" for name in names)})
            path = _find(self.root, [*names, PAGE])
        try:
            with open(path or "", "rb") as file:
                self._send_file(file, path)
        except (FileNotFoundError, IsADirectoryError, PermissionError):
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send_file(self, file, path):
        status = os.fstat(file.fileno())
        tag = f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"'
        if self.headers.get("If-None-Match") == tag:
            return self._send(HTTPStatus.NOT_MODIFIED, {"ETag": tag})
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        headers = {"ETag": tag, "Accept-Ranges": "bytes",
                   "Content-Type": f"{kind}; charset=utf-8" if kind.startswith("text/") else kind}
        first, last = 0, status.st_size - 1
        asked = self.headers.get("Range") if self.headers.get("If-Range", tag) == tag else None
        part = asked and _part(asked, status.st_size)
        if part == ():
            return self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                              {"Content-Range": f"bytes */{status.st_size}"})
        if part:
            first, last = part
            headers["Content-Range"] = f"bytes {first}-{last}/{status.st_size}"
        self._send(HTTPStatus.PARTIAL_CONTENT if part else HTTPStatus.OK, headers, last + 1 - first)
        file.seek(first)
        left = 0 if self.command == "HEAD" else last + 1 - first
        while left and (chunk := file.read(min(left, CHUNK))):
            self.wfile.write(chunk)
            left -= len(chunk)
        self.close_connection |= left > 0 and self.command != "HEAD"    # it was cut while it was sent

    def _send(self, status, headers, length=0):
        self.send_response(status)
        if status != HTTPStatus.NOT_MODIFIED:
            headers["Content-Length"] = str(length)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _names(address):
    """Return the names in the path of an address, decoded once; None if one is hidden, .. or no file name."""
    try:
        path = urlsplit(address).path
    except ValueError:                      # such as http://[/
        return None
    names = [name for name in unquote(path, errors="surrogateescape").split("/") if name]
    wrong = any(name.startswith(".") or "\0" in name or os.sep in name or "\\" in name or ":" in name for name in names)
    return None if wrong else names


def _find(root, names):
    """Return the real path of the file or folder of these names below `root`, a real path; None without one there."""
    try:
        found = os.path.realpath(os.path.join(root, *names), strict=True)
    except OSError:                         # there is none; a name that is too long; links in a circle
        return None
    inside = found == root or found.startswith(os.path.join(root, ""))
    hidden = any(part.startswith(".") for part in os.path.relpath(found, root).split(os.sep) if found != root)
    return found if inside and not hidden and (os.path.isdir(found) or os.path.isfile(found)) else None


def _part(asked, size):
    """Return (first, last) byte of a Range header; None if it is to be ignored, () if there are no such bytes."""
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", asked.strip(), re.ASCII)
    if not match or match[1] == match[2] == "":
        return None                         # several parts: the whole is an allowed answer
    if match[1] == "":
        first, last = max(0, size - int(match[2])), size - 1
    else:
        first, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
        if match[2] and int(match[2]) < first:
            return None
    return (first, last) if first <= last else ()
