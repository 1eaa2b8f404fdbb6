"""`cost`: two models are timed alternately, and peak memory is measured in a separate process."""

import json
import multiprocessing
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EVERY_ATTENTION, SMALL_FASTGAN, _warm, lines

from device import fast_step, precision
from device.distributed import Place
from errors import DataError
from generate.classes import Classes
from generate.metadata import Bank
from layers import attention, convolutions
from metrics import cost, meter
from parameter import parse, resolve
from pretrained import vgg
from storage import checkpoint
from training import memory

ALONE = Place(torch.device("cpu"))
SMALL = ("--imsize", "32", "--batch_size", "2", "--g_conv_dim", "4", "--d_conv_dim", "4", "--device", "cpu")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(cost, "SECONDS", 0.1)
    monkeypatch.setattr(cost, "TURN", 0.01)
    monkeypatch.setattr(cost, "LEAST", 4)


@pytest.mark.soak
def test_a_run_is_measured_against_the_baseline_in_one_table(run, pictures, quick, monkeypatch):
    monkeypatch.setattr(cost, "peak_memory", lambda config, bank, place, classes: 2**21 + 2**20 * config.slae)
    run(*SMALL_FASTGAN, "--version", "f", "--total_step", 1, "--dataset", "folder", "--image_path", pictures,
        "--z_dim", 8, "--num_workers", 0, "--metadata", "true", "--vgg_weights", "random", tiny=False)
    code, out, err = run("--version", "f", "--mode", "evaluate", "--metrics", "cost", "--against", "baseline",
                         tiny=False)
    assert code == 0, err
    own, baseline = lines("f")[-2:]
    more = own["g_parameters"] - baseline["g_parameters"]
    assert more == 3 * 98 + 512 * 8, "three masks of 2 x 7 x 7, and W of 512 x 8"
    assert own["d_parameters"] == baseline["d_parameters"] and baseline["sec_per_1000_steps"] > 0
    assert own["sec_per_1000_steps"] > 0 and (own["peak_memory_mib"], baseline["peak_memory_mib"]) == (3, 2)
    assert own["time_ratio"] > 0.2 and own["time_ratio_std"] > 0
    assert (own["source"], baseline["source"][:8]) == ("the run's model", "baseline") and "time_ratio" not in baseline
    assert own["protocol"] == baseline["protocol"] and "64 px, batch 4" in own["protocol"]
    assert "sec_per_1000_steps" in Path("logs/scores.md").read_text() and "time_ratio" in out
    saved = json.loads(Path("models/f/config.json").read_text())
    assert saved["slae"] and saved["metadata"], "measuring changes no run"


def config_of_batch(batch):
    return resolve(parse([*SMALL, "--imsize", "64", "--batch_size", str(batch)]))


def train_a_small_batch():
    cost.TimedConfig(config_of_batch(2), ALONE).run(1)
    return cost.TimedConfig


class AfterASmallBatch:
    """TimedConfig, once it arrives in another process: which has then trained, so that libraries are in its memory."""

    def __reduce__(self):
        return train_a_small_batch, ()


def test_memory_is_that_of_the_training_and_not_of_this_process(monkeypatch):
    started = SimpleNamespace(get_context=lambda method: {"spawn": _warm()}[method])
    monkeypatch.setattr(cost, "multiprocessing", started)       # as far from this process, but has imported everything
    ballast = torch.ones(64 * 2**20)                    # 256 MiB, which are none of it
    images = 32 * 3 * 64 * 64 * 4
    assert 4 * images < cost.peak_memory(config_of_batch(32), None, ALONE, AfterASmallBatch()) < 2**27
    assert ballast[0] == 1


# ---- the estimate, before there is anything to measure ----

WIDE = ("--imsize", "64", "--batch_size", "8", "--device", "cpu", "--dataset", "toy")
OF_FASTGAN = (*WIDE, "--model", "fastgan", "--g_conv_dim", "16", "--d_conv_dim", "16", "--vgg_weights", "random")
PRECISE = ("--precision", "fp32")


@pytest.mark.parametrize(("flags", "classes"), [
    pytest.param((*WIDE, "--adv_loss", "wgan-gp"), 0, marks=pytest.mark.soak),
    ((*WIDE, "--arch", "resnet", "--conditional", "true", "--imsize", "32", "--g_conv_dim", "32", "--d_conv_dim", "32",
      "--d_iters", "1"), 3),
    pytest.param((*OF_FASTGAN, "--recon", "lpips", "--augment", "color,cutout"), 0, marks=pytest.mark.soak),
    pytest.param((*OF_FASTGAN, "--metadata", "false", "--recon", "l1", "--d_features", "vgg16", "--accumulate", "2"), 0,
                 marks=pytest.mark.soak),
    ((*OF_FASTGAN, "--metadata", "false", "--recon", "l1", "--checkpointing", "true"), 0)],
    ids=["penalty", "resnet", "metadata and lpips", "features and parts", "recomputed"])
