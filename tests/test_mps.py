"""`--device mps`, on an imitation of Apple's GPUs: no float64 there, and no tensors of two devices in one operation."""

from pathlib import Path

import pytest
import torch
from conftest import TINY, lines, state
from imitated_mps import imitated

from device import mps
from device.precision import Precision


def tiny_without(*names):
    """TINY without these flags."""
    return tuple(word for pair in zip(TINY[::2], TINY[1::2], strict=True) if pair[0] not in names for word in pair)


FLAGS = tiny_without("--device")
FASTGAN = (*tiny_without("--device", "--g_attn", "--d_attn"), "--model", "fastgan", "--imsize", 64, "--recon", "l1",
           "--vgg_weights", "random")
RESNET = (*FLAGS, "--arch", "resnet", "--conditional", "true")
SCORED = ("--metrics", "fid,kid,pr", "--feature_net", "vgg16", "--vgg_weights", "random", "--num_eval", 8)


@pytest.fixture
def apple(monkeypatch):
    with imitated(monkeypatch) as operations:
        yield operations


@pytest.mark.parametrize(("flags", "scores"), [
    (FLAGS, SCORED), *(pytest.param(flags, (), marks=pytest.mark.soak) for flags in (FASTGAN, RESNET))],
                         ids=["sagan", "fastgan", "resnet"])
def test_training_and_sampling_on_mps_are_those_on_the_cpu(run, pictures, monkeypatch, flags, scores):
    if flags != RESNET:
        flags = (*flags, "--dataset", "folder", "--image_path", pictures)
    saving = ("--log_step", 1, "--model_save_step", 1)
    assert run(*flags, *saving, "--device", "cpu", "--version", "cpu", "--total_step", 2, tiny=False)[0] == 0
    with imitated(monkeypatch) as operations:
        for step in (1, 2):                             # the second goes on
            code, out, err = run(*flags, *saving, "--version", "mps", "--total_step", step, tiny=False)
            assert code == 0, err
        assert "convolution_backward" in operations
        code, out, err = run("--version", "mps", "--mode", "sample", "--num_samples", 4, tiny=False)
        assert code == 0, err
        if scores:
            code, out, err = run("--version", "mps", "--mode", "evaluate", *scores, tiny=False)
            assert code == 0, err
    for own, other in zip(lines("mps"), lines("cpu"), strict=False):
        assert own["d_loss"] == pytest.approx(other["d_loss"], abs=1e-3)
        assert own["g_loss"] == pytest.approx(other["g_loss"], abs=1e-3) and own["gpu_memory_gib"] == 0.25
    assert "mps" in state("mps", 2)["random"][0]
    assert len(list(Path("samples/mps").glob("*_seed0/*.png"))) == 4


def test_mps_is_taken_where_it_is_and_refused_where_it_is_not(run, apple, monkeypatch, capsys):
    assert run("--dry_run", *FLAGS, tiny=False)[1].count("device: mps\n") == 1
    precision = Precision("fp16", torch.device("mps"))
    precision.announce()
    assert precision.name == "fp32"
    assert capsys.readouterr().out == "note: --precision fp16 is for other GPUs and CPUs; using fp32\n"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    code, _, err = run(*FLAGS, "--device", "mps", tiny=False)
    assert code == 2 and "--device mps: no GPU of Apple's here" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(*FLAGS, "--device", "mps", tiny=False)
    assert code == 2 and "--device mps: is for one process" in err


def test_the_maps_that_batch_norm_takes_are_contiguous(apple):
    """Its gradient is wrong on MPS for maps in another memory format."""
    norm, formats = torch.nn.BatchNorm2d(3), []
    net = mps.with_contiguous_maps(torch.nn.Sequential(norm).to(torch.device("mps")), torch.device("mps"))
    norm.register_forward_pre_hook(lambda module, inputs: formats.append(inputs[0].is_contiguous()))
    net(torch.randn(2, 4, 4, 3, device=torch.device("mps")).permute(0, 3, 1, 2))
    assert formats == [True]
