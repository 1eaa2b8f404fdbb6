"""The command line: which values are refused, with which exit code and message, and which defaults apply."""

import argparse
import importlib
import json
import os
import re
import runpy
from pathlib import Path

import pytest
import torch
from conftest import MAIN

import parameter
from device import distributed
from errors import UsageError
from flags.common import LOSSES
from flags.scores import FEATURE_NETS, METRICS
from parameter import FAMILIES, FLAGS, GROUPS, parse, resolve, to_resume

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(("flags", "words"), [
    ("--imsize 48", "--imsize 48: must be 32, 64, 128 or 256"),
    ("--imsize 512", "--imsize 512: must be 32, 64, 128 or 256 with --model sagan"),
    ("--model fastgan --imsize 32", "--imsize 32: must be 64, 128, 256, 512 or 1024 with --model fastgan"),
    ("--model fastgan --adv_loss wgan-gp", "--adv_loss wgan-gp"),
    ("--model fastgan --slae_kernel 5", "--slae_kernel 5: must be 3 or 7"),
    ("--model fastgan --metadata_layer relu3_3", "--metadata_layer: 'relu3_3' is not one of relu5_3, relu4_3"),
    ("--model fastgan --g_attn 16", "--g_attn is for --model sagan, this is fastgan"),
    ("--slae true", "--slae is for --model fastgan, this is sagan; leave it out"),
    ("--metadata false", "--metadata is for --model fastgan"),
    ("--attn_queries 0.5", "--attn_queries: '0.5' is not one to eight points y,x;y,x"),
    ("--attn_queries 0.5,1.5", "'0.5,1.5' is not"),
    ("--attn_queries 0.5,nan", "'0.5,nan' is not"),
    ("--model fastgan --attn_queries 0.5,0.5", "--attn_queries is for --model sagan"),
    ("--label_noise 1.5", "--label_noise 1.5: must be at most 1"),
    ("--model fastgan --recon_weight -1", "--recon_weight -1.0: must be at least 0"),
    ("--g_attn 64", "--g_attn 64: at --imsize 64 the feature sizes are 4,8,16,32"),
    ("--d_attn 8,5", "there is no 5"),
    ("--g_attn big", "--g_attn: 'big' is neither a list of sizes"),
    ("--batch_size 0", "--batch_size 0: must be at least 1"),
    ("--total_step -1", "--total_step -1: must be at least 1"),
    ("--sample_step 0", "--sample_step 0"),
    ("--d_iters 0", "--d_iters 0"),
    ("--g_conv_dim 0", "--g_conv_dim 0"),
    ("--num_samples 0", "--num_samples 0"),
    ("--num_workers -1", "--num_workers -1"),
    ("--num_workers many", "--num_workers: 'many' is neither a whole number nor auto"),
    ("--g_lr 0", "--g_lr 0.0"),
    ("--g_lr nan", "--g_lr nan"),
    ("--beta1 1.0", "--beta1 1.0: must be in [0, 1)"),
    ("--lambda_gp inf", "--lambda_gp inf: give a finite number"),
    ("--label_noise=-inf", "--label_noise -inf: give a finite number"),
    ("--imsize 0", "--imsize 0: must be 32, 64, 128 or 256"),
    ("--total_step 9999999999", "--total_step 9999999999: must be at most 2147483647"),
    ("--z_dim 9999999999", "--z_dim 9999999999: must be at most 65536"),
    ("--version=", "--version '': use a plain name"),
    ("--config=", "--config : cannot be read"),
    ("--log_path=", "--log_path: is empty"),
    (f"--sample_path {'x' * 256}", "--sample_path: has a name of more than 255 bytes"),
    (f"--version {'ä' * 60}", "use a plain name of up to 100 bytes"),
    ("--version index.html", "--version index.html: is the name of a file"),
    ("--grapefruit 1", "unknown flag --grapefruit: see python main.py --help"),
    ("--beta2 -0.1", "--beta2 -0.1: must be in [0, 1)"),
    ("--version ../../x", "--version '../../x'"),
    ("--version /etc/x", "--version '/etc/x'"),
    ("--version ..", "--version '..'"),
    ("--device cuda:99", "--device cuda:99"),
    ("--device tpu", "--device tpu: use auto, cpu, cuda, cuda:N or mps"),
    ("--imgsize 64", "unknown flag --imgsize: did you mean --imsize?"),
    ("--batch-size 64", "did you mean --batch_size?"),
    ("--xyzzy 1", "unknown flag --xyzzy"),
    ("--classes cat dog", "'dog' belongs to no flag: a list has commas, such as --classes cat,dog"),
    ("--dataset lsum", "'lsum' is not one of celeb, lsun, cifar10, folder, toy; did you mean lsun?"),
    ("--model qgan", "--model: 'qgan'"),
    ("--adv_loss wgan", "did you mean wgan-gp?"),
    ("--augment colour", "--augment: 'colour' is not one of color, translation, mirror, cutout; did you mean color?"),
    ("--train maybe", "--train: 'maybe' is neither true nor false"),
    ("--conditional maybe", "--conditional: 'maybe' is neither true nor false nor auto"),
    ("--total_step 1e5", "--total_step: '1e5' is no whole number"),
    ("--g_lr fast", "--g_lr: 'fast' is no number"),
    ("--model stylegan", "--model: 'stylegan' is not one of sagan, fastgan\n"),
    ("--imsize", "--imsize: expected one argument\n"),
    ("--imsize --device cpu", "--imsize: expected one argument\n"),
    ("--classes -dash", "write --classes=-dash for a value that begins with -"),
    ("--version models/a/", "and not beginning with . or -, such as a\n"),
    ("--dataset folder", "--image_path DIR"),
    ("--train false --mode train", "contradict"),
    ("--config nowhere.json", "--config nowhere.json"),
    ("--parallel true --device cpu", "--parallel true: needs two or more CUDA devices"),
    ("--metrics fdi",
     "--metrics: 'fdi' is not one of fid, kid, pr, is, swd, ifid, nearest, lpips, share, cost; did you mean fid?"),
    ("--metrics fid,lpip", "did you mean lpips?"),
    ("--metrics fid,", "--metrics: '' is not one of"),
    ("--pretrained_model bset", "--pretrained_model: 'bset' is neither a step nor best"),
    ("--pretrained_model 0", "--pretrained_model 0: must be at least 1"),
    ("--fake_dir x", "--fake_dir x: is for --mode evaluate"),
    ("--metric_step 5 --metrics fid,lpips", "--metrics fid,lpips: lpips cannot be computed during training"),
    ("--metric_step 5 --metrics cost", "--metrics cost: cost cannot be computed during training, only by --mode ev"),
    ("--metric_step 5 --metrics nearest,swd,cost", "nearest and cost cannot be computed during training"),
    ("--mode evaluate --fake_dir x --metrics fid,lpips,cost", "lpips and cost cannot be computed for --fake_dir"),
    ("--mode evaluate --fake_dir x --real_dir y --metrics lpips", "lpips cannot be computed for --fake_dir"),
    ("--model fastgan --mode evaluate --metrics cost --against sagan", "--against: 'sagan' is not one of baseline"),
    ("--mode evaluate --fake_dir x --imsize 15", "--imsize 15: must be from 16 to 4096 with --fake_dir"),
    ("--mode evaluate --fake_dir x --real_dir y --imsize 4097", "--imsize 4097: must be from 16 to 4096"),
    ("--metric_step -1", "--metric_step -1: must be at least 0"),
    ("--num_eval 1", "--num_eval 1: must be at least"),
    ("--backtrack_steps 0", "--backtrack_steps 0: must be at least 1"),
    ("--holdout 0.6", "--holdout 0.6: must be at most 0.5"),
    ("--holdout nan", "--holdout nan: give a finite number"),
])
def test_usage_errors_name_the_flag_and_write_nothing(run, flags, words):
    code, out, err = run(*flags.split(), tiny=False)
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) <= 2 and "Traceback" not in err
    assert os.listdir() == []


