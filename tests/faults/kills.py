"""What tests of SIGKILL share: when to kill, in which process, and what must hold afterwards."""

import atexit
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import (
    EVERY_ATTENTION,
    MAIN,
    TINY,
    Launched,
    assert_same_state,
    environment_of_two,
    fill,
    lines,
    start_torchrun,
    state,
)

from storage import checkpoint

STEPS = 12
SHORT = (*TINY, "--version", "a", "--total_step", STEPS, "--log_step", 1, "--model_save_step", 2, "--sample_step", 100)
RECORDS = (*SHORT, *EVERY_ATTENTION, "--sample_step", 3)


def tries(fault, count, quick=0):
    """Parameters of `count` tries of a fault: a seed; with a list for `count`, a seed and one of the list for each.

    All but the first `quick` are for `make soak` alone.
    """
    each = [(seed,) for seed in range(count)] if isinstance(count, int) else list(enumerate(count))
    return [pytest.param(*values, marks=[pytest.mark.fault(fault), *[pytest.mark.soak] * (number >= quick)],
                         id="-".join(getattr(value, "__name__", str(value)) for value in values))
            for number, values in enumerate(each)]


def moments(fault, seed):
    """The random numbers that decide when this try is killed."""
    return random.Random(f"{fault} {seed}")


def kept_folder():
    """A new folder that is there for all tries."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def pictures(count):
    """A folder of pictures for all tries: where they are and when they were written is part of a run's state."""
    return fill(kept_folder() / "pictures", count)


# ------------------------------------------------------------------------------------------- what is killed, and how


def run_to_the_end(*flags):
    """`python main.py --flags`, which must succeed; what it printed. In a process that has imported everything."""
    running = Launched(*flags, out="again.txt", err="again_err.txt")
    assert running.wait(120) == 0, running.err.read_text()
    return running.out.read_text()


def torchrun_to_the_end(*flags):
    """The same with two processes under a real torchrun."""
    with Group(*flags) as group:
        assert group.process.wait(120) == 0, group.err.read_text()
        return group.out.read_text()


class Cold:
    """`python main.py --flags` from the very start, as a user runs it. Used as a Launched is."""

    def __init__(self, *flags):
        self.err = Path("err.txt").absolute()
        with open("out.txt", "w") as out, open(self.err, "w") as err:
            self.started = subprocess.Popen([sys.executable, MAIN, *map(str, flags)], stdout=out, stderr=err)
        self.pid, self.process, self.join = self.started.pid, self, self.started.wait

    def is_alive(self):
        return self.started.poll() is None

    @property
    def exitcode(self):
        return self.started.poll()


class Group:
    """A real torchrun with two ranks. All of them are killed at the end of its `with` block."""

    def __init__(self, *flags):
        self.out, self.err = Path("group_out.txt").absolute(), Path("group_err.txt").absolute()
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = start_torchrun(MAIN, *flags, stdout=out, stderr=err)
        self.seen = set()

    def ranks(self):
        """The process numbers of the ranks that have been started."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout.split()
        self.seen |= set(map(int, found))
        return sorted(self.seen)

    def wait_for(self, path, seconds=60):
        """Wait until a file is there and has content: an empty log says only that rank 0 has begun."""
        end = time.monotonic() + seconds
        while not Path(path).exists() or not Path(path).stat().st_size:
            assert self.process.poll() is None and time.monotonic() < end, self.err.read_text()
            time.sleep(0.005)

    def kill(self, first_torchrun, pause):
        """Kill torchrun and its ranks, torchrun first or last, with a pause between one and the next."""
        ranks = self.ranks()
        for pid in [self.process.pid, *ranks] if first_torchrun else [*ranks, self.process.pid]:
            send(pid, signal.SIGKILL)
            time.sleep(pause)
        self.process.wait()
        end = time.monotonic() + 10
        while any(map(is_running, ranks)) and time.monotonic() < end:
            time.sleep(0.01)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill(False, 0)


class Two:
    """Two ranks of `python main.py --flags`, without torchrun, which would end one when the other ends."""

    def __init__(self, *flags, script=MAIN):
        meeting = environment_of_two()
        self.ranks = [Launched(*flags, out=f"{rank}.out", err=f"{rank}.err", script=script, RANK=str(rank),
                               LOCAL_RANK=str(rank), **meeting) for rank in range(2)]

    def wait(self, seconds=30):
        """[exit code of each rank]"""
        return [rank.wait(seconds) for rank in self.ranks]

    def errors(self):
        """What both have printed to stderr below their progress bars."""
        return "".join(rank.err.read_text().rpartition("\r")[2] for rank in self.ranks)


def process_of_rank_0(group):
    """Rank 0 of a Group, for `stop_while`."""
    pid = json.loads(Path("models/a/.lock").read_text())["pid"]
    assert pid in group.ranks()
    return SimpleNamespace(pid=pid, process=SimpleNamespace(is_alive=lambda: is_running(pid)), err=group.err)


def is_running(pid):
    """Whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def send(pid, number):
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# -------------------------------------------------------------------------------------------------------- the moment


