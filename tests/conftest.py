"""Shared fixtures and helpers: a folder of small pictures, tiny runs of the real command, their output files."""

import contextlib
import io
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import main
from dataset import toy
from device import distributed, precision
from device.precision import has_bf16
from families import FAMILIES
from gallery import sheets
from metrics.cost import TimedConfig
from parameter import parse, resolve
from pretrained import inception
from storage import checkpoint

pytest.register_assert_rewrite("kills")

MAIN = str(Path(__file__).parent.parent / "main.py")

TINY_OF_ANY = ("--dataset", "toy", "--imsize", "32", "--batch_size", "4", "--g_conv_dim", "4", "--d_conv_dim", "4",
               "--z_dim", "8", "--num_workers", "0", "--device", "cpu", "--preset", "published")     # of any family
TINY = (*TINY_OF_ANY, "--g_attn", "8", "--d_attn", "none")
EVERY_ATTENTION = ("--g_attn", "8,16", "--d_attn", "4,8")   # as by default; its sheets are half the time of a tiny run

SMALL_SHEETS = 32       # px of the pictures in attention sheets: those of 192 px took a fourth of all tests' time


_drawn = cache(toy.draw_face)


def draw_face_once(*arguments, **more):
    """toy.draw_face, which takes a sixth of a tiny run, for tests that look at what becomes of the faces."""
    return _drawn(*arguments, **more).copy()


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped, with the reason, where there is no CUDA device. Reports get their test's fault."""
    for item in items:
        if item.path.parent.name == "faults":
            item.add_marker(pytest.mark.faults)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if fault := item.get_closest_marker("fault"):
            item.user_properties.append(("fault", fault.args[0]))


def pytest_terminal_summary(terminalreporter):
    """The table of the faults that were tried: each test marked `fault` is one try, and a test that fails is a loss."""
    tries, lost = defaultdict(set), defaultdict(set)
    for report in (report for group in terminalreporter.stats.values() for report in group):
        fault = dict(getattr(report, "user_properties", ())).get("fault")
        ended = getattr(report, "outcome", None)            # none of those that were deselected
        if fault and (ended == "failed" or ended == "passed" and report.when == "call"):
            tries[fault].add(report.nodeid)
            lost[fault] |= {report.nodeid} if ended == "failed" else set()
    if not tries:
        return
    rows = [("fault", "tries", "lost"), *((fault, len(tries[fault]), len(lost[fault])) for fault in sorted(tries))]
    rows.append(("all", *(sum(map(len, table.values())) for table in (tries, lost))))
    width = max(len(fault) for fault, _, _ in rows)
    terminalreporter.section("faults")
    for fault, tried, gone in rows:
        terminalreporter.write_line(f"{fault:<{width}}  {tried:>5}  {gone:>4}")


@pytest.fixture(autouse=True)
def same_arithmetic_on_every_processor(monkeypatch):
    """`--precision auto` is fp32 on any CPU, as if none had units for bf16."""
    monkeypatch.setattr(precision, "has_bf16", lambda device: device.type == "cuda" and has_bf16(device))


@pytest.fixture(autouse=True)
def no_process_is_left():
    """Kills what a failed test left running. Python would wait for it at the end of all tests, without end."""
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.join()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*flags) -> (exit code, stdout, stderr) of `python main.py --flags` at a tiny size in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sheets, "LEAST", SMALL_SHEETS)
    monkeypatch.setattr(toy, "draw_face", draw_face_once)

    def command(*flags, tiny=True):
        code = main.main([*(TINY if tiny else ()), *map(str, flags)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return command


@pytest.fixture
def an_empty_folder(tmp_path, monkeypatch):
    """The working directory of a test that starts programs."""
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def small_disk_at(folder, size):
    """A real disk of this size, such as 8m, as a new folder; without the right to mount one, the test is skipped."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("cannot mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def pictures(tmp_path):
    """A folder of 12 random 40 x 50 PNGs."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{number}.png")
    return folder


class SmallInception(torch.nn.Module):
    """Stands in for Inception: uint8 (B, 3, H, W) -> features (B, 16), logits (B, 10), a matter of milliseconds.

    `seen` counts the pictures that passed.
    """

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(16, 3 * 8 * 8, generator=generator) / 8)
        self.seen = 0

    def forward(self, pictures):
        self.seen += len(pictures)
        small = torch.nn.functional.interpolate(pictures.float() / 128 - 1, (8, 8), mode="area")
        features = torch.tanh(small.flatten(1) @ self.weight.T)             # (B, 16)
        return features, features[:, :10]