@pytest.mark.parametrize(("flags", "words"), [
    ("--mode sample --real_dir x", "--real_dir x: is for --mode evaluate"),
    ("--model fastgan --mode evaluate --against baseline", "--against baseline: needs --metrics cost"),
    ("--model fastgan --preset small --mode evaluate --metrics cost --against baseline", "without SLAE and metadata"),
    ("--model fastgan --preset small --d_features_weight 0", "--d_features_weight 0"),
    ("--model fastgan --d_features_share 0.5", "--d_features none"),
    ("--mode evaluate --metrics cost --against baseline", "--against is for --model fastgan"),
    ("--model fastgan --metadata false --mode evaluate --backtrack_metadata true", "--backtrack_metadata true: this"),
    ("--mode evaluate --imsize 100", "--imsize 100: must be 32, 64, 128 or 256"),
    ("--mode evaluate --num_eval 3", "--num_eval 3: --metrics pr needs at least 6"),
    ("--metric_step 5 --metrics fid,pr --num_eval 3", "--num_eval 3: --metrics pr needs at least 6"),
    ("--mode sample --restart true", "--restart true: is for training, not for --mode sample"),
    ("--restart true --pretrained_model 5", "--restart true begins from scratch, --pretrained_model 5 goes on"),
    ("--adv_loss wgan-gp --label_noise 0.2", "--label_noise 0.2: has no effect with --adv_loss wgan-gp; leave it out"),
    ("--stop auto --metric_step 5 --metrics pr,swd", "--stop auto: has no effect with --metrics pr,swd; leave it out"),
    ("--stop auto", "--stop auto: has no effect with --metric_step 0"),
    ("--metrics kid", "--metrics kid: has no effect with --metric_step 0 (with N training measures every N steps)"),
    ("--num_eval 9 --mode sample", "--num_eval 9: has no effect with --mode sample"),
    ("--feature_net vgg16", "--feature_net vgg16: has no effect with --metric_step 0"),
    ("--mode interpolate --num_samples 5", "--num_samples 5: has no effect with --mode interpolate (--mode sample"),
    ("--dataset toy --image_path x", "--image_path x: has no effect with --dataset toy (--dataset folder takes"),
    ("--yes true", "--yes true: has no effect with --mode train"),
    ("--g_attn none --d_attn none --attn_raw true", "--attn_raw true: has no effect with networks without attention"),
    ("--model fastgan --slae false --attn_raw true", "--attn_raw true: has no effect with networks without attention"),
    ("--cache off --cache_dir x", "--cache_dir x: has no effect with --cache off"),
    ("--mode sample --seeds 3,4 --seed 7", "--seed 7: has no effect with --seeds 3,4"),
    ("--mode evaluate --wandb true", "--wandb true: has no effect with --mode evaluate"),
    ("--mode sample --film gif", "--film gif: has no effect with --mode sample"),
    ("--lambda_gp 5", "--lambda_gp 5.0: has no effect with --adv_loss hinge"),
    ("--model fastgan --lambda_gp 5", "--lambda_gp 5.0: has no effect with --adv_loss hinge"),
    ("--g_attn none --d_attn none --attn_pool true", "--attn_pool true: has no effect with --g_attn none --d_attn"),
    ("--model fastgan --metadata false --metadata_sample bank", "--metadata_sample bank: has no effect with --meta"),
    ("--model fastgan --slae false --slae_kernel 3", "--slae_kernel 3: has no effect with --slae false"),
])
def test_settings_that_do_not_fit_together_name_the_flag(flags, words):
    with pytest.raises(UsageError) as refused:
        resolve(parameter.parse(flags.split()))
    assert words in str(refused.value)


