"""SLAE-FastGAN through the real command at a tiny size: output files, resume, metadata, its own figures."""

import itertools
import os
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MAIN, assert_same_state, lines, state, two_processes
from PIL import Image
from stand_ins import SmallLpips

import families
import fastgan_models
import parameter
from gallery import sheets
from generate import trained
from pretrained import lpips, vgg

FASTGAN = ("--model", "fastgan", "--preset", "cpu", "--batch_size", "4", "--g_conv_dim", "4", "--d_conv_dim", "4",
           "--z_dim", "8", "--device", "cpu", "--dataset", "folder")

random_vgg = cache(vgg._random_state)       # drawing its weights takes a tenth of a tiny run


@pytest.fixture
def fastgan(run, pictures, monkeypatch):
    """fastgan(*flags) runs the command on a folder of 12 pictures, with metadata of a random VGG unless told not to."""
    monkeypatch.setattr(vgg, "_random_state", random_vgg)

    def command(*flags, vgg_weights="random"):
        return run(*FASTGAN, "--image_path", pictures, "--vgg_weights", vgg_weights, *flags, tiny=False)

    return command


def generated(version, step, other=""):
    folder = Path("samples", version, f"{step:07d}_generated_seed0{other}")
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def share_of_rows(saved):
    """The share of a checkpoint's fixed z whose metadata are those of one picture."""
    rows, fixed = saved["metadata"]["rows"].float(), saved["fixed_z"][:, 8:]
    assert fixed.shape == (64, 512)
    return ((fixed[:, None] - rows).abs().amax(2).amin(1) == 0).float().mean()


def test_a_run_writes_masks_reconstructions_of_the_same_pictures_and_their_figures(fastgan, monkeypatch):
    shown, save = [], sheets.save_reconstructions
    monkeypatch.setattr(sheets, "save_reconstructions", lambda rows, *more: shown.append(rows) or save(rows, *more))
    code, out, _ = fastgan("--version", "a", "--total_step", 2, "--sample_step", 1, "--log_step", 2, "--slae_d", "true",
                           "--attn_raw", "true", "--metadata", "false")
    assert code == 0 and "reconstruction loss of D: l1" in out
    with np.load("samples/a/0000002_attn.npz") as raw:
        assert {name: mask.shape for name, mask in raw.items()} == {
            name: (4, 1, size, size) for name, size in (
                ("slae4", 4), ("slae8", 8), ("slae16", 16), ("slae_d64", 64), ("slae_d64_real", 64))}
        assert (raw["slae_d64"] != raw["slae_d64_real"]).any()
    names = {f"{step:07d}_{kind}.png" for step in (1, 2) for kind in ("fake", "attn_slae", "attn_slae_real", "recon")}
    assert {path.name for path in Path("samples/a").glob("*.png")} == names | {"real.png"}
    for path in Path("samples/a").glob("*.png"):
        Image.open(path).load()
    last = lines("a")[-1]
    assert {"d_loss", "g_loss", "recon/last", "recon/middle", "recon/small"} <= last.keys()
    for layer in ("slae4", "slae8", "slae16", "slae_d64"):
        assert 0 < last[f"mask/{layer}"] < 1 and 0 < last[f"mask_range/{layer}"] < 1
    assert not any(name.startswith(("gamma/", "entropy/")) for name in last)

    for label, one in shown[0].items():
        assert one.shape == (8, 3, 32, 32)
        assert torch.equal(one, shown[1][label]) == (not label.startswith("from")), label
    grid = torch.from_numpy(np.asarray(Image.open("samples/a/real.png").convert("RGB"), np.float32) / 127.5 - 1)
    real = torch.stack([grid[y:y + 64, x:x + 64].permute(2, 0, 1) for y in (2, 68) for x in (2, 68, 134, 200)])
    first = real[:1]
    assert torch.allclose(shown[0]["real"][:1], fastgan_models.downscale(first, 32), atol=1e-3)
    saved = state("a", 2)
    _, D = families.build(parameter.Config.of(saved["config"]))
    D.load_state_dict(saved["D"])
    with torch.no_grad():
        for label, one in D.train().reconstructions(real).items():
            assert torch.allclose(one, shown[1][label], atol=0.03), "by D as it is in training"
    quadrant = fastgan_models.take_quadrant(first, torch.tensor([0]))
    assert torch.allclose(shown[0]["one quadrant"][:1], quadrant, atol=1e-3)


