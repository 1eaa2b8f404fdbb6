"""Samples drawn for a metric are byte-identical to those that `--mode sample` writes."""

from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_OF_ANY
from stand_ins import CPU

from device.precision import Precision
from generate.draw import DrawnSamples, recompute_bn_stats
from generate.latents import Inputs
from generate.trained import load_generator
from metrics.swd import PictureFiles
from parameter import resolve
from storage import checkpoint


@pytest.mark.parametrize(("count", "batch"), [(256, 51), (256, 12), (64, 9), (256, 64), (5, 8)])
def test_batch_statistics_are_of_parts_that_count_alike(count, batch):
    """As 128x160 has batches of 51, 256 images made five of them, and one image with a sixth of the weight."""
    G, seen = torch.nn.BatchNorm1d(3), []
    G.register_forward_pre_hook(lambda net, arguments, named: ((named["z"],), {}), with_kwargs=True)
    G.register_forward_hook(lambda net, arguments, out: seen.append(len(out)))
    z = torch.randn(count, 3)
    recompute_bn_stats(G, Inputs(z), Precision("fp32", CPU.device), batch)
    assert sum(seen) == count and max(seen) - min(seen) <= 1 and max(seen) <= batch
    torch.testing.assert_close(G.running_mean, z.mean(0), atol=0.01, rtol=0)


FASTGAN = (*TINY_OF_ANY, "--model", "fastgan", "--imsize", 64, "--recon", "l1", "--vgg_weights",
           "random")


@pytest.mark.parametrize(("flags", "samplers"), [
    (TINY, [None]), pytest.param(FASTGAN, ["mix", "gauss"], marks=pytest.mark.soak)],
                         ids=["sagan", "fastgan with metadata, as in training and others"])
def test_what_is_drawn_is_what_the_command_writes(run, pictures, flags, samplers):
    code, _, err = run(*flags, "--version", "a", "--total_step", 1, "--dataset", "folder", "--image_path", pictures,
                       tiny=False)
    assert code == 0, err
    for seed, sampler in enumerate(samplers, start=3):
        again = {"version": "a", "seed": seed, "device": "cpu"} | ({"metadata_sample": sampler} if sampler else {})
        command = [word for flag, value in again.items() for word in (f"--{flag}", value)]
        code, _, err = run("--mode", "sample", "--num_samples", 70, *command, tiny=False)
        assert code == 0, err
        other = "_metadata-gauss" if sampler == "gauss" else ""         # than the run's own
        written = PictureFiles.below(Path(f"samples/a/0000001_generated_seed{seed}{other}"))
        assert len(written) == 70 and len(torch.unique(written[0:70], dim=0)) == 70
        config = resolve(again, checkpoint.saved_config)
        trained = load_generator(config, CPU, Precision(config.precision, CPU.device))

        def draw(count, trained=trained, config=config):
            return DrawnSamples(trained.G, trained.latents, count, config.seed, trained.precision, config.imsize)

        drawn = draw(70)
        assert len(drawn) == 70
        for part in (slice(0, 70), slice(0, 64), slice(64, 70)):
            found = drawn[part]
            assert found.dtype == torch.uint8 and torch.equal(found, written[part])
        for part in (slice(5, 12), slice(60, 68), slice(69, 80), slice(-3, None)):
            apart = (drawn[part].int() - written[part]).abs()
            assert apart.max() <= 1 and apart.float().mean() < 1e-3, "equal up to rounding"
        fewer = draw(6)
        assert len(fewer) == 6 and (fewer[0:9].int() - written[0:6]).abs().max() <= 1