def test_the_estimated_memory_is_that_of_the_tensors_of_a_real_step(flags, classes, monkeypatch):
    """Weights, averages and moments are counted, and the step is that of the same update on the CPU."""
    monkeypatch.setattr(attention, "FUSED_FROM_POSITIONS", 0)      # as a GPU, which never holds the N x N matrix
    monkeypatch.setattr(convolutions, "MERGED_FROM_POSITIONS", 10**9)     # and changes sizes in a step of its own
    config = resolve(parse((*flags, *PRECISE)))
    estimate = memory.estimate(config, ALONE, classes)
    bank = Bank(torch.randn(8, 512).half(), "relu5_3", vgg.FILE.sha256, "") if config.metadata else None
    names = Classes(tuple("abc"), (4, 4, 4)) if classes else None
    timed = cost.TimedConfig(config, ALONE, bank, names)
    timed.run(1)                                        # makes Adam's moments
    trainer, batch = timed.trainer, next(timed.batches)
    tensors = [batch.images] * config.d_iters + ([batch.labels] * config.d_iters if classes else [])
    with memory._Ledger() as ledger:
        trainer.update(tensors)
    assert estimate.step == pytest.approx(ledger.peak, rel=0.2)
    adam = [moment for optimizer in (trainer.g_optimizer, trainer.d_optimizer)
            for slots in optimizer.state.values() for name, moment in slots.items() if name != "step"]
    held = [weight for net in (trainer.G, trainer.D, trainer.G_ema) for weight in net.parameters()] + adam
    frozen = [part for part in vars(trainer.objective).values() if isinstance(part, torch.nn.Module)]
    held += [weight for part in frozen for weight in part.parameters()]
    assert estimate.constant == pytest.approx(sum(tensor.nbytes for tensor in held), rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [("--imsize", "64", "--batch_size", "64"), (
    "--model", "fastgan", "--imsize", "256", "--metadata", "false", "--recon", "lpips", "--vgg_weights", "random")],
    ids=["sagan", "fastgan"])
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_the_estimated_memory_is_what_a_gpu_takes(flags, name):
    config = resolve(parse(("--dataset", "toy", "--preset", "published", "--cuda_graph", "false", "--compile", "false",
                            "--precision", name, *flags)))
    place = Place(torch.device("cuda"))
    assert memory.estimate(config, place).total == pytest.approx(cost.peak_memory(config, None, place), rel=0.25)


