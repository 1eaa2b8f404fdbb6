"""The real command at a tiny size: its output files, exact resume, and exit codes."""

import errno
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    EVERY_ATTENTION,
    MAIN,
    TINY,
    SmallInception,
    assert_same_state,
    lines,
    state,
    torchrun,
    two_processes,
)
from PIL import Image

import loop
import main
import parameter
import trainer
from errors import CheckpointError
from flags import scores
from metrics import features, swd
from metrics.meter import Meter
from start import _has_begun
from storage import checkpoint, score_table


def test_a_run_writes_what_the_readme_promises(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, out, err = run("--version", "a", "--total_step", 4, "--sample_step", 2, "--log_step", 2,
                         "--model_save_step", 2, "--use_tensorboard", "true", *EVERY_ATTENTION)
    assert code == 0
    names = {f"{step:07d}_{kind}.png" for step in (2, 4)
             for kind in ("fake", "attn_g8", "attn_g16", "attn_d4", "attn_d8", "attn_d4_real", "attn_d8_real")}
    assert {path.name for path in Path("samples/a").glob("*.png")} == names | {"real.png"}
    assert "samples/a/index.html" in out
    newest = Path("samples/a/index.html").read_text()
    assert '"step":4,' in newest and '"d_loss"' in newest and '"g_lr":0.0001' in newest
    assert '"version":"a"' in Path("samples/index.html").read_text()
    for path in Path("samples/a").glob("*.png"):
        Image.open(path).load()
    assert Image.open("samples/a/0000004_fake.png").width >= 8 * 64, "8 x 8 faces, enlarged for the screen"
    assert sorted(os.listdir("models/a")) == [".lock", "0000002.pth", "0000004.pth", "config.json"]
    first, last = lines("a")
    assert (first["step"], last["step"]) == (2, 4)
    assert {"d_loss", "g_loss", "gamma/g8", "gamma/g16", "gamma/d4", "gamma/d8", "sec_per_step", "images_per_sec",
            "entropy/g8"} <= first.keys()
    assert 0 <= last["entropy/g16"] <= 1 and last["images_per_sec"] == pytest.approx(4 / last["sec_per_step"])
    events = EventAccumulator("logs/a").Reload()
    assert [event.value for event in events.Scalars("d_loss")] == pytest.approx([first["d_loss"], last["d_loss"]])
    assert [event.step for event in events.Scalars("gamma/g16")] == [2, 4]


def smallest_change(before, after):
    """The largest change within the kernel of a layer of G or D, of the layer where it is smallest."""
    return min((kernel - after[net][name]).abs().max() for net in "GD" for name, kernel in before[net].items()
               if kernel.ndim == 4)


@pytest.mark.parametrize("flags", [
    ("--num_workers", "2", "--hflip", "true", "--augment", "color,translation,cutout", *EVERY_ATTENTION),
    ("--adv_loss", "wgan-gp", "--d_iters", "2", "--lr_decay", "0.5", "--batch_size", "7"),
], ids=["hinge", "wgan-gp"])
def test_six_steps_are_three_and_three_bit_for_bit(run, pictures, flags):
    flags = ("--dataset", "folder", "--image_path", pictures, *flags)
    run("--version", "straight", "--total_step", 6, *flags)
    run("--version", "resumed", "--total_step", 3, *flags)
    code, out, _ = run("--version", "resumed", "--total_step", 6, *flags)
    assert code == 0 and "resuming 'resumed' from step 3" in out
    assert_same_state(state("straight", 6), state("resumed", 6))
    assert smallest_change(state("resumed", 3), state("resumed", 6)) > 0, "every layer learns"


@pytest.mark.parametrize(("first", "then"), [
    (("on", 2), ("off", 2)), *(pytest.param(first, then, marks=pytest.mark.soak) for first, then in (
        (("on", 2), ("on", 0)), (("off", 1), ("on", 0)), (("off", 1), ("off", 2))))])
def test_cache_and_workers_change_no_bit_nor_does_changing_them_on_the_way(run, pictures, first, then):
    flags = ("--dataset", "folder", "--image_path", pictures, "--hflip", "true", "--check_data", "header")

    def trained(version, steps, cache, workers):
        return run("--version", version, "--total_step", steps, "--cache", cache, "--num_workers", workers, *flags)

    trained("straight", 8, "off", 0)
    trained("resumed", 4, *first)                       # in the middle of an epoch of three steps
    code, out, _ = trained("resumed", 8, *then)
    assert code == 0 and "resuming 'resumed' from step 4" in out
    assert_same_state(state("straight", 8), state("resumed", 8))


@pytest.mark.gpu
def test_the_same_on_cuda(run):
    flags = ("--device", "cuda", "--deterministic", "true", "--imsize", "64", "--g_conv_dim", "16")
    run("--version", "straight", "--total_step", 6, *flags)
    run("--version", "resumed", "--total_step", 3, *flags)
    code, _, _ = run("--version", "resumed", "--total_step", 6, *flags)
    assert code == 0 and lines("resumed")[-1]["gpu_memory_gib"] > 0
    assert_same_state(state("straight", 6), state("resumed", 6))
    code, _, _ = run("--version", "straight", "--train", "false", "--device", "cuda", tiny=False)
    assert code == 0


@pytest.mark.parametrize(("preset", "told"), [("published", "the published settings are slow on a CPU"),
                                              ("cpu", None)])
def test_settings_that_are_slow_on_a_cpu_are_told(run, preset, told):
    _, out, _ = run("--preset", preset, "--version", "a", "--total_step", 1, "--sample_step", 5)
    assert told in out if told else "slow on a CPU" not in out


@pytest.mark.parametrize(("typed", "told"), [
    ({"preset": "small"}, None), ({"preset": "small", "imsize": 128}, None), ({"preset": "gpu"}, "--preset cpu"),
    ({"preset": "small", "model": "fastgan"}, None),
    ({"preset": "small", "model": "fastgan", "imsize": 128}, "at --imsize 128 .* without --imsize they are tuned")])
def test_of_a_preset_only_full_width_is_called_slow(typed, told):
    note = main._note_on_slow_settings(parameter.resolve({"vgg_weights": "random", **typed}))
    assert re.search(told, note) if told else note is None


def test_seeds_differ_and_the_same_seed_does_not(run):
    for version, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("--version", version, "--total_step", 2, "--seed", seed)
    assert_same_state(state("a", 2), state("b", 2))
    assert smallest_change(state("a", 2), state("c", 2)) > 0.01, "from the beginning on"
    assert not torch.equal(state("a", 2)["fixed_z"], state("c", 2)["fixed_z"])


def test_records_change_no_weight(run):
    run("--version", "quiet", "--total_step", 3)
    run("--version", "loud", "--total_step", 3, "--sample_step", 1, "--log_step", 1, "--model_save_step", 1)
    assert_same_state(state("quiet", 3), state("loud", 3))


def test_learning_rates_decay_by_epoch(run, pictures):
    run("--version", "a", "--total_step", 7, "--lr_decay", "0.5", "--dataset", "folder", "--image_path", pictures)
    # 12 pictures, batches of 4: steps 1-3 are epoch 0, 4-6 epoch 1, 7 epoch 2
    assert state("a", 7)["g_optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-4 * 0.25)
    assert lines("a")[-1]["epoch"] == pytest.approx(28 / 12)


def test_d_iters_counts_batches_and_gp_is_logged(run):
    run("--version", "a", "--total_step", 2, "--adv_loss", "wgan-gp", "--d_iters", 3, "--log_step", 1)
    saved = state("a", 2)
    assert saved["samples_seen"] == 2 * 3 * 4
    assert saved["d_optimizer"]["state"][0]["step"] == 6 and saved["g_optimizer"]["state"][0]["step"] == 2
    assert all(line["gp"] >= 0 for line in lines("a"))
    assert not any("parametrizations" in name for name in saved["D"]), "--sn auto: none for wgan-gp"


def test_spectral_norm_follows_the_flag(run):
    run("--version", "a", "--total_step", 1, "--sn", "g")
    saved = state("a", 1)
    assert any("parametrizations" in name for name in saved["G"])
    assert not any("parametrizations" in name for name in saved["D"])


def test_sampling_needs_no_flags_and_no_data(run, pictures):
    run("--version", "a", "--total_step", 2, "--dataset", "folder", "--image_path", pictures, "--g_conv_dim", 6)
    shutil.rmtree(pictures)
    # torch's own kernels: those of oneDNN may round differently by the number of images
    with torch.backends.mkldnn.flags(enabled=False):
        code, out, _ = run("--version", "a", "--train", "false", "--num_samples", 70, tiny=False)
    assert code == 0
    folder = Path("samples/a/0000002_generated_seed0")
    assert len(list(folder.glob("*.png"))) == 70 and folder.with_name(folder.name + ".png").exists()
    first = np.asarray(Image.open(folder / "000000.png"))
    assert first.shape == (32, 32, 3)
    shutil.rmtree(folder)
    with torch.backends.mkldnn.flags(enabled=False):
        assert run("--version", "a", "--mode", "sample", "--num_samples", 1, tiny=False)[0] == 0
    assert np.array_equal(first, np.asarray(Image.open(folder / "000000.png"))), "picture i is the same for any number"


def test_samples_come_from_the_average(run):
    run("--version", "a", "--total_step", 3, "--g_lr", "0.05")
    saved = state("a", 3)
    assert not torch.equal(saved["G"]["to_rgb.weight"], saved["G_ema"]["to_rgb.weight"])
    run("--version", "a", "--train", "false", "--num_samples", 3, tiny=False)
    G, _ = trainer.FAMILIES["sagan"].build(trainer_config("a"))
    G.load_state_dict(saved["G_ema"])
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))[:3]
    with torch.no_grad():
        expected = ((G.eval()(z)[0] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    written = [np.asarray(Image.open(f"samples/a/0000003_generated_seed0/00000{i}.png")) for i in range(3)]
    assert np.abs(np.stack(written).astype(int) - expected).max() <= 1


def trainer_config(version):
    from parameter import resolve
    return resolve({"version": version}, checkpoint.saved_config)


def test_a_resumed_run_needs_no_flags_and_keeps_its_shape(run):
    run("--version", "a", "--total_step", 2)
    code, _, _ = run("--version", "a", "--total_step", 3, tiny=False)
    assert code == 0 and state("a", 3)["config"]["g_conv_dim"] == 4
    code, _, err = run("--version", "a", "--imsize", 64, tiny=False)
    assert code == 2 and "--imsize 64: run 'a' was started with 32" in err


def test_changed_settings_are_said_and_that_a_run_is_finished(run):
    run("--version", "a", "--total_step", 1)
    path = Path("models/a/0000001.pth")                 # as of an older program, without later flags
    older = torch.load(path, weights_only=True)
    for name in ("accumulate", "hflip", "g_attn", "conditional", "slae"):
        del older["config"][name]
    torch.save(older, path)
    _, out, _ = run("--version", "a", "--total_step", 2, "--g_lr", "0.001", "--hflip", "true")
    assert "--g_lr is now 0.001, was 0.0001" in out and "--hflip is now True, was False" in out
    assert not re.search("--(accumulate|g_attn|conditional|slae) ", out)
    assert state("a", 2)["g_optimizer"]["param_groups"][0]["lr"] == 0.001
    code, out, _ = run("--version", "a", "--total_step", 2)
    assert code == 0 and "has reached step 2 of --total_step 2" in out


def test_pretrained_model_starts_from_that_step_and_loses_nothing(run):
    run("--version", "a", "--total_step", 4, "--model_save_step", 1, "--log_step", 1)
    code, out, _ = run("--version", "a", "--total_step", 3, "--pretrained_model", 2, "--log_step", 1)
    assert code == 0 and "from step 2" in out
    assert checkpoint.steps_in("models/a") == [1, 2, 3]
    assert checkpoint.steps_in("models/a/superseded") == [3, 4]
    assert [line["step"] for line in lines("a")] == [1, 2, 3]
    superseded = Path("logs/a/superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in superseded] == [3, 4]
    assert_same_state(state("a", 3), checkpoint.load("models/a/superseded/0000003.pth"))
    code, _, err = run("--version", "a", "--pretrained_model", 77)
    assert code == 5 and "--pretrained_model 77" in err and "1, 2, 3" in err


def test_records_of_a_future_that_is_given_up_are_set_aside(run):
    run("--version", "a", "--total_step", 4, "--sample_step", 2, "--model_save_step", 2, "--attn_path", "maps")
    os.remove("models/a/0000004.pth")                   # as if it had been killed before that checkpoint
    run("--version", "a", "--total_step", 3, "--attn_path", "maps")
    assert {path.name[:7] for path in Path("samples/a").glob("*_fake.png")} == {"0000002", "0000003"}
    assert Path("samples/a/superseded/0000004_fake.png").exists()
    assert Path("maps/a/superseded/0000004_attn_g8.png").exists() and not Path("maps/a/0000004_attn_g8.png").exists()


def test_a_damaged_checkpoint_is_passed_over_and_said(run):
    run("--version", "a", "--total_step", 4, "--model_save_step", 2)
    path, weight = Path("models/a/0000004.pth"), state("a", 4)["G"]["to_rgb.weight"]
    data = bytearray(path.read_bytes())
    data[data.index(bytes(weight.untyped_storage())) + 100] ^= 1        # one flipped bit
    path.write_bytes(data)
    code, out, _ = run("--version", "a", "--total_step", 5)
    assert code == 0 and "0000004.pth is damaged" in out and "from step 2" in out
    for other in checkpoint.steps_in("models/a"):
        checkpoint.path_of("models/a", other).write_bytes(b"<html>quota</html>")
    code, _, err = run("--version", "a", "--total_step", 6)
    assert code == 5 and "no checkpoint in models/a can be used" in err


@pytest.mark.parametrize(("step", "due"), [
    (2, "log show"), (3, ""), (5, "log"), (8, "log show save"), (9, "log show save")])
def test_a_record_has_a_line_whatever_the_interval_of_lines(step, due):
    config = SimpleNamespace(total_step=9, log_step=5, sample_step=2, model_save_step=8, metric_step=0)
    assert [name for name, wanted in loop.due_at(config, step)._asdict().items() if wanted] == due.split()


def test_old_checkpoints_are_pruned(run):
    run("--version", "a", "--total_step", 4, "--model_save_step", 1, "--keep_checkpoints", 2)
    assert checkpoint.steps_in("models/a") == [3, 4]
    run("--version", "b", "--total_step", 3, "--model_save_step", 1, "--keep_checkpoints", 0)
    assert checkpoint.steps_in("models/b") == [1, 2, 3]


def test_a_checkpoint_that_cannot_be_deleted_is_warned_of_and_a_full_disk_gets_space_before_the_next_one(
        run, monkeypatch):
    def protected(path, unlink=Path.unlink, **missing):
        if path.name == "0000001.pth":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        unlink(path, **missing)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    flags = ("--version", "a", "--model_save_step", 1, "--keep_checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", protected)
        code, out, _ = run(*flags, 2, "--total_step", 4)
    assert code == 0 and checkpoint.steps_in("models/a") == [1, 3, 4]
    assert out.count("cannot delete old checkpoints (models/a/0000001.pth: Operation not permitted)") == 1
    monkeypatch.setattr(torch, "save", full)
    code, _, err = run(*flags, 1, "--total_step", 5)
    assert code == 5 and "lower --keep_checkpoints" in err and checkpoint.steps_in("models/a") == [4]


def test_a_non_finite_loss_ends_with_4_and_keeps_the_good_checkpoint(run):
    wgan = ("--version", "a", "--adv_loss", "wgan-gp", "--d_iters", "1")
    run(*wgan, "--total_step", 2)
    good = state("a", 2)
    code, _, err = run(*wgan, "--total_step", 20, "--lambda_gp", "1e39", "--log_step", 5, "--model_save_step", 3)
    assert code == 4 and "NaN or infinite between steps" in err and len(err.strip().splitlines()[-2:]) == 2
    assert_same_state(state("a", 2), good)


def test_weights_that_are_no_numbers_are_not_saved(run, monkeypatch):
    def blow_up(G_ema, G, decay):
        next(G.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr("utils.ema_update", blow_up)
    code, _, err = run("--version", "a", "--total_step", 1)
    assert code == 4 and "a weight, statistic or moment became NaN" in err and checkpoint.steps_in("models/a") == []


def test_a_disk_that_refuses_ends_with_5(run, monkeypatch):
    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    run("--version", "a", "--total_step", 1)
    monkeypatch.setattr(torch, "save", full)
    code, _, err = run("--version", "a", "--total_step", 2)
    assert code == 5 and "0000002.pth" in err and "Free some space" in err
    assert sorted(os.listdir("models/a")) == [".lock", "0000001.pth", "config.json"]


@pytest.mark.parametrize(("flags", "words"), [
    ((), ("CelebA", "bash download.sh CelebA", "--dataset toy")),
    (("--dataset", "lsun"), ("bash download.sh LSUN",)),
    (("--dataset", "cifar10"), ("bash download.sh CIFAR10",)),
    (("--dataset", "folder", "--image_path", "nowhere"), ("--image_path", "nowhere")),
])
def test_missing_data_ends_with_3_in_two_lines_and_writes_nothing(run, flags, words):
    code, _, err = run("--device", "cpu", *flags, tiny=False)
    assert code == 3
    assert all(word in err for word in words) and len(err.strip().splitlines()) <= 2
    assert os.listdir() == []


def test_fewer_pictures_than_a_batch_ends_with_3(run, pictures):
    code, _, err = run("--dataset", "folder", "--image_path", pictures, "--batch_size", 13)
    assert code == 3 and "--batch_size" in err and "12" in err
    assert sorted(os.listdir()) == ["cache", "pictures"], "the check's own cache"
    for name in ("broken.png", "cut.png"):
        (pictures / name).write_bytes(b"no picture")
    code, _, err = run("--dataset", "folder", "--image_path", pictures, "--batch_size", 14, "--version", "a")
    assert code == 3 and "2 of the 14 pictures" in err and "broken.png" in err and "--batch_size" not in err
    assert "broken.png" in Path("logs/a/bad_images.jsonl").read_text(), "what --mode clean_data reads"


def test_dry_run_prints_and_writes_nothing(run):
    code, out, _ = run("--dataset", "toy", "--dry_run", tiny=False)
    assert code == 0
    assert "G parameters: 3832885\n" in out and "D parameters: 3175299\n" in out
    config = json.loads(out[:out.rindex("}") + 1])
    assert config["g_attn"] == [16, 32] and config["sn"] == "both"
    assert "4096" in out and "device: " in out and "precision: fp32\n" in out
    assert os.listdir() == []


def test_attention_maps_go_where_asked(run):
    run("--version", "a", "--total_step", 1, "--attn_path", "maps", "--sample_path", "s", "--log_path", "l",
        "--model_save_path", "m")
    assert sorted(os.listdir("maps/a")) == [".lock", "0000001_attn_g8.png"]
    assert sorted(os.listdir("l/a")) == [".lock", "metrics.jsonl"], "no events of TensorBoard unless asked"
    assert sorted(os.listdir("s/a")) == [".lock", "0000001_fake.png", "index.html", "real.png"]
    assert sorted(os.listdir()) == ["l", "m", "maps", "s"]


def test_attention_is_shown_for_the_asked_points_and_written_as_numbers(run):
    run("--version", "a", "--total_step", 1, "--sample_step", 1, "--attn_raw", "true",
        "--attn_queries", "0.1,0.9;0.5,0.5;1,0", *EVERY_ATTENTION)
    with np.load("samples/a/0000001_attn.npz") as raw:
        assert set(raw) == {"g8", "g16", "d4", "d8", "d4_real", "d8_real", "queries"}
        assert (raw["d8"] != raw["d8_real"]).any()
        assert raw["g16"].shape == (4, 3, 16, 16) and raw["d4"].shape == (4, 3, 4, 4)
        assert raw["g16"].sum((2, 3)) == pytest.approx(np.ones((4, 3)), abs=1e-4)
        assert raw["queries"] == pytest.approx(np.array([[0.1, 0.9], [0.5, 0.5], [1, 0]]))
    run("--version", "b", "--total_step", 1, "--sample_step", 1)
    assert not list(Path("samples/b").glob("*.npz"))
    narrow, usual = (Image.open(f"samples/{version}/0000001_attn_g8.png").width for version in "ab")
    assert narrow < usual, "three columns of overlays, not five"


def test_a_run_without_attention(run):
    code, _, _ = run("--version", "a", "--total_step", 1, "--g_attn", "none", "--d_attn", "none")
    assert code == 0 and not list(Path("samples/a").glob("*attn*"))


def test_a_step_that_is_not_there_writes_nothing(run):
    code, _, err = run("--version", "a", "--pretrained_model", 5)
    assert code == 5 and "--pretrained_model 5: no such checkpoint" in err and os.listdir() == []


def test_no_checkpoint_to_sample_from_ends_with_5(run):
    Path("models/nobody").mkdir(parents=True)               # a run that ended before its first checkpoint
    code, _, err = run("--version", "nobody", "--train", "false", tiny=False)
    assert code == 5 and "--version nobody: no checkpoint" in err and os.listdir() == ["models"]


def start(*flags, **more):
    return subprocess.Popen([sys.executable, MAIN, *TINY, *map(str, flags)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **more)


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not Path(path).exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.soak)])
def test_an_interrupt_saves_first(tmp_path, monkeypatch, number, code):
    monkeypatch.chdir(tmp_path)
    process = start("--version", "a", "--num_workers", 1, "--sample_step", 5, start_new_session=True)
    wait_for("samples/a/0000005_fake.png")
    os.killpg(process.pid, number)                      # as a terminal does it: the workers get it too
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    (step,) = checkpoint.steps_in("models/a")
    assert f"step {step} is saved" in out and "Traceback" not in err
    assert state("a", step)["step"] == step


@pytest.mark.slow
def test_two_processes_train_one_run(tmp_path, monkeypatch):
    """The batch is shared out, and resume is exact."""
    monkeypatch.chdir(tmp_path)
    straight = torchrun(MAIN, *TINY, "--version", "straight", "--total_step", 4)
    assert straight.returncode == 0, straight.stderr
    assert straight.stdout.count("starting 'straight'") == 1
    for steps in (2, 4):
        assert two_processes(MAIN, *TINY, "--version", "resumed", "--total_step", steps).returncode == 0
    assert_same_state(state("straight", 4), state("resumed", 4))
    assert state("straight", 4)["samples_seen"] == 16


@pytest.mark.soak
def test_processes_start_equal_and_average_gradients(tmp_path):
    script = tmp_path / "two.py"
    script.write_text("""
import torch
from device import distributed
from device.replicas import GradientAverage
from parameter import resolve
place = distributed.start(resolve({"device": "cpu"}))
torch.manual_seed(place.rank)
net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
distributed.broadcast(net)
for weight in net.parameters():
    weight.grad = torch.full_like(weight, place.rank + 1.0)
GradientAverage(net.parameters()).finish()
assert all((weight.grad == 1.5).all() for weight in net.parameters())
weights = distributed.gather([weight.tolist() for weight in net.parameters()])
assert weights[0] == weights[1]
assert distributed.mean_over_processes(torch.tensor(float(place.rank))).item() == 0.5
vote = distributed.StopVote()
assert not vote(False)
assert any(vote(place.rank == 1) for _ in range(vote.every)), "rank 1's request reaches both"
distributed.say("checked")
distributed.stop()
""")
    result = two_processes(script)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "checked\n"


# ---------------------------------------------------------------------------------------- measurements in training


def measuring(pictures, *flags):
    """Flags of a run on the 12 pictures that takes a FID of 8 samples every other step."""
    return ("--dataset", "folder", "--image_path", pictures, "--metric_step", 2, "--num_eval", 8, "--metrics", "fid",
            "--log_step", 100, *flags)


def scored(version):
    return {line["step"]: line["fid"] for line in lines(version) if "fid" in line}


@pytest.fixture(autouse=True)
def a_quick_swd(monkeypatch):
    quick = functools.partial(swd.sliced_wasserstein, count=2048, directions=64)
    monkeypatch.setattr(swd, "sliced_wasserstein", quick)


@pytest.fixture
def fids(monkeypatch, small_inception):
    """fids(5, 3, ...): the next measurements give these."""
    coming = []
    monkeypatch.setattr(features, "distances", lambda *_: {"fid": float(coming.pop(0))})
    return lambda *values: coming.extend(values)


def test_metrics_are_taken_at_their_steps_and_at_the_last(run, pictures, small_inception, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write_pages(folders, config, classes, live):
        pages.append((max(scored(config.version), default=0), live.state))

    pages = []
    monkeypatch.setattr(loop.page, "write_pages", write_pages)
    code, out, _ = run(*measuring(pictures), "--version", "a", "--total_step", 5, "--use_tensorboard", "true",
                       "--metrics", "fid,kid,pr,is,swd")
    assert code == 0
    found = [line for line in lines("a") if "protocol" in line]
    names = {"fid", "fid_floor", "kid", "kid_std", "kid_floor", "precision", "recall", "coverage", "inception_score",
             "inception_score_std"}
    assert [(line["step"], line.keys() - {"step", "protocol", "source"}) for line in found] == [
        (step, values) for step in (2, 4, 5) for values in (names, {"swd"})]
    for line in found:
        assert "8 samples at 32 px" in line["protocol"] and "all 12 pictures of folder pictures" in line["protocol"]
        assert line["source"] == "G_ema, seed 0"
    assert len({line["protocol"] for line in found}) == 2
    assert found[0]["fid"] != found[2]["fid"] and f"step 4: fid {found[2]['fid']:.4g}, kid " in out
    (net,) = small_inception
    assert net.seen == 12 + 3 * 8, "the reference once"
    events = EventAccumulator("logs/a").Reload()
    assert [event.step for event in events.Scalars("fid")] == [2, 4, 5]
    assert [event.value for event in events.Scalars("swd")] == pytest.approx([line["swd"] for line in found[1::2]])
    tags = {tag for kind in events.Tags().values() if isinstance(kind, list) for tag in kind}
    assert names <= tags and not any(word in tag for tag in tags for word in ("protocol", "source"))
    assert "| a   |    4 |" in Path("logs/scores.md").read_text(encoding="utf-8")
    assert pages == [(0, "running"), (2, "running"), (4, "running"), (5, "running"), (5, "done")], "at once"


def test_measuring_changes_no_weight(run, pictures, small_inception):
    quiet = ("--dataset", "folder", "--image_path", pictures, "--total_step", 4)
    run(*quiet, "--version", "quiet")
    run(*measuring(pictures), *quiet, "--version", "loud", "--metrics", "fid,kid,pr,is,swd")
    assert len(scored("loud")) == 2 and not scored("quiet")
    assert_same_state(state("quiet", 4), state("loud", 4))


def test_a_measured_number_is_that_of_the_checkpoint_of_this_step(run, pictures, small_inception):
    run(*measuring(pictures), "--version", "a", "--total_step", 3)
    run("--dataset", "folder", "--image_path", pictures, "--log_step", 100, "--version", "b", "--total_step", 2)
    measured = [line for line in lines("a") if "fid" in line]
    assert [line["step"] for line in measured] == [2, 3], "the first beside no checkpoint"
    for version, line in zip("ba", measured, strict=True):
        code, _, _ = run("--version", version, "--mode", "evaluate", "--metrics", "fid", "--num_eval", 8, "--device",
                         "cpu", tiny=False)
        assert code == 0 and lines(version)[-1] == {**line, "by": "--mode evaluate"}


def test_best_pth_is_the_checkpoint_of_the_lowest_fid_and_is_not_pruned(run, pictures, fids):
    run("--dataset", "folder", "--image_path", pictures, "--version", "straight", "--total_step", 6,
        "--model_save_step", 4)
    fids(5, 3, 4)
    run(*measuring(pictures), "--version", "a", "--total_step", 6, "--model_save_step", 1, "--keep_checkpoints", 1)
    assert scored("a") == {2: 5, 4: 3, 6: 4}
    assert sorted(os.listdir("models/a")) == [".lock", "0000006.pth", "best.pth", "config.json"]
    best = checkpoint.load("models/a/best.pth")
    assert best.pop("best") == checkpoint.best_score("models/a") == {
        "metric": "fid", "fid": 3, "source": "G_ema, seed 0", "protocol": lines("a")[0]["protocol"]}
    assert_same_state(best, state("straight", 4))


def test_a_run_says_when_it_is_done_and_with_stop_auto_it_ends(run, pictures, fids, tmp_path):
    flags = measuring(pictures, "--total_step", 14, "--patience", 2, "--model_save_step", 100)
    fids(5, 3, 4, 3, 4, 2, 9)
    code, out, _ = run(*flags, "--version", "a")
    assert code == 0 and out.count("note: no score is better than that of step 4, which best.pth has, for 2 mea") == 1
    fids(5, 3, 4, 3)
    code, out, _ = run(*flags, "--version", "b", "--stop", "auto")
    assert code == 0 and "no score is better than that of step 4" in out and "done: 8 steps" in out
    assert checkpoint.steps_in("models/b") == [8] and "note: no score" not in out
    fids(4, 3)
    code, out, _ = run(*flags, "--version", "b", "--stop", "auto", "--pretrained_model", "best")
    assert code == 0 and "resuming 'b' from step 4" in out and "done: 8 steps" in out, "what is given up counts not"
    code, out, _ = run(*flags, "--version", "b", "--stop", "auto")
    assert code == 0 and "'b' has ended at step 8, as no score is better" in out and "--stop never trains on" in out
    fids(4, 2, 9)
    code, out, _ = run(*flags, "--version", "b", "--stop", "never")
    assert code == 0 and "resuming 'b' from step 8" in out
    assert_same_state(state("a", 14), state("b", 14))


def test_a_measurement_that_is_broken_off_is_made_up_and_counts_as_none(run, pictures, fids, monkeypatch):
    def interrupted(self, *words, measure=Meter.measure):
        if lines("a") and scored("a"):
            os.kill(os.getpid(), signal.SIGINT)
        return measure(self, *words)

    flags = measuring(pictures, "--total_step", 9, "--patience", 1, "--stop", "auto", "--version", "a")
    fids(5)
    with monkeypatch.context() as patch:
        patch.setattr(Meter, "measure", interrupted)
        code, out, _ = run(*flags, "--total_step", 4)   # the last one, too
    assert code == 130 and "interrupted: step 4 is saved" in out and scored("a") == {2: 5}
    fids(4, 7)
    code, out, _ = run(*flags)
    assert code == 0 and scored("a") == {2: 5, 4: 4, 6: 7} and "done: 6 steps" in out


def test_with_few_real_pictures_best_pth_goes_by_kid_and_an_older_entry_by_fid_gives_way(run, pictures, fids,
                                                                                         monkeypatch):
    coming = [{"fid": 5.0, "kid": 2.0}, {"fid": 4.0, "kid": 3.0}, {"fid": 9.0, "kid": 1.0}]
    fids(1)
    run(*measuring(pictures), "--version", "a", "--total_step", 2, "--metrics", "fid", "--model_save_step", 2)
    best = checkpoint.load("models/a/best.pth")
    del best["best"]["metric"]                          # as older versions wrote it
    torch.save(best, "models/a/best.pth")
    assert checkpoint.best_score("models/a")["metric"] == "fid"
    monkeypatch.setattr(features, "distances", lambda *_: coming.pop(0))
    seen = []
    for step in (4, 6, 8):
        run(*measuring(pictures), "--version", "a", "--total_step", step, "--metrics", "fid,kid", "--model_save_step",
            2)
        seen.append((checkpoint.load("models/a/best.pth")["step"], checkpoint.best_score("models/a")["metric"]))
    assert seen == [(4, "kid"), (4, "kid"), (8, "kid")] and checkpoint.best_score("models/a")["kid"] == 1
    monkeypatch.setattr(scores, "FEW", 12)              # as many as there are: fid decides
    coming += [{"fid": 8.0, "kid": 5.0}]
    run(*measuring(pictures), "--version", "a", "--total_step", 10, "--metrics", "fid,kid", "--model_save_step", 2)
    assert checkpoint.best_score("models/a")["metric"] == "fid"


def test_a_best_pth_that_cannot_be_read_now_gives_way_to_no_worse_one(run, pictures, fids, monkeypatch):
    def away(path, load=checkpoint.load):
        if Path(path).name == "best.pth":
            raise checkpoint.UnreadableCheckpoint(f"cannot read {path} (Stale file handle)")
        return load(path)

    def measure_then(self, *words, measure=Meter.measure):
        patch.setattr(checkpoint, "load", away)
        return measure(self, *words)

    fids(3, 4)
    flags = (*measuring(pictures), "--version", "a")
    run(*flags, "--total_step", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Meter, "measure", measure_then)
        code, out, _ = run(*flags, "--total_step", 4)
    assert code == 0 and "Stale file handle" in out and scored("a") == {2: 3, 4: 4}
    assert checkpoint.best_score("models/a")["fid"] == 3


def test_best_pth_is_sampled_and_evaluated(run, pictures, fids):
    fids(5, 3, 4, 2)
    run(*measuring(pictures), "--version", "a", "--total_step", 6, "--model_save_step", 2)
    code, _, _ = run("--version", "a", "--train", "false", "--pretrained_model", "best", "--num_samples", 2, tiny=False)
    assert code == 0 and Path("samples/a/0000004_generated_seed0/000001.png").exists()
    code, out, _ = run("--version", "a", "--mode", "evaluate", "--pretrained_model", "best", "--metrics", "fid",
                       "--device", "cpu", tiny=False)
    assert code == 0 and "evaluating 'a' at step 4" in out and lines("a")[-1]["fid"] == 2
    assert checkpoint.best_score("models/a")["fid"] == 3, "its own score does not replace it"


def test_a_checkpoint_that_is_pruned_while_it_is_scored_is_scored_all_the_same(run, pictures, fids, monkeypatch):
    def prune(*_):
        os.replace("models/a/0000002.pth", "models/a/0000003.pth")
        return {"fid": 1.0}

    run("--dataset", "folder", "--image_path", pictures, "--version", "a", "--total_step", 2)
    monkeypatch.setattr(features, "distances", prune)
    flags = ("--version", "a", "--mode", "evaluate", "--metrics", "fid", "--device", "cpu")
    code, _, _ = run(*flags, tiny=False)
    assert code == 0 and lines("a")[-1]["fid"] == 1 and checkpoint.best_score("models/a") is None


def test_scores_are_told_where_neither_the_best_nor_the_table_can_be_written(run, pictures, fids, monkeypatch):
    def read_only(*_):
        raise CheckpointError("cannot write models/a/best.pth (Read-only file system); ...\nFree some space")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    fids(4.25, 5.25)
    run("--dataset", "folder", "--image_path", pictures, "--version", "a", "--total_step", 1)
    flags = ("--version", "a", "--mode", "evaluate", "--metrics", "fid", "--device", "cpu")
    monkeypatch.setattr(checkpoint, "save_best", read_only)
    code, out, err = run(*flags, tiny=False)
    assert code == 0 and "4.250" in out and "warning: the best checkpoint is not kept: cannot write" in out, err
    monkeypatch.setattr(score_table, "record", full)
    code, out, err = run(*flags, tiny=False)
    assert code == 5 and "5.250" in out and "No space left" in err


def test_a_run_goes_on_from_its_best(run, pictures, fids):
    fids(5, 3, 4)
    run(*measuring(pictures), "--version", "a", "--total_step", 6, "--model_save_step", 2)
    fids(3.5)
    code, out, _ = run("--version", "a", "--total_step", 5, "--pretrained_model", "best", tiny=False)
    assert code == 0 and "resuming 'a' from step 4" in out
    assert "(0000006.pth) moved to models/a/superseded" in out
    assert checkpoint.steps_in("models/a") == [2, 4, 5] and checkpoint.steps_in("models/a/superseded") == [6]
    assert scored("a") == {2: 5, 4: 3, 5: 3.5}
    assert checkpoint.load("models/a/best.pth")["step"] == 4


def test_a_run_of_which_only_the_best_is_left_is_still_this_run(run, pictures, fids):
    """It went back to its best, whose own checkpoint was pruned, and was killed before the next one."""
    fids(5, 3, 4, 6)
    run(*measuring(pictures), "--version", "a", "--total_step", 6, "--keep_checkpoints", 1)
    best = checkpoint.load("models/a/best.pth")
    os.remove("models/a/0000006.pth")
    os.remove("models/a/config.json")
    assert _has_begun(trainer_config("a")), "so its size is given"
    for flags in ((), ("--pretrained_model", "best")):
        code, _, _ = run("--version", "a", "--train", "false", "--num_samples", 2, *flags, tiny=False)
        assert code == 0 and Path("samples/a/0000004_generated_seed0/000001.png").exists()
        shutil.rmtree("samples/a/0000004_generated_seed0")
    code, out, _ = run("--version", "a", "--total_step", 5, tiny=False)
    assert code == 0 and "resuming 'a' from step 4" in out
    assert state("a", 5)["samples_seen"] == best["samples_seen"] + 4


def test_a_best_that_is_newer_than_all_other_checkpoints_is_gone_on_from(run, pictures, fids):
    fids(5, 3)
    run(*measuring(pictures), "--version", "a", "--total_step", 4, "--model_save_step", 3)
    os.remove("models/a/0000004.pth")                   # as if it had been killed soon after that measurement
    fids(4)
    code, out, _ = run("--version", "a", "--total_step", 5, tiny=False)
    assert code == 0 and "resuming 'a' from step 4" in out and scored("a") == {2: 5, 4: 3, 5: 4}
    assert checkpoint.steps_in("models/a") == [3, 5] and checkpoint.load("models/a/best.pth")["step"] == 4


def test_a_resumed_run_keeps_a_best_that_is_better(run, pictures, fids):
    fids(5, 3)
    run(*measuring(pictures), "--version", "a", "--total_step", 4)
    fids(3.5, 2)
    run("--version", "a", "--total_step", 6, tiny=False)
    assert checkpoint.load("models/a/best.pth")["step"] == 4 and checkpoint.best_score("models/a")["fid"] == 3
    run("--version", "a", "--total_step", 8, tiny=False)
    assert checkpoint.load("models/a/best.pth")["step"] == 8 and checkpoint.best_score("models/a")["fid"] == 2
    fids(90)
    run("--version", "a", "--total_step", 10, "--num_eval", 9, tiny=False)
    assert checkpoint.best_score("models/a")["fid"] == 90, "of another protocol: the new one counts"


def test_going_back_before_the_best_sets_it_aside(run, pictures, fids):
    fids(5, 3, 4)
    run(*measuring(pictures), "--version", "a", "--total_step", 6, "--model_save_step", 2)
    fids(50)
    code, out, _ = run("--version", "a", "--total_step", 4, "--pretrained_model", 2, tiny=False)
    assert code == 0 and "(0000004.pth, 0000006.pth, best.pth) moved to models/a/superseded" in out
    assert checkpoint.best_score("models/a/superseded")["fid"] == 3
    assert checkpoint.best_score("models/a")["fid"] == 50, "nothing better is left of this run"


def test_a_damaged_best_is_no_best(run, pictures, fids):
    fids(5, 6)
    run(*measuring(pictures), "--version", "a", "--total_step", 2)
    Path("models/a/best.pth").write_bytes(b"<html>quota</html>")
    code, _, err = run("--version", "a", "--pretrained_model", "best", "--train", "false", tiny=False)
    assert code == 5 and "best.pth is damaged" in err and "Traceback" not in err
    code, _, _ = run("--version", "a", "--total_step", 4, tiny=False)
    assert code == 0 and checkpoint.best_score("models/a")["fid"] == 6


def test_a_best_that_is_not_there_ends_with_5(run, pictures):
    run("--dataset", "folder", "--image_path", pictures, "--version", "a", "--total_step", 1)
    before = sorted(Path().rglob("*"))
    for version, mode in itertools.product("ab", ("train", "sample", "evaluate", "interpolate")):
        code, _, err = run("--version", version, "--mode", mode, "--pretrained_model", "best", "--device", "cpu",
                           "--dataset", "folder", "--image_path", pictures, "--imsize", 32, "--batch_size", 4,
                           "--cache", "off", tiny=False)
        assert len(err.strip().splitlines()) <= 2, err
        if version == "b" and mode != "train":
            assert code == 2 and "--version b: there is no such run" in err
        else:
            assert code == 5 and "--metric_step" in err
            assert f"--pretrained_model best: there is no models/{version}/best.pth" in err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(("when", "number", "code"), [
    ("scoring", signal.SIGINT, 130), ("reference", signal.SIGTERM, 143)])
def test_a_signal_ends_a_measurement_soon_and_saves(run, pictures, small_inception, monkeypatch, when, number, code):
    def kill_and_look(net, part):
        if part is not None and net.seen == (4 if when == "reference" else 12 + 4):
            os.kill(os.getpid(), number)
        return forward(net, part)

    forward = SmallInception.forward
    monkeypatch.setattr(SmallInception, "forward", kill_and_look)
    monkeypatch.setattr(features, "CHUNK", 4)
    before = signal.getsignal(number)
    found, out, err = run(*measuring(pictures), "--version", "a", "--total_step", 9, "--num_eval", 40)
    assert found == code and "Traceback" not in err and signal.getsignal(number) == before
    if when == "reference":
        assert small_inception[0].seen == 4 and err.endswith("interrupted\n"), "nothing to save: it ends at once"
        assert checkpoint.steps_in("models/a") == [] and not Path("cache/reference").exists()
    else:
        assert small_inception[0].seen == 12 + 8, "the chunk that it was at is the last"
        assert "step 2 is saved" in out and checkpoint.steps_in("models/a") == [2], "where it is made up"
        assert not scored("a") and not Path("logs/scores.jsonl").exists() and not Path("models/a/best.pth").exists()


def test_how_it_is_measured_is_taken_over_when_a_run_goes_on_but_not_which_metrics_evaluate_takes(
        run, pictures, small_inception):
    run(*measuring(pictures), "--version", "a", "--total_step", 2, "--metrics", "kid")
    run("--version", "a", "--total_step", 4, tiny=False)
    found = [line for line in lines("a") if "protocol" in line]
    assert [line["step"] for line in found] == [2, 4] and found[0]["protocol"] == found[1]["protocol"]
    assert [line.keys() for line in found] == [{"step", "kid", "kid_std", "kid_floor", "protocol", "source"}] * 2
    code, _, _ = run("--version", "a", "--mode", "evaluate", "--device", "cpu", tiny=False)
    assert code == 0 and {"fid", "kid", "precision", "inception_score"} < lines("a")[-1].keys()