@pytest.fixture
def small_inception(monkeypatch):
    """`inception.load` gives a small network that needs no weights; the list of those that it gave."""
    nets = []

    def load(weights):
        nets.append(SmallInception())
        return nets[-1]

    monkeypatch.setattr(inception, "load_inception", load)
    return nets


def lines(version):
    return [json.loads(line) for line in Path("logs", version, "metrics.jsonl").read_text().splitlines()]


def tensors(thing, path=""):
    """{path: tensor or number} of every leaf of a checkpoint."""
    if isinstance(thing, dict):
        return {k: v for name, part in thing.items() for k, v in tensors(part, f"{path}/{name}").items()}
    if isinstance(thing, (list, tuple)):
        return {k: v for name, part in enumerate(thing) for k, v in tensors(part, f"{path}/{name}").items()}
    return {path: thing}


def assert_same_state(a, b):
    """Of all but the config, and the statistics for the next log line."""
    a, b = (tensors({k: v for k, v in state.items() if k not in ("config", "unlogged")}) for state in (a, b))
    assert a.keys() == b.keys()
    different = [name for name in a if not (torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor)
                                            else a[name] == b[name])]
    assert not different


def state(version, step):
    return checkpoint.load(checkpoint.path_of(Path("models", version), step))


def start_torchrun(script, *flags, **streams):
    """A real torchrun with two processes on the CPU (gloo), as a Popen."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             str(script), *map(str, flags)], text=True, **streams,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(MAIN).parent)})


def torchrun(script, *flags):
    """What a real torchrun returned and printed."""
    with start_torchrun(script, *flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        try:
            out, err = running.communicate(timeout=120)
        except BaseException:
            running.kill()
            raise
    return SimpleNamespace(returncode=running.returncode, stdout=out, stderr=err)


def environment_of_two():
    """The environment variables that torchrun sets for both of two processes; their ranks are to be added."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}