def test_a_setting_without_effect_is_refused_only_if_typed_and_not_the_default(tmp_path):
    before = saved(adv_loss="wgan-gp", label_noise=0.0)(None) | {"label_noise": 0.2, "lambda_gp": 10.0}
    assert resolve({"version": "a"}, lambda folder: before).label_noise == 0.2
    (tmp_path / "c.json").write_text(json.dumps({"lambda_gp": 5.0, "adv_loss": "hinge"}))
    assert resolve({"config": str(tmp_path / "c.json")}).lambda_gp == 5
    assert resolve({"lambda_gp": 10.0, "adv_loss": "hinge"}).lambda_gp == 10
    assert resolve({"adv_loss": "wgan-gp", "d_features": "vgg16", "label_noise": 0.2}).label_noise == 0.2, "of heads"
    with pytest.raises(UsageError, match="no effect"):
        resolve({"version": "a", "label_noise": 0.3}, lambda folder: before)


@pytest.mark.parametrize("mode", ["sample", "interpolate", "evaluate"])
def test_a_misspelt_version_is_told_the_near_ones(run, mode):
    flags = ("--mode", mode, "--device", "cpu")
    code, _, err = run("--version", "faces", *flags, tiny=False)
    assert code == 2 and "--version faces: there is no such run in models; there is none at all" in err
    for name in ("faces_a", "faces_b", *(f"z{number:02}" for number in range(12))):
        Path("models", name).mkdir(parents=True)
        Path("models", name, "0000001.pth").touch()
    code, _, err = run("--version", "facesa", *flags, tiny=False)
    assert code == 2 and "--version facesa: there is no such run in models; did you mean faces_a or faces_b?" in err
    code, _, err = run("--version", "portraits", *flags, tiny=False)
    assert code == 2 and "; there are faces_a, faces_b, z00, " in err and "z07 and 4 more" in err
    assert len(err.splitlines()) == 1 and os.listdir() == ["models"]


@pytest.mark.parametrize("word", ["true", "1", "yes", "True", "YES"])
def test_booleans_that_mean_true(word):
    assert parameter.parse(["--use_tensorboard", word]) == {"use_tensorboard": True}


@pytest.mark.parametrize("word", ["false", "0", "no", "False"])
def test_booleans_that_mean_false(word):
    assert parameter.parse(["--use_tensorboard", word]) == {"use_tensorboard": False}


