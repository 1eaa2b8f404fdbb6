"""download.sh against a real HTTP server on the loopback interface.

The tests run a copy of the script whose table has the sizes and hashes of small archives and the server's URLs, and
whose pause between retries is 0; nothing else is changed. The table of the original script is tested separately.
"""

import hashlib
import http.server
import io
import os
import re
import resource
import shlex
import shutil
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
from conftest import encode, fill_lmdb, gradient

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


def claiming(name, size):
    """A zip that says of its member that it unpacks to `size` bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
        archive.getinfo(name).file_size = size  # goes into the directory at the end alone
    return buffer.getvalue()


def make_tar(members, kind=tarfile.REGTYPE, linkname="", mode="w:gz", claims=None):
    """tar.gz of {name: bytes}; kind, linkname and the size that it claims when unpacked apply to every member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, linkname
            info.pax_headers = {"GNU.sparse.realsize": str(claims)} if claims else {}
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


FACES = {f"img_align_celeba/{i:06d}.jpg": os.urandom(200) for i in range(1, 4)}
CELEBA = make_zip(FACES)
LARGE = make_zip({"img_align_celeba/000001.jpg": os.urandom(400_000)})  # curl buffers less before it writes
LSUN = make_zip({f"church_outdoor_train_lmdb/{name}.mdb": os.urandom(300) for name in ("data", "lock")})
CIFAR = make_tar({"cifar-10-batches-py/data_batch_1": os.urandom(300)})
FLOWERS = make_tar({f"jpg/image_{i:05d}.jpg": os.urandom(200) for i in range(1, 4)})
OBAMA = make_zip({f"obama/{i}.jpg": os.urandom(200) for i in range(3)})
VGG = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + os.urandom(400_000)  # as torch.save began files before 1.6


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` {path: bytes}; `requests` lists (path, Range header), `heads` the paths of HEAD requests. Folders
    of a path misbehave:

    /cut half of what is asked, then the connection drops · /hang half, then silence · /dead no answer ·
    /norange the whole file whatever was asked · /halfnorange half of it, then the connection drops ·
    /page an HTML page · /busy 503 at first · /404 · /moved a redirect, which has a body ·
    /nohead HEAD is not allowed · /slowhead HEAD gets silence · /nolength no Content-Length, the connection's end is
    the file's · /huge HEAD tells of a file that fits on no disk
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.heads, self.closing = {}, [], [], threading.Event()

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.server.heads.append(self.path)
        self.answer(body=False)

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        self.answer(body=True)

    def answer(self, body):
        asked, (*how, name) = self.headers.get("Range"), self.path[1:].split("/")
        if "dead" in how:
            return
        first = len(self.server.requests + self.server.heads) == 1
        for folder, code, applies in (("404", 404, True), ("busy", 503, first), ("nohead", 405, not body)):
            if folder in how and applies:
                self.send_error(code)
                return
        if "slowhead" in how and not body:
            self.server.closing.wait(20)
            return
        if "moved" in how:
            self.send_response(302)
            self.send_header("Location", self.path.replace("/moved", ""))
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"moved" if body else b"")
            return
        content = PAGE if "page" in how else self.server.files[name]
        start = 0 if {"norange", "halfnorange", "page"} & {*how} or not asked else int(asked[len("bytes="):-1])
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Type", "text/html" if "page" in how else "application/zip")
        if "nolength" not in how:
            self.send_header("Content-Length", str(HUGE if "huge" in how and not body else len(content) - start))
        self.end_headers()
        rest = content[start:] if body else b""
        self.wfile.write(rest[: (len(rest) + 1) // 2] if {"cut", "hang", "halfnorange"} & {*how} else rest)
        self.wfile.flush()
        if body and "hang" in how:
            self.server.closing.wait(20)

    def log_message(self, *args):
        pass


def shipped_table():
    """The fields of each line of the shipped table, by its first name and part."""
    (table,) = re.findall(r"(?ms)^table='\n(.*?)^'\n", SCRIPT.read_text())
    rows = [line.split("|") for line in table.splitlines()]
    return {" ".join(words.split()[0] for words in fields[:2] if words): fields for fields in rows}


class Bench:
    """One script copy, one server, one folder for the data."""

    def __init__(self, tmp_path, server):
        self.server, self.to, self.home = server, tmp_path / "data sets", tmp_path
        self.script = tmp_path / "download.sh"
        self.archives = {"CelebA": CELEBA, "LSUN church_outdoor": LSUN, "CIFAR10": CIFAR, "Flowers": FLOWERS,
                         "VGG16": VGG, "Inception": VGG}  # of the sources that have a hash
        self.urls = {}
        self.unpacked = 4000
        self.part = self.to / "img_align_celeba.zip.part"
        self.whole = self.to / "img_align_celeba.zip.whole"
        self.record = self.to / "100-shot-obama.zip.sha256"
        server.files["100-shot-obama.zip"] = OBAMA

    def source(self, name, archive=None, urls=None):
        """Replaces the archive or the URLs of one line of the table."""
        if archive:
            self.archives[name] = archive
        if urls:
            self.urls[name] = urls

    def obama(self, how):
        """Lets the 100-shot sets come from another folder of the server."""
        self.source("100-shot-obama", urls=[f"/{how}/WORD.zip"])

    def start(self, *arguments, to=True, **options):
        """The script with these arguments, and --to unless it is to run in the folder that holds `data`."""
        lines = []
        for name, fields in shipped_table().items():
            file = fields[3]
            if name in self.archives:
                archive, kind = self.archives[name], fields[6].partition(":")[0]
                self.server.files.setdefault(file, archive)
                fields[4] = fields[4] and str(len(archive))
                fields[5] = str(self.unpacked)
                fields[6] = f"{kind}:{hashlib.new(kind, archive).hexdigest()}"
            fields[8] = " ".join(map(self.server.url, self.urls.get(name, [f"/{file}"])))
            lines.append("|".join(fields))
        table = "table='\n" + "\n".join(lines) + "\n'\n"
        text, tables = re.subn(r"(?ms)^table='\n.*?^'\n", lambda _: table, SCRIPT.read_text())
        text, pauses = re.subn(r"(?m)^pause=3 ", "pause=0 ", text)
        assert (tables, pauses) == (1, 1)
        if not self.script.exists() or self.script.read_text() != text:  # bash reads while it runs
            self.script.write_text(text)
        command = ["bash", self.script, *map(str, arguments), *(["--to", self.to] if to else [])]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.home,
                                **{"env": environment(self.home), "preexec_fn": heed_signals, **options})

    def run(self, *arguments, **options):
        """Exit code and everything printed."""
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=20)
        return process.returncode, out + err

    def left(self):
        """Every file and folder under the data folder, relative."""
        return sorted(str(p.relative_to(self.to)) for p in self.to.rglob("*"))


def environment(home, first=None):
    """The environment less proxies, with this Python before the system's, and the folder `first` before both."""
    keep = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    path = os.pathsep.join([*([str(first)] if first else []), str(Path(sys.executable).parent), os.environ["PATH"]])
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


def quoted(path):
    """As bash writes it where a person is to paste it."""
    return str(path).replace(" ", "\\ ")


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


def rare(name, *values):
    """A case for soak."""
    return pytest.param(*values, id=name, marks=pytest.mark.soak)


FEW = ["100-shot-obama", "100-shot-panda", "100-shot-grumpy_cat", "AnimalFace-cat", "AnimalFace-dog"]
CATEGORIES = """
    bedroom bridge church_outdoor classroom conference_room dining_room kitchen living_room restaurant tower
    airplane bicycle bird boat bottle bus car cat chair cow dining_table dog horse motorbike person potted_plant sheep
    sofa train tv-monitor
"""

# The shipped script -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage:"),
        (["celebb"], "unknown data set: celebb"),
        (["LSUN", "castle"], "unknown data set: LSUN castle"),
        (["CIFAR10", "bedroom"], "unknown data set: CIFAR10 bedroom"),
        (["100-shot-obama 100-shot-panda"], "unknown data set"),
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
        lines = {" ".join(line.split()) for line in text.splitlines()}
        assert {"CelebA 1.44 GB", "LSUN church_outdoor 2.45 GB", "LSUN church_outdoor_val 5957308 bytes",
                "CIFAR10 0.17 GB", "VGG16 0.55 GB", "Inception 0.10 GB"} < lines
        assert {f"{name} size unknown" for name in (*FEW, "Flowers", "few-shot")} < lines
        assert {*CATEGORIES.split()} < {*text.split()}
    assert list(tmp_path.iterdir()) == []


def test_mirror_and_from_file_exclude_each_other(tmp_path):
    (tmp_path / "x.zip").write_bytes(CELEBA)
    code, text = shipped(tmp_path, "CelebA", "--from-file", "x.zip", "--mirror", "http://127.0.0.1/x.zip")
    assert code == 2 and "exclude each other" in text


@pytest.mark.parametrize(
    ("row", "size", "digest"),
    [
        ("CelebA", 1443490838, "sha256:46fb89443c578308acf364d7d379fe1b9efb793042c0af734b6112e4fd3a8c74"),
        ("LSUN church_outdoor", 2448463466, "sha256:91128ae026840ac0c5982b4445ab5fc4e092d6847cca76793b2b1a0815c2e74a"),
        ("LSUN church_outdoor_val", 5957308, "sha256:34635b7547a3e51a15f942a4a4082dd6bc9cca381a953515cb2275c0eed50584"),
        ("CIFAR10", 170498071, "md5:c58f30108f718f92721af3b95e74349a"),
        ("Flowers", None, "md5:52808999861908f626f3c1f4e79d11fa"),
        ("VGG16", 553433881, "sha256:397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
        ("Inception", 95628359, "sha256:6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
    ],
)
def test_shipped_table_holds_the_published_sizes_and_hashes(row, size, digest):
    fields = shipped_table()[row]
    assert (fields[4], fields[6]) == (str(size or ""), digest)
    assert int(fields[5]) >= (size or 0)


DRIVE = "https://drive.usercontent.google.com/download?id=1aAJCZbXNHyraJ6Mi13dSbe7pTyfPXha0&export=download&confirm=t"


@pytest.mark.parametrize(
    ("words", "url", "terms"),
    [
        *[([name], f"https://data-efficient-gans.mit.edu/datasets/{name}.zip", "third parties own") for name in FEW],
        (["few-shot"], DRIVE, "third parties own"),
        (["Flowers"], "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz", "research use"),
        (["LSUN"], "http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip", "third parties own"),
        (["LSUN", "church_outdoor_val"], "http://dl.yf.io/lsun/scenes/church_outdoor_val_lmdb.zip", "third"),
        (["LSUN", "bedroom"], "http://dl.yf.io/lsun/scenes/bedroom_train_lmdb.zip", "third parties own"),
        (["LSUN", "tv-monitor"], "http://dl.yf.io/lsun/objects/tv-monitor.zip", "third parties own"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_shipped_urls(tmp_path, words, url, terms):
    curl = tmp_path / "bin" / "curl"
    curl.parent.mkdir()
    curl.write_text("#!/bin/sh\nexit 3\n")  # "not a URL", which is not tried again
    curl.chmod(0o755)
    done = subprocess.run(["bash", SCRIPT, *words], capture_output=True, text=True, cwd=tmp_path, timeout=20,
                          env=environment(tmp_path, curl.parent))
    assert done.returncode == 3 and f" here) from {url}\n" in done.stdout and terms in done.stdout
    assert f"from {url} for instance" in done.stderr and "--from-file" in done.stderr
    assert ("bash download.sh few-shot puts them into few-shot/" + words[0] in done.stderr) == (words[0] in FEW)


def test_shipped_script_refuses_an_archive_of_another_hash(tmp_path):
    (tmp_path / "mine.tar.gz").write_bytes(CIFAR)
    code, text = shipped(tmp_path, "CIFAR10", "--from-file", "mine.tar.gz")
    assert code == 3 and "expected c58f30108f718f92721af3b95e74349a" in text
    assert f"got {hashlib.md5(CIFAR).hexdigest()}" in text
    assert not (tmp_path / "data" / "CIFAR10").exists()


# What is fetched, and where it lands --------------------------------------------------------------


def test_celeba_lands_where_the_program_reads_it_and_a_second_run_does_nothing(bench):
    code, text = bench.run("CelebA")
    assert code == 0 and "terms of use: non-commercial research only" in text and "note:" not in text
    assert bench.left() == sorted(["CelebA", "CelebA/img_align_celeba", "CelebA/img_align_celeba/.complete",
                                   *(f"CelebA/{name}" for name in FACES)])
    assert all((bench.to / "CelebA" / name).read_bytes() == content for name, content in FACES.items())
    asked = list(bench.server.requests)
    code, text = bench.run("CelebA")
    assert code == 0 and "is complete in" in text and bench.server.requests == asked


def test_lsun_lands_as_an_lmdb_folder(bench):
    assert bench.run("LSUN", "church_outdoor")[0] == 0
    assert {"data.mdb", "lock.mdb"} < set(os.listdir(bench.to / "LSUN" / "church_outdoor_train_lmdb"))


def test_cifar10_comes_from_a_tar_with_an_md5(bench):
    assert bench.run("CIFAR10")[0] == 0
    assert "data_batch_1" in os.listdir(bench.to / "CIFAR10" / "cifar-10-batches-py")


def test_mirror_is_tried_first_and_the_table_goes_on_after_it(bench):
    code, text = bench.run("CelebA", "--mirror", bench.server.url("/404/img_align_celeba.zip"))
    assert code == 0 and "HTTP error 404" in text
    paths = [path for path, _ in bench.server.requests]
    assert paths == ["/404/img_align_celeba.zip", "/img_align_celeba.zip"]


def test_a_python_that_does_not_start_is_named_before_anything_is_fetched_or_lost(bench, tmp_path):
    stub = tmp_path / "bin" / "python3"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\necho 'pyenv: version not set' >&2; exit 127\n")
    stub.chmod(0o755)
    bench.to.mkdir()
    bench.whole.write_bytes(CELEBA)
    code, text = bench.run("CelebA", env=environment(tmp_path, stub.parent))
    assert code == 1 and "a python3 of 3.6 or newer that starts is needed" in text
    assert bench.whole.read_bytes() == CELEBA and bench.server.requests == []


def test_next_url_is_used_when_one_fails(bench):
    bench.source("CelebA", urls=["/dead/img_align_celeba.zip", "/img_align_celeba.zip"])
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
    assert (bench.to / "CelebA" / "img_align_celeba" / ".complete").exists()


def test_from_file_ends_a_download_but_not_the_file_that_was_given(bench):
    bench.to.mkdir()
    bench.part.write_bytes(CELEBA[:100])
    bench.whole.write_bytes(CELEBA)
    assert bench.run("CelebA", "--from-file", bench.whole)[0] == 0
    assert not bench.part.exists() and bench.whole.read_bytes() == CELEBA


def test_flowers_have_a_hash_and_no_known_size(bench):
    code, text = bench.run("Flowers")
    assert code == 0 and "hash is right" in text and bench.server.heads == ["/102flowers.tgz"]
    assert len(os.listdir(bench.to / "Flowers" / "jpg")) == 3 + 1 and bench.left()[0] == "Flowers"


def test_other_flowers_are_refused(bench):
    bench.server.files["102flowers.tgz"] = other = make_tar({"jpg/image_00001.jpg": b"x"})
    code, text = bench.run("Flowers")
    assert code == 3 and f"got {hashlib.md5(other).hexdigest()}" in text and bench.left() == []


# LSUN ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("category", "file", "top", "folder"),
    [
        ("bedroom", "bedroom_train_lmdb.zip", "bedroom_train_lmdb/", "bedroom_train_lmdb"),
        ("tv-monitor", "tv-monitor.zip", "", "tv-monitor_lmdb"),
    ],
)
def test_any_lsun_category_lands_where_the_program_reads_it(bench, category, file, top, folder):
    bench.server.files[file] = make_zip({f"{top}{name}.mdb": os.urandom(300) for name in ("data", "lock")})
    code, text = bench.run("LSUN", category)
    assert code == 0 and "no encryption and no published hash" in text
    assert sorted(os.listdir(bench.to)) == ["LSUN", f"{file}.sha256"]
    assert [str(p.relative_to(bench.to)) for p in bench.to.glob("LSUN/*_lmdb/data.mdb")] == [f"LSUN/{folder}/data.mdb"]


def test_lsun_without_a_data_mdb_is_refused(bench):
    bench.server.files["cat.zip"] = make_zip({"church_outdoor_train_lmdb/0.webp": b"x"})
    code, text = bench.run("LSUN", "cat")
    assert code == 3 and "no data.mdb" in text and bench.left() == [] and "Run the same command again" in text


# Sources without a hash or a known layout ---------------------------------------------------------


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_first_download_is_recorded_and_the_next_is_held_against_it(bench):
    code, text = bench.run("100-shot-obama")
    assert code == 0 and sha256(OBAMA) in text and str(bench.record) in text and "third parties own" in text
    assert bench.record.read_text() == f"{sha256(OBAMA)}  100-shot-obama.zip\n"
    assert set(os.listdir(bench.to)) == {"100-shot-obama", bench.record.name}
    assert {"0.jpg", "1.jpg", "2.jpg"} < set(os.listdir(bench.to / "100-shot-obama"))
    asked = list(bench.server.requests)
    code, text = bench.run("100-shot-obama")
    assert code == 0 and "is complete in" in text and bench.server.requests == asked and len(bench.server.heads) == 1

    shutil.rmtree(bench.to / "100-shot-obama")
    code, text = bench.run("100-shot-obama")
    assert code == 0 and f"as in {bench.record}" in text and "note:" not in text


def test_another_hash_than_the_recorded_one_is_refused_until_the_record_is_deleted(bench):
    bench.to.mkdir()
    bench.record.write_text(f"{'A' * 64}  mine.zip\n")  # as a person may have put it there
    code, text = bench.run("100-shot-obama")
    assert code == 3 and f"sha256 is {sha256(OBAMA)}" in text and f"says {'a' * 64}" in text
    assert str(bench.record) in text and "delet" in text and "100-shot-obama.zip.whole" in text
    assert set(os.listdir(bench.to)) == {bench.record.name, "100-shot-obama.zip.whole"}
    assert bench.record.read_text().startswith("A")
    bench.record.unlink()
    asked = len(bench.server.requests)
    assert bench.run("100-shot-obama")[0] == 0 and len(bench.server.requests) == asked
    assert set(os.listdir(bench.to)) == {"100-shot-obama", bench.record.name}


@pytest.mark.soak
def test_a_refused_file_makes_way_for_the_recorded_one(bench):
    bench.to.mkdir()
    bench.record.write_text(sha256(OBAMA))
    bench.server.files["100-shot-obama.zip"] = make_zip({"obama/0.jpg": b"another"})
    assert bench.run("100-shot-obama")[0] == 3
    bench.server.files["right.zip"] = OBAMA
    code, text = bench.run("100-shot-obama", "--mirror", bench.server.url("/right.zip"))
    assert code == 0 and "is removed" in text
    assert set(os.listdir(bench.to)) == {"100-shot-obama", bench.record.name}


@pytest.mark.soak
def test_mirror_with_another_hash_than_the_recorded_one_is_passed_over(bench):
    bench.to.mkdir()
    bench.record.write_text(sha256(OBAMA).upper())
    bench.server.files["wrong.zip"] = make_zip({"obama/0.jpg": b"another"})
    code, text = bench.run("100-shot-obama", "--mirror", bench.server.url("/wrong.zip"))
    assert code == 0 and "wrong.zip: its sha256 is" in text
    assert {"1.jpg", "2.jpg"} < set(os.listdir(bench.to / "100-shot-obama"))
    assert set(os.listdir(bench.to)) == {"100-shot-obama", bench.record.name}


def test_from_file_without_a_hash_is_recorded_and_held_against_the_record(bench, tmp_path):
    mine = tmp_path / "mine.bin"
    mine.write_bytes(OBAMA)
    code, text = bench.run("100-shot-obama", "--from-file", mine)
    assert code == 0 and sha256(OBAMA) in text and bench.record.read_text().startswith(sha256(OBAMA))
    shutil.rmtree(bench.to / "100-shot-obama")
    mine.write_bytes(other := make_zip({"obama/0.jpg": b"another"}))
    code, text = bench.run("100-shot-obama", "--from-file", mine)
    assert code == 3 and sha256(other) in text and sha256(OBAMA) in text and "delete that record" in text
    assert mine.read_bytes() == other and bench.left() == [bench.record.name]
    assert bench.server.requests == bench.server.heads == []


@pytest.mark.parametrize("words", ["z" * 64, "a" * 65])
def test_record_that_is_none_is_named(bench, words):
    bench.to.mkdir()
    bench.record.write_text(words)
    code, text = bench.run("100-shot-obama")
    assert code == 3 and f"{bench.record} does not begin with a sha256" in text and "delete it" in text
    assert bench.record.read_text() == words and bench.server.requests == []


@pytest.mark.parametrize(
    ("archive", "expected"),
    [
        (make_zip({"any name/0.jpg": b"x", "any name/b/1.jpg": b"y"}), ["0.jpg", "b", "b/1.jpg"]),
        (make_zip({"a/0.jpg": b"x", "b/0.jpg": b"y"}), ["a", "a/0.jpg", "b", "b/0.jpg"]),
        (make_zip({"a/0.jpg": b"x", "__MACOSX/a/._0.jpg": b"y", ".DS_Store": b"z"}), ["0.jpg"]),
        (make_tar({"a/0.jpg": b"x", "b/0.jpg": b"y"}, mode="w"), ["a", "a/0.jpg", "b", "b/0.jpg"]),
    ],
    ids=["one folder", "two", "folder and junk", "tar"],
)
def test_only_top_folder_or_all_becomes_the_target(bench, archive, expected):
    bench.server.files["few-shot-images.zip"] = archive
    assert bench.run("few-shot")[0] == 0
    assert bench.left() == ["few-shot", "few-shot-images.zip.sha256", "few-shot/.complete",
                            *(f"few-shot/{name}" for name in expected)]


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]


PLAIN = make_tar({"a/0.jpg": b"x", "a/1.jpg": b"y"}, mode="w")


@pytest.mark.parametrize(
    "archive",
    [
        pytest.param(flipped(OBAMA, 100), id="zip"),
        rare("zip cut", OBAMA[:-30]),
        rare("zip directory", flipped(OBAMA, OBAMA.index(b"PK\1\2") + 2)),
        rare("zip password", flipped(OBAMA, OBAMA.index(b"PK\1\2") + 8)),
        pytest.param(flipped(FLOWERS, len(FLOWERS) - 8), id="gz checksum"),
        rare("gz data", flipped(FLOWERS, 300)),
        rare("gz cut", FLOWERS[:-4]),
        pytest.param(PLAIN[:1024], id="tar cut"),
        rare("tar header", flipped(PLAIN, 1024 + 150)),
        pytest.param(make_zip({}), id="empty"),
    ],
)
def test_damaged_archive_stops_nobody(bench, archive):
    """/nolength: a connection that ends early looks like a whole file, so the archive itself must tell."""
    bench.obama("nolength")
    bench.server.files["100-shot-obama.zip"] = archive
    code, text = bench.run("100-shot-obama")
    assert code == 3 and ("is damaged" in text or "is empty" in text) and bench.left() == []
    assert "Run the same command again" in text and "--mirror" in text and "--from-file" in text
    bench.server.files["100-shot-obama.zip"] = OBAMA
    assert bench.run("100-shot-obama")[0] == 0


def test_damaged_from_file_is_left_alone(bench, tmp_path):
    mine = tmp_path / "mine.zip"
    mine.write_bytes(flipped(OBAMA, 100))
    code, text = bench.run("100-shot-obama", "--from-file", mine)
    assert code == 3 and "is damaged" in text and "another copy" in text and bench.left() == []
    assert mine.read_bytes() == flipped(OBAMA, 100)


def test_unknown_archive_that_reaches_out_of_its_folder_is_removed(bench, tmp_path):
    bench.server.files["100-shot-obama.zip"] = make_zip({"obama/0.jpg": b"x", "../escaped": b"x"})
    code, text = bench.run("100-shot-obama")
    assert code == 3 and "not unpacked" in text and "--mirror" in text and bench.left() == []
    assert not any(p.name == "escaped" for p in tmp_path.rglob("*"))


def test_quota_page_instead_of_a_set_without_a_hash(bench):
    bench.source("few-shot", urls=["/page/few-shot-images.zip"])
    code, text = bench.run("few-shot")
    assert code == 3 and "text/html instead of a zip or tar archive" in text and "quota" in text
    assert "--from-file" in text and bench.left() == []


def test_web_page_saved_as_a_set_without_a_hash_is_refused(bench, tmp_path):
    mine = tmp_path / "few-shot-images.zip"
    mine.write_bytes(PAGE)
    code, text = bench.run("few-shot", "--from-file", mine)
    assert code == 3 and "perhaps a web page" in text and bench.left() == []


# The size, where the table does not know it -------------------------------------------------------


def test_partial_file_of_unknown_size_is_resumed_by_the_next_run(bench):
    bench.obama("hang")
    bench.server.files["100-shot-obama.zip"] = large = make_zip({"obama/0.jpg": os.urandom(400_000)})
    part = bench.to / "100-shot-obama.zip.part"
    running = bench.start("100-shot-obama")
    wait_for(lambda: part.exists() and part.stat().st_size > 0)
    assert bench.run("100-shot-obama")[0] == 6
    running.terminate()
    running.communicate(timeout=5)
    here = part.stat().st_size
    assert bench.left() == [part.name] and 0 < here < len(large)
    bench.obama("")
    assert bench.run("100-shot-obama")[0] == 0 and bench.server.requests[-1][1] == f"bytes={here}-"
    assert (bench.to / "100-shot-obama" / "0.jpg").stat().st_size == 400_000


@pytest.mark.soak
def test_busy_server_is_asked_for_the_size_again(bench):
    bench.obama("busy")
    bench.to.mkdir()
    (bench.to / "100-shot-obama.zip.part").write_bytes(OBAMA[:100])
    assert bench.run("100-shot-obama")[0] == 0 and bench.server.requests[0][1] == "bytes=100-"


@pytest.mark.soak
def test_partial_file_that_is_larger_than_the_servers_is_not_resumed(bench):
    bench.to.mkdir()
    (bench.to / "100-shot-obama.zip.part").write_bytes(OBAMA + b"x")
    assert bench.run("100-shot-obama")[0] == 0
    assert bench.server.requests == [("/100-shot-obama.zip", None)]


def test_size_is_that_of_the_file_a_redirect_leads_to(bench):
    bench.obama("moved")
    bench.to.mkdir()
    (bench.to / "100-shot-obama.zip.part").write_bytes(OBAMA[:100])
    code, text = bench.run("100-shot-obama")
    assert code == 0 and f"({len(OBAMA)} bytes, 100 bytes here)" in text
    assert bench.server.requests[-1] == ("/100-shot-obama.zip", "bytes=100-")


@pytest.mark.parametrize("how", ["nohead", "nolength"])
def test_server_that_does_not_tell_the_size_is_asked_for_all(bench, how):
    bench.obama(how)
    bench.to.mkdir()
    (bench.to / "100-shot-obama.zip.part").write_bytes(OBAMA[:100])
    code, text = bench.run("100-shot-obama")
    assert code == 0 and "size unknown" in text
    assert all(asked is None for _, asked in bench.server.requests)
    assert set(os.listdir(bench.to)) == {"100-shot-obama", bench.record.name}


@pytest.mark.parametrize("how", ["nohead/cut", "page"])
def test_failure_without_a_size_leaves_what_was_there(bench, how):
    bench.obama(how)
    bench.to.mkdir()
    part = bench.to / "100-shot-obama.zip.part"
    part.write_bytes(OBAMA[:100])
    code, text = bench.run("100-shot-obama")
    assert code == 3 and "no source gave" in text and all(asked is None for _, asked in bench.server.requests)
    assert bench.left() == [part.name] and part.read_bytes() == OBAMA[:100] and len(bench.server.requests) < 10


def test_empty_answer_without_a_size_is_no_archive(bench):
    bench.obama("nolength")
    bench.server.files["100-shot-obama.zip"] = b""
    code, text = bench.run("100-shot-obama")
    assert code == 3 and "ends after 0 bytes" in text and bench.left() == []


@pytest.mark.parametrize("number", ["SIGTERM", rare("SIGKILL", "SIGKILL")])
def test_interrupted_download_without_a_size_leaves_nothing_that_stops_the_next(bench, number):
    bench.obama("nohead/hang")
    bench.server.files["100-shot-obama.zip"] = make_zip({"obama/0.jpg": os.urandom(400_000)})
    running = bench.start("100-shot-obama", start_new_session=True)
    fetched = bench.to / ".100-shot-obama.lock" / "fetched"
    wait_for(lambda: fetched.exists() and fetched.stat().st_size > 0)
    os.killpg(running.pid, signal.Signals[number])
    running.communicate(timeout=5)
    assert (bench.left() == []) == (number == "SIGTERM")
    bench.obama("nohead")
    code, text = bench.run("100-shot-obama")
    assert code == 0 and "0 bytes here" in text
    assert set(os.listdir(bench.to)) == {"100-shot-obama", bench.record.name}


def test_interrupted_while_the_server_does_not_tell_the_size(bench):
    bench.obama("slowhead")
    running = bench.start("100-shot-obama")
    wait_for(lambda: bench.server.heads)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=5)
    assert running.returncode == 130 and "run the same command again" in err and bench.left() == []


@pytest.mark.soak
def test_whole_archive_of_unknown_size_is_not_fetched_twice(bench):
    bench.obama("nohead")
    bench.server.files["100-shot-obama.zip"] = make_zip({"obama/0.jpg": bytes(200_000)})
    limit = (100_000, 100_000)
    code, text = bench.run("100-shot-obama", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert code == 5 and bench.left() == ["100-shot-obama.zip.whole"]
    assert bench.run("100-shot-obama")[0] == 0 and len(bench.server.requests) == 1
    assert set(os.listdir(bench.to)) == {"100-shot-obama", bench.record.name}


# What the last line says --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "to", "expected"),
    [
        (["CelebA"], False, "python main.py --dataset celeb"),
        (["CIFAR10"], True, "python main.py --dataset cifar10 --image_path {to}"),
        (["few-shot"], True,
         "python main.py --model fastgan --dataset folder --image_path {to}/few-shot/SET\n"
         "download.sh: where SET is one of: art/ skulls/"),
        (["VGG16"], True,
         "--model fastgan takes it for metadata and LPIPS, --mode evaluate for --metrics nearest,lpips"
         "; add --vgg_weights {to}/VGG16/vgg16-397923af.pth"),
        (["Inception"], False, "--mode evaluate takes it for --metrics fid,kid,pr,is"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_closing_line_says_how_to_go_on(bench, words, to, expected):
    bench.server.files["few-shot-images.zip"] = make_zip({"art/0.jpg": b"x", "skulls/0.jpg": b"y"})
    last = f"download.sh: next: {expected}\n".format(to=quoted(bench.to))
    code, text = bench.run(*words, to=to)
    assert code == 0 and text.endswith(last)
    code, text = bench.run(*words, to=to)
    assert code == 0 and "is complete in" in text and text.endswith(last)


def test_closing_line_takes_any_folder(bench):
    bench.to = bench.home / "TO TARGET [x] & 'quoted'"
    for words in (["CelebA"], ["Flowers"]):
        code, text = bench.run(*words)
        *_, flag, path = shlex.split(text.splitlines()[-1].partition("next: ")[2])
        folder = bench.to if words == ["CelebA"] else bench.to / "Flowers" / "jpg"
        assert code == 0 and (flag, path) == ("--image_path", str(folder))


# A single file, which is not unpacked -------------------------------------------------------------

WEIGHTS = "VGG16/vgg16-397923af.pth"
WHOLE = ["VGG16", "VGG16/.complete", WEIGHTS]


def test_weights_land_where_the_program_reads_them_and_a_second_run_does_nothing(bench):
    code, text = bench.run("VGG16")
    assert code == 0 and "terms of use: weights of torchvision" in text
    assert bench.left() == WHOLE and (bench.to / WEIGHTS).read_bytes() == VGG
    asked = list(bench.server.requests)
    code, text = bench.run("VGG16")
    assert code == 0 and "is complete in" in text and bench.server.requests == asked


def test_weights_from_a_file_are_copied(bench, tmp_path):
    content = b"PK\3\4" + VGG[2:]                       # as torch.save begins files since 1.6
    bench.source("VGG16", archive=content)
    mine = tmp_path / "my weights.pth"
    mine.write_bytes(content)
    assert bench.run("VGG16", "--from-file", mine)[0] == 0
    assert bench.server.requests == [] and bench.left() == WHOLE
    assert mine.read_bytes() == content == (bench.to / WEIGHTS).read_bytes()
    assert not mine.samefile(bench.to / WEIGHTS)


def test_a_web_page_instead_of_weights_is_refused(bench):
    bench.source("VGG16", urls=["/page/vgg16-397923af.pth"])
    code, text = bench.run("VGG16")
    assert code == 3 and "text/html instead of a .pth" in text and "--from-file" in text and bench.left() == []


def test_a_web_page_saved_as_weights_is_refused(bench, tmp_path):
    mine = tmp_path / "vgg16-397923af.pth"
    mine.write_bytes(PAGE)
    code, text = bench.run("VGG16", "--from-file", mine)
    assert code == 3 and "perhaps a web page" in text and bench.left() == []


def test_space_for_both_copies_of_the_weights_is_checked(bench):
    bench.unpacked = HUGE
    assert bench.run("VGG16")[0] == 5 and bench.server.requests == []


@pytest.mark.soak
def test_disk_full_while_copying_weights_keeps_the_download(bench):
    part = bench.to / "vgg16-397923af.pth.part"
    bench.to.mkdir()
    part.write_bytes(VGG)
    limit = (len(VGG) // 2, len(VGG) // 2)
    code, text = bench.run("VGG16", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert code == 5 and "the archive is kept" in text and bench.left() == ["vgg16-397923af.pth.whole"]
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


@pytest.mark.parametrize("name", ["CelebA", "100-shot-obama"])
def test_a_source_that_is_away_leaves_no_folder(bench, tmp_path, name):
    bench.to = tmp_path / "new" / "data"
    bench.source(name, urls=["/404/x"])
    code, text = bench.run(*name.split())
    assert code == 3 and "no source gave" in text and not (tmp_path / "new").exists()


def test_a_folder_that_was_there_stays_when_a_download_fails(bench):
    bench.to.mkdir()
    bench.source("CelebA", urls=["/404/x"])
    assert bench.run("CelebA")[0] == 3 and bench.to.is_dir() and bench.left() == []


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
        ("CelebA", make_zip({"img_align_celeba/link": b"/etc/passwd"}, mode=stat.S_IFLNK | 0o777)),
        ("CIFAR10", make_tar({"/escaped": b"x"})),
        ("CIFAR10", make_tar({"cifar-10-batches-py/l": b""}, tarfile.SYMTYPE, linkname="data_batch_1")),
        rare("tar hard link", "CIFAR10",
             make_tar({"cifar-10-batches-py/l": b""}, tarfile.LNKTYPE, linkname="data_batch_1")),
    ],
    ids=["zip up", "zip link", "tar root", "tar link", None],
)
def test_archive_that_reaches_out_of_its_folder_is_refused(bench, tmp_path, name, archive):
    bench.source(name, archive=archive)
    code, text = bench.run(name)
    assert code == 3 and "not unpacked" in text and "please report it" in text
    assert not any(p.name == "escaped" for p in tmp_path.rglob("*"))
    assert bench.left() == [f"{shipped_table()[name][3]}.whole"]


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


def test_space_is_checked_with_the_size_that_the_server_tells(bench):
    bench.obama("huge")
    code, text = bench.run("100-shot-obama")
    assert code == 5 and f"{HUGE / 1e9:.2f} GB to download" in text and "--to" in text
    assert bench.server.requests == [] and bench.left() == []


@pytest.mark.parametrize(
    ("name", "archive", "from_file"),
    [
        ("CelebA", claiming("img_align_celeba/0.jpg", HUGE), False),
        ("CIFAR10", make_tar({"cifar-10-batches-py/data_batch_1": b"x"}, claims=HUGE), True),
        ("few-shot", make_tar({"0.jpg": b"x"}, claims=HUGE), False),
    ],
    ids=["zip", "tar of a file", "unknown tar"],
)
def test_space_for_what_the_archive_holds_is_checked_before_unpacking(bench, tmp_path, name, archive, from_file):
    file = shipped_table()[name][3]
    if name == "few-shot":
        bench.server.files[file] = archive
    else:
        bench.source(name, archive=archive)
    mine = tmp_path / "mine"
    mine.write_bytes(archive)
    code, text = bench.run(name, *(["--from-file", mine] if from_file else []))
    assert code == 5 and f"needs {HUGE / 1e9:.2f} GB unpacked" in text and "archive is kept" in text
    kept = mine if from_file else bench.to / f"{file}.whole"
    assert f"bash download.sh {name} --from-file {quoted(kept)} --to DIR" in text
    assert bench.left() == ([] if from_file else [kept.name]) and mine.read_bytes() == archive


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
    assert code == 5 and "cannot unpack" in text and bench.left() == [bench.whole.name]
    assert f"--from-file {quoted(bench.whole)} --to DIR" in text
    asked = len(bench.server.requests)
    assert bench.run("CelebA")[0] == 0 and len(bench.server.requests) == asked


def test_folder_that_cannot_be_made(bench):
    bench.to.write_bytes(b"a file")
    code, text = bench.run("CelebA")
    assert code == 5 and "--to" in text


# Two at once, and signals -------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "expected"), [("SIGINT", 130), rare("SIGHUP", "SIGHUP", 129)])
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


@pytest.mark.parametrize("owner", ["elsewhere {pid}\n", rare("none", "")])
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


# What is said to come next ------------------------------------------------------------------------


def real_pictures(tmp_path, source):
    """An archive as its source makes it, of real pictures."""
    if source == "Flowers":
        return make_tar({f"jpg/image_{i:05d}.jpg": encode(gradient(seed=i), "JPEG") for i in range(5)})
    if source == "100-shot-obama":
        return make_zip({f"any name/{i}.png": encode(gradient(seed=i), "PNG") for i in range(5)})
    if source == "CelebA":
        return make_zip({f"img_align_celeba/{i}.jpg": encode(gradient((178, 218), i), "JPEG") for i in range(5)})
    top = "cat" if source == "LSUN cat" else "church_outdoor_train_lmdb"
    folder = fill_lmdb(tmp_path / "made", 5)
    return make_zip({f"{top}/{name}": (folder / name).read_bytes() for name in os.listdir(folder)})


@pytest.mark.slow
@pytest.mark.parametrize("source", ["CelebA", "LSUN", *(pytest.param(name, marks=pytest.mark.soak)
                                                       for name in ("LSUN cat", "Flowers", "100-shot-obama"))])
def test_the_command_that_is_said_to_come_next_reads_what_came(bench, tmp_path, run, source):
    name = "LSUN church_outdoor" if source == "LSUN" else source
    archive = real_pictures(tmp_path, source)
    if name in bench.archives:
        bench.source(name, archive=archive)
    bench.server.files[{"LSUN cat": "cat.zip", "100-shot-obama": "100-shot-obama.zip"}.get(source)] = archive
    code, text = bench.run(*source.split())
    assert code == 0, text
    (said,) = re.findall(r"^download.sh: next: python main.py (.*)$", text, re.M)
    small = ["--imsize", 64, "--metadata", "false", "--recon", "l1"] if "fastgan" in said else ["--imsize", 32]
    code, out, err = run("--batch_size", 2, "--total_step", 2, "--num_workers", 0, "--device", "cpu", "--g_conv_dim", 4,
                         "--d_conv_dim", 4, *small, *shlex.split(said), tiny=False)
    assert code == 0, err
    assert "done: 2 steps" in out
