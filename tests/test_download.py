"""download.sh against a real HTTP server on the loopback interface.

The runs use a copy of the script whose table describes small archives and whose pause between tries is 0;
nothing else is changed. What the shipped table says is checked on the shipped file.
"""

import hashlib
import http.server
import io
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "download.sh"
PAGE = b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>"
HUGE = 10**18


def make_zip(members, mode=0o644):
    """Zip of {name: bytes}; mode is the Unix mode of every member."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return buffer.getvalue()


def make_tar(members, kind=tarfile.REGTYPE, linkname=""):
    """tar.gz of {name: bytes}; kind and linkname apply to every member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, linkname
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


FACES = {f"img_align_celeba/{i:06d}.jpg": os.urandom(200) for i in range(1, 4)}
CELEBA = make_zip(FACES)
LARGE = make_zip({"img_align_celeba/000001.jpg": os.urandom(400_000)})  # curl buffers less before it writes
LSUN = make_zip({f"church_outdoor_train_lmdb/{name}.mdb": os.urandom(300) for name in ("data", "lock")})
CIFAR = make_tar({"cifar-10-batches-py/data_batch_1": os.urandom(300)})
VGG = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + os.urandom(400_000)  # as torch.save began files before 1.6


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` {path: bytes}; `requests` lists (path, Range header). Prefixes of a path misbehave:

    /cut half of what is asked, then the connection drops · /hang half, then silence · /dead no answer ·
    /norange the whole file whatever was asked · /halfnorange half of it, then the connection drops ·
    /page an HTML page · /busy 503 at first · /404
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.closing = {}, [], threading.Event()

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        how, _, name = self.path[1:].rpartition("/")
        if how == "dead":
            return
        if how == "404" or (how == "busy" and len(self.server.requests) == 1):
            self.send_error(404 if how == "404" else 503)
            return
        body = PAGE if how == "page" else self.server.files[name]
        start = int(asked[len("bytes="):-1]) if asked and how not in ("norange", "halfnorange", "page") else 0
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Type", "text/html" if how == "page" else "application/zip")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        self.wfile.write(rest[: (len(rest) + 1) // 2] if how in ("cut", "hang", "halfnorange") else rest)
        self.wfile.flush()
        if how == "hang":
            self.server.closing.wait(20)

    def log_message(self, *args):
        pass


class Bench:
    """One script copy, one server, one folder for the data."""

    def __init__(self, tmp_path, server):
        self.server, self.to, self.home = server, tmp_path / "data sets", tmp_path
        self.script = tmp_path / "download.sh"
        self.rows = {
            "CelebA": ["", "CelebA/img_align_celeba", "img_align_celeba.zip", CELEBA, "sha256",
                       ["/img_align_celeba.zip"]],
            "LSUN": ["church_outdoor", "LSUN/church_outdoor_train_lmdb", "church_outdoor_train_lmdb.zip",
                     LSUN, "sha256", ["/church_outdoor_train_lmdb.zip"]],
            "CIFAR10": ["", "CIFAR10/cifar-10-batches-py", "cifar-10-python.tar.gz", CIFAR,
                        "md5", ["/cifar-10-python.tar.gz"]],
            "VGG16": ["", "VGG16", "vgg16-397923af.pth", VGG, "sha256", ["/vgg16-397923af.pth"]],
        }
        self.unpacked = 4000
        self.part = self.to / "img_align_celeba.zip.part"

    def source(self, name, archive=None, urls=None):
        """Replaces the archive or the URLs of one data set."""
        self.rows[name][3] = archive or self.rows[name][3]
        self.rows[name][5] = urls or self.rows[name][5]

    def start(self, *arguments, **options):
        lines = []
        for name, (part, folder, file, archive, kind, urls) in self.rows.items():
            self.server.files.setdefault(file, archive)
            digest = hashlib.new(kind, archive).hexdigest()
            lines.append(f"{name}|{part}|{folder}|{file}|{len(archive)}|{self.unpacked}|{kind}:{digest}"
                         f"|the terms of {name}|{' '.join(map(self.server.url, urls))}")
        table = "table='\n" + "\n".join(lines) + "\n'\n"
        text, tables = re.subn(r"(?ms)^table='\n.*?^'\n", lambda _: table, SCRIPT.read_text())
        text, pauses = re.subn(r"(?m)^pause=3 ", "pause=0 ", text)
        assert (tables, pauses) == (1, 1)
        if not self.script.exists() or self.script.read_text() != text:  # bash reads while it runs
            self.script.write_text(text)
        command = ["bash", self.script, *map(str, arguments), "--to", self.to]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env=environment(self.home), **{"preexec_fn": heed_signals, **options})

    def run(self, *arguments, **options):
        """Exit code and everything printed."""
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=20)
        return process.returncode, out + err

    def left(self):
        """Every file and folder under the data folder, relative."""
        return sorted(str(p.relative_to(self.to)) for p in self.to.rglob("*"))


def environment(home):
    keep = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**keep, "PATH": path, "HOME": str(home)}


def shipped(tmp_path, *arguments):
    done = subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path,
                          env=environment(tmp_path), timeout=20)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def bench(tmp_path, server):
    return Bench(tmp_path, server)


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened within 10 s"
        time.sleep(0.01)


def heed_signals():
    """A suite started by nohup or in the background ignores these, and bash cannot trap what it was born ignoring."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def ended_process():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


# The shipped script -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage:"),
        (["celebb"], "unknown data set: celebb"),
        (["LSUN", "bedroom"], "unknown data set: LSUN bedroom"),
        (["CelebA", "--to"], "--to needs a value"),
        (["CelebA", "--mirror", "--to"], "--mirror needs a value"),
        (["CelebA", "--form-file", "x"], "unknown option --form-file"),
        (["CelebA", "--from-file", "absent.zip"], "--from-file absent.zip"),
        (["LSUN", "church_outdoor", "CelebA"], "one data set at a time"),
    ],
)
def test_usage_errors_exit_2_and_touch_nothing(tmp_path, arguments, message):
    code, text = shipped(tmp_path, *arguments)
    assert code == 2 and message in text
    if not arguments or "unknown data set" in message:
        assert all(name in text for name in ("CelebA", "LSUN church_outdoor", "CIFAR10", "VGG16"))
    assert list(tmp_path.iterdir()) == []


def test_mirror_and_from_file_exclude_each_other(tmp_path):
    (tmp_path / "x.zip").write_bytes(CELEBA)
    code, text = shipped(tmp_path, "CelebA", "--from-file", "x.zip", "--mirror", "http://127.0.0.1/x.zip")
    assert code == 2 and "exclude each other" in text


@pytest.mark.parametrize(
    ("row", "size", "digest"),
    [
        ("CelebA", 1443490838, "sha256:46fb89443c578308acf364d7d379fe1b9efb793042c0af734b6112e4fd3a8c74"),
        ("LSUN", 2448463466, "sha256:91128ae026840ac0c5982b4445ab5fc4e092d6847cca76793b2b1a0815c2e74a"),
        ("CIFAR10", 170498071, "md5:c58f30108f718f92721af3b95e74349a"),
        ("VGG16", 553433881, "sha256:397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
    ],
)
def test_shipped_table_holds_the_published_sizes_and_hashes(row, size, digest):
    (fields,) = [line.split("|") for line in SCRIPT.read_text().splitlines() if line.startswith(f"{row}|")]
    assert (int(fields[4]), fields[6]) == (size, digest)
    assert int(fields[5]) >= size


def test_shipped_script_refuses_an_archive_of_another_hash(tmp_path):
    (tmp_path / "mine.tar.gz").write_bytes(CIFAR)
    code, text = shipped(tmp_path, "CIFAR10", "--from-file", "mine.tar.gz")
    assert code == 3 and "expected c58f30108f718f92721af3b95e74349a" in text
    assert f"got {hashlib.md5(CIFAR).hexdigest()}" in text
    assert not (tmp_path / "data" / "CIFAR10").exists()


# What is fetched, and where it lands --------------------------------------------------------------


def test_celeba_lands_where_the_program_reads_it_and_a_second_run_does_nothing(bench):
    code, text = bench.run("CelebA")
    assert code == 0 and "the terms of CelebA" in text
    assert bench.left() == sorted(["CelebA", "CelebA/img_align_celeba", "CelebA/img_align_celeba/.complete",
                                   *(f"CelebA/{name}" for name in FACES)])
    assert all((bench.to / "CelebA" / name).read_bytes() == content for name, content in FACES.items())
    asked = list(bench.server.requests)
    code, text = bench.run("CelebA")
    assert code == 0 and "is complete in" in text and bench.server.requests == asked


@pytest.mark.parametrize("words", [["LSUN"], ["LSUN", "church_outdoor"]])
def test_lsun_lands_as_an_lmdb_folder(bench, words):
    assert bench.run(*words)[0] == 0
    assert {"data.mdb", "lock.mdb"} < set(os.listdir(bench.to / "LSUN" / "church_outdoor_train_lmdb"))


def test_cifar10_comes_from_a_tar_with_an_md5(bench):
    assert bench.run("CIFAR10")[0] == 0
    assert "data_batch_1" in os.listdir(bench.to / "CIFAR10" / "cifar-10-batches-py")


def test_mirror_is_tried_first_and_the_table_goes_on_after_it(bench):
    code, text = bench.run("CelebA", "--mirror", bench.server.url("/404/img_align_celeba.zip"))
    assert code == 0 and "HTTP error 404" in text
    paths = [path for path, _ in bench.server.requests]
    assert paths == ["/404/img_align_celeba.zip", "/img_align_celeba.zip"]


@pytest.mark.parametrize("bad", ["404", "page", "dead"])
def test_next_url_is_used_when_one_fails(bench, bad):
    bench.source("CelebA", urls=[f"/{bad}/img_align_celeba.zip", "/img_align_celeba.zip"])
    assert bench.run("CelebA")[0] == 0
    assert bench.server.requests[-1][0] == "/img_align_celeba.zip"


def test_busy_server_is_asked_again(bench):
    bench.source("CelebA", urls=["/busy/img_align_celeba.zip"])
    assert bench.run("CelebA")[0] == 0 and len(bench.server.requests) == 2


def test_from_file_needs_no_network_and_keeps_the_file(bench, tmp_path):
    mine = tmp_path / "img (1).zip"
    mine.write_bytes(CELEBA)
    assert bench.run("CelebA", "--from-file", mine)[0] == 0
    assert bench.server.requests == [] and mine.read_bytes() == CELEBA
    assert (bench.to / "CelebA" / "img_align_celeba" / ".complete").exists() and not bench.part.exists()


# A single file, which is not unpacked -------------------------------------------------------------

WEIGHTS = "VGG16/vgg16-397923af.pth"
WHOLE = ["VGG16", "VGG16/.complete", WEIGHTS]


def test_weights_land_where_the_program_reads_them_and_a_second_run_does_nothing(bench):
    code, text = bench.run("VGG16")
    assert code == 0 and "the terms of VGG16" in text
    assert bench.left() == WHOLE and (bench.to / WEIGHTS).read_bytes() == VGG
    asked = list(bench.server.requests)
    code, text = bench.run("VGG16")
    assert code == 0 and "is complete in" in text and bench.server.requests == asked


@pytest.mark.parametrize("beginning", [b"PK\3\4", b"\x80\x02"])
def test_weights_from_a_file_are_copied(bench, tmp_path, beginning):
    content = beginning + VGG[2:]
    bench.source("VGG16", archive=content)
    mine = tmp_path / "my weights.pth"
    mine.write_bytes(content)
    assert bench.run("VGG16", "--from-file", mine)[0] == 0
    assert bench.server.requests == [] and bench.left() == WHOLE
    assert mine.read_bytes() == content == (bench.to / WEIGHTS).read_bytes()
    assert not mine.samefile(bench.to / WEIGHTS)


def test_weights_are_resumed_and_come_from_a_mirror(bench):
    bench.source("VGG16", urls=["/hang/vgg16-397923af.pth"])
    part = bench.to / "vgg16-397923af.pth.part"
    running = bench.start("VGG16")
    wait_for(lambda: part.exists() and part.stat().st_size > 0)
    assert bench.run("VGG16")[0] == 6
    running.terminate()
    running.communicate(timeout=5)
    here = part.stat().st_size
    assert running.returncode == 143 and bench.left() == [part.name] and 0 < here < len(VGG)
    assert bench.run("VGG16", "--mirror", bench.server.url("/mirror/vgg16-397923af.pth"))[0] == 0
    assert bench.server.requests[-1] == ("/mirror/vgg16-397923af.pth", f"bytes={here}-")
    assert bench.left() == WHOLE and (bench.to / WEIGHTS).read_bytes() == VGG


@pytest.mark.parametrize("how", ["page", "flipped"])
def test_other_weights_are_refused(bench, how):
    bench.source("VGG16", urls=["/page/vgg16-397923af.pth" if how == "page" else "/vgg16-397923af.pth"])
    bench.server.files["vgg16-397923af.pth"] = VGG[:-1] + bytes([VGG[-1] ^ 1])
    code, text = bench.run("VGG16")
    message = "text/html instead of a .pth" if how == "page" else "wrong sha256"
    assert code == 3 and message in text and "--from-file" in text and bench.left() == []


def test_a_web_page_saved_as_weights_is_refused(bench, tmp_path):
    mine = tmp_path / "vgg16-397923af.pth"
    mine.write_bytes(PAGE)
    code, text = bench.run("VGG16", "--from-file", mine)
    assert code == 3 and "perhaps a web page" in text and bench.left() == []


def test_space_for_both_copies_of_the_weights_is_checked(bench):
    bench.unpacked = HUGE
    assert bench.run("VGG16")[0] == 5 and bench.server.requests == []


def test_disk_full_while_copying_weights_keeps_the_download(bench):
    part = bench.to / "vgg16-397923af.pth.part"
    bench.to.mkdir()
    part.write_bytes(VGG)
    limit = (len(VGG) // 2, len(VGG) // 2)
    code, text = bench.run("VGG16", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert code == 5 and "the archive is kept" in text and bench.left() == [part.name]
    assert bench.run("VGG16")[0] == 0 and bench.server.requests == [] and bench.left() == WHOLE


# Resuming -----------------------------------------------------------------------------------------


def test_cut_connections_lose_no_byte(bench):
    bench.source("CelebA", urls=["/cut/img_align_celeba.zip"])
    assert bench.run("CelebA")[0] == 0
    starts = [int(asked[6:-1]) if asked else 0 for _, asked in bench.server.requests]
    assert starts == sorted(set(starts)) and len(starts) > 5


def test_partial_file_is_kept_and_resumed_by_the_next_run(bench):
    bench.to.mkdir()
    bench.part.write_bytes(CELEBA[:100])
    bench.source("CelebA", urls=["/dead/img_align_celeba.zip"])
    code, text = bench.run("CelebA")
    assert code == 3 and "no source gave" in text and "--from-file" in text
    assert bench.left() == [bench.part.name] and bench.part.read_bytes() == CELEBA[:100]
    bench.source("CelebA", urls=["/img_align_celeba.zip"])
    assert bench.run("CelebA")[0] == 0 and bench.server.requests[-1][1] == "bytes=100-"


def test_server_that_cannot_resume_sends_it_all_again(bench):
    bench.to.mkdir()
    bench.part.write_bytes(CELEBA[:100])
    bench.source("CelebA", urls=["/norange/img_align_celeba.zip"])
    assert bench.run("CelebA")[0] == 0


def test_server_that_cannot_resume_and_always_drops_is_given_up(bench):
    bench.source("CelebA", urls=["/halfnorange/img_align_celeba.zip"])
    assert bench.run("CelebA")[0] == 3
    assert len(bench.server.requests) < 10


def test_web_page_does_not_cost_the_bytes_already_here(bench):
    bench.to.mkdir()
    bench.part.write_bytes(CELEBA[:100])
    bench.source("CelebA", urls=["/page/img_align_celeba.zip"])
    assert bench.run("CelebA")[0] == 3
    assert bench.part.read_bytes() == CELEBA[:100]


# Wrong data ---------------------------------------------------------------------------------------


def test_web_page_is_refused(bench):
    bench.source("CelebA", urls=["/page/img_align_celeba.zip"])
    code, text = bench.run("CelebA")
    assert code == 3 and "text/html instead of a .zip" in text and "quota" in text and "--from-file" in text
    assert bench.left() == []


@pytest.mark.parametrize("change", ["flipped", "short"])
def test_wrong_archive_is_removed_and_both_hashes_are_shown(bench, change):
    other = CELEBA[:-1] + bytes([CELEBA[-1] ^ 1]) if change == "flipped" else CELEBA[:-10]
    bench.server.files["img_align_celeba.zip"] = other
    code, text = bench.run("CelebA")
    assert code == 3 and bench.left() == []
    if change == "flipped":
        assert f"expected {hashlib.sha256(CELEBA).hexdigest()}" in text
        assert f"got {hashlib.sha256(other).hexdigest()}" in text
    else:
        assert f"ends after {len(other)} bytes, expected are {len(CELEBA)}" in text


@pytest.mark.parametrize(("content", "message"), [(PAGE, "perhaps a web page"), (LSUN, "wrong sha256")])
def test_from_file_checks_the_file_and_leaves_it_alone(bench, tmp_path, content, message):
    mine = tmp_path / "mine.zip"
    mine.write_bytes(content)
    code, text = bench.run("CelebA", "--from-file", mine)
    assert code == 3 and message in text and "again" in text
    assert bench.left() == [] and mine.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "archive"),
    [
        ("CelebA", make_zip({**FACES, "../escaped": b"x"})),
        ("CelebA", make_zip({**FACES, "/escaped": b"x"})),
        ("CelebA", make_zip({"img_align_celeba/link": b"/etc/passwd"}, mode=stat.S_IFLNK | 0o777)),
        ("CIFAR10", make_tar({"cifar-10-batches-py/../../escaped": b"x"})),
        ("CIFAR10", make_tar({"/escaped": b"x"})),
        ("CIFAR10", make_tar({"cifar-10-batches-py/l": b""}, tarfile.SYMTYPE, linkname="data_batch_1")),
        ("CIFAR10", make_tar({"cifar-10-batches-py/l": b""}, tarfile.LNKTYPE, linkname="data_batch_1")),
    ],
)
def test_archive_that_reaches_out_of_its_folder_is_refused(bench, tmp_path, name, archive):
    bench.source(name, archive=archive)
    code, text = bench.run(name)
    assert code == 3 and "not unpacked" in text
    assert not any(p.name == "escaped" for p in tmp_path.rglob("*"))
    assert bench.left() == [f"{bench.rows[name][2]}.part"]


def test_archive_without_the_expected_folder_is_refused(bench):
    bench.source("CelebA", archive=LSUN)
    code, text = bench.run("CelebA")
    assert code == 3 and "holds no folder img_align_celeba" in text and not (bench.to / "CelebA").exists()


def test_folder_that_is_not_ours_is_left_alone(bench):
    mine = bench.to / "CelebA" / "img_align_celeba" / "mine.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    code, text = bench.run("CelebA")
    assert code == 3 and "move it away" in text
    assert mine.read_bytes() == b"mine" and bench.server.requests == []


# Disk ---------------------------------------------------------------------------------------------


def test_space_is_checked_before_the_first_byte(bench):
    bench.unpacked = HUGE
    code, text = bench.run("CelebA")
    assert code == 5 and f"{HUGE / 1e9:.2f} GB unpacked" in text and "--to" in text
    assert bench.server.requests == [] and bench.left() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_full_while_downloading(bench):
    bench.to.mkdir()
    bench.part.symlink_to("/dev/full")
    code, text = bench.run("CelebA")
    assert code == 5 and "free space" in text and "same command again" in text


def test_disk_full_while_unpacking_keeps_the_archive_alone(bench):
    bench.source("CelebA", archive=make_zip({"img_align_celeba/000001.jpg": bytes(200_000)}))
    limit = (100_000, 100_000)  # bytes a file may have: Python gets an OSError as it does from a full disk
    code, text = bench.run("CelebA", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert code == 5 and "cannot unpack" in text and bench.left() == [bench.part.name]
    asked = len(bench.server.requests)
    assert bench.run("CelebA")[0] == 0 and len(bench.server.requests) == asked


def test_folder_that_cannot_be_made(bench):
    bench.to.write_bytes(b"a file")
    code, text = bench.run("CelebA")
    assert code == 5 and "--to" in text


# Two at once, and signals -------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "expected"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_signal_keeps_the_partial_file_and_nothing_else(bench, number, expected):
    bench.source("CelebA", archive=LARGE, urls=["/hang/img_align_celeba.zip"])
    running = bench.start("CelebA")
    wait_for(lambda: bench.part.exists() and bench.part.stat().st_size > 0)
    code, text = bench.run("CelebA")
    assert code == 6 and str(running.pid) in text and "Wait for it" in text
    running.send_signal(signal.Signals[number])
    _, err = running.communicate(timeout=5)
    assert running.returncode == expected and "run the same command again" in err
    assert bench.left() == [bench.part.name]
    here = bench.part.stat().st_size
    bench.source("CelebA", urls=["/img_align_celeba.zip"])
    assert bench.run("CelebA")[0] == 0 and bench.server.requests[-1][1] == f"bytes={here}-"


def test_lock_and_half_unpacked_folder_of_a_killed_run_do_not_stop_the_next(bench):
    bench.source("CelebA", archive=LARGE, urls=["/hang/img_align_celeba.zip"])
    running = bench.start("CelebA", start_new_session=True)
    wait_for(lambda: bench.part.exists() and bench.part.stat().st_size > 0)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate(timeout=5)
    assert ".CelebA.lock" in bench.left()
    half = bench.to / ".CelebA.unpack" / "img_align_celeba" / "half.jpg"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    bench.source("CelebA", urls=["/img_align_celeba.zip"])
    assert bench.run("CelebA")[0] == 0
    assert bench.left() == ["CelebA", "CelebA/img_align_celeba", "CelebA/img_align_celeba/.complete",
                            "CelebA/img_align_celeba/000001.jpg"]


@pytest.mark.parametrize("owner", ["elsewhere {pid}\n", ""])
def test_lock_that_cannot_be_judged_is_respected_and_named(bench, owner):
    lock = bench.to / ".CelebA.lock"
    lock.mkdir(parents=True)
    (lock / "owner").write_text(owner.format(pid=ended_process()))
    code, text = bench.run("CelebA")
    assert code == 6 and f"delete {lock}" in text and lock.exists() and bench.server.requests == []


def test_one_of_many_takes_over_a_stale_lock(bench):
    host = subprocess.run(["bash", "-c", "echo $HOSTNAME"], capture_output=True, text=True).stdout.strip()
    (bench.to / ".CelebA.lock").mkdir(parents=True)
    (bench.to / ".CelebA.lock" / "owner").write_text(f"{host} {ended_process()}\n")
    bench.source("CelebA", archive=LARGE, urls=["/hang/img_align_celeba.zip"])
    running = [bench.start("CelebA") for _ in range(4)]
    wait_for(lambda: sum(p.poll() is not None for p in running) == 3)
    wait_for(lambda: bench.server.requests)
    (winner,) = [p for p in running if p.poll() is None]
    winner.terminate()
    codes = sorted(p.wait(timeout=5) for p in running)
    for process in running:
        process.communicate()
    assert codes == [6, 6, 6, 143] and len(bench.server.requests) == 1
