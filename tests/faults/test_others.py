"""Faults of what is around a run, at random moments: a reader that goes, a full disk, a loader process, a second run.

One test is one try. tests/faults/test_faults.py holds each of them once, in more detail.
"""

import os
import signal
import subprocess
import time

import pytest
from conftest import Launched, assert_same_state, lines, small_disk_at, state
from kills import SHORT, STEPS, assert_goes_on, moments, never_killed, pictures, run_to_the_end, tries

from storage import checkpoint

pytestmark = pytest.mark.usefixtures("an_empty_folder")


def assert_whole(flags):
    """A run that came to its end."""
    assert_same_state(never_killed(run_to_the_end, *flags)[STEPS], state("a", STEPS))
    assert [line["step"] for line in lines("a")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("seed", tries("the reader of the output goes away", 10))
def test_the_reader_goes_away(seed):
    """Of stdout, of stderr, or of both."""
    drawn = moments("reader", seed)
    os.mkfifo("pipe")
    running = Launched(*SHORT, **[{"out": "pipe"}, {"err": "pipe"}, {"out": "pipe", "err": "pipe"}][seed % 3])
    with open("pipe", "rb", buffering=0) as reader:
        reader.read(drawn.randrange(1, 100))
        time.sleep(drawn.uniform(0, 0.5))
    running.process.join(60)
    assert running.process.exitcode == 0
    assert_whole(SHORT)


@pytest.fixture
def small_disk(tmp_path, an_empty_folder):
    """The disk of the folder models."""
    with small_disk_at(tmp_path / "models", "4m") as disk:
        yield disk


@pytest.mark.parametrize("seed", tries("the disk of the checkpoints is full", 10))
def test_the_disk_of_the_checkpoints_is_full(seed, small_disk):
    """From the start or later on: the run ends with 5; what was saved is there; with space again it goes on."""
    (small_disk / "filler").write_bytes(bytes(moments("disk", seed).randrange(2_600_000, 4 * 2**20)))
    running = Launched(*SHORT)
    assert running.wait() == 5
    err = running.err.read_text()
    assert "Traceback" not in err and "Free some space" in err, err
    (small_disk / "filler").unlink()
    assert_goes_on(SHORT, checkpoint.steps_in("models/a"))


@pytest.mark.parametrize("seed", tries("a loader process is killed", 10))
def test_a_loader_process_is_killed(seed):
    """Exit code 3; between two steps it saves first; the same command goes on from what is saved."""
    flags = (*SHORT, "--dataset", "folder", "--image_path", pictures(40), "--cache", "off", "--num_workers", 2)
    drawn, running = moments("loader", seed), Launched(*flags)
    running.wait_for("logs/a/metrics.jsonl")
    loaders = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    time.sleep(drawn.uniform(0, 0.3))
    os.kill(int(drawn.choice(loaders)), signal.SIGKILL)
    assert running.wait() == 3
    err, saved = running.err.read_text(), checkpoint.steps_in("models/a")
    assert "Traceback" not in err and "--num_workers" in err, err
    assert_goes_on(flags, saved)


@pytest.mark.parametrize("seed", tries("a second run into the same folder", 10))
def test_a_second_run_into_the_same_folder(seed):
    """At once or later: one of the two is turned away, and the other does not notice."""
    drawn = moments("second", seed)
    first = Launched(*SHORT, out="1.out", err="1.err")
    if seed % 2:
        first.wait_for("models/a/0000002.pth")
    else:
        time.sleep(drawn.uniform(0, 0.3))
    second = Launched(*SHORT, out="2.out", err="2.err")
    codes = sorted([first.wait(), second.wait()])
    err = first.err.read_text() + second.err.read_text()
    assert codes == [0, 6] and "Traceback" not in err, (codes, err)
    assert_whole(SHORT)
