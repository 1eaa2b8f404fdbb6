"""Faults of one rank among several: the others end soon, with one message, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import MAIN, TINY, lines, two_processes
from kills import Group, Two, is_running

import data_loader
from device import distributed, watch
from errors import UsageError
from parameter import resolve
from storage import checkpoint

ENDLESS = (*TINY, "--version", "a", "--total_step", 100_000, "--log_step", 1, "--sample_step", 10, "--model_save_step",
           10)
IMPATIENT = """
import sys, main
from device import watch
if __name__ == "__main__":      # loader processes import this file
    watch.SILENT, watch.GRACE, watch.AWAY = 3.0, 2.0, 2.0
    sys.exit(main.main(sys.argv[1:]))
"""


@pytest.fixture
def two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    return lambda *flags: Two(*flags, script=tmp_path / "impatient.py")


@pytest.mark.fault("a rank of two is killed or stopped")
@pytest.mark.parametrize(("number", "victim", "words"), [
    (signal.SIGKILL, 1, "was killed"),
    pytest.param(signal.SIGSTOP, 1, "is stopped or hangs", marks=pytest.mark.soak),
    pytest.param(signal.SIGKILL, 0, "was killed", marks=pytest.mark.soak),
    pytest.param(signal.SIGSTOP, 0, "is stopped or hangs", marks=pytest.mark.soak)])
def test_the_other_rank_names_it_and_the_same_command_goes_on(two, run, number, victim, words):
    running = two(*ENDLESS, "--model_save_step", 2, "--keep_checkpoints", 0, "--sample_step", 1000)
    lost, left = running.ranks[victim], running.ranks[1 - victim]
    left.wait_for("models/a/0000002.pth")
    began = time.monotonic()
    os.kill(lost.pid, number)
    assert left.wait(20) == 7
    assert time.monotonic() - began < 15
    lost.process.kill()
    lost.process.join()
    err = running.errors()
    assert err.count("error:") == 1 and f"error: rank {victim} (process {lost.pid} on " in err and words in err, err
    assert "Traceback" not in err and len(err.strip().splitlines()) <= 4, err
    step = checkpoint.steps_in("models/a")[-1]
    code, out, _ = run("--version", "a", "--total_step", step + 1)
    assert code == 0 and f"resuming 'a' from step {step}" in out


@pytest.mark.soak
def test_a_loader_process_of_one_rank_that_is_killed_ends_both_after_saving(two, pictures):
    running = two(*ENDLESS, "--model_save_step", 10_000, "--dataset", "folder", "--image_path", pictures, "--cache",
                  "off", "--num_workers", 2)
    running.ranks[0].wait_for("samples/a/0000010_fake.png")
    workers = subprocess.run(["pgrep", "-P", str(running.ranks[1].pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert running.wait() == [7, 3]
    (step,) = checkpoint.steps_in("models/a")
    assert step >= 10 and f"step {step} is saved in models/a" in running.ranks[1].out.read_text()
    assert running.errors().count("error:") == 1 and "Traceback" not in running.errors()


def test_what_all_ranks_meet_is_printed_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code, *flags in ((2, "--imsize", 33), (4, "--adv_loss", "wgan-gp", "--lambda_gp", "1e22")):
        done = two_processes(MAIN, *TINY, "--version", "a", "--total_step", 3, *flags)
        assert done.returncode == code and done.stderr.count("error:") == 1, done.stderr


LAUNCH = "import sys; from device import distributed; sys.exit(distributed.launch(2, sys.argv[1], sys.argv[2:]))"


def launched(*flags, **more):
    """`--parallel true` as if there were two GPUs."""
    return subprocess.Popen([sys.executable, "-c", LAUNCH, MAIN, *map(str, flags)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(MAIN).parent)},
                            **more)


@pytest.mark.soak
def test_parallel_prints_only_what_the_program_says_and_returns_its_exit_code(tmp_path):
    mistake = launched(*TINY, "--imsize", 33, cwd=tmp_path)
    _, err = mistake.communicate(timeout=60)
    assert mistake.returncode == 2 and err.startswith("error:") and len(err.splitlines()) <= 2, err
    running = launched(*ENDLESS, cwd=tmp_path)
    end = time.monotonic() + 60
    while not (tmp_path / "models/a/0000010.pth").exists() and time.monotonic() < end:
        time.sleep(0.05)
    running.terminate()
    out, err = running.communicate(timeout=40)
    assert running.returncode == 143 and "Traceback" not in err and "interrupted: step" in out, err


def test_the_exit_code_is_the_first_that_a_process_gave_itself():
    class Failure:
        def __init__(self, exitcode, timestamp):
            self.exitcode, self.timestamp = exitcode, timestamp

    assert distributed.exit_code([Failure(-9, 5), Failure(7, 6), Failure(3, 8)]) == 7
    assert distributed.exit_code([Failure(-15, 6), Failure(-9, 5)]) == 137


@pytest.fixture
def under_torchrun(an_empty_folder):
    """A real torchrun of ENDLESS with two ranks, once they train."""
    with Group(*ENDLESS, "--model_save_step", 10_000) as group:
        group.wait_for("samples/a/0000010_fake.png")
        yield group


@pytest.mark.soak
@pytest.mark.fault("a rank under torchrun is killed or stopped")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_the_job_ends_within_a_minute_with_one_message(under_torchrun, run, number, victim):
    ranks, began = under_torchrun.ranks(), time.monotonic()
    os.kill(ranks[victim], number)
    assert under_torchrun.process.wait(60) == 1
    assert time.monotonic() - began < 60
    err = under_torchrun.err.read_text()
    assert err.count(f"error: rank {victim} (process {ranks[victim]} on ") == err.count("error:") == 1, err
    assert "[rank" not in err, err                      # of our own, no traceback
    code, _, err = run("--version", "a", "--total_step", 1)
    assert code == 0, err


@pytest.mark.soak
@pytest.mark.fault("torchrun is killed")
def test_without_torchrun_the_ranks_save_and_end(under_torchrun, run):
    ranks = under_torchrun.ranks()
    under_torchrun.process.kill()
    under_torchrun.process.wait()
    end = time.monotonic() + 20
    while any(map(is_running, ranks)):
        assert time.monotonic() < end, under_torchrun.err.read_text()
        time.sleep(0.1)
    (step,) = checkpoint.steps_in("models/a")
    assert under_torchrun.err.read_text().count("torchrun is gone") == 1
    code, out, _ = run("--version", "a", "--total_step", step + 1)
    assert code == 0 and f"resuming 'a' from step {step}" in out
    assert lines("a")[-1]["step"] == step + 1


# ---------------------------------------------------------------------------------- ranks that see different things


def test_ranks_with_other_settings_pictures_or_checkpoints_are_refused(run, pictures, monkeypatch):
    """Else they wait for each other for ever, or train on what is no run at all."""
    def other(found):
        """What the other rank has."""
        if isinstance(found, dict):
            return found | {"beta1": 0.5}
        return (7, None) if found == (None, None) else found

    flags = ("--dataset", "folder", "--image_path", pictures, "--version", "a", "--total_step", 1)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "gather", lambda found: [found, other(found)])
        code, _, err = run(*flags)
        assert code == 2 and "--beta1: the processes have different values (0.0, 0.5)" in err
        patch.setattr(distributed, "gather", lambda found: [found, found if isinstance(found, dict) else other(found)])
        code, _, err = run(*flags)
        assert code == 5 and "the processes found different checkpoints" in err
    monkeypatch.setattr(data_loader, "is_alone", lambda: False)
    monkeypatch.setattr(data_loader, "gather", lambda found: [found, (found[0] + 1, found[1])])
    code, _, err = run(*flags)
    assert code == 3 and "the processes see different pictures (12, 13)" in err and not Path("models").exists()


def test_while_a_checkpoint_is_written_no_other_ranks_loss_ends_this_one(run, monkeypatch):
    def write(*words, plain=checkpoint._write):
        seen.append(watch._running.acting.locked())
        plain(*words)

    seen = []
    monkeypatch.setattr(watch, "_running", watch.Watch())
    monkeypatch.setattr(checkpoint, "_write", write)
    assert run("--version", "a", "--total_step", 2, "--model_save_step", 1)[0] == 0
    assert seen == [True, True] and not watch._running.acting.locked()


def test_what_was_said_before_torchruns_restart_is_said_again(monkeypatch):
    class Store(dict):
        def add(self, key, number):
            self[key] = self.get(key, 0) + number
            return self[key]

    one = watch.Watch()
    one.store = Store()
    one.met.set()
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        assert [one.claim("a lost rank"), one.claim("a lost rank")] == [True, False]


# ----------------------------------------------------------------------------------------------- GPUs that do not fit


def test_a_gpu_that_this_pytorch_cannot_use_is_named(monkeypatch):
    config = resolve({"device": "auto"})
    monkeypatch.setattr(distributed.torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(distributed.torch.cuda, "get_device_name", lambda device: "GTX 1080")
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed.torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "compute_120"])
    with pytest.raises(UsageError, match="cannot use GPUs of capability 6.1, such as GTX 1080\n.*--device cpu"):
        distributed.place_alone(config)
    monkeypatch.setattr(distributed.torch.cuda, "get_arch_list", lambda: ["sm_50", "sm_90"])
    assert distributed.place_alone(config).device.type == "cuda" and not distributed.why_no_gpu(config)


@pytest.mark.parametrize(("built_for", "words"), [(None, "was built without CUDA"), ("13.0", "finds no GPU; perhaps")])
def test_a_training_on_the_cpu_beside_an_nvidia_gpu_says_why(run, monkeypatch, built_for, words):
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed.torch.version, "cuda", built_for)
    monkeypatch.setattr(distributed.shutil, "which", lambda name: f"/usr/bin/{name}")
    _, out, _ = run("--device", "auto", "--dry_run", "true")
    assert words not in out, "it prints the device itself"
    _, out, _ = run("--device", "auto", "--total_step", 1, "--sample_step", 5)
    assert "note: training on the CPU: this PyTorch (" in out and words in out
