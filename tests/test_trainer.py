"""The training step: optimized kernels and layouts equal plain ones; gradient accumulation equals the whole batch."""

import gc
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, SMALL_FASTGAN, begun, step_losses
from torch import nn

import families
import spectral
import trainer
import utils
from generate.latents import Inputs
from layers import attention
from parameter import parse, resolve


def losses(flags, steps=6):
    """(steps, 2): d_loss and g_loss of each step from the seed on."""
    training = begun(flags)
    return torch.stack([step_losses(training) for _ in range(steps)])


@pytest.fixture
def plainly(monkeypatch):
    """plainly(do, ...) -> do(...), with the plain implementation in place of every optimized layout and kernel."""

    def divide(self, weight):
        matrix = weight.movedim(self.out_dim, 0).flatten(1)
        return weight / torch.dot(self.u, matrix @ self.v)

    def forward(self, x):
        B, C, H, W = x.size()
        q, k, v = (_rows(layer(x)) for layer in (self.query, self.key, self.value))
        if isinstance(self.pool, nn.MaxPool2d):
            k, v = (_rows(nn.functional.max_pool2d(layer(x), 2)) for layer in (self.key, self.value))
        out = torch.softmax(q @ k.transpose(1, 2), -1) @ v
        return self.gamma * out.transpose(1, 2).reshape(B, C, H, W) + x

    def _rows(x):
        return x.flatten(2).transpose(1, 2)

    adam, to = utils.Adam, nn.Module.to

    def unfused(*words, fused, **more):
        return adam(*words, **more)

    def contiguous(self, *words, memory_format=None, **more):
        return to(self, *words, **more)

    def run(do, *arguments):
        with monkeypatch.context() as patched:
            patched.setattr(spectral.SpectralNorm, "forward", divide)
            patched.setattr(attention.SelfAttention, "forward", forward)
            patched.setattr(utils, "Adam", unfused)
            patched.setattr(nn.Module, "to", contiguous)
            return do(*arguments)

    return run


@pytest.mark.parametrize("flags", [(*SMALL, "--attn_pool", "true", "--g_lr", "0.001", "--d_lr", "0.004"),
                                   (*SMALL, "--adv_loss", "wgan-gp", "--sn", "both", "--d_iters", "2"), SMALL_FASTGAN],
                         ids=["pooled", "penalty", "fastgan"])
def test_six_steps_have_the_losses_of_the_plain_implementation(flags, plainly, monkeypatch):
    """In float64. In float32 Adam's first steps, which are signs of gradients, amplify rounding errors: another number
    of threads changes the losses of the plain implementation itself by 1e-3 and more.
    """
    monkeypatch.setattr(attention, "FUSED_FROM_POSITIONS", 0)
    torch.set_default_dtype(torch.float64)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "float", torch.Tensor.double)     # code that asks for float32
            fast, plain = losses(flags), plainly(losses, flags)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (fast - plain).abs().max() < 1e-9
    assert (plain[0] - plain).abs().amax(0).min() > 1e-3, "the losses change"


@pytest.mark.parametrize("flags", [(*SMALL, "--g_attn", "8,16", "--d_attn", "4,8"),
                                   (*SMALL, "--adv_loss", "wgan-gp", "--sn", "both", "--d_iters", "1"), SMALL_FASTGAN],
                         ids=["hinge", "penalty", "fastgan"])
def test_in_float32_each_step_has_the_losses_of_the_plain_implementation(flags, plainly, monkeypatch):
    """Both start each step from the same state. G's loss is looser: Adam has updated D before it, in full-size steps
    also where the gradient is nothing but rounding error.
    """
    monkeypatch.setattr(attention, "FUSED_FROM_POSITIONS", 0)
    fast, plain = begun(flags), plainly(begun, flags)
    apart = []
    for _ in range(5):
        state = plain.trainer.state()
        fast.trainer.restore(state)
        mine = step_losses(fast)
        plain.trainer.restore(state)                    # the random states, too
        apart.append(mine - plainly(step_losses, plain))
    d_apart, g_apart = torch.stack(apart).abs().amax(0)
    assert d_apart < 1e-4 and g_apart < 0.05


# ---- from the flags to the step ----


def test_what_is_typed_reaches_networks_optimizers_losses_and_the_average():
    training = begun((*SMALL, "--g_attn", "8", "--d_attn", "4", "--attn_pool", "true", "--beta1", "0.3", "--beta2",
                      "0.7", "--g_lr", "0.02", "--d_lr", "0.03", "--label_noise", "0.4", "--ema_decay", "0.15"))
    nets = training.trainer
    for optimizer, lr in ((nets.g_optimizer, 0.02), (nets.d_optimizer, 0.03)):
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"]) == (lr, (0.3, 0.7))
    assert nets.objective.label_noise == 0.4
    pools = [layer.pool for net in (nets.G, nets.D) for layer in net.attention.values()]
    assert len(pools) == 2 and all(isinstance(pool, nn.MaxPool2d) for pool in pools)
    average = [weight.clone() for weight in nets.G_ema.parameters()]
    for decay in (0.1, 0.15):                   # that of the warm-up, (1 + 0) / (10 + 0), then the flag's
        nets.train_step(training.batches)
        average = [decay * mean + (1 - decay) * weight for mean, weight in zip(average, nets.G.parameters(),
                                                                               strict=True)]
    torch.testing.assert_close(list(nets.G_ema.parameters()), average)


