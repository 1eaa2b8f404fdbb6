"""Several processes are one run: two ranks compute what one process computes on the same batch.

Two processes run this file as a script, which trains; the tests read what rank 0 has written.
"""

import sys
from contextlib import contextmanager

import pytest
import torch
from conftest import MAIN, SMALL, SMALL_FASTGAN, TINY, state, two_processes
from torch import nn

from data_loader import build_dataset, real_batches
from device import distributed, replicas
from device.precision import Precision
from device.replicas import SyncBatchNorm2d
from families import FAMILIES
from fastgan_models import Noise
from generate.classes import find_classes
from generate.metadata import Bank
from parameter import parse, resolve
from pretrained import vgg
from storage import checkpoint
from trainer import Trainer

HINGE = (*SMALL, "--num_workers", "0", "--hflip", "true", "--augment", "color,mirror,cutout", "--label_noise",
         "0.2")
PENALTY = (*SMALL, "--num_workers", "0", "--adv_loss", "wgan-gp", "--d_iters", "2")
FASTGAN = (*SMALL_FASTGAN, "--num_workers", "0", "--metadata", "true", "--hflip", "true")
CLASSES = (*SMALL, "--num_workers", "0", "--arch", "resnet", "--g_conv_dim", "2", "--d_conv_dim", "2", "--balance",
           "true")
RUNS = {"hinge": HINGE, "wgan-gp": PENALTY, "fastgan": FASTGAN, "classes": CLASSES}


@contextmanager
def in_float64():
    """All of a training in float64: what two ranks compute then differs by rounding alone, even after several steps."""
    single = torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double            # code that asks for float32
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.Tensor.float = single