def test_the_published_settings_are_the_defaults():
    config = resolve(parameter.parse(["--adv_loss", "hinge", "--version", "sagan_celeb"]))
    assert (config.dataset, config.imsize, config.z_dim, config.batch_size) == ("celeb", 64, 128, 64)
    assert (config.g_conv_dim, config.d_conv_dim, config.g_attn, config.d_attn) == (64, 64, (16, 32), (4, 8))
    assert (config.g_lr, config.d_lr, config.beta1, config.beta2) == (1e-4, 4e-4, 0.0, 0.9)
    assert (config.d_iters, config.sn, config.lr_decay) == (1, "both", 1.0)


def test_wgan_gp_brings_its_own_defaults_and_flags_win():
    config = resolve({"adv_loss": "wgan-gp"})
    assert (config.d_iters, config.sn, config.lambda_gp) == (5, "none", 10.0)
    config = resolve({"adv_loss": "wgan-gp", "d_iters": 2, "sn": "d"})
    assert (config.d_iters, config.sn) == (2, "d")


def test_fastgan_has_its_published_settings():
    config = resolve({"model": "fastgan"})
    assert (config.imsize, config.z_dim, config.batch_size, config.hflip) == (256, 256, 8, True)
    assert (config.g_lr, config.d_lr, config.beta1, config.beta2, config.ema_decay) == (2e-4, 2e-4, 0.5, 0.999, 0.999)
    assert (config.augment, config.label_noise, config.total_step) == (("color", "translation"), 0.2, 50_000)
    assert (config.slae, config.slae_kernel, config.slae_d, config.metadata) == (True, 7, False, True)
    assert (config.metadata_layer, config.metadata_sample, config.vgg_weights) == ("relu5_3", "mix", "imagenet")
    assert resolve({"model": "fastgan", "version": None}).version == "fastgan_celeb"


def test_what_belongs_to_one_model_is_unset_with_the_other():
    sagan, fastgan = resolve({}), resolve({"model": "fastgan"})
    for model, owner, other in (("sagan", sagan, fastgan), ("fastgan", fastgan, sagan)):
        for flag in FAMILIES[model].FLAGS:
            assert getattr(other, flag.name) is None, flag.name
            assert getattr(owner, flag.name) is not None or flag.name in ("attn_queries", "against")
    assert resolve({"augment": ("cutout",), "label_noise": 0.1}).label_noise == 0.1, "DiffAugment serves both"


@pytest.mark.parametrize(("flags", "there", "recon"), [
    ({}, False, "lpips"),                                       # metadata fetch the weights
    ({"metadata": False}, False, "l1"),
    ({"metadata": False}, True, "lpips"),
    ({"vgg_weights": "random"}, False, "l1"),
    ({"vgg_weights": "my.pth"}, True, "lpips"),
    ({"vgg_weights": "my.pth"}, False, "l1"),
    ({"recon": "l1"}, True, "l1"),
    ({"preset": "cpu"}, True, "l1"),
    ({"metadata": False, "d_features": "vgg16_fine"}, False, "lpips"),   # D's features do, too
])
def test_reconstructions_are_compared_by_lpips_where_its_weights_are(flags, there, recon):
    assert resolve({"model": "fastgan", **flags}, weights_there=lambda weights: there).recon == recon


def test_a_run_needs_its_name_alone_to_go_on_whatever_its_model():
    saved = json.loads(parameter.as_json(resolve({"model": "fastgan", "preset": "cpu", "slae": False, "version": "a"})))
    del saved["g_lr"]                                           # of an older program, say: fastgan's preset fills it
    config = resolve({"version": "a"}, lambda folder: saved)
    assert (config.model, config.preset, config.slae, config.g_attn) == ("fastgan", "cpu", False, None)
    assert config.g_lr == 2e-4
    other = json.loads(parameter.as_json(resolve({"imsize": 32, "version": "a"})))     # with attention at 4
    with pytest.raises(UsageError, match="--arch resnet: run 'a' was started with dcgan"):
        resolve({"version": "a", "arch": "resnet"}, lambda folder: other)
    with pytest.raises(UsageError, match="--slae true: run 'a' was started with false"):
        resolve({"version": "a", "slae": True}, lambda folder: saved)
    with pytest.raises(UsageError, match="--g_attn is for --model sagan"):
        resolve({"version": "a", "g_attn": (8,)}, lambda folder: saved)


def test_a_sagan_runs_config_file_serves_fastgan_too(tmp_path):
    (tmp_path / "c.json").write_text(parameter.as_json(resolve({"batch_size": 5})))
    config = resolve({"config": str(tmp_path / "c.json"), "model": "fastgan", "imsize": 64})
    assert (config.batch_size, config.g_attn, config.slae) == (5, None, True)


def test_attention_moves_with_the_image_size():
    found = {imsize: (resolve({"imsize": imsize}).g_attn, resolve({"imsize": imsize}).d_attn)
             for imsize in (32, 64, 128, 256)}
    assert found == {32: ((8, 16), (4, 8)), 64: ((16, 32), (4, 8)), 128: ((32, 64), (8, 16)),
                     256: ((64, 128), (16, 32))}