def stop_while(running, holds, moments, most=5):
    """Stop the process (SIGSTOP) while `holds()`: one of the first `most` times that it does, at most 3 ms later.

    Only what is stopped can be looked at before it goes on: so what is killed here is killed in the midst of it.
    """
    left, before = moments.randrange(most), False
    while running.process.is_alive():
        now = holds()
        if now and not before:
            left -= 1
            if left < 0:
                time.sleep(moments.uniform(0, 0.003))
                os.kill(running.pid, signal.SIGSTOP)
                time.sleep(0.001)
                if holds():
                    return
                os.kill(running.pid, signal.SIGCONT)
                now = False
        before = now
        time.sleep(0.0002)
    raise AssertionError(f"it ended before its moment came: {running.err.read_text()}")


def is_there(*patterns):
    """holds() for `stop_while`: whether there is a file of one of these patterns."""
    return lambda: any(next(iter(Path().glob(pattern)), None) for pattern in patterns)


def kill(running):
    """SIGKILL, the process alone. Return the steps of the checkpoints that were there."""
    if not running.process.is_alive() and not running.process.exitcode:
        pytest.skip("it came to its end before it was killed: this was no try")
    os.kill(running.pid, signal.SIGKILL)
    running.process.join()
    return checkpoint.steps_in("models/a")


# A run that kills itself before it opens or changes such a file for the N-th time: `REGEX N --flags`.
KILLS_ITSELF = """
import os, re, runpy, signal, sys, main
wanted, left, itself = re.compile(sys.argv[1]), int(sys.argv[2]), os.getpid()
def look(event, arguments):
    global left
    if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and os.getpid() == itself:
        path = arguments[0] if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
        mode = f" {arguments[1]}" if event == "open" else ""
        if wanted.search(f"{event}{mode} {os.fsdecode(path)}"):
            left -= 1
            if left < 0:
                os.kill(itself, signal.SIGKILL)
sys.addaudithook(look)
sys.argv[1:] = sys.argv[3:]
runpy.run_path(main.__file__, run_name="__main__")
"""
CHANGES = r"^(os\.|open [wax]).*"          # and not files that are only read
OF_THE_RUN = CHANGES + r"\b(models|logs|samples)\b"


def launch_that_kills_itself(what, number, *flags):
    """Run until SIGKILL, just before what matches this regex is done for the `number`-th time, counted from 0.

    What can be done is `open MODE PATH`, and `os.rename PATH` and the like.
    """
    Path("kills_itself.py").write_text(KILLS_ITSELF)
    running = Launched(what, number, *flags, script=Path("kills_itself.py").absolute())
    running.process.join(60)
    assert running.process.exitcode == -signal.SIGKILL, f"it was not killed: {running.err.read_text()}"
    return checkpoint.steps_in("models/a")


# ---------------------------------------------------------------------------------------------------- and afterwards


@cache
def never_killed(go, *flags):
    """{step: state} of the checkpoints of a run that was left alone, and its "records"; computed once."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as there:
        there.chdir(folder)
        go(*flags)
        return {step: state("a", step) for step in checkpoint.steps_in("models/a")} | {"records": records()}


def records():
    """(the log's lines without their times, {name: bytes} of the pictures) of the run."""
    kept = [{name: value for name, value in line.items() if name not in ("sec_per_step", "images_per_sec")}
            for line in lines("a")]
    return kept, {path.name: path.read_bytes() for path in Path("samples/a").glob("*.png")}


def assert_same_records(expected, ended=None):
    """Of a run that was killed or not. Sums over several ranks may be rounded otherwise.

    `ended`: the step at which the run had come to an end before, and so has a record.
    """
    (before, drawn), (after, drawn_after) = expected, records()
    if ended:
        assert f"{ended:07}_fake.png" in drawn_after
        drawn_after = {name: data for name, data in drawn_after.items() if not name.startswith(f"{ended:07}")}
        after = [{name: line[name] for name in other if name in line} if line["step"] == ended else line
                 for line, other in zip(after, before, strict=True)]
    assert [line["step"] for line in after] == [line["step"] for line in before]
    for line, other in zip(before, after, strict=True):
        assert other.keys() == line.keys(), line["step"]
        for name, value in line.items():
            expected = value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-6)
            assert other[name] == expected, (line["step"], name)
    assert drawn_after.keys() == drawn.keys()
    assert [name for name in drawn if drawn[name] != drawn_after[name]] == []


def assert_goes_on(flags, saved, go=run_to_the_end, ended=None):
    """The same command goes on from the newest checkpoint `saved` before the kill, and nothing shows that it was."""
    out = go(*flags)
    newest = saved[-1] if saved else None
    words = "starting 'a'" if newest is None else f"resuming 'a' from step {newest}"
    # one killed at its end may have all its records, or not
    assert words in out or (newest == STEPS and f"has reached step {STEPS}" in out), out
    told = [line for line in out.splitlines() if "warning" in line and "pictures are fewer than" not in line]
    assert not told, out                    # so few pictures, of which every run of these tests is warned
    assert_same_state(never_killed(go, *flags)[STEPS], state("a", STEPS))
    assert_same_records(never_killed(go, *flags)["records"], ended)
    assert [str(path) for path in Path().rglob("*.tmp")] == []
