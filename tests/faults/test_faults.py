"""Faults while a run is going on: what ends it, what must not, and that nothing is lost."""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MAIN, TINY, Launched, assert_same_state, lines, small_disk_at, state
from stand_ins import small_swd
from test_page import embedded

import loop
import parameter
import utils
from device.signals import Interrupt
from gallery import grid, page
from gallery.health import Health
from metrics import swd
from storage import checkpoint, score_table

ENDLESS = (*TINY, "--version", "a", "--total_step", 100_000, "--log_step", 1, "--sample_step", 10, "--model_save_step",
           1000)


def saved():
    return checkpoint.steps_in("models/a")


# ------------------------------------------------------------- A. secondary things never decide over the run


def test_a_reader_that_goes_away_ends_no_run_and_no_dry_run(tmp_path, monkeypatch):
    """As in `python main.py ... 2>&1 | head`, or when the terminal is gone."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    running = Launched(*TINY, "--version", "a", "--total_step", 10, "--log_step", 1, out="pipe", err="err.txt")
    with open("pipe", "rb") as reader:
        assert reader.read(20)
    assert running.wait() == 0
    assert saved() == [10] and [line["step"] for line in lines("a")] == list(range(1, 11))
    dry = Launched(*TINY, "--dry_run", out="pipe", err="dry.txt")
    with open("pipe", "rb"):
        pass                                            # gone before it has printed anything
    assert dry.wait() == 0 and dry.err.read_text() == ""


def test_a_library_that_puts_another_stream_in_the_place_of_stdout_changes_no_exit_code():
    text = ("import io, sys; from device import console\n"
            "def main(argv): sys.stdout = io.StringIO(); return 0\n"
            "console.run(main)")
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=Path(MAIN).parent)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.soak
@pytest.mark.parametrize("path", [path for path in sorted((Path(MAIN).parent / "benchmarks").glob("*.py"))
                                  if "a part of another program" not in path.read_text()], ids=lambda path: path.stem)
def test_a_measuring_program_into_head_is_quiet(path, tmp_path):
    command = f"{sys.executable} {path} --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.soak
def test_a_console_without_the_character_shows_an_escape(tmp_path, pictures):
    folder = tmp_path / "größe"
    pictures.rename(folder)
    command = [sys.executable, MAIN, *TINY, "--dataset", "folder", "--image_path", str(folder), "--dry_run"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONIOENCODING": "ascii:strict"})
    assert done.returncode == 0 and b"gr\\xf6\\xdfe" in done.stdout, done.stderr


@pytest.fixture
def small_disk(tmp_path):
    with small_disk_at(tmp_path / "disk", "16m") as disk:
        yield disk


def test_a_full_disk_for_samples_or_logs_costs_these_alone(run, small_disk):
    """The run goes on; the warning names the file, once for each kind; what fits again is written again."""
    run("--version", "plain", "--total_step", 4)
    folders = ("--sample_path", small_disk / "samples", "--log_path", small_disk / "logs")
    (small_disk / "filler").write_bytes(bytes(16_690_000))
    code, out, err = run("--version", "a", "--total_step", 3, "--sample_step", 1, "--log_step", 1,
                         "--use_tensorboard", "true", *folders)
    assert code == 0, err
    assert out.count("warning: cannot write samples and attention maps") == 1
    assert f"{small_disk}/samples/a/" in out and "No space left on device" in out
    (small_disk / "filler").unlink()
    code, out, _ = run("--version", "a", "--total_step", 4, "--sample_step", 1, "--log_step", 1, *folders)
    assert code == 0 and "warning" not in out and (small_disk / "samples/a/0000004_fake.png").exists()
    assert_same_state(state("plain", 4), state("a", 4))


def test_a_page_that_cannot_be_written_is_announced_once_and_when_it_works_again(run, monkeypatch):
    write, calls = page.write_pages, []

    def fail_at_first(*arguments):
        calls.append(arguments)
        if len(calls) <= 2:
            raise OSError(errno.EACCES, "Permission denied", "samples/a/index.html")
        write(*arguments)

    monkeypatch.setattr(page, "write_pages", fail_at_first)
    code, out, _ = run("--version", "a", "--total_step", 2, "--sample_step", 1)
    assert code == 0 and len(calls) == 4 and Path("samples/a/index.html").exists()
    assert out.count("warning: cannot write the page (samples/a/index.html: Permission denied)") == 1
    assert out.count("note: can write the page again") == 1


def test_the_checkpoint_of_a_step_is_saved_before_its_record(run, monkeypatch):
    def end_at_once(self):
        if self.trainer.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Run, "show", end_at_once)
    code, _, _ = run("--version", "a", "--total_step", 6, "--sample_step", 1, "--model_save_step", 3)
    assert code == 130 and saved() == [3]


def test_a_loader_process_that_is_killed_ends_the_run_after_saving(tmp_path, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    flags = ("--dataset", "folder", "--image_path", pictures, "--cache", "off", "--num_workers", 1)
    running = Launched(*ENDLESS, *flags)
    running.wait_for("logs/a/metrics.jsonl")
    workers = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    assert workers
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert running.wait() == 3
    (step,) = saved()
    assert f"step {step} is saved in models/a" in running.out.read_text()
    assert "--num_workers" in running.err.read_text() and "Traceback" not in running.err.read_text()


def test_a_picture_that_is_deleted_ends_the_run_after_saving_and_it_goes_on_without(run, pictures):
    flags = ("--dataset", "folder", "--image_path", pictures, "--cache", "off", "--version", "a", "--log_step", 1,
             "--sample_step", 100)

    def delete(self, stats, add=loop.Window.add):
        add(self, stats)
        for path in pictures.glob("[0-5].png") if self.steps == 1 and Path("logs/a/metrics.jsonl").exists() else ():
            path.unlink()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.Window, "add", delete)
        code, out, err = run(*flags, "--total_step", 100)
    assert code == 3 and str(pictures) in err and len(saved()) == 1, err
    assert f"step {saved()[0]} is saved" in out
    code, _, err = run(*flags, "--total_step", saved()[0] + 2)
    assert code == 0, err


def test_an_unexpected_exception_between_steps_is_shown_after_saving(run, monkeypatch):
    due = loop.Run.due

    def fail(self):
        if self.trainer.step == 3:
            raise ZeroDivisionError("unexpected")
        return due(self)

    monkeypatch.setattr(loop.Run, "due", fail)
    with pytest.raises(ZeroDivisionError):
        run("--version", "a", "--total_step", 9)
    assert saved() == [3]
    monkeypatch.undo()


# ------------------------------------------------------------------ B. state is checked for what it says


def other_states(good):
    """{kind: what a checkpoint of this name may hold instead of ours}."""
    without = {key: value for key, value in good.items() if key != "samples_seen"}
    larger = {**good, "G": {name: torch.cat([tensor, tensor]) if tensor.ndim else tensor
                            for name, tensor in good["G"].items()}}
    return {
        "a list": [1, 2], "an empty dict": {}, "a missing key": without, "a step in words": {**good, "step": "6"},
        "another size": larger, "another network": {**good, "D": {"weight": torch.ones(3)}},
        "the published layout": {"g": good["G"], "d": good["D"], "g_ema": good["G_ema"], "opt_g": {}, "opt_d": {}},
        "no tensors": {**good, "G": dict.fromkeys(good["G"], 1.0)},
    }


class Harm:
    """What a malicious file asks unpickling to do."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_files_that_are_no_checkpoints_of_ours_are_passed_over_in_a_line_each_and_without_another_end_it_with_5(run):
    """What torch advises for a malicious one is never passed on."""
    run("--version", "a", "--total_step", 2)
    good = state("a", 2)
    others = {f"{step:07}.pth": other for step, other in enumerate(other_states(good).values(), 4)}
    for name, other in {**others, "0000099.pth": {**good, "config": Harm()}}.items():
        torch.save(other, f"models/a/{name}")
    code, out, err = run("--version", "a", "--total_step", 3)
    assert code == 0 and "resuming 'a' from step 2" in out and out.count("warning:") == len(others) + 1, err
    assert [name for name in others if out.count(f"{name} is no checkpoint of this run (") != 1] == []
    assert "0000099.pth holds other objects" in out and "weights_only" not in out and saved() == [2, 3]
    moved = list(Path("models/a/superseded").iterdir())
    assert {path.name for path in moved} == {*others, "0000099.pth"}
    for step in (2, 3):
        os.remove(f"models/a/{step:07}.pth")
    for path in moved:
        os.replace(path, Path("models/a", path.name))
    for flags in (("--total_step", 3), ("--train", "false")):
        code, out, err = run("--version", "a", *flags)
        assert code == 5 and len(err.strip().splitlines()) == 2 and "weights_only" not in out + err, err
    assert not Path("harmed").exists()


