"""A real torchrun with two ranks, killed as a whole at any moment, or asked to end by a signal to each process.

One test is one try. Its seed decides the moment, who is first, and how soon the others follow.
"""

import os
import signal
import time

import pytest
from conftest import MAIN, TINY, assert_same_state, lines, state, two_processes
from kills import (
    RECORDS,
    Group,
    Two,
    assert_goes_on,
    is_there,
    moments,
    never_killed,
    process_of_rank_0,
    send,
    stop_while,
    torchrun_to_the_end,
    tries,
)

from storage import checkpoint

pytestmark = pytest.mark.usefixtures("an_empty_folder")


# ------------------------------------------------------------------------------------------------------- SIGKILL


def while_it_starts(group, drawn):
    time.sleep(drawn.uniform(0, 6))


def in_a_step(group, drawn):
    group.wait_for("logs/a/metrics.jsonl")
    time.sleep(drawn.uniform(0, 1))


def while_a_checkpoint_is_written(group, drawn):
    group.wait_for("logs/a/metrics.jsonl")
    stop_while(process_of_rank_0(group), is_there("models/a/.*.pth.*.tmp"), drawn)


def while_a_record_is_written(group, drawn):
    group.wait_for("logs/a/metrics.jsonl")
    stop_while(process_of_rank_0(group), is_there("samples/a/.*.png.*.tmp", "samples/a/.index.html.*.tmp"), drawn, 8)


def while_it_resumes(group, drawn):
    time.sleep(drawn.uniform(3, 7))


MOMENTS = [while_it_starts, in_a_step, while_a_checkpoint_is_written, while_a_record_is_written, while_it_resumes] * 6


@pytest.mark.parametrize(("seed", "moment"), tries("SIGKILL: torchrun and both ranks", MOMENTS))
def test_torchrun_and_its_ranks_are_killed(seed, moment):
    drawn, before = moments("ranks", seed), []
    if moment is while_it_resumes:
        assert two_processes(MAIN, *RECORDS, "--total_step", 4).returncode == 0
        before = [2, 4]
    with Group(*RECORDS) as group:
        moment(group, drawn)
        group.kill(drawn.random() < 0.5, drawn.uniform(0, 0.03))
    saved = checkpoint.steps_in("models/a")
    assert saved[: len(before)] == before
    assert_goes_on(RECORDS, saved, torchrun_to_the_end, ended=4 if before else None)


# ------------------------------------------------------------------------- SIGTERM to torchrun and to both ranks


LONG = (*TINY, "--version", "a", "--log_step", 1, "--sample_step", 1000, "--keep_checkpoints", 0)
ENDLESS = (*LONG, "--total_step", 100_000, "--model_save_step", 100_000)


def ranks_to_the_end(*flags):
    assert two_processes(MAIN, *flags).returncode == 0


def assert_saved(out, err):
    """The step at which it stopped is saved, is that of a run that was left alone, and the same command goes on."""
    (step,) = checkpoint.steps_in("models/a")
    assert f"interrupted: step {step} is saved" in out, out
    assert "main.py\", line" not in err, f"a traceback, and not torchrun's own: {err}"
    assert [line["step"] for line in lines("a")] == list(range(1, step + 1))
    assert two_processes(MAIN, *ENDLESS, "--total_step", step + 1).returncode == 0
    left_alone = never_killed(ranks_to_the_end, *LONG, "--total_step", step + 1, "--model_save_step", step)
    for saved in (step, step + 1):
        assert_same_state(left_alone[saved], state("a", saved))


@pytest.mark.parametrize("seed", tries("SIGTERM: torchrun and both ranks", 20))
def test_a_signal_to_torchrun_and_to_its_ranks_saves(seed):
    """As SLURM and systemd do it. torchrun passes its own on, so that a rank gets two."""
    drawn = moments("signals", seed)
    with Group(*ENDLESS) as group:
        group.wait_for("logs/a/metrics.jsonl")
        time.sleep(drawn.uniform(0, 1))
        everyone = [group.process.pid, *group.ranks()]
        assert len(everyone) == 3
        drawn.shuffle(everyone)
        for pid in everyone:
            send(pid, signal.SIGTERM)
            time.sleep(drawn.choice([0, drawn.uniform(0, 0.1)]))
        assert group.process.wait(60) != 0
        assert_saved(group.out.read_text(), group.err.read_text())


@pytest.mark.fault("SIGTERM: both ranks, twice")
def test_two_signals_to_each_rank_save(run):
    """What the ranks see of it, without torchrun, in a tenth of the time."""
    running = Two(*ENDLESS, "--total_step", 60)
    running.ranks[0].wait_for("logs/a/metrics.jsonl")
    for _ in range(2):
        for rank in running.ranks:
            os.kill(rank.pid, signal.SIGTERM)
        time.sleep(0.05)                                # or the system would make one of both
    assert running.wait() == [143, 143]
    (step,) = checkpoint.steps_in("models/a")
    assert f"interrupted: step {step} is saved" in running.ranks[0].out.read_text()
    assert run(*ENDLESS, "--total_step", step + 1, tiny=False)[0] == 0
    assert [line["step"] for line in lines("a")] == list(range(1, step + 2))