def test_without_slae_and_reconstructions_neither_is_computed_shown_or_said_and_vgg_not_asked(fastgan):
    code, out, _ = fastgan("--version", "a", "--total_step", 1, "--sample_step", 1, "--slae", "false", "--metadata",
                           "false", "--recon", "lpips", "--recon_weight", 0, vgg_weights="missing.pth")
    assert code == 0 and "reconstruction loss" not in out
    assert not [*Path("samples/a").glob("*recon*"), *Path("samples/a").glob("*attn*")]
    assert not any(name.startswith("recon") for name in lines("a")[-1])
    assert state("a", 1)["metadata"] is None and state("a", 1)["fixed_z"].shape[1] == 8
    assert not Path("cache/metadata").exists(), "nothing was asked of VGG"


def two_and_two(fastgan, *flags):
    """What a run of four steps prints, and one of two, which then goes on to the same state without the cache."""
    _, straight, _ = fastgan("--version", "straight", "--total_step", 4, *flags)
    _, half, _ = fastgan("--version", "resumed", "--total_step", 2, "--sample_step", 1, "--log_step", 1, *flags)
    shutil.rmtree("cache", ignore_errors=True)              # a run goes on with its own metadata
    code, _, _ = fastgan("--version", "resumed", "--total_step", 4, *flags)
    assert code == 0 and not Path("cache/metadata").exists()
    assert_same_state(state("straight", 4), state("resumed", 4))
    return straight, half


def test_four_steps_are_two_and_two_bit_for_bit_and_metadata_are_taken_once(fastgan, pictures):
    first, second = two_and_two(fastgan)
    assert "random" in first, "a VGG with random weights is said"
    assert "cache/metadata" not in first and "12 pictures" in second and "read from cache/metadata" in second
    assert share_of_rows(state("straight", 4)) < 0.2, "the fixed z carry mixtures, as samples will"
    for path in pictures.iterdir():
        os.utime(path, (1, 1))                              # as in a copy of the folder
    _, out, _ = fastgan("--version", "resumed", "--total_step", 5)
    assert "have changed" not in out
    Image.new("RGB", (40, 50), "red").save(pictures / "3.png")
    _, out, _ = fastgan("--version", "resumed", "--total_step", 6)
    assert "the pictures have changed since this run's metadata were computed" in out
    assert torch.equal(state("straight", 4)["metadata"]["rows"], state("resumed", 6)["metadata"]["rows"])


@pytest.mark.soak
@pytest.mark.parametrize("flags", [
    ("--slae", "false", "--metadata", "false", "--d_features", "vgg16_fine", "--d_features_share", "0.25",
     "--augment", "color,mirror"),
    ("--slae_d", "true", "--slae_kernel", "3", "--augment", "none", "--d_iters", "2")])
def test_four_steps_of_other_settings_are_two_and_two_bit_for_bit(fastgan, flags):
    two_and_two(fastgan, *flags)


def test_the_preset_for_few_pictures_trains_goes_on_and_draws(fastgan):
    flags = ("--version", "few", "--preset", "small", "--batch_size", 8, "--total_step")
    assert fastgan(*flags, 1)[0] == 0
    code, out, err = fastgan(*flags, 2)
    assert code == 0 and "slow on a CPU" not in out, err
    assert {name for name in state("few", 2)["D"] if name.startswith("feature_heads")}
    assert fastgan(*flags[:4], "--train", "false", "--num_samples", 2)[0] == 0


def test_a_d_with_features_learns_by_its_heads_and_a_checkpoint_holds_no_vgg(fastgan):
    for version, name in (("plain", "none"), ("features", "vgg16")):
        code, out, err = fastgan("--version", version, "--total_step", 2, "--log_step", 1, "--metadata", "false",
                                 "--d_features", name)
        assert code == 0, err
    plain, features = state("plain", 2), state("features", 2)
    own = {key: weight for key, weight in features["D"].items() if not key.startswith("feature_heads")}
    assert own.keys() == plain["D"].keys() and len(own) < len(features["D"]) < len(own) + 30
    assert sum(weight.numel() for weight in features["D"].values()) < 2e6, "no network of 15 million"
    first, *_, last = [line for line in lines("features") if "features/d_real" in line]
    assert first["features/d_real"] != last["features/d_real"]
    assert not any("features/d_real" in line for line in lines("plain"))
    assert (features["G"]["to_rgb.parametrizations.weight.original"]
            != plain["G"]["to_rgb.parametrizations.weight.original"]).any(), "G is trained by the heads, too"
    assert fastgan("--version", "features", "--total_step", 3, "--d_features", "none")[0] == 2, "a setting of the run"


@pytest.mark.gpu
def test_the_same_on_cuda(fastgan):
    flags = ("--device", "cuda", "--deterministic", "true", "--d_features", "vgg16_fine",
             "--augment", "color,mirror")
    fastgan("--version", "straight", "--total_step", 6, *flags)
    fastgan("--version", "resumed", "--total_step", 3, "--sample_step", 1, *flags)
    code, _, _ = fastgan("--version", "resumed", "--total_step", 6, *flags)
    assert code == 0
    assert_same_state(state("straight", 6), state("resumed", 6))
    assert fastgan("--version", "straight", "--train", "false", "--device", "cuda")[0] == 0


