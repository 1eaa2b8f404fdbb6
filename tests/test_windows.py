"""The program without POSIX: no such call is on the way of a run, see without_posix.py. No Windows was at hand."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, TINY_OF_ANY, state

SCRIPT = Path(__file__).parent / "without_posix.py"


def run_on_windows(*commands):
    """(exit codes, output) of these commands, one after the other."""
    flags = [flag for command in commands for flag in ("--then", *map(str, command))]
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)
    ends = [line.removeprefix("exit code ") for line in done.stdout.splitlines() if line.startswith("exit code ")]
    return ends, done.stdout + done.stderr


@pytest.mark.soak
def test_a_run_trains_goes_on_is_moved_aside_sampled_and_scored(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training = (*TINY, "--dataset", "folder", "--image_path", pictures, "--version", "a", "--sample_step", 2,
                "--model_save_step", 2, "--total_step")
    codes, output = run_on_windows(
        (*training, 2, "--cache", "on"), (*training, 4, "--use_tensorboard", "true"),
        (*training, 2, "--restart", "true"),
        ("--version", "a", "--mode", "sample", "--num_samples", 2), ("--version", "a", "--mode", "evolution"),
        ("--version", "a", "--mode", "evaluate", "--metrics", "swd", "--num_eval", 4))
    assert codes == ["0"] * 6, output
    assert state("a.old1", 4)["step"] == 4 and state("a", 2)["step"] == 2
    assert output.count("has no locks: nothing keeps a second process") == 3
    assert "resuming 'a' from step 2" in output and Path("logs/scores.md").exists()


@pytest.mark.soak
def test_loader_processes_and_fastgan_work_too(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fastgan = ("--model", "fastgan", "--imsize", 64, "--vgg_weights", "random", "--recon", "l1", "--num_workers", 2)
    codes, output = run_on_windows(
        (*TINY_OF_ANY, *fastgan, "--dataset", "folder", "--image_path", pictures, "--version", "a", "--total_step", 2),
        ("--version", "a", "--mode", "interpolate"), ("--version", "a", "--mode", "style_mix"))
    assert codes == ["0"] * 3, output
