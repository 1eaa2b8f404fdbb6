"""Nothing is written before all that can be refused is refused: every refusal leaves the disk as it was, caches apart.

A cache costs time if it is lost, and does no harm if it is there: that of decoded pictures, and those in --cache_path.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import MAIN, TINY, TINY_OF_ANY, fill, two_processes

import main
import parameter
import start
from errors import Failure
from pretrained import vgg
from storage import checkpoint

RUN = ("--dataset", "folder", "--image_path", "pictures", "--version", "a", "--total_step", "4")
FOLDER = (*TINY, "--g_attn", "none", *RUN)
MEASURING = ("--metric_step", "1", "--metrics")


def snapshot():
    """{path: hash of the content, None for what is no file} of all that is here, caches apart."""
    paths = [path for path in Path().rglob("*") if not {"cache", ".decoded"} & set(path.parts)]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None for path in paths}


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A folder with 12 pictures and, in `trained`, also a run 'a' of two steps on them."""
    home = tmp_path_factory.mktemp("before")
    fill(home / "pictures", 12)
    shutil.copytree(home, home / "trained")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(home / "trained")
        assert main.main([*FOLDER, "--total_step", "2", "--sample_step", "1"]) == 0
    return home


@pytest.fixture
def refused(before, run, tmp_path, monkeypatch):
    """refused(start, refusal, *flags): the command with these flags ends as the Refusal says, and changes nothing."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def check(start, refusal, *flags):
        shutil.copytree(before / start, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("trained"))
        if refusal.spoil:
            refusal.spoil(monkeypatch)
        there = snapshot()
        code, _, err = run(*flags, *refusal.flags, tiny=False)
        words = (refusal.words,) if isinstance(refusal.words, str) else refusal.words
        assert code == refusal.code and all(word in err for word in words) and "Traceback" not in err, err
        assert snapshot() == there

    return check


# ---- what can be wrong ----


@dataclass
class Refusal:
    """Flags that end a command with this exit code and these words, after `spoil(monkeypatch)`."""

    flags: tuple
    code: int
    words: str | tuple
    spoil: Callable | None = None


def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def no_memory(monkeypatch):
    def refuse(*_, **__):
        raise MemoryError

    monkeypatch.setattr(start, "Trainer", refuse)


def without(module):
    return lambda monkeypatch: monkeypatch.setitem(sys.modules, module, None)


def damaged_weights(monkeypatch):
    path = Path("data/VGG16/vgg16-397923af.pth")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"<html>")


def other_weights(monkeypatch):
    torch.save({"weight": torch.ones(3)}, "w.pth")


def infinite_weights(monkeypatch):
    weights = vgg.load_vgg("random", "").state_dict()
    torch.save({name: torch.full_like(weight, torch.inf) for name, weight in weights.items()}, "w.pth")


def a_bad_picture(monkeypatch):
    fill(Path("pictures"), 20)
    Path("pictures/019.png").write_bytes(b"<html>")


def few_pictures(monkeypatch):
    fill(Path("few"), 6)


def one_picture(monkeypatch):
    fill(Path("few"), 1)


def no_pictures(monkeypatch):
    shutil.rmtree("pictures")


def other_pictures(monkeypatch):
    shutil.rmtree("pictures")
    fill(Path("pictures/deep"), 12)


def file_in_the_way(monkeypatch):
    Path("way").write_text("mine")


def link_to_nothing(monkeypatch):
    Path("samples").mkdir(exist_ok=True)
    shutil.rmtree("samples/a", ignore_errors=True)
    Path("samples/a").symlink_to("nowhere")


def read_only(monkeypatch):
    Path("locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "locked")


def other_network(monkeypatch):
    state = checkpoint.load("models/a/0000002.pth")
    torch.save({**state, "D": {"weight": torch.ones(3)}}, "models/a/0000002.pth")


def cut(monkeypatch):
    Path("models/a/0000002.pth").write_bytes(b"PK")


BEGINNING = {
    "no pictures": Refusal(("--image_path", "nowhere"), 3, "there is no folder nowhere"),
    "no CelebA": Refusal(("--dataset", "celeb"), 3, "bash download.sh CelebA"),
    "a large batch": Refusal(("--batch_size", "13"), 3, "--batch_size 13 is more than the 12 pictures"),
    "a batch of all, one bad": Refusal(("--batch_size", "20"), 3, "than the 19 usable of 20", a_bad_picture),
    "a large holdout": Refusal(("--batch_size", "10", "--holdout", "0.4"), 3, "--batch_size 10 is more than the 7"),
    "all held out": Refusal(("--image_path", "few", "--batch_size", "1", "--holdout", "0.5"), 3,
                            "--holdout 0.5 leaves no picture", one_picture),
    "few for the metrics": Refusal(("--image_path", "few", "--batch_size", "1", "--holdout", "0.5", *MEASURING, "pr"),
                                   3, "3 real pictures: --metrics pr needs at least 6", few_pictures),
    "few samples": Refusal((*MEASURING, "pr", "--num_eval", "3"), 2, "--num_eval 3: --metrics pr needs"),
    "no Inception": Refusal((*MEASURING, "fid"), 3, ("error: --inception_weights standard: ", "no network",
                                                     "`bash download.sh Inception`", "--metrics swd"), no_network),
    "no VGG-16": Refusal((*MEASURING, "fid", "--feature_net", "vgg16"), 3, "bash download.sh VGG16", no_network),
    "no CLIP": Refusal((*MEASURING, "fid", "--feature_net", "clip"), 3, "--feature_net vgg16 --vgg_weights",
                       no_network),
    "Inception Score of VGG-16": Refusal((*MEASURING, "fid,is", "--feature_net", "vgg16"), 2,
                                         "--metrics fid,is: the Inception Score needs --feature_net inception"),
    "no features": Refusal((*MEASURING, "swd", "--feature_net", "vgg16"), 2, "no effect with --metrics swd"),
    "Inception's weights for VGG-16": Refusal((*MEASURING, "fid", "--feature_net", "vgg16", "--inception_weights", "w"),
                                              2, "no effect with --feature_net vgg16"),
    "no file of Inception": Refusal((*MEASURING, "fid", "--inception_weights", "w"), 2, "--inception_weights w:"),
    "no Inception in it": Refusal((*MEASURING, "fid", "--inception_weights", "w.pth"), 3, "this is not torch-fid",
                                  other_weights),
    "no torch-fidelity": Refusal((*MEASURING, "fid"), 2, "pip install torch-fidelity",
                                 without("torch_fidelity.feature_extractor_inceptionv3")),
    "no memory": Refusal((), 1, "out of memory on this machine: lower", no_memory),
    "a file for samples": Refusal(("--sample_path", "way"), 5, ("error: way/a: Not a directory", "set other --sample_"),
                                  file_in_the_way),
    "a file for checkpoints": Refusal(("--model_save_path", "way/m"), 5, "way/m/a: Not a directory", file_in_the_way),
    "a link to nothing": Refusal((), 5, "samples/a: Not a directory", link_to_nothing),
    "a folder that is read-only": Refusal(("--log_path", "locked/l"), 5, "locked/l/a: cannot be written", read_only),
    "a long path": Refusal(("--attn_path", "/".join(["x" * 200] * 25)), 5, "File name too long"),
    "a cache that cannot be": Refusal(("--cache", "on", "--cache_dir", "way"), 5, "--cache on", file_in_the_way),
    "a start from a step": Refusal(("--restart", "true", "--pretrained_model", "2"), 2, "leave one out"),
}
FASTGAN = (*TINY_OF_ANY, *RUN, "--model", "fastgan", "--imsize", "64")
BEGINNING_FASTGAN = {
    "no VGG-16 for metadata": Refusal(("--recon", "l1"), 3, ("bash download.sh VGG16", "--metadata false",
                                                             "no network"), no_network),
    "no VGG-16 for LPIPS": Refusal(("--metadata", "false", "--recon", "lpips"), 3,
                                   ("bash download.sh VGG16", "--recon l1"), no_network),
    "a damaged VGG-16": Refusal((), 3, "is damaged or another file", damaged_weights),
    "no file of VGG-16": Refusal(("--vgg_weights", "w"), 2, "--vgg_weights w: cannot be read"),
    "no VGG-16 in it": Refusal(("--vgg_weights", "w.pth"), 3, "this is not torchvision's vgg16", other_weights),
    "infinite weights": Refusal(("--recon", "l1", "--vgg_weights", "w.pth"), 3, "are not finite", infinite_weights),
    "no torchmetrics": Refusal(("--metadata", "false", "--recon", "lpips", "--vgg_weights", "random"), 2,
                               "pip install torchmetrics", without("torchmetrics.functional.image.lpips")),
}
RESUMING = {
    "no such step": Refusal(("--pretrained_model", "7"), 5, "--pretrained_model 7: no such checkpoint"),
    "no best": Refusal(("--pretrained_model", "best"), 5, "--pretrained_model best: there is no"),
    "other networks": Refusal((), 5, "no checkpoint in models/a can be used", other_network),
    "a damaged checkpoint": Refusal((), 5, "no checkpoint in models/a can be used", cut),
    "other pictures": Refusal((), 2, "this run was trained on other pictures", other_pictures),
    "another size": Refusal(("--imsize", "64"), 2, "--imsize 64: run 'a' was started with 32"),
} | {name: BEGINNING[name] for name in ("no pictures", "no memory", "a folder that is read-only")}
SAMPLING = {
    "no such run": Refusal(("--version", "b"), 2, "--version b: there is no such run in models; there are a"),
    "no such step": Refusal(("--pretrained_model", "7"), 5, "--pretrained_model 7: no such checkpoint"),
    "other networks": Refusal((), 5, "no checkpoint in models/a can be used", other_network),
    "a damaged checkpoint": Refusal((), 5, "no checkpoint in models/a can be used", cut),
    "a restart": Refusal(("--restart", "true"), 2, "--restart true: is for training"),
    "a file for samples": Refusal(("--sample_path", "way"), 5, "way/a: Not a directory", file_in_the_way),
}
EVALUATING = {name: SAMPLING[name] for name in ("a damaged checkpoint", "a file for samples")} | {
    "no Inception": Refusal(("--metrics", "swd,fid"), 3, "bash download.sh Inception", no_network),
    "no VGG-16": Refusal(("--metrics", "swd,nearest"), 3, "bash download.sh VGG16", no_network),
    "no pictures": Refusal(("--metrics", "swd"), 3, "there is no folder pictures", no_pictures),
    "no pictures to hold out": Refusal(("--metrics", "swd,lpips", "--real_dir", "few", "--vgg_weights", "random"), 3,
                                       "there is no folder pictures", lambda _: [few_pictures(_), no_pictures(_)]),
    "few pictures": Refusal(("--metrics", "swd,nearest", "--real_dir", "few", "--vgg_weights", "random"), 3,
                            "1 real picture: --metrics nearest needs at least 2", one_picture),
    "few samples": Refusal(("--metrics", "swd,pr", "--num_eval", "3"), 2, "--num_eval 3: --metrics pr needs"),
    "a file for logs": Refusal(("--metrics", "swd", "--log_path", "way"), 5, "way/a: Not a directory", file_in_the_way),
}


@pytest.mark.parametrize("name", ["no pictures", "no Inception", "no memory", "a file for checkpoints",
                                  "a link to nothing", "a batch of all, one bad"])
def test_a_new_run_that_is_refused_leaves_nothing(refused, name):
    refused("", BEGINNING[name], *FOLDER)


@pytest.mark.parametrize("name", BEGINNING)
def test_a_restart_that_is_refused_leaves_the_old_run_in_place_and_makes_no_folder(refused, name):
    refused("trained", BEGINNING[name], *FOLDER, "--restart", "true", "--attn_path", "elsewhere")


@pytest.mark.parametrize("name", BEGINNING_FASTGAN)
def test_missing_weights_leave_an_old_run_in_place(refused, name):
    refused("trained", BEGINNING_FASTGAN[name], *FASTGAN, "--restart", "true")


@pytest.mark.parametrize("name", RESUMING)
def test_a_run_that_cannot_go_on_stays_as_it_is(refused, name):
    refused("trained", RESUMING[name], *FOLDER)


def test_a_run_that_would_go_on_as_another_family_stays_as_it_is(refused):
    refused("trained", Refusal((), 2, "--model fastgan: run 'a' was started with sagan"), *FASTGAN)


@pytest.mark.parametrize(("mode", "name"), [*(("sample", name) for name in SAMPLING),
                                            ("interpolate", "a file for samples")])
def test_refused_sampling_writes_nothing(refused, mode, name):
    refused("trained", SAMPLING[name], "--version", "a", "--device", "cpu", "--mode", mode)


@pytest.mark.parametrize("name", EVALUATING)
def test_a_refused_evaluation_writes_nothing(refused, name):
    elsewhere = () if "--sample_path" in EVALUATING[name].flags else ("--sample_path", "elsewhere")
    refused("trained", EVALUATING[name], "--version", "a", "--device", "cpu", "--mode", "evaluate", *elsewhere)


class OutOfMemoryError(RuntimeError):
    """As torch's, of a GPU."""


