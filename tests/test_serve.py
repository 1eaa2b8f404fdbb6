"""--mode serve: the galleries over HTTP on the loopback address, and nothing else of the disk."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import MAIN
from test_page import Run

from gallery import page

FLAGS = ("--mode", "serve", "--port", "0")


class Served:
    """`python main.py --mode serve`, and what it answers."""

    def __init__(self, *flags):
        self.process = subprocess.Popen([sys.executable, MAIN, *FLAGS, *flags], stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)
        self.said = self.process.stdout.readline() + self.process.stdout.readline()
        self.port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", self.said)[1])

    def ask(self, path, method="GET", **headers):
        """(status, headers, content); the path is sent as it is written."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), content

    def end(self):
        """(exit code, stderr) after Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        _, err = self.process.communicate(timeout=10)
        return self.process.returncode, err


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a run, and with what must not be served."""
    root = tmp_path_factory.mktemp("served")
    run = Run(root, "a b")
    run.record(100)
    run.write("running", 1)
    samples = root / "samples"
    page.write_overview(samples)
    (root / "secret.txt").write_text("secret")
    (root / "samples2").mkdir()
    (root / "samples2" / "secret.txt").write_text("secret")
    (samples / "out").symlink_to(root)
    (samples / "link.txt").symlink_to(root / "secret.txt")
    (samples / "circle").symlink_to(samples / "circle")
    (samples / "inner.png").symlink_to(run.folders.samples / "0000100_fake.png")
    (samples / ".lock").write_text("secret")
    (samples / "lock").symlink_to(samples / ".lock")
    (samples / "no page").mkdir()
    (samples / "no page" / "0000100_generated.png").write_bytes(b"png")
    (samples / "video.mp4").write_bytes(bytes(range(100)))
    os.mkfifo(samples / "pipe")
    return root


@pytest.fixture(scope="module")
def served(root):
    one = Served("--sample_path", str(root / "samples"))
    yield one
    one.process.kill()
    one.process.wait()


def test_the_pages_and_pictures_of_all_runs_are_served(served, root):
    assert f"ssh -L {served.port}:127.0.0.1:{served.port} " in served.said and socket.gethostname() in served.said
    status, headers, content = served.ask("/")
    assert status == 200 and content == (root / "samples/index.html").read_bytes()
    assert headers["Content-Type"] == "text/html; charset=utf-8" and headers["Cache-Control"] == "no-cache"
    assert served.ask("/a%20b/index.html?newer")[2] == (root / "samples/a b/index.html").read_bytes()
    status, headers, content = served.ask("/a%20b/0000100_fake.png")
    assert status == 200 and headers["Content-Type"] == "image/png" and content[:4] == b"\x89PNG"
    assert served.ask("/inner.png")[2] == content       # a link to another file inside
    status, headers, content = served.ask("/a%20b/0000100_fake.png", "HEAD")
    assert status == 200 and int(headers["Content-Length"]) > 100 and content == b""
    status, headers, _ = served.ask("/a%20b")
    assert status == 301 and headers["Location"] == "/a%20b/"


@pytest.mark.parametrize("path", [
    "/../secret.txt", "/%2e%2e/secret.txt", "/a%20b/../../secret.txt", "/..%2fsecret.txt", "/%2e%2e%2fsecret.txt",
    "//secret.txt", "/a%20b/..%2f..%2fsecret.txt", "/..%5csecret.txt", "/%252e%252e/secret.txt", "/out/secret.txt",
    "/out/", "/link.txt", "/circle", "/.lock", "/lock", "/../samples2/secret.txt", "/a%00b", "/pipe", "/no%20page/",
    "/nothing", "/" + "x" * 5000, "/%ff%fe", "../secret.txt", "/../../../../etc/passwd",
    "/etc/passwd", "//etc/passwd", "/C:/x", "http://127.0.0.1/../secret.txt", "/video.mp4/..", "/."])
def test_there_is_no_way_out_of_the_folder_and_no_list_of_files(served, path):
    status, _, content = served.ask(path)
    assert status == 404 and b"secret" not in content and b"root:" not in content and b"generated" not in content