def test_a_config_json_that_is_none_is_read_from_the_checkpoint(run):
    run("--version", "a", "--total_step", 2)
    config, drawn = Path("models/a/config.json"), Path("samples/a/0000002_generated_seed0")

    def assert_it_samples():
        code, _, err = run("--version", "a", "--train", "false", "--device", "cpu", "--num_samples", 2, tiny=False)
        assert code == 0 and len(list(drawn.iterdir())) == 2, err
        shutil.rmtree(drawn)

    for data in (b"[1]", b"[" * 200_000, b"\xff\xfe"):
        config.write_bytes(data)
        assert_it_samples()
    config.unlink()
    assert_it_samples()
    config.mkdir()
    assert_it_samples()


def test_a_checkpoint_that_is_pruned_while_it_is_listed_is_no_damage(run, monkeypatch):
    run("--version", "a", "--total_step", 2, "--model_save_step", 1)
    load = checkpoint.load

    def prune_first(path):
        if Path(path).name == "0000002.pth" and Path(path).exists():
            os.rename(path, "models/a/0000003.pth")         # as a training that goes on meanwhile does
        return load(path)

    monkeypatch.setattr(checkpoint, "load", prune_first)
    code, out, err = run("--version", "a", "--train", "false", "--num_samples", 1)
    assert code == 0 and "warning" not in out + err, err


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(run, monkeypatch):
    """Else the run would go on from an older one, and train again what is there."""
    def away(path, *_, read=zipfile.ZipFile):
        if Path(path).name == "0000002.pth":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    def no_memory(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ...")

    run("--version", "a", "--total_step", 2, "--model_save_step", 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.zipfile, "ZipFile", away)
        code, out, err = run("--version", "a", "--total_step", 3)
        assert code == 5 and "cannot read models/a/0000002.pth (Permission denied)" in err and "damaged" not in out
        assert "--pretrained_model STEP" in err and run("--version", "a", "--dry_run", "--pretrained_model", 1)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", no_memory)
        code, out, err = run("--version", "a", "--total_step", 3)
        assert code == 5 and "not enough memory to read models/a/0000002.pth" in err and "damaged" not in out + err
    assert saved() == [1, 2] and not Path("models/a/superseded").exists()


def test_checkpoints_that_are_links_to_what_is_not_there_are_said(run):
    os.makedirs("models/a")
    for name in ("0000005.pth", "00001000.pth"):            # the second one is no name of ours
        os.symlink("missing", Path("models/a", name))
    assert checkpoint.steps_in("models/a") == [5]
    code, _, err = run("--version", "a")
    assert code == 5 and "models/a/0000005.pth is listed, but not there" in err


# ----------------------------------------------------------------------------------- C. not finite, and unhealthy


def test_infinite_moments_of_adam_end_the_run_before_they_are_saved(run):
    code, _, err = run("--version", "a", "--adv_loss", "wgan-gp", "--lambda_gp", "1e22", "--total_step", 30,
                       "--model_save_step", 5)
    assert code == 4 and "became NaN or infinite" in err and saved() == []


def test_what_goes_wrong_in_training_is_warned_of_once_with_what_to_try(capsys):
    health, images = Health(), torch.rand(8, 3, 4, 4)
    fine = {"real": torch.tensor([1.0, 2.0]), "fake": torch.tensor([-1.0, -2.0]), "heldout": torch.tensor([0.9, 2.0])}
    dead = {name: torch.full((2,), 0.25) for name in fine}
    memorized = {**fine, "heldout": torch.tensor([-1.0, -2.0])}
    collapsed = images[:1].expand(8, -1, -1, -1)
    health.check(499, collapsed, images, dead)
    assert health.check(500, images, images, fine) == {"d_heldout": pytest.approx(1.45), "d_trained": 1.5}
    assert capsys.readouterr().out == ""
    for _ in range(2):
        health.check(500, collapsed, images, dead)
        health.check(600, images, images, memorized)
    warnings = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in warnings] == ["step 500", "step 500", "step 600"]
    words = (("same logit", "--d_lr"), ("mode collapse", "--g_lr"), ("memorized", "--augment"))
    assert all(cause in line and cure in line for line, (cause, cure) in zip(warnings, words, strict=True))