def test_sampling_needs_no_flags_no_pictures_no_cache_and_no_vgg(fastgan, run, pictures, monkeypatch):
    fastgan("--version", "a", "--total_step", 2, "--metadata_sample", "bank")
    assert share_of_rows(state("a", 2)) == 1
    shutil.rmtree(pictures)
    shutil.rmtree("cache")
    monkeypatch.setattr(vgg, "load_vgg", lambda *_: pytest.fail("VGG is not needed"))
    recomputed, recompute = [], trained.recompute_bn_stats
    monkeypatch.setattr(trained, "recompute_bn_stats", lambda G, inputs, *more: (
        recomputed.append(tuple(inputs.z.shape)), recompute(G, inputs, *more)))
    draws = []
    for how in ((), ("--metadata_sample", "mix"), ("--metadata_sample", "gauss")):
        code, out, _ = run("--version", "a", "--train", "false", "--num_samples", 5, *how, tiny=False)
        assert code == 0
        draws.append(generated("a", 2, f"_metadata-{how[1]}" if how else ""))       # each in a folder of its own
    assert recomputed == [(256, 8 + 512)] * 2, "of the run's own way of drawing metadata the checkpoint's serve"
    assert draws[0].shape == (5, 64, 64, 3)
    assert not any(np.array_equal(one, other) for one, other in itertools.combinations(draws, 2))
    assert run("--like", "samples/a/0000002_generated_seed0_metadata-gauss/000001.png", tiny=False)[0] == 0
    again = Image.open("samples/a/0000002_seed0_picture000001_metadata-gauss.png")
    assert (np.asarray(again) == draws[2][1]).all()
    shutil.rmtree("samples/a/0000002_generated_seed0")
    run("--version", "a", "--train", "false", "--num_samples", 3, tiny=False)
    difference = np.abs(generated("a", 2).astype(int) - draws[0][:3])      # other batches are rounded otherwise
    assert difference.max() <= 1, "picture i is the same for any number"


def test_lpips_compares_the_reconstructions_when_asked(fastgan, monkeypatch):
    net = SmallLpips()
    monkeypatch.setattr(lpips, "load_lpips", lambda weights, hint: net)
    monkeypatch.setattr(lpips, "require", lambda weights: None)
    code, out, _ = fastgan("--version", "a", "--total_step", 1, "--log_step", 1, "--metadata", "false", "--recon",
                           "lpips")
    assert code == 0 and "reconstruction loss of D: lpips" in out
    assert net.seen == [(3 * 4, 3, 32, 32)] * 2, "three reconstructions of each picture, and their targets"
    assert lines("a")[0]["recon/last"] > 0


@pytest.mark.soak
def test_d_learns_to_reconstruct(fastgan):
    fastgan("--version", "a", "--total_step", 40, "--log_step", 1, "--metadata", "false", "--augment", "none",
            "--d_lr", "0.002")
    recon = [line["recon/small"] for line in lines("a")]
    assert np.mean(recon[-5:]) < 0.9 * np.mean(recon[:5])


def test_dry_run_counts_fastgans_parameters_and_touches_no_cache(fastgan):
    code, out, _ = fastgan("--version", "a", "--dry_run")
    G, D = fastgan_models.Generator(64, 8, 4), fastgan_models.Discriminator(64, 4)
    assert code == 0 and os.listdir() == ["pictures"]
    assert f"G parameters: {sum(w.numel() for w in G.parameters())}\n" in out
    assert f"D parameters: {sum(w.numel() for w in D.parameters())}\n" in out


def test_a_dry_run_says_what_training_would_fetch_first(fastgan, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    _, out, _ = fastgan("--version", "a", "--dry_run", "--metadata", "true", "--vgg_weights", "imagenet")
    assert "training begins by fetching them (553 MB)" in out
    assert "fetching" not in fastgan("--version", "a", "--dry_run")[1]


@pytest.mark.soak
def test_two_processes_share_one_extraction_and_one_run(tmp_path, pictures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = (*FASTGAN, "--image_path", pictures, "--vgg_weights", "random")
    straight = two_processes(MAIN, *flags, "--version", "straight", "--total_step", 2)
    assert straight.returncode == 0, straight.stderr
    assert len(list(Path("cache/metadata").iterdir())) == 1
    assert straight.stdout.count("computing relu5_3 of VGG-16") == 1
    assert state("straight", 2)["samples_seen"] == 8