def test_an_address_that_names_another_host_does_not_lead_there(served):
    status, headers, _ = served.ask("//evil.example/a%20b")
    assert status == 404 and "Location" not in headers
    status, headers, _ = served.ask("//a%20b")
    assert status == 404 or headers["Location"] == "/a%20b/"


def test_other_websites_get_nothing(served):
    """One that lets its own name point to this address; one that shows a page in its frame."""
    assert served.ask("/", Host="evil.example:8000")[0] == 403
    assert served.ask("/", Host="localhost:9000")[0] == 200             # another port at the other end of ssh
    headers = served.ask("/")[1]
    assert headers["X-Frame-Options"] == "SAMEORIGIN" and headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["X-Content-Type-Options"] == "nosniff" and "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_it_can_only_be_read(served, method, root):
    before = {path: path.stat().st_mtime_ns for path in (root / "samples").iterdir() if path.exists()}
    assert served.ask("/index.html", method)[0] == 501
    assert before == {path: path.stat().st_mtime_ns for path in (root / "samples").iterdir() if path.exists()}


@pytest.mark.parametrize(("asked", "first", "last"), [
    ("bytes=0-9", 0, 9), ("bytes=90-", 90, 99), ("bytes=-5", 95, 99), ("bytes=50-500", 50, 99)])
def test_a_part_of_a_video_is_sent(served, asked, first, last):
    status, headers, content = served.ask("/video.mp4", Range=asked)
    assert status == 206 and content == bytes(range(first, last + 1))
    assert headers["Content-Range"] == f"bytes {first}-{last}/100" and headers["Content-Type"] == "video/mp4"


def test_of_odd_parts_the_whole_is_sent_or_none(served):
    for asked in ("bytes=5-2", "bytes=0-1,5-6", "lines=1-2", "bytes=-", "bytes=²-"):
        assert served.ask("/video.mp4", Range=asked.encode("utf-8"))[::2] == (200, bytes(range(100)))
    status, headers, content = served.ask("/video.mp4", Range="bytes=100-")
    assert status == 416 and headers["Content-Range"] == "bytes */100" and content == b""


def test_what_is_unchanged_is_not_sent_again_and_what_a_run_rewrote_in_the_same_second_is(served, root):
    run = Run(root, "a b")
    tag = served.ask("/a%20b/")[1]["ETag"]
    assert served.ask("/a%20b/", If_None_Match=tag)[::2] == (304, b"")
    run.write("done")
    status, _, content = served.ask("/a%20b/", If_None_Match=tag)
    assert status == 200 and content == run.path.read_bytes() and b'"done"' in content


def test_several_are_served_at_once(served):
    with socket.create_connection(("127.0.0.1", served.port)) as silent:        # says nothing, and waits
        assert served.ask("/")[0] == 200
        silent.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address of this machine")
def test_another_machine_cannot_connect(served):
    """As only 127.0.0.1 is listened to: at any other address of this machine nobody answers."""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", served.port), timeout=10)


def test_ctrl_c_ends_it_without_a_traceback(tmp_path):
    began = time.monotonic()
    one = Served("--sample_path", str(tmp_path))
    assert time.monotonic() - began < 3, "it imports no torch"
    assert one.ask("/")[0] == 404                       # no run was there yet
    assert one.end() == (130, "interrupted\n")


def test_a_port_in_use_and_a_folder_that_is_missing_are_one_line(run):
    Path("samples").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, out, err = run("--mode", "serve", "--port", port, tiny=False)
    assert code == 2 and err == (f"error: --port {port}: another program uses it; give another one, or 0 for a free "
                                 "one\n") and out == ""
    code, _, err = run("--mode", "serve", "--sample_path", "nowhere", tiny=False)
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("error: --sample_path nowhere: there is no such folder")
    code, _, err = run("--mode", "serve", "--port", 65536, tiny=False)
    assert code == 2 and "--port 65536" in err
    code, _, err = run("--port", 9000)
    assert code == 2 and "--port 9000: has no effect with --mode train" in err