def test_a_preset_fills_only_what_was_left_unset():
    preset = FAMILIES["sagan"].PRESETS["cpu"]
    config = resolve({"preset": "cpu", "g_lr": 0.5})
    assert config.g_lr == 0.5
    assert all(getattr(config, name) == value for name, value in preset.items() if name != "g_lr")


@pytest.mark.parametrize(("imsize", "narrow"), [({}, True), ({"imsize": 64}, True), ({"imsize": "64x96"}, True),
                                                ({"imsize": 128}, False)])
def test_fastgans_preset_for_few_pictures_has_narrow_networks_where_they_were_measured(imsize, narrow):
    config = resolve({"model": "fastgan", "preset": "small", **imsize})
    assert (config.d_features, config.d_features_weight, config.d_features_share, config.slae, config.metadata) == (
        "vgg16_fine", 0.3, 0.125, False, False)
    assert config.augment == ("color", "mirror")
    assert (config.g_conv_dim, config.d_conv_dim, config.sn, config.recon_weight, config.g_lr, config.recon) == (
        (8, 8, "d", 0, 4e-4, "l1") if narrow else (64, 64, "both", 1, 2e-4, "lpips"))


def test_the_gpu_preset_is_the_published_one_scaled_to_the_batch():
    """Batches and rates of four times, a quarter of the steps; beyond that rates grow by the square root."""
    def scaled(**typed):
        config = resolve({"preset": "gpu", **typed})
        return (config.batch_size, config.g_lr, config.d_lr, config.beta1, config.beta2, config.ema_decay,
                config.ema_start, config.total_step)

    assert scaled() == (256, 4e-4, 1.6e-3, 0.0, 0.6, 0.996006, 0, 250_000)
    assert scaled(batch_size=64) == (64, 1e-4, 4e-4, 0.0, 0.9, 0.999, 0, 1_000_000), "as published"
    assert scaled(batch_size=1024)[1:6] == (8e-4, 3.2e-3, 0.0, 0.5, round(0.999**16, 6)), "beta2: Adam takes no signs"
    assert scaled(model="fastgan")[:6] == (32, 8e-4, 8e-4, 0.0, 0.996, 0.996006)
    assert scaled(arch="resnet") == (1024, 4e-4, 1.6e-3, 0.0, 0.6, 0.996006, 500, 250_000)
    assert scaled(g_lr=0.5, d_lr=0.25)[:3] == (256, 0.5, 0.25)
    assert scaled(batch_size=1) == (1, *scaled(batch_size=64)[1:]), "of smaller batches the published settings"
    assert scaled(batch_size=10**6)[1:] == scaled(batch_size=4096)[1:]
    for wrong in (-4, 10**400):
        with pytest.raises(UsageError, match="--batch_size"):
            scaled(batch_size=wrong)


def test_a_folder_of_pictures_may_be_called_data():
    assert resolve({"dataset": "folder", "image_path": "./data"}).image_path == "./data"