def two_processes(script, *flags):
    """What `torchrun` does, by two processes that have imported everything: else it takes each two seconds more.

    `each` is what either printed.
    """
    meeting = environment_of_two()
    with tempfile.TemporaryDirectory() as place:
        written = [[Path(place) / f"{rank}.{stream}" for stream in ("out", "err")] for rank in range(2)]
        running = []
        for rank, paths in enumerate(written):
            environment = {**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            running.append(_start(str(script), [*map(str, flags)], os.getcwd(), paths, environment))
        end = time.monotonic() + 120
        while any(process.is_alive() for process in running) and time.monotonic() < end:
            if any(process.exitcode for process in running):    # torchrun ends the others too
                end = min(end, time.monotonic() + 5)
            time.sleep(0.02)
        for process in running:
            process.kill()
            process.join()
        out, err = ([path.read_text(encoding="utf-8") for path in paths] for paths in zip(*written, strict=True))
    code = max(abs(process.exitcode) for process in running)
    return SimpleNamespace(returncode=code, stdout="".join(out), stderr="".join(err), each=out)


class Launched:
    """`python main.py --flags` in a process that has imported everything; it prints into the files `out` and `err`.

    `script` may be another than main.py. It is killed at the end of the test, if it has not ended.
    """

    def __init__(self, *flags, out="out.txt", err="err.txt", script=MAIN, **environment):
        self.out, self.err = Path(out).absolute(), Path(err).absolute()
        arguments = (str(script), [*map(str, flags)], os.getcwd(), (self.out, self.err), {**os.environ, **environment})
        self.process = _start(*arguments)
        self.pid = self.process.pid

    def wait(self, seconds=60):
        """The exit code; the process is killed when the time is over."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s: {self.err.read_text()}")
        return self.process.exitcode

    def wait_for(self, path, seconds=60):
        """Wait until a file is there and has content: an empty log says only that rank 0 has begun."""
        end = time.monotonic() + seconds
        while not Path(path).exists() or not Path(path).stat().st_size:
            assert self.process.is_alive() and time.monotonic() < end, self.err.read_text()
            time.sleep(0.005)


@cache
def _warm():
    """A source of processes that have imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as only_there:
        only_there.chdir(Path(MAIN).parent)     # modules of the test's own folder, such as its main.py, come first
        only_there.setenv("PYTHONPATH", os.pathsep.join([str(Path(MAIN).parent), str(Path(__file__).parent)]))
        only_there.setenv("OMP_NUM_THREADS", "1")
        only_there.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")    # as main.py sets it before it imports torch
        forkserver.ensure_running()
    return context


_started = []


def _start(*arguments):
    """A new process that runs a script: see `_run_script`."""
    process = _warm().Process(target=_run_script, args=arguments)
    process.start()
    _started.append(process)
    return process


def _run_script(script, flags, folder, written, environment):
    for number, path in enumerate(written, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    sheets.LEAST = SMALL_SHEETS
    multiprocessing.set_start_method(None, force=True)  # loader processes start as those of `python main.py` do
    signal.signal(signal.SIGHUP, signal.SIG_DFL)        # ignored where the tests themselves run under nohup
    os.chdir(folder)
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


def forks(work, count):
    """[work(0), work(1), ...] of `count` forks of this process, which run concurrently.

    They cannot train: autograd does not survive a fork.
    """
    context, answers, running = multiprocessing.get_context("fork"), [], []

    def answer(number, end):
        end.send(work(number))

    for number in range(count):
        receiving, sending = context.Pipe(duplex=False)
        running.append(context.Process(target=answer, args=(number, sending)))
        running[-1].start()
        sending.close()                                     # so that a fork that fails raises EOFError here
        answers.append(receiving)
    try:
        assert all(answer.poll(60) for answer in answers), "a fork does not answer"
        return [answer.recv() for answer in answers]
    finally:
        for process in running:
            process.join(5)
            process.kill()
            process.join()


# ---- training without a command ----

SMALL = ("--dataset", "toy", "--imsize", "32", "--batch_size", "8", "--g_conv_dim", "8", "--d_conv_dim", "8", "--z_dim",
         "16", "--device", "cpu", "--preset", "published")
SMALL_FASTGAN = ("--dataset", "toy", "--model", "fastgan", "--imsize", "64", "--batch_size", "4", "--g_conv_dim", "4",
                 "--d_conv_dim", "4", "--z_dim", "16", "--device", "cpu", "--metadata", "false", "--recon", "l1")


def begun(flags):
    """A training of these flags, from the seed on: `trainer`, and `batches` of images that need no loading."""
    config = resolve(parse(flags))
    training = TimedConfig(config, distributed.start(config))
    for gamma in FAMILIES[config.model].gammas(training.trainer.G, training.trainer.D).values():
        gamma.fill_(0.5)                                # gamma starts at 0, where attention has no effect
    return training


def step_losses(training):
    """(2,): d_loss and g_loss of its next step."""
    stats = training.trainer.train_step(training.batches)
    return torch.stack([stats["d_loss"], stats["g_loss"]])


# ---- pictures ----

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def assert_colour(picture: torch.Tensor, colour, tolerance=2):
    assert picture.dtype == torch.uint8
    difference = (picture.int() - torch.tensor(colour).view(3, 1, 1)).abs().max()
    assert difference <= tolerance, picture[:, 0, 0]


def data_config(path=".", **changes):
    """What the rooms of the data read of a config: no check and no cache, unless `changes` say so."""
    values = dict(dataset="folder", image_path=str(path), imsize=16, batch_size=4, num_workers=0, seed=7, hflip=False,
                  holdout=0.0, check_data="off", cache="off", cache_dir=None, cache_path="cache", mode="train",
                  dry_run=False, version="test", log_path="logs", total_step=1000, d_iters=1, accumulate=1,
                  max_pixels=178_956_970, sample_path="samples", model_save_path="models", attn_path=None)
    return SimpleNamespace(**{**values, **changes})


def encode(image, kind, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(size=(40, 30), seed=0) -> Image.Image:
    """A smooth picture that differs from its mirror image and from those of other seeds."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)


def fill(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        gradient(seed=index).save(folder / f"{index:03}.png")
    return folder


def fill_lmdb(folder: Path, count: int) -> Path:
    import lmdb  # here alone: tests on a GPU need none

    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**22) as opened, opened.begin(write=True) as transaction:
        for index in range(count):
            transaction.put(f"{index:08}".encode(), encode(gradient(seed=index), "WEBP", lossless=True))
    return folder


def take(batches, count: int) -> torch.Tensor:
    try:
        return torch.cat([next(batches).images for _ in range(count)])
    finally:
        batches.close()


def identities(pictures: torch.Tensor) -> list[bytes]:
    return [picture.numpy().tobytes() for picture in pictures]