def trained(flags, steps, start=None):
    """Train from the seed, or from the state `start`, for so many steps: {"state", "losses" (steps, 2)}."""
    config = resolve(parse(flags))
    place = distributed.start(config)
    dataset = build_dataset(config)
    rows = torch.randn(50, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    bank = Bank(rows.half(), "relu5_3", vgg.FILE.sha256, "") if config.metadata else None
    classes = find_classes(config, dataset)
    trainer = Trainer(config, place, Precision("fp32", place.device), len(dataset), bank, classes)
    with torch.no_grad():                               # both start at 0, where what they scale has no effect
        for gamma in FAMILIES[config.model].gammas(trainer.G, trainer.D).values():
            gamma.fill_(0.5)
        for layer in trainer.G.modules():
            if isinstance(layer, Noise):
                layer.weight.fill_(0.3)
    if start is not None:
        trainer.restore(start)
    batches = real_batches(config, dataset, trainer.samples_seen, place.device, place.rank, place.world_size,
                           classes is not None)
    losses = []
    for _ in range(steps):
        stats = trainer.train_step(batches)
        losses.append(torch.stack([stats["d_loss"], stats["g_loss"]]))
    losses = distributed.mean_over_processes(torch.stack(losses))
    trainer.recompute_bn_stats(64)
    return {"state": trainer.state(), "losses": losses}


@pytest.fixture
def by_two(tmp_path):
    """by_two(flags, steps, start, float64) -> what `trained` returns on rank 0 of two."""

    def train(flags, steps, start=None, float64=True):
        torch.save({"job": (flags, steps, start), "float64": float64}, tmp_path / "job.pth")
        done = two_processes(__file__, tmp_path)
        assert done.returncode == 0, done.stderr
        return torch.load(tmp_path / "done.pth", weights_only=True)

    return train


def work(folder):
    """What each of the two processes does."""
    replicas.BUCKET = 2**14                             # as a few buckets, though these networks are small
    asked = torch.load(f"{folder}/job.pth", weights_only=True)
    if asked["float64"]:
        with in_float64():
            done = trained(*asked["job"])
    else:
        done = trained(*asked["job"])
    if distributed.is_first():
        torch.save(done, f"{folder}/done.pth")
    distributed.stop()


def furthest(one, other):
    """The largest difference between two states: weights, buffers, averages, Adam's moments."""
    apart = {}
    for name in ("G", "D", "G_ema"):
        assert one[name].keys() == other[name].keys()
        apart |= {f"{name}.{key}": (one[name][key] - other[name][key]).abs().max().item() for key in one[name]}
    for name in ("g_optimizer", "d_optimizer"):
        for number, moments in one[name]["state"].items():
            apart |= {f"{name}.{number}.{key}": (moment - other[name]["state"][number][key]).abs().max().item()
                      for key, moment in moments.items()}
    assert torch.equal(one["random"][0]["torch"], other["random"][0]["torch"]) and one["step"] == other["step"]
    assert one["samples_seen"] == other["samples_seen"]
    return max(apart.values())


def only_in_soak(*kinds):
    return (pytest.param(kind, marks=pytest.mark.soak) for kind in kinds)


@pytest.mark.parametrize(("parts", "steps"), [("1", 2), pytest.param("2", 4, marks=pytest.mark.soak)],
                         ids=["whole", "accumulated"])
@pytest.mark.parametrize("kind", [*only_in_soak("hinge"), "wgan-gp", "fastgan", "classes"])     # hinge: see below
def test_steps_of_two_ranks_are_those_of_one_process(kind, parts, steps, by_two):
    flags = (*RUNS[kind], "--accumulate", parts, "--check_replicas", "1")
    with in_float64():
        one = trained(flags, steps)
    recomputed = ("--checkpointing", "true") if parts == "2" else ()    # alone it changes nothing: test_recompute
    two = by_two((*flags, *recomputed), steps)
    assert furthest(one["state"], two["state"]) < 1e-8
    assert (one["losses"] - two["losses"]).abs().max() < 1e-8
    assert (one["losses"][0] - one["losses"][-1]).abs().min() > 1e-3, "the losses change"


@pytest.mark.parametrize("kind", ["hinge", *only_in_soak("wgan-gp", "fastgan")])
def test_in_float32_the_first_losses_are_those_of_one_process(kind, by_two):
    """D hardly learns here: G's first loss follows D's first update, which Adam makes of the signs of gradients."""
    flags = (*RUNS[kind], "--d_lr", "1e-12")
    one, two = trained(flags, 1)["losses"], by_two(flags, 1, float64=False)["losses"]
    assert (one - two).abs().max() < 1e-5


@pytest.mark.soak
def test_batch_norm_of_each_rank_alone_is_another_run(by_two):
    """Why `--sync_bn auto` is true: everything else is the same here."""
    flags = (*RUNS["hinge"], "--check_replicas", "1")
    with in_float64():
        one = trained(flags, 2)
    two = by_two((*flags, "--sync_bn", "false"), 2)
    assert (one["losses"] - two["losses"]).abs().max() > 1e-4


def test_a_run_goes_on_with_another_number_of_ranks(by_two):
    flags = (*RUNS["hinge"], "--accumulate", "2")
    with in_float64():
        straight = trained(flags, 3)["state"]
        by_one = trained(flags, 1)["state"]
        then_by_two = by_two(flags, 1, by_one)["state"]
        resumed = trained(flags, 1, then_by_two)["state"]
    assert furthest(straight, resumed) < 1e-8


def test_another_number_of_processes_is_said(run):
    run("--version", "a", "--total_step", 1)
    by_two = two_processes(MAIN, *TINY, "--version", "a", "--total_step", 2)
    assert by_two.stdout.count("resuming 'a' from step 1\nnote: 2 processes, were 1\n") == 1
    _, out, _ = run("--version", "a", "--total_step", 3)
    assert "note: 1 process, were 2\n" in out
    older = state("a", 2)
    del older["processes"]
    checkpoint.save(older, "models/a")
    _, out, _ = run("--version", "a", "--total_step", 3, "--pretrained_model", 2)
    assert "resuming 'a' from step 2" in out and "were" not in out


def test_checkpoints_with_a_random_state_by_rank_go_on(by_two):
    """Older ones: all ranks take that of rank 0."""
    flags = (*RUNS["hinge"], "--check_replicas", "1")
    with in_float64():
        old = trained(flags, 1)["state"]
        straight = trained(flags, 2)["state"]
        torch.manual_seed(99)
        old["random"].append({**old["random"][0], "torch": torch.get_rng_state()})
    assert furthest(straight, by_two(flags, 1, old)["state"]) < 1e-8


# ---- batch norm over all ranks ----


NORM = """
import sys, torch
from torch import nn
from device import distributed
from device.replicas import GradientAverage, SyncBatchNorm2d, sync_batch_norm
from layers.norms import ConditionalBatchNorm
from parameter import resolve
place = distributed.start(resolve({"device": "cpu"}))
for dtype, layout, affine, tolerance in (
        (torch.float64, torch.contiguous_format, True, 1e-12), (torch.float64, torch.channels_last, False, 1e-12),
        (torch.float32, torch.channels_last, True, 1e-5), (torch.bfloat16, torch.channels_last, True, 0.03)):
    torch.manual_seed(0)
    ours, plain = (nn.Sequential(nn.BatchNorm2d(3, affine=affine)) for _ in range(2))
    for net in (ours, plain):
        net.to(torch.float64 if dtype == torch.float64 else torch.float32)
        for number, weight in enumerate(net.parameters()):
            nn.init.constant_(weight, number + 0.5)
    whole = (torch.randn(4, 3, 5, 6) * 2 + 30).to(dtype).to(memory_format=layout)
    up = torch.randn(4, 3, 5, 6).to(dtype)
    sync_batch_norm(ours, place.device)
    assert type(ours[0]) is SyncBatchNorm2d and ours.state_dict().keys() == plain.state_dict().keys()
    mine = slice(2 * place.rank, 2 * place.rank + 2)
    x, part = whole.clone().requires_grad_(), whole[mine].clone().requires_grad_()
    expected, got = plain(x), ours(part)
    (expected * up).mean().backward()                   # the mean over the batch, and over the share of each rank
    (got * up[mine]).mean().backward()
    weights = list(ours.parameters())
    if affine:
        GradientAverage(weights).finish()

    def close(a, b):
        assert a.dtype == b.dtype and (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1), (dtype, a, b)

    close(got, expected[mine])
    close(part.grad / 2, x.grad[mine])                  # the trainer divides by the ranks, with the weights' gradients
    for a, b in zip(weights, plain.parameters()):
        close(a.grad, b.grad)
    for a, b in zip(ours.buffers(), plain.buffers()):
        close(a, b)
    ours.eval(), plain.eval()
    if place.rank == 0:
        close(ours(whole), plain(whole))
ours, plain = ConditionalBatchNorm(3, 4), ConditionalBatchNorm(3, 4)
sync_batch_norm(ours, place.device)
x, labels, tolerance = whole.float() * torch.arange(4).view(4, 1, 1, 1), torch.tensor([1, 3, 0, 1]), 1e-5
mine = slice(2 * place.rank, 2 * place.rank + 2)
close(ours(x[mine], labels[mine]), plain(x, labels)[mine])
close(ours.norm.running_var, plain.norm.running_var)
distributed.say("checked")
distributed.stop()
"""


def assert_checked_by_two(text, tmp_path):
    """Two ranks run this script to its end."""
    script = tmp_path / "script.py"
    script.write_text(text)
    done = two_processes(script)
    assert done.returncode == 0 and done.stdout == "checked\n", done.stderr


def test_its_values_gradients_and_statistics_are_those_of_the_whole_batch(tmp_path):
    assert_checked_by_two(NORM, tmp_path)


def test_one_process_keeps_the_plain_one():
    config = resolve(parse((*RUNS["fastgan"], "--sync_bn", "true", "--metadata", "false")))
    place = distributed.start(config)
    trainer = Trainer(config, place, Precision("fp32", place.device), 8)
    kinds = {type(layer) for net in (trainer.G, trainer.D, trainer.G_ema) for layer in net.modules()}
    assert nn.BatchNorm2d in kinds and SyncBatchNorm2d not in kinds


# ---- fp16 ----

OVERFLOW = """
import torch
from device import distributed, precision
from metrics.cost import TimedConfig
from parameter import parse, resolve
precision.has_fp16 = lambda device: True
config = resolve(parse(%r))
place = distributed.start(config)
training = TimedConfig(config, place)
trainer = training.trainer
before = {name: weight.clone() for name, weight in trainer.D.named_parameters()}
last = trainer.D.to_logit
hook = last.register_full_backward_hook(lambda layer, inputs, outputs: (inputs[0] * float("inf"),))
if place.rank == 0:
    hook.remove()                                       # only the other overflows
trainer.train_step(training.batches)                    # checks the replicas
assert all(weight.equal(before[name]) for name, weight in trainer.D.named_parameters()), "both skip"
assert trainer.loss_scales["D"].figures() == {"scale": 2.0**15, "skipped": 1}
hook.remove()
trainer.train_step(training.batches)
assert not all(weight.equal(before[name]) for name, weight in trainer.D.named_parameters())
if place.rank == 0:
    print("checked")
distributed.stop()
"""


def test_an_overflow_in_fp16_on_one_rank_skips_the_update_on_all(tmp_path):
    assert_checked_by_two(OVERFLOW % ((*HINGE, "--precision", "fp16", "--check_replicas", "1"),), tmp_path)


# ---- gradients over all ranks ----

AVERAGE = """
import sys, torch
from torch import nn
from device import distributed, replicas
from device.replicas import GradientAverage
from parameter import resolve
place = distributed.start(resolve({"device": "cpu"}))
torch.manual_seed(0)
replicas.BUCKET = 1                                     # each parameter alone
net = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4)))
unused = nn.Parameter(torch.zeros(2))
average = GradientAverage([*net.parameters(), unused], parts=2)
started = []                                            # by the gradient that each all-reduce carries
for bucket in average.buckets:
    def start(bucket=bucket, start=bucket.start):
        started.append(bucket.parameters[0])
        start()
    bucket.start = start
images = torch.randn(2, 2, 5, 3)                        # (parts, ranks, B, 3)
for step in range(2):                                   # the second counts from zero again
    net.zero_grad()
    started.clear()
    net[3](net[2](net[1](net[0](images[0, place.rank])))).square().mean().backward()
    assert not started, "the other part is missing"
    through = net[1:] if step == 0 else net             # the first layer gets no gradient from the second part
    through(images[1, place.rank]).square().mean().backward()
    expected = [net[number].weight for number in (3, 2, 1, 0)]
    assert [*map(id, started)] == [*map(id, expected[:3 if step == 0 else 4])], "while backward goes on, last first"
    average.finish()
    got = [weight.grad.clone() for weight in net.parameters()]
    net.zero_grad()
    for rank in range(2):
        loss = net(images[0, rank]).square().mean() + through(images[1, rank]).square().mean()
        (plain,) = [torch.autograd.grad(loss / 2, list(net.parameters()))]
        got = [gradient - part for gradient, part in zip(got, plain)]
    assert max(gradient.abs().max() for gradient in got) < 1e-6
    assert unused.grad is None
distributed.say("checked")
distributed.stop()
"""


def test_gradients_are_averaged_while_backward_goes_on(tmp_path):
    assert_checked_by_two(AVERAGE, tmp_path)


# ---- the check ----

DRIFT = """
import sys, torch, main, utils
from device import distributed
average = utils.ema_update
def drift(G_ema, G, decay):
    average(G_ema, G, decay)
    if not distributed.is_first():
        with torch.no_grad():
            G.to_rgb.weight[3, 0] *= 1 + 2**-20
utils.ema_update = drift
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.fixture
def drifting(tmp_path, monkeypatch):
    """drifting(*flags) -> what two ranks print that drift apart."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "drift.py"
    script.write_text(DRIFT)
    return lambda *flags: two_processes(script, *TINY, "--version", "a", *flags)


def test_ranks_that_drift_end_the_run_with_4_and_save_nothing(drifting):
    done = drifting("--total_step", 3, "--model_save_step", 1)
    assert done.returncode == 4 and checkpoint.steps_in("models/a") == []
    (line,) = {line for line in done.stderr.splitlines() if line.startswith("error:")}
    assert line == "error: step 1: G.to_rgb.weight of rank 1 is no longer that of rank 0."


@pytest.mark.soak
def test_with_a_check_every_0_steps_nobody_looks_whether_ranks_drift(drifting):
    assert drifting("--total_step", 1, "--check_replicas", 0).returncode == 0


if __name__ == "__main__":
    work(sys.argv[1])