def test_a_batch_that_processes_cannot_share_is_refused(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, _, err = run("--batch_size", 4)
    assert code == 2 and "--batch_size 4 must be a multiple of the 3 processes" in err and os.listdir() == []


@pytest.mark.parametrize(("flags", "words"), [
    ("", "4 processes on this machine, which has 2 GPUs; use --nproc_per_node=2"),
    ("--device cuda", "4 processes on this machine, which has 2 GPUs"),
    ("--device cuda:1", "--device cuda:1: is one GPU, and each process has its own"),
])
def test_processes_have_a_gpu_each(monkeypatch, flags, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UsageError, match=words):
        resolve(parse(flags.split()))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert flags == "--device cuda:1" or resolve(parse(flags.split())).device in ("auto", "cuda")


def test_a_restart_begins_with_what_is_typed_alone():
    find = saved(seed=5, g_lr=0.3, z_dim=7)
    assert resolve({"version": "a"}, find).seed == 5
    begun = resolve({"version": "a", "restart": True, "dataset": "toy", "z_dim": 9}, find)
    assert (begun.seed, begun.g_lr, begun.z_dim) == (0, 1e-4, 9)


def test_parallel_starts_one_process_for_each_gpu(run, monkeypatch):
    started = []
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(distributed, "launch", lambda *of_what: started.append(of_what) or 7)
    typed = ["--parallel", "true", "--batch_size", "6"]
    assert run(*typed, tiny=False)[0] == 7 and started == [(3, MAIN, typed)]


def test_the_command_that_goes_on_is_named_without_what_would_begin_again():
    for flags, words in (((), "the same command"), (("--restart", "true"), "the same command without --restart"),
                         (("--pretrained_model", "5"), "the same command without --pretrained_model")):
        assert to_resume(resolve(parse(flags))) == words


def test_the_config_is_read_only():
    config = resolve({})
    with pytest.raises(AttributeError):
        config.imsize = 32


def test_a_config_file_is_read_back_and_the_command_line_wins(tmp_path):
    original = resolve({"imsize": 128, "g_attn": (8,), "hflip": True, "adv_loss": "wgan-gp",
                        "attn_queries": ((0.25, 0.5), (1.0, 0.0))})
    (tmp_path / "c.json").write_text(parameter.as_json(original))
    again = resolve({"config": str(tmp_path / "c.json"), "batch_size": 3})
    assert (again.imsize, again.g_attn, again.hflip, again.d_iters, again.batch_size) == (128, (8,), True, 5, 3)
    assert again.attn_queries == ((0.25, 0.5), (1.0, 0.0))
    (tmp_path / "c.json").write_text(json.dumps({"imsiz": 3}))
    with pytest.raises(UsageError, match="unknown setting 'imsiz'"):
        resolve({"config": str(tmp_path / "c.json")})


@pytest.mark.parametrize(("settings", "typed"), [
    ({}, {"preset": "cpu"}), ({"g_lr": 0.5}, {"preset": "cpu"}), ({"preset": "cpu"}, {"preset": "published"}),
    ({"model": "fastgan"}, {"preset": "cpu"}), ({}, {"adv_loss": "wgan-gp"}), ({}, {"imsize": 128}),
    ({"preset": "cpu"}, {"arch": "resnet"}), ({"arch": "resnet", "imsize": 32}, {"imsize": 128}),
    ({"arch": "resnet", "imsize": 32, "batch_size": 16}, {"preset": "cpu"}), ({"preset": "gpu"}, {"batch_size": 512}),
    ({"preset": "gpu", "batch_size": 512}, {"preset": "published"}), ({"g_attn": (32,)}, {"preset": "cpu"}),
    ({"model": "fastgan", "preset": "small"}, {"imsize": 128}), ({"model": "fastgan"}, {"preset": "small"})])
def test_of_a_runs_config_nothing_stays_that_follows_from_what_is_typed_otherwise(tmp_path, settings, typed):
    (tmp_path / "c.json").write_text(parameter.as_json(resolve(settings)))
    again = vars(resolve({"config": str(tmp_path / "c.json"), **typed}))
    assert {**again, "config": None} == vars(resolve({**settings, **typed}))


def test_a_file_for_settings_that_was_written_by_hand_keeps_them_beside_a_typed_preset(tmp_path):
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"batch_size": 5}).encode())      # as by Notepad
    assert resolve({"config": str(tmp_path / "c.json"), "preset": "cpu"}).batch_size == 5


def test_command_line_then_config_file_then_saved_run_then_preset(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"g_lr": 0.02, "d_lr": 0.02}))
    saved = {**json.loads(parameter.as_json(resolve({"preset": "cpu", "version": "a"}))),
             "g_lr": 0.03, "d_lr": 0.03, "beta2": 0.33}
    config = resolve({"version": "a", "config": str(tmp_path / "c.json"), "g_lr": 0.01}, lambda folder: saved)
    assert (config.g_lr, config.d_lr, config.beta2, config.preset) == (0.01, 0.02, 0.33, "cpu")
    with pytest.raises(UsageError, match="--preset published: run 'a' was started with cpu"):
        resolve({"version": "a", "preset": "published"}, lambda folder: saved)


def test_every_flag_of_the_command_line_we_follow_is_there():
    names = {
        "model", "adv_loss", "imsize", "z_dim", "g_conv_dim", "d_conv_dim", "lambda_gp", "version", "total_step",
        "d_iters", "batch_size", "num_workers", "g_lr", "d_lr", "lr_decay", "beta1", "beta2", "pretrained_model",
        "train", "parallel", "dataset", "use_tensorboard", "image_path", "log_path", "model_save_path",
        "sample_path", "attn_path", "log_step", "sample_step", "model_save_step",
    }
    assert names <= set(resolve({}).__dict__)


def docs_generator():
    """The globals of docs/write_flags.py, which writes docs/flags.md."""
    return runpy.run_path(str(DOCS / "write_flags.py"))