@pytest.mark.parametrize(("mode", "error", "words"), [
    ("sample", OutOfMemoryError(), "the GPU: use --device cpu, or wait for what else uses it"),
    ("interpolate", MemoryError(), "this machine: wait for what else uses it"),
    ("evaluate", OutOfMemoryError(), "the GPU: use --device cpu, or wait for what else uses it, or give fewer "
                                     "--metrics, or another --feature_net"),
])
def test_without_memory_outside_training_what_helps_there_is_named(monkeypatch, mode, error, words):
    def fail(*_):
        raise error

    monkeypatch.setattr(main, "dispatch", fail)
    config = parameter.resolve({"mode": mode, "device": "cpu"})
    with pytest.raises(Failure) as failure:
        main.watched(config, None)
    assert str(failure.value) == f"out of memory on {words}"


# ---- what refuses by being there ----


@pytest.fixture
def trained(before, tmp_path, run):
    """The folder of the run 'a'; `run` works in it."""
    shutil.copytree(before / "trained", tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def hold():
    """hold(path) has another process lock a file until the test ends."""
    running = []
    script = ("import fcntl, sys; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, fcntl.LOCK_EX); print(); "
              "sys.stdout.flush(); sys.stdin.read()")

    def lock(path):
        running.append(subprocess.Popen([sys.executable, "-c", script, path], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE))
        running[-1].stdout.readline()

    yield lock
    for process in running:
        process.communicate()


def test_a_run_that_another_process_trains_is_left_alone(run, trained, hold):
    hold("models/a/.lock")
    there = snapshot()
    for flags in ((), ("--restart", "true"), ("--sample_path", "elsewhere"), ("--image_path", "nowhere")):
        code, _, err = run(*FOLDER, *flags, tiny=False)
        assert code == 6 and "writes into models/a; wait for it, or use another --version" in err
        assert snapshot() == there


@pytest.mark.parametrize("restart", ["true", "false"])
def test_a_run_that_another_process_trained_in_the_meantime_is_left_alone(run, trained, monkeypatch, restart):
    def train_first(*arguments):
        shutil.copy("models/a/0000002.pth", "models/a/0000003.pth")
        return build(*arguments)

    build = start.build_dataset
    monkeypatch.setattr(start, "build_dataset", train_first)
    code, _, err = run(*FOLDER, "--restart", restart, tiny=False)
    assert code == 6 and "another process has trained in the meantime; run the same command again" in err
    assert checkpoint.steps_in("models/a") == [2, 3] and not list(Path().rglob("superseded"))
    assert sorted(path.name for path in Path("models").iterdir()) == ["a"]


def test_where_one_folder_cannot_be_created_none_is(run, before, tmp_path, monkeypatch):
    shutil.copytree(before / "pictures", tmp_path / "pictures")
    there, make = snapshot(), Path.mkdir

    def refuse(path, *more, **options):
        if path.name == "logs":
            raise OSError(28, "No space left on device", str(path))
        make(path, *more, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, _, err = run(*FOLDER, "--cache", "off", "--check_data", "off", tiny=False)
    assert code == 5 and "error: logs: No space left on device" in err and snapshot() == there


def test_too_many_bad_pictures_leave_the_list_of_them_alone(run, trained):
    for number in range(3):
        Path("pictures", f"{number:03}.png").write_bytes(b"<html>")
    there = snapshot()
    code, _, err = run(*FOLDER, "--restart", "true", tiny=False)
    assert code == 3 and "3 of the 12 pictures in pictures cannot be used, all listed in logs/a/bad_images.jsonl" in err
    (new,) = snapshot().items() - there.items()
    assert new[0] == "logs/a/bad_images.jsonl"


def test_mp4_without_its_package_writes_nothing(run, trained, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "imageio_ffmpeg" else find(name))
    there = snapshot()
    code, _, err = run("--version", "a", "--mode", "interpolate", "--film", "mp4", "--device", "cpu", tiny=False)
    assert code == 2 and "pip install imageio-ffmpeg" in err and snapshot() == there


def test_restart_moves_a_run_aside_of_which_only_the_best_is_left(run, trained):
    os.rename("models/a/0000002.pth", "models/a/best.pth")
    code, out, err = run(*FOLDER, "--total_step", "1", "--restart", "true", tiny=False)
    assert code == 0 and "the run 'a' is now called 'a.old1'" in out and Path("models/a.old1/best.pth").exists(), err


@pytest.mark.slow
def test_two_ranks_refuse_alike_and_say_it_once(trained, hold):
    for flags, code, words in ((("--log_path", "pictures/000.png"), 5, "Not a directory"),
                               (("--batch_size", "14"), 3, "--batch_size 14 is more")):
        there = snapshot()
        done = two_processes(MAIN, *FOLDER, "--restart", "true", *flags)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert done.returncode == code and len(errors) == 1 and words in errors[0], done.stderr
        assert snapshot() == there
    hold("models/a/.lock")
    done = two_processes(MAIN, *FOLDER)
    assert done.returncode == 6 and done.stderr.count("writes into models/a") == 1 and snapshot() == there, done.stderr