def test_mixed_precision_parts_of_a_batch_and_recomputation_take_less_memory(monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    kept, recomputed = (memory.estimate(resolve(parse((*OF_FASTGAN, "--metadata", "false", *more))), ALONE).step
                        for more in ((), ("--checkpointing", "true")))
    assert recomputed < 0.7 * kept
    whole, rounded, parts = (memory.estimate(
        resolve(parse((*WIDE, "--batch_size", "64", *more))), ALONE).step for more in (
        PRECISE, ("--precision", "bf16"), (*PRECISE, "--accumulate", "8")))
    assert rounded < 0.8 * whole and parts < 0.7 * whole


@pytest.fixture
def small_machine(monkeypatch):
    """small_machine(flags, share): with room for this share of what the flags need."""
    def shrink(flags, share):
        needed = memory.estimate(resolve(parse(flags)), ALONE).total
        monkeypatch.setattr(memory, "available_memory", lambda: int(share * needed))
    return shrink


def test_a_run_that_will_not_fit_is_refused_with_what_fits(run, small_machine):
    flags = ("--imsize", "64", "--batch_size", "32", "--g_conv_dim", "8", "--d_conv_dim", "8", "--device", "cpu",
             "--dataset", "toy", *PRECISE)
    small_machine(flags, 0.7)
    for more in ((), ("--dry_run",)):
        code, out, err = run(*flags, "--version", "a", "--total_step", 1, *more, tiny=False)
        assert code == 2 and "--batch_size 32 at --imsize 64: a step needs about 30 MiB, and this machine has" in err
        assert not Path("samples").exists() and not Path("models").exists()
    assert "of a step: about 30 MiB, of which weights, averages and Adam's moments 3 MiB; this machine has 21" in out
    advice = re.search(r"Give (--accumulate \d+) \(a batch in parts\), which needs", err)[1].split()
    assert run(*flags, *advice, "--version", "a", "--total_step", 1, tiny=False)[0] == 0
    small_machine(flags, 0.01)
    code, _, err = run(*flags, "--version", "a", "--total_step", 2, tiny=False)
    assert code == 2 and "Not even one picture at a time fits" in err, "and a run that is begun keeps its size"


def test_smaller_pictures_are_advised_with_the_attention_that_is_typed_or_narrower_networks(run, small_machine):
    flags = ("--imsize", "64", "--batch_size", "2", "--g_conv_dim", "8", "--d_conv_dim", "8", "--device", "cpu",
             "--dataset", "toy", "--g_attn", "32", "--dry_run", *PRECISE)
    small_machine(flags, 0.5)
    code, _, err = run(*flags, tiny=False)
    assert code == 2 and "Give --imsize 32 --g_attn 8,16, which needs about" in err
    assert run(*flags, "--imsize", "32", "--g_attn", "8,16", tiny=False)[0] == 0
    small_machine(flags, 0.01)
    code, _, err = run(*flags, tiny=False)
    assert code == 2 and "Give smaller --g_conv_dim and --d_conv_dim, or a smaller --imsize" in err


def test_a_dry_run_of_the_widest_networks_says_what_they_need(run):
    code, out, err = run("--g_conv_dim", 2**16, "--dry_run")
    assert code == 2 and "G parameters: " in out and "a step needs about" in err
    assert run("--g_conv_dim", 2**16 + 1)[::2] == (2, "error: --g_conv_dim 65537: must be at most 65536\n")


def test_a_step_that_runs_out_of_memory_says_what_fits_and_a_metric_does_not(run, monkeypatch):
    def failing(error):
        def fail(*_, **__):
            raise error
        return fail

    with monkeypatch.context() as patch:
        no_room = RuntimeError("DefaultCPUAllocator: can't allocate memory")
        patch.setattr(fast_step.FastStep, "__call__", failing(no_room))
        code, _, err = run("--version", "a", "--total_step", 2, *EVERY_ATTENTION)
    assert code == 2 and "out of memory on this machine: a step needs about" in err and "Give --accumulate 2" in err
    monkeypatch.setattr(meter.Meter, "measure", failing(MemoryError()))
    code, _, err = run("--version", "b", "--total_step", 2, "--metric_step", 1, "--metrics", "swd", "--num_eval", 4)
    assert code == 2 and "out of memory on this machine while --metrics swd were computed, after step 1" in err
    assert "--feature_net" in err and "--batch_size" not in err and checkpoint.steps_in("models/b") == [1]


def without_weights(config, place, bank, classes):
    raise DataError("weights that are missing")


def test_a_mistake_in_the_other_process_is_told_here(monkeypatch):
    fork = SimpleNamespace(get_context=lambda method: multiprocessing.get_context("fork"))
    monkeypatch.setattr(cost, "multiprocessing", fork)  # starts at once: nothing is measured here
    with pytest.raises(DataError, match="weights that are missing"):
        cost.peak_memory(config_of_batch(1), None, ALONE, without_weights)


def test_sides_take_turns_and_the_order_changes(quick, monkeypatch):
    order = []

    class Side:
        def __init__(self, name, seconds):
            self.name, self.each, self.seconds = name, seconds, []

        def run(self, steps):
            order.append(self.name)
            return self.each

    sides = [Side("a", 0.3), Side("b", 0.1)]
    monkeypatch.setattr(cost, "SECONDS", 0)
    assert cost.alternate(sides) == 1
    assert order[:3] == ["a", "b", "a"], "warm-up of both, then how long a turn is"
    turns = order[3:]
    assert len(turns) == 2 * cost.LEAST and turns[:4] == ["b", "a", "a", "b"]
    assert cost.each_ratio(*sides) == pytest.approx([3] * cost.LEAST)


def test_cost_needs_no_pictures(run, pictures, quick, monkeypatch):
    run("--version", "a", "--total_step", 1, "--dataset", "folder", "--image_path", pictures)
    shutil.rmtree(pictures)
    monkeypatch.setattr(cost, "peak_memory", lambda *_, **__: 2**20)
    code, _, _ = run("--version", "a", "--mode", "evaluate", "--metrics", "cost", tiny=False)
    assert code == 0 and lines("a")[-1]["peak_memory_mib"] == 1