def test_docs_and_help_list_the_same_flags_and_defaults(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")               # or --help breaks lines at hyphens
    with pytest.raises(SystemExit) as end:
        run("--help", tiny=False)
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    page, generator = (DOCS / "flags.md").read_text(encoding="utf-8"), docs_generator()
    assert page == generator["markdown"](), "docs/flags.md is out of date: make docs"
    flags = [flag for group in parameter.GROUPS.values() for flag in group]
    assert re.findall(r"^\| `--(\w+)` \| .* \| .* \|$", page.partition("## What a run keeps")[0], re.M) == [
        flag.name for flag in flags]
    for flag in flags:
        default = parameter.defaults(flag)
        words = flag.help + (f" (default: {default})" if default else "")
        kind = flag.metavar
        values = (f"{kind} [{kind} ...]",) if flag.several else (kind, f"[{kind}]")
        assert any(f"--{flag.name} {value} {words}" in shown for value in values), words
        assert f"| `--{flag.name}` | {f'`{default}`' if default else '–'} | {generator['cell'](flag.help)} |" in page


# ------------------------------------------------------------------------------------------------------ evaluation


def saved(**settings):
    """find_saved(folder) of a run that was started with these."""
    config = json.loads(parameter.as_json(resolve({"version": "a", **settings})))
    return lambda folder: config


def test_metrics_and_the_checkpoint_are_named_by_words():
    typed = parameter.parse(["--metrics", "kid,fid,kid", "--pretrained_model", "best"])
    assert typed == {"metrics": ("kid", "fid"), "pretrained_model": "best"}
    assert resolve({**typed, "metric_step": 5}).pretrained_model == "best"
    assert parameter.parse(["--pretrained_model", "5000"]) == {"pretrained_model": 5000}
    assert resolve({}).metrics == ("fid", "kid", "pr", "is") and resolve({}).metric_step == 0
    config = resolve({"feature_net": "vgg16", "metric_step": 5})
    assert config.feature_net == "vgg16", "the metrics that were not typed may stay"


@pytest.mark.parametrize("flags", [
    {"mode": "evaluate", "metrics": ("lpips", "nearest", "cost"), "metric_step": 5},    # metric_step is the run's
    {"metrics": ("fid", "kid", "pr", "is", "swd"), "metric_step": 5},
    {"mode": "evaluate", "metrics": ("fid", "kid", "pr", "is", "swd", "nearest"), "fake_dir": "x", "dataset": "toy"},
    {"model": "fastgan", "mode": "evaluate", "metrics": ("cost",), "against": "baseline"},
    {"model": "fastgan", "mode": "evaluate", "metrics": ("lpips",), "backtrack_metadata": True},
])
def test_metrics_that_fit_are_taken(flags):
    assert resolve(flags).metrics == flags["metrics"]


def test_cost_is_measured_by_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--metrics cost: is measured on one device"):
        resolve({"mode": "evaluate", "metrics": ("fid", "cost")})
    assert resolve({"mode": "evaluate"}).metrics and resolve({"metrics": ("fid",), "metric_step": 3}).mode == "train"


def test_how_it_is_measured_is_the_runs_but_evaluate_takes_the_usual_metrics():
    find = saved(metric_step=7, num_eval=99, metrics=("kid",), inception_weights="random")
    config = resolve({"version": "a"}, find)
    assert (config.metric_step, config.num_eval, config.metrics) == (7, 99, ("kid",))
    assert config.inception_weights == "random"
    config = resolve({"version": "a", "mode": "evaluate"}, find)
    assert (config.num_eval, config.metrics) == (99, ("fid", "kid", "pr", "is"))
    assert resolve({"version": "a", "mode": "evaluate", "metrics": ("swd",)}, find).metrics == ("swd",)
    assert resolve({"version": "a", "metric_step": 0}, find).metric_step == 0


def test_what_was_held_out_stays_held_out():
    assert resolve({"version": "a"}, saved(holdout=0.1)).holdout == 0.1
    for mode in ("train", "evaluate"):
        with pytest.raises(UsageError, match="--holdout 0.2: run 'a' was started with 0.1"):
            resolve({"version": "a", "holdout": 0.2, "mode": mode}, saved(holdout=0.1))
        with pytest.raises(UsageError, match="--holdout 0.1: run 'a' was started with 0.0"):
            resolve({"version": "a", "holdout": 0.1, "mode": mode}, saved())
    before = saved()(None)
    del before["holdout"]                                       # of a program that had no such flag: it held out none
    assert resolve({"version": "a"}, lambda folder: before).holdout == 0


@pytest.mark.parametrize(("settings", "mode", "refused"), [
    ({"model": "fastgan"}, "train", True),
    ({"model": "fastgan"}, "evaluate", False),
    ({"model": "fastgan"}, "sample", False),
    ({"model": "fastgan", "metadata": False}, "train", False),
    ({}, "train", False),
    ({}, "evaluate", False),
])
def test_vgg_weights_are_fixed_where_metadata_come_from_them(settings, mode, refused):
    typed = {"version": "a", "vgg_weights": "random", "mode": mode}
    if refused:
        with pytest.raises(UsageError, match="--vgg_weights random: run 'a' was started with imagenet"):
            resolve(typed, saved(**settings))
    else:
        assert resolve(typed, saved(**settings)).vgg_weights == "random"
    assert resolve({"version": "a", "mode": mode}, saved(**settings)).vgg_weights == "imagenet"


@pytest.mark.parametrize("mode", ["train", "sample", "evaluate"])
def test_a_saved_sagan_of_before_it_had_vgg_weights_still_resolves(mode):
    before = {**saved()(None), "vgg_weights": None}
    assert resolve({"version": "a", "mode": mode}, lambda folder: before).vgg_weights == "imagenet"


@pytest.mark.parametrize("imsize", [None, 16, 100, 4096])
def test_two_folders_need_no_run_no_data_set_and_no_size_of_a_model(imsize):
    def find(folder):
        raise AssertionError("a run was looked for")

    flags = {"mode": "evaluate", "dataset": "folder", "fake_dir": "x", "real_dir": "y"}
    assert resolve({**flags, **({"imsize": imsize} if imsize else {})}, find).imsize == imsize


def test_a_folder_against_a_runs_data_set_takes_size_and_data_from_the_run():
    find = saved(dataset="folder", image_path="faces", imsize=128)
    flags = {"version": "a", "mode": "evaluate", "fake_dir": "x"}
    config = resolve(flags, find)
    assert (config.imsize, config.image_path, config.dataset) == (128, "faces", "folder")
    assert resolve({**flags, "imsize": 50}, find).imsize == 50, "its own size may be another"
    assert resolve(flags).imsize is None
    with pytest.raises(UsageError, match="--image_path DIR"):
        resolve({**flags, "dataset": "folder"})


def test_a_folder_against_the_data_of_a_run_that_is_not_there_is_refused():
    flags = {"version": "mien", "mode": "evaluate", "fake_dir": "x"}
    with pytest.raises(UsageError, match="--version mien: there is no such run in models"):
        resolve(flags, lambda folder: None)
    by_hand = {"dataset": "folder", "image_path": "faces"}
    assert resolve({**flags, **by_hand}, lambda folder: None).image_path == "faces"
    del flags["version"]
    assert resolve(flags, lambda folder: None).dataset == "celeb"


# ---- flags and the tables that they choose from ----

CHOICES = {
    "model": lambda: importlib.import_module("families").FAMILIES,
    "recon": lambda: importlib.import_module("families").RECONSTRUCTIONS,
    "adv_loss": lambda: importlib.import_module("losses").OBJECTIVES,
    "dataset": lambda: importlib.import_module("dataset.table").DATASETS,
    "check_data": lambda: ["auto", "off", *importlib.import_module("dataset.check").LEVELS],
    "metadata_sample": lambda: importlib.import_module("generate.metadata").SAMPLERS,
    "metadata_layer": lambda: importlib.import_module("pretrained.vgg").LAYERS,
    "d_features": lambda: ["none", *importlib.import_module("pretrained.vgg").D_FEATURES],
    "augment": lambda: importlib.import_module("diffaug").POLICIES,
    "metrics": lambda: METRICS,
    "mode": lambda: ["train", "evaluate", "clean_data", "evolution", "serve",
                     *importlib.import_module("generate.modes").MODES],
    "preset": lambda: FAMILIES["sagan"].PRESETS,
    "against": lambda: FAMILIES["fastgan"].BASELINES,
}


def accepts(flag, word):
    try:
        flag.type(word)
    except argparse.ArgumentTypeError:
        return False
    return True


@pytest.mark.parametrize("name", CHOICES)
def test_a_flag_takes_the_names_of_its_table_and_no_others(name):
    table, flag = list(CHOICES[name]()), FLAGS[name]
    assert all(accepts(flag, word) for word in table)
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        flag.type("something-else")
    offered = re.search(r"is not one of ([^;]*)", str(refused.value))[1].split(", ")
    assert sorted(offered) == sorted(table)


def test_every_metric_has_the_file_and_the_functions_that_its_row_says():
    for name, row in METRICS.items():
        module = importlib.import_module(f"metrics.{row.file}")
        assert all(hasattr(module, word) for word in (["SetMeter"] if row.of_sets else ["require", "evaluate"])), name
    assert METRICS["pr"].least == importlib.import_module("metrics.features").COVERAGE_NEIGHBOURS + 1
    assert tuple(importlib.import_module("pretrained.feature_nets").FEATURE_NETS) == FEATURE_NETS


def test_families_agree_on_presets_and_every_loss_fills_the_same_settings():
    assert len({tuple(family.PRESETS) for family in FAMILIES.values()}) == 1
    assert {tuple(row) for row in LOSSES.values()} == {("d_iters", "sn")}
    for family in FAMILIES.values():
        assert all(accepts(FLAGS[name], parameter.written(value)) for preset in family.PRESETS.values()
                   for name, value in preset.items())
    assert len(FLAGS) == sum(len(group) for group in GROUPS.values()), "no name twice"