def test_what_is_typed_reaches_the_other_losses():
    def objective(*flags):
        return families.build_objective(resolve(parse(flags)), torch.device("cpu"))

    found = objective(*SMALL_FASTGAN, "--recon_weight", "3", "--label_noise", "0.4")
    assert (found.recon_weight, found.label_noise) == (3, 0.4)
    assert objective(*SMALL, "--adv_loss", "wgan-gp", "--lambda_gp", "7").lambda_gp == 7


@pytest.mark.parametrize(("flags", "sizes"), [(SMALL, [32] * 3), (SMALL_FASTGAN, [64, 64, 32, 64, 32])],
                         ids=["sagan", "fastgan"])
def test_d_sees_nothing_but_augmented_images(flags, sizes, monkeypatch):
    """In D's phase the real ones and the fakes, in G's phase the fakes."""
    augmented, seen = [], []

    def make_grey(images, policies, draw_rows):
        augmented.append((images.shape[-1], policies))
        return 0 * images + 0.25

    def watch(D, inputs):
        seen.extend([inputs[0]] if isinstance(inputs[0], torch.Tensor) else inputs[0])

    monkeypatch.setattr(trainer, "augment", make_grey)
    training = begun((*flags, "--augment", "cutout"))
    training.trainer.D.register_forward_pre_hook(watch)
    training.trainer.train_step(training.batches)
    assert augmented == [(size, ("cutout",)) for size in sizes]
    assert seen and all((images == 0.25).all() for images in seen)


# ---- accumulation ----


@pytest.mark.parametrize("flags", [(), ("--d_features", "vgg16_fine", "--vgg_weights", "random")])
def test_accumulated_gradients_are_those_of_the_whole_batch(monkeypatch, flags):
    """SAGAN's D has no batch statistics; those of G are switched off. In float64: the sums of features round much."""
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: x)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    gradients = []
    for parts in ("1", "4"):
        training = begun((*SMALL, *flags, "--accumulate", parts))
        trainer = training.trainer
        for net in (trainer.G, trainer.D, trainer.G_ema, *([trainer.objective.maps] if flags else [])):
            net.double()
        trainer.augment = lambda images: images.double()
        fixed = torch.randn(8, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        drawn = [Inputs(z) for _ in range(2) for z in fixed.chunk(int(parts))]
        trainer.latents.training = lambda count, drawn=drawn: drawn.pop(0)
        seen = []
        for optimizer in (trainer.d_optimizer, trainer.g_optimizer):
            parameters = optimizer.param_groups[0]["params"]
            optimizer.step = lambda parameters=parameters, seen=seen: seen.extend(
                p.grad.clone() for p in parameters if p.grad is not None)
        stats = trainer.train_step(training.batches)
        gradients.append([*seen, stats["d_loss"], stats["g_loss"], stats["d_real"]])
    for whole, parted in zip(*gradients, strict=True):
        torch.testing.assert_close(parted, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_a_step_on_a_cpu_uses_the_memory_of_the_one_before_and_no_compiler():
    """The system gives no new pages after the first steps: filling these with zeros took a tenth to a quarter. And no
    compiler is imported, which took one to three seconds of each start; nor for networks that a checkpoint is compared
    with.
    """
    program = """
import resource, sys
import families
import parameter
from conftest import begun, step_losses
training, faults = begun(("--imsize", "64", "--batch_size", "32", "--g_conv_dim", "16", "--d_conv_dim", "16")), []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step_losses(training)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
for flags in (), ("--arch", "resnet"), ("--model", "fastgan"):
    families.build_shapes(parameter.resolve(parameter.parse([*flags, "--dataset", "toy"])), 3)
print(min(faults), max(faults), int("torch._dynamo" in sys.modules))
"""
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parent.parent)))}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | paths)
    assert not found.returncode, found.stderr
    least, most, compiler = map(int, found.stdout.split())
    assert least < most / 20 and not compiler, found


def test_accumulation_must_divide_the_batch(run, monkeypatch):
    code, _, err = run("--accumulate", 3)
    assert code == 2 and "--batch_size 4 must be a multiple of --accumulate 3" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run("--accumulate", 2, "--batch_size", 6)
    assert code == 2 and "--batch_size 6 must be a multiple of the 2 processes times --accumulate 2" in err


def test_accumulation_saves_activation_memory():
    def peak(parts):
        training = begun((*SMALL, "--batch_size", "64", "--accumulate", parts))
        held = [0, 0]                                       # bytes of saved tensors: now, and the peak

        class Held:
            def __init__(self, tensor):
                self.tensor = tensor
                held[0] += tensor.nbytes
                held[1] = max(held)

            def __del__(self):
                held[0] -= self.tensor.nbytes

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
            training.trainer.train_step(training.batches)
        gc.collect()
        assert held[0] == 0
        return held[1]

    assert peak("8") < peak("1") / 4