def test_a_d_that_tells_nothing_for_long_is_warned_of(run, monkeypatch, capsys):
    health = Health()
    for step in range(10, 5000, 10):
        health.watch(step, {"d_real": 0.3, "d_fake": 0.2})
    assert capsys.readouterr().out == ""
    health = Health()
    for step in range(0, 5000, 10):
        health.watch(step, {"d_real": 0.3 + step % 20, "d_fake": 0.28 + step % 20})
    assert capsys.readouterr().out.count("warning: step 1000: D has not told real from fake images for 1000 steps") == 1
    for name, value in {"OVER": 2, "GAP": math.inf, "FROM": 0}.items():
        monkeypatch.setattr(Health, name, value)
    _, out, _ = run("--version", "a", "--total_step", 6, "--log_step", 1)
    assert out.count("not told real from fake images for 2 steps") == 1 and "--d_iters 2" in out


def test_held_out_pictures_give_ds_logits_a_curve(run, pictures):
    run("--version", "a", "--dataset", "folder", "--image_path", pictures, "--holdout", 0.2, "--total_step", 1)
    assert all({"d_heldout", "d_trained"} <= line.keys() for line in lines("a"))


# ----------------------------------------------------------------------------------------- D. requests to end


@pytest.mark.parametrize("name", [
    "SIGINT", *(pytest.param(name, marks=pytest.mark.soak) for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"))])
def test_a_request_to_end_saves_first_and_the_page_says_that_it_was_interrupted(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    running = Launched(*ENDLESS)
    running.wait_for("logs/a/metrics.jsonl")
    assert embedded(Path("samples/a/index.html"), "summary")["live"]["state"] == "running"
    number = getattr(signal, name)
    os.kill(running.pid, number)
    os.kill(running.pid, number)                            # a forwarded copy
    assert running.wait(10) == 128 + number
    assert len(saved()) == 1 and "Traceback" not in running.err.read_text()
    assert running.err.read_text().count("finishing this step and saving") == 1
    assert embedded(Path("samples/a/index.html"), "summary")["live"]["state"] == "interrupted"


def test_a_second_ctrl_c_after_some_seconds_ends_at_once_and_says_what_it_costs():
    with Interrupt() as interrupt, interrupt.deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)                  # a copy, as job schedulers send
        interrupt._since -= 6
        with pytest.raises(KeyboardInterrupt, match="since the last checkpoint is not saved"):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_every_request_to_end_is_only_noted_during_a_step(name):
    number, before = getattr(signal, name), signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)            # ignored where the tests themselves run under nohup
    try:
        with Interrupt() as interrupt, interrupt.deferred():
            signal.raise_signal(number)
            assert interrupt.signal == number
    finally:
        signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_terminal_that_goes_away_ends_nothing_and_sigterm_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "nohup.py"
    script.write_text("import runpy, signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
                      f"runpy.run_path({MAIN!r}, run_name='__main__')\n")
    running = Launched(*ENDLESS, script=script)
    running.wait_for("logs/a/metrics.jsonl")
    for number in (signal.SIGHUP, signal.SIGTERM):          # the first request to end would decide the exit code
        os.kill(running.pid, number)
    assert running.wait(10) == 143 and len(saved()) == 1


@pytest.mark.parametrize("after", [pytest.param(0.05, marks=pytest.mark.soak), 1.0])
def test_before_training_a_request_is_answered_within_5_seconds(tmp_path, after):
    """While the program imports, checks its data, or starts."""
    process = subprocess.Popen([sys.executable, MAIN, *map(str, ENDLESS)], cwd=tmp_path, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    time.sleep(after)
    process.terminate()
    began = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert process.returncode in (143, -signal.SIGTERM) and "Traceback" not in err, err
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("ends_in", [AttributeError("module 'numpy' has no attribute 'subtract'"), None])
def test_a_request_that_an_import_swallows_is_answered_all_the_same(run, monkeypatch, ends_in):
    """As torch's import does with what is raised in numpy's, which is half imported then."""
    parse = parameter.parse

    def swallow(argv):
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        if ends_in:
            raise ends_in
        return parse(argv)

    monkeypatch.setattr(parameter, "parse", swallow)
    code, out, err = run("--total_step", 1)
    assert code == 143 and err == "interrupted\n" and not Path("models").exists()


# ------------------------------------------------------------------------------------------ E. what a run owns


def test_a_second_run_into_any_of_its_folders_is_turned_away_by_name(run, tmp_path):
    running = Launched(*ENDLESS, "--sample_path", "shared")
    running.wait_for("logs/a/metrics.jsonl")
    code, _, err = run("--version", "a", "--sample_path", "shared", "--model_save_path", "m", "--log_path", "l")
    assert code == 6 and f"process {running.pid} on {os.uname().nodename} writes into shared/a" in err
    os.kill(running.pid, signal.SIGKILL)
    running.process.join()
    code, _, err = run("--version", "a", "--sample_path", "shared", "--total_step", 1)
    assert code == 0, "the lock ends with its process"


def test_a_file_system_without_locks_gets_one_warning(run, monkeypatch):
    from storage import folders

    def refuse(*_):
        raise OSError(number, "No locks available")

    number = errno.ENOLCK
    monkeypatch.setattr(folders.fcntl, "lockf", refuse)
    code, out, _ = run("--version", "a", "--total_step", 1)
    assert code == 0 and out.count("has no locks") == 1
    number = errno.EIO                                      # whatever says anything but that another holds it
    assert folders.FolderLock(["models/a"], "--version a").unsupported == Path("models/a")


def a_dead_process():
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_leftovers_of_a_killed_run_go_at_the_next_start_and_damaged_lines_of_its_log_with_a_word(run):
    run("--version", "a", "--total_step", 1, "--log_step", 1)
    dead = a_dead_process()
    here = utils._machine()
    gone = [Path(path) for path in (
        f"models/a/.0000001.pth.{here}-{dead}.tmp", f"models/a/.0000001.pth.{dead}.tmp",    # of older programs
        f"samples/.index.html.{here}-{dead}.tmp", f"logs/.scores.md.{here}-{dead}.tmp")]
    others = [Path(f"samples/.rsync.{dead}.tmp"), Path(f"samples/.index.html.{dead}.txt")]      # of other programs
    stay = [Path("models/a", f".0000001.pth.{writer}.tmp") for writer in (
        f"{here}-{os.getpid()}", f"01234567-{dead}", "x")]      # alive, elsewhere, not ours
    stay += others
    for path in (*gone, *stay):
        path.write_bytes(b"part")
    with open("logs/a/metrics.jsonl", "ab") as file:
        file.write(b'{"step": 1, "\xff\xfe": 1}\n' + b"[" * 200_000 + b"\n" + b"null\n")
    code, out, err = run("--version", "a", "--total_step", 2, "--log_step", 1)
    assert [path for path in gone if path.exists()] == [] and all(path.exists() for path in stay)
    assert code == 0 and "3 damaged lines dropped" in out, err
    assert [line["step"] for line in lines("a")] == [1, 2]


def test_leftovers_go_with_the_next_write_of_their_file_and_pictures_do_not_list_their_folder(tmp_path, monkeypatch):
    dead = a_dead_process()
    for name in ("[1].pt", "1.pt"):
        (tmp_path / f".{name}.{utils._machine()}-{dead}.tmp").write_bytes(b"part")
    utils.write_atomically(tmp_path / "[1].pt", lambda path: path.write_bytes(b"whole"))
    assert {path.name for path in tmp_path.iterdir()} == {"[1].pt", f".1.pt.{utils._machine()}-{dead}.tmp"}
    monkeypatch.setattr(utils, "remove_leftovers", None)
    grid.save_grid(torch.zeros(1, 3, 8, 8), tmp_path / "0000100_fake.png")


# --------------------------------------------------------------------------- killed between a checkpoint and its record


def without_times(lines):
    return [{name: value for name, value in line.items() if name not in ("sec_per_step", "images_per_sec")}
            for line in lines]


@pytest.mark.parametrize("total", [4, pytest.param(6, marks=pytest.mark.soak)])
def test_what_a_killed_run_had_not_written_for_its_last_step_is_written_later(run, total, pictures, monkeypatch):
    """Of a run that has steps left, and of one that was killed at its end."""
    monkeypatch.setattr(swd, "sliced_wasserstein", small_swd)
    flags = ("--version", "a", "--dataset", "folder", "--image_path", pictures, "--log_step", 2, "--sample_step", 4,
             "--model_save_step", 4, "--metrics", "swd", "--metric_step", 4, "--num_eval", 4)
    run(*flags, "--total_step", 4)
    grid, logged = Path("samples/a/0000004_fake.png"), Path("logs/a/metrics.jsonl")
    before, shown = lines("a"), grid.read_bytes()
    assert [line["step"] for line in before] == [2, 4, 4] and "swd" in before[2]
    for picture in Path("samples/a").glob("0000004_*"):
        picture.unlink()
    logged.write_text(logged.read_text().splitlines(keepends=True)[0])
    code, out, _ = run(*flags, "--total_step", total)
    assert code == 0 and "resuming 'a' from step 4" in out
    assert Path("samples/a/0000004_attn_g8.png").exists()
    assert grid.read_bytes() == shown and without_times(lines("a"))[:3] == without_times(before)
    left = Path(f"samples/.index.html.{utils._machine()}-{a_dead_process()}.tmp")
    last_page = Path("samples/a/index.html")
    finished = last_page.read_text()
    now = f'"step":{total}'
    last_page.write_text(finished.replace(now, '"step":2'))                # killed before its last page
    left.write_text("part")
    code, out, _ = run(*flags, "--total_step", total)
    assert code == 0 and "nothing to do" in out
    assert last_page.read_text().count(now) == finished.count(now) > 0 and not left.exists()


@pytest.mark.soak
def test_a_log_line_covers_all_steps_since_the_last_one_wherever_the_run_was_resumed(run):
    def logged(version, *totals, log_step=4):
        for total in totals:
            run("--version", version, "--total_step", total, "--log_step", log_step, "--sample_step", 100)
        return {line["step"]: [line[name] for name in ("d_loss", "g_loss", "d_real")] for line in lines(version)}

    each = logged("each", 8, log_step=1)
    for number, totals in enumerate([(3, 6, 8), (4, 7, 8)]):        # between two lines, and at one
        before = 0
        for step, values in logged(f"parts{number}", *totals).items():
            mean = torch.tensor([each[one] for one in range(before + 1, step + 1)]).mean(0)
            assert values == pytest.approx(mean.tolist(), abs=1e-6), (totals, step)
            before = step


@pytest.mark.soak
def test_a_checkpoint_whose_log_statistics_are_damaged_is_used_without_them(run):
    flags = ("--version", "a", "--log_step", 2, "--sample_step", 100)
    run(*flags, "--total_step", 2)
    path, kept = Path("models/a/0000002.pth"), state("a", 2)
    good = {"sums": {"d_loss": 1.0, "g_loss": 1.0}, "steps": 2, "seconds": 1.0}
    for number, damage in enumerate(({}, {"steps": 2}, {**good, "sums": [1]}, {**good, "sums": {"d_loss": "a"}},
                                     {**good, "sums": {"d_loss": float("nan"), "g_loss": 1.0}}, {**good, "steps": 0})):
        torch.save({**kept, "unlogged": damage}, path)
        Path("logs/a/metrics.jsonl").unlink()
        code, _, err = run(*flags, "--total_step", 3 + number)
        assert code == 0, err
        assert all(np.isfinite(line["d_loss"]) for line in lines("a"))


def test_a_fresh_start_sets_an_older_runs_records_aside(run):
    run("--version", "a", "--total_step", 2)
    shutil.rmtree("models")
    Path("logs/a/wandb_id").write_text("of the older run")
    score_table.record("logs", score_table.as_entries("a", 2, [score_table.Score({"fid": 7.0}, "p", "s")]))
    code, out, _ = run("--version", "a", "--total_step", 1)
    assert not Path("logs/a/wandb_id").exists() and "| a " not in Path("logs/scores.md").read_text()
    assert code == 0 and "starting 'a'" in out and "records of an older run" in out
    shown = {path.name[:7] for path in Path("samples/a").glob("*_fake.png")}
    assert shown == {"0000001"} and Path("samples/a/superseded/0000002_fake.png").exists()


def test_restart_moves_the_old_run_aside_and_begins_again(run):
    """What says that it was killed in the midst of this is not believed where it would cost a run."""
    flags = ("--version", "a", "--g_conv_dim", 8)
    run("--version", "a", "--total_step", 2, "--seed", 1)
    old, moving = state("a", 2), Path("models/.a.moving")
    score_table.record("logs", score_table.as_entries("a", 2, [score_table.Score({"fid": 7.0}, "p", "s")]))
    code, out, _ = run(*flags, "--total_step", 2, "--restart", "true")
    assert code == 0 and "the run 'a' is now called 'a.old1'" in out and "starting 'a'" in out
    assert "| a.old1 | " in Path("logs/scores.md").read_text()
    assert saved() == [2] and Path("samples/a.old1/index.html").exists() and Path("logs/a.old1/metrics.jsonl").exists()
    code, _, err = run("--version", "a.old1", "--train", "false", "--num_samples", 1, "--device", "cpu", tiny=False)
    assert code == 0 and json.loads(Path("models/a/config.json").read_text())["g_conv_dim"] == 8, err
    new = state("a", 2)
    for text in ("1", "-3", "99999999999999999999999", "one"):
        moving.write_text(text)
        code, out, err = run(*flags, "--total_step", 2)
        assert code == 0 and "nothing to do" in out, err
    code, out, err = run(*flags, "--total_step", 1, "--restart", "true")
    assert code == 0 and "the run 'a' is now called 'a.old2'" in out, err
    assert_same_state(old, state("a.old1", 2))
    assert_same_state(new, state("a.old2", 2))
    moving.write_text("3")
    code, _, err = run(*flags, "--total_step", 3, "--pretrained_model", 1)
    assert code == 2 and "--pretrained_model 1" in err and "models/.a.moving" in err and saved() == [1]


@pytest.mark.parametrize(("moved", "flags"), [(1, ("--restart", "true")), (3, ())])
def test_a_restart_that_was_killed_between_two_folders_is_gone_on_with(run, monkeypatch, moved, flags):
    run("--version", "a", "--total_step", 2, "--seed", 1)
    old = state("a", 2)
    left = [moved]

    def move(path, target, replace=os.replace):
        if ".old" in str(target):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        replace(path, target)

    def keep(path, unlink=Path.unlink, **missing):
        if path.name.endswith(".moving"):
            raise KeyboardInterrupt
        unlink(path, **missing)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", move)
        patched.setattr(Path, "unlink", keep)
        assert run("--version", "a", "--total_step", 1, "--restart", "true")[0] == 130
    code, out, err = run("--version", "a", "--total_step", 1, *flags)
    assert code == 0 and "the run 'a' is now called 'a.old1'" in out and "starting 'a'" in out, err
    assert saved() == [1] and sorted(os.listdir("models")) == ["a", "a.old1"]
    assert_same_state(old, state("a.old1", 2))
    for folder, name in (("samples", "0000002_fake.png"), ("logs", "metrics.jsonl"), ("models", "0000002.pth")):
        assert Path(folder, "a.old1", name).exists() and not Path(folder, "a.old2").exists()


# --------------------------------------------------------------------------------- F. what a run is trained on


def test_what_changed_since_the_checkpoint_is_said_and_other_pictures_are_refused(run, pictures, tmp_path):
    flags = ("--version", "a", "--dataset", "folder", "--image_path")
    run(*flags, pictures, "--total_step", 1)
    code, out, _ = run(*flags, pictures, "--total_step", 2)
    assert code == 0 and "12 pictures in" in out and "were" not in out
    (pictures / "0.png").unlink()
    (pictures / "1.png").rename(pictures / "new.png")
    code, out, _ = run(*flags, pictures, "--total_step", 3)
    assert code == 0 and "note: 11 pictures, were 12: 1 added, 2 gone" in out
    other = tmp_path / "other"
    other.mkdir()
    for number in range(5):
        shutil.copy(pictures / "2.png", other / f"x{number}.png")
    code, _, err = run(*flags, other, "--total_step", 4)
    assert code == 2 and "5 pictures, were 11" in err and "--restart true" in err and saved() == [1, 2, 3]
    code, out, err = run(*flags, other, "--total_step", 1, "--restart", "true")
    assert code == 0 and saved() == [1], err
