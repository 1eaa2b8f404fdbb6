"""What is fast gives the numbers of what is plain: same z, same pictures, same algorithm. And the benchmark of it."""

import gc
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import assert_same_state, state, tensors
from torch import nn

import cost
import distributed
import precision
import sagan_models
import spectral
import speed
from cost import OneBatch
from families import FAMILIES
from parameter import parse, resolve
from trainer import Trainer

SMALL = ("--dataset", "toy", "--imsize", "32", "--batch_size", "8", "--g_conv_dim", "8", "--d_conv_dim", "8", "--z_dim",
         "16", "--device", "cpu", "--preset", "published")
FASTGAN = ("--dataset", "toy", "--model", "fastgan", "--imsize", "64", "--batch_size", "4", "--g_conv_dim", "4",
           "--d_conv_dim", "4", "--z_dim", "16", "--device", "cpu", "--metadata", "false", "--recon", "l1")


def begun(flags):
    """A Trainer of these flags, on pictures that need no loading."""
    config = resolve(parse(flags))
    place = distributed.start(config)
    trainer = Trainer(config, OneBatch(config, place.device), place)
    for gamma in FAMILIES[config.model].gammas(trainer.G, trainer.D).values():
        gamma.fill_(0.5)                                # it starts at 0: attention would have no part in these steps
    return trainer


def step_losses(trainer):
    """[d_loss, g_loss] of its next step."""
    stats = trainer.train_step(trainer.dataset)
    return [stats["d_loss"], stats["g_loss"]]


def losses(flags, steps=20):
    """[[d_loss, g_loss], ...] of a training from the seed on."""
    trainer = begun(flags)
    return torch.tensor([step_losses(trainer) for _ in range(steps)])


@pytest.fixture
def plainly(monkeypatch):
    """plainly(do, ...) -> do(...) with every layout, kernel and formula of training the plain one."""

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

    adam, to = torch.optim.Adam, nn.Module.to

    def unfused(*words, fused, **more):
        return adam(*words, **more)

    def contiguous(self, *words, memory_format=None, **more):
        return to(self, *words, **more)

    def run(do, *arguments):
        with monkeypatch.context() as patched:
            patched.setattr(spectral.SpectralNorm, "forward", divide)
            patched.setattr(sagan_models.SelfAttention, "forward", forward)
            patched.setattr(torch.optim, "Adam", unfused)
            patched.setattr(nn.Module, "to", contiguous)
            return do(*arguments)

    return run


@pytest.mark.parametrize("flags", [(*SMALL, "--g_attn", "8,16", "--d_attn", "4,8"),
                                   (*SMALL, "--attn_pool", "true", "--g_lr", "0.001", "--d_lr", "0.004"),
                                   (*SMALL, "--adv_loss", "wgan-gp", "--sn", "both", "--d_iters", "2"), FASTGAN],
                         ids=["hinge", "pooled", "penalty", "fastgan"])
def test_twenty_steps_lose_what_they_lose_plainly(flags, plainly, monkeypatch):
    """In float64, where rounding has no say: in float32 Adam's first steps, which are signs of gradients, carry the
    plain way itself 1e-3 and more away from itself when the number of threads changes.
    """
    monkeypatch.setattr(sagan_models, "FUSED_FROM_POSITIONS", 0)
    torch.set_default_dtype(torch.float64)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "float", torch.Tensor.double)     # what asks for float32 by name
            fast, plain = losses(flags), plainly(losses, flags)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (fast - plain).abs().max() < 1e-9
    assert (plain[0] - plain[-1]).abs().min() > 1e-3, "it does train"


@pytest.mark.parametrize("flags", [(*SMALL, "--g_attn", "8,16", "--d_attn", "4,8"),
                                   (*SMALL, "--adv_loss", "wgan-gp", "--sn", "both", "--d_iters", "1"), FASTGAN],
                         ids=["hinge", "penalty", "fastgan"])
def test_in_float32_d_loses_at_each_step_what_it_loses_plainly_from_there(flags, plainly, monkeypatch):
    """G's loss comes after Adam's update of D, which moves by whole steps weights whose gradient is rounding alone."""
    monkeypatch.setattr(sagan_models, "FUSED_FROM_POSITIONS", 0)
    fast, plain = begun(flags), plainly(begun, flags)
    apart = []
    for _ in range(20):
        state = plain.state()
        fast.restore(state)
        mine = step_losses(fast)
        plain.restore(state)                            # the random numbers, too
        apart.append(torch.tensor(mine) - torch.tensor(plainly(step_losses, plain)))
    d_apart, g_apart = torch.stack(apart).abs().amax(0)
    assert d_apart < 1e-4 and g_apart < 0.05


@pytest.mark.parametrize("layer", [lambda: nn.Conv2d(5, 9, 3), lambda: nn.ConvTranspose2d(5, 9, 4, 2, 1),
                                   lambda: nn.Conv2d(6, 4, 1), lambda: nn.Linear(6, 11)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_normalized_weight_and_its_gradient_are_autograds(layer, layout):
    torch.manual_seed(0)
    layer = spectral.spectral_norm(layer()).to(memory_format=layout)
    chain = layer.parametrizations.weight
    norm, weight = chain[0], chain.original
    spectral.power_iterate(layer)
    matrix = weight.movedim(norm.out_dim, 0).flatten(1)
    v = nn.functional.normalize(matrix.T @ nn.functional.normalize(matrix @ norm.v, dim=0), dim=0)
    expected = weight / torch.dot(norm.u, matrix @ norm.v)
    target = torch.randn_like(weight)
    torch.testing.assert_close(layer.weight, expected)
    assert v.shape == norm.v.shape and torch.dot(v, norm.v) > 0.5, "v keeps its order in every layout"
    for seen in (target, target.contiguous(memory_format=torch.contiguous_format)):
        torch.testing.assert_close(torch.autograd.grad((layer.weight * seen).sum(), weight),
                                   torch.autograd.grad((expected * seen).sum(), weight, retain_graph=True))


def test_u_and_v_are_the_same_in_every_layout():
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = nn.Sequential(spectral.spectral_norm(nn.Conv2d(5, 9, 3)), spectral.spectral_norm(
            nn.ConvTranspose2d(9, 4, 4))).to(memory_format=layout)
        spectral.power_iterate(net)
        found.append(torch.cat([buffer for buffer in net.buffers()]))
    torch.testing.assert_close(*found)


# ---- precision ----


@pytest.mark.parametrize("flags", [SMALL, (*SMALL, "--adv_loss", "wgan-gp", "--sn", "both"), FASTGAN],
                         ids=["hinge", "penalty", "fastgan"])
def test_bf16_loses_about_what_fp32_loses(flags, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)         # slow, where it has not
    exact, rounded, auto = (losses((*flags, "--precision", name), 1) for name in ("fp32", "bf16", "auto"))
    assert 0 < (exact - rounded).abs().max() < 0.1
    assert auto.equal(rounded)


def test_weights_and_statistics_stay_fp32(run, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    assert run("--precision", "bf16", "--version", "a", "--total_step", 2)[0] == 0
    kept = [thing for thing in tensors(state("a", 2)).values() if isinstance(thing, torch.Tensor)]
    assert {thing.dtype for thing in kept if thing.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("wanted", ["tf32", "bf16"])
def test_what_the_processor_has_not_is_said_once_and_replaced(run, pictures, monkeypatch, wanted):
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    few = "--dataset", "folder", "--image_path", pictures
    _, out, _ = run(*few, "--precision", wanted, "--version", "a", "--total_step", 2)
    assert out.count(f"this device has no {wanted} units; --precision fp32 is taken") == 1
    _, out, _ = run(*few, "--version", "b", "--total_step", 2)
    assert "units" not in out
    _, out, _ = run(*few, "--version", "b", "--mode", "evaluate", "--precision", wanted, "--num_eval", 4, "--metrics",
                    "swd")
    assert out.count(f"this device has no {wanted} units") == 1
    assert_same_state(state("a", 2), state("b", 2))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("bf16", "taken"), [(False, "fp32"), (True, "bf16")])
def test_auto_takes_what_the_device_is_fast_at(monkeypatch, capsys, device, bf16, taken):
    monkeypatch.setattr(precision, "has_bf16", lambda device: bf16)
    monkeypatch.setattr(precision, "has_tensor_cores", lambda device: bf16)
    chosen = precision.Precision("auto", torch.device(device))
    chosen.tell()
    assert chosen.name == taken and capsys.readouterr().out == ""


@pytest.mark.gpu
@pytest.mark.parametrize(("wanted", "switch"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_the_switches_are_those_of_the_step_alone(wanted, switch):
    device = torch.device("cuda")
    before = torch.backends.cuda.matmul.allow_tf32
    with precision.Precision(wanted, device).switched():
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == switch
    assert torch.backends.cuda.matmul.allow_tf32 == before


# ---- accumulation ----


def test_parts_of_a_batch_give_ds_gradient_of_the_whole(monkeypatch):
    """SAGAN's D has no batch statistics; G's are held still."""
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: x)
    gradients = []
    for parts in ("1", "4"):
        config = resolve(parse((*SMALL, "--accumulate", parts)))
        place = distributed.start(config)
        trainer = Trainer(config, OneBatch(config, place.device), place)
        fixed = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
        drawn = [z for _ in range(2) for z in fixed.chunk(int(parts))]
        trainer.latents.training = lambda count, drawn=drawn: drawn.pop(0)
        seen = []
        for optimizer in (trainer.d_optimizer, trainer.g_optimizer):
            parameters = optimizer.param_groups[0]["params"]
            optimizer.step = lambda parameters=parameters, seen=seen: seen.extend(
                p.grad.clone() for p in parameters if p.grad is not None)
        stats = trainer.train_step(trainer.dataset)
        gradients.append([*seen, stats["d_loss"], stats["g_loss"], stats["d_real"]])
    for whole, parted in zip(*gradients, strict=True):
        torch.testing.assert_close(parted, whole, rtol=1e-4, atol=1e-6)


def test_accumulation_must_divide_the_batch(run):
    code, _, err = run("--accumulate", 3)
    assert code == 2 and "--batch_size 4 must be a multiple of --accumulate 3" in err
    code, _, _ = run("--accumulate", 2, "--total_step", 2, "--version", "a")
    assert code == 0


def test_accumulation_holds_less_for_the_backward_pass():
    def most_held(parts):
        config = resolve(parse((*SMALL, "--batch_size", "64", "--accumulate", parts)))
        place = distributed.start(config)
        trainer = Trainer(config, OneBatch(config, place.device), place)
        held = [0, 0]                                       # bytes now, at the most

        class Held:
            def __init__(self, tensor):
                self.tensor = tensor
                held[0] += tensor.nbytes
                held[1] = max(held)

            def __del__(self):
                held[0] -= self.tensor.nbytes

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
            trainer.train_step(trainer.dataset)
        gc.collect()
        assert held[0] == 0
        return held[1]

    assert most_held("8") < most_held("1") / 4


# ---- the benchmark ----


@pytest.mark.slow
def test_the_table_says_how_many_times_the_reference(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cost, "SECONDS", 0.3)
    monkeypatch.setattr(cost, "TURN", 0.01)
    monkeypatch.setattr(speed, "peak_memory", lambda _, bank, place, kind: 2**20 * (3 if kind is cost.Side else 12))
    monkeypatch.setitem(speed.VARIANTS, "sagan", ("--attn_pool true",))
    results = tmp_path / "RESULTS.md"
    assert speed.main(["--results", str(results), *SMALL]) == 0
    text = results.read_text()
    assert "## Speed of a step: sagan, 32 px, batch 8" in text and "python benchmarks/speed.py --results" in text
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| (?:\*\*)?([\d.]+).*? \| ([\d,]+) \| ([\d.]+) \|$", text, re.M)
    assert [row[0] for row in rows] == ["reference", "this program --attn_pool true"]
    assert float(rows[1][2]) > 1, "the plain way is slower"
    assert [row[3:] for row in rows] == [("12", "1.00"), ("3", "0.25")]
    assert "| reference |" in capsys.readouterr().out


def test_a_table_takes_the_place_of_its_predecessor(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n\n## Before\n\nkept\n\n## A (b+c)\n\nold\n\n## After\n\nkept too\n")
    speed.put(path, "A (b+c)", ["new"])
    speed.put(path, "D", ["one more"])
    assert path.read_text() == ("# Results\n\n## Before\n\nkept\n\n## A (b+c)\n\nnew\n\n## After\n\nkept too\n\n"
                                "## D\n\none more\n")


def test_growth_tells_how_far_the_ideal_is(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(speed.GROWTH, "sagan", ((32,), (8,)))
    monkeypatch.setattr(speed, "MATRIX", 512)
    monkeypatch.setattr(speed, "TIMED", 0.1)
    monkeypatch.setattr(speed, "peak_memory", lambda *_: 2**20)
    assert speed.main(["--growth", "--results", str(tmp_path / "r.md"), *SMALL]) == 0
    (row,) = re.findall(r"^\| 32 \| 8 \| ([\d.]+) \| ([\d.]+) \| (\d+)% \| 1 \|$", capsys.readouterr().out, re.M)
    assert 0 < int(row[2]) < 100


def test_loading_is_compared_with_pictures_that_are_there(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cost, "SECONDS", 0.1)
    monkeypatch.setattr(cost, "TURN", 0.01)
    monkeypatch.setattr(speed, "PICTURES", 24)
    timed = []
    monkeypatch.setattr(speed, "alternate", lambda sides, *words: timed.extend(sides) or cost.alternate(sides, *words))
    assert speed.main(["--loading", "--results", str(tmp_path / "r.md"), *SMALL, "--num_workers", "0"]) == 0
    rows = re.findall(r"^\| ([^|]+) \| [\d.]+ \| (?:\*\*)?([\d.]+).* \|$", (tmp_path / "r.md").read_text(), re.M)
    assert [name for name, _ in rows] == [
        "none: always the same pictures", "JPEGs of 178x218, by the training itself", "from the cache"]
    assert rows[0][1] == "1" and all(0.1 < float(ratio) < 100 for _, ratio in rows)
    assert [type(side.pictures).__name__ for side in timed] == ["OneBatch", "RealBatches", "RealBatches"]
    assert "32 px, batch 8, loading" in (tmp_path / "r.md").read_text()


def test_variants_on_the_command_line_take_the_usual_ones_place(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(speed, "compare", lambda flags, seconds, variants: asked.append(variants) or ["row"])
    for more in ((), ("--variant", "--attn_pool true", "--variant", "--accumulate 2")):
        assert speed.main(["--results", str(tmp_path / "r.md"), *more, *SMALL]) == 0
    assert asked == [None, ["--attn_pool true", "--accumulate 2"]]
    assert "32 px, batch 8, --attn_pool true, --accumulate 2, " in (tmp_path / "r.md").read_text()


def test_the_ideal_counts_the_products_that_attention_needs(monkeypatch):
    """Whichever kernel computes it: not those with the zeros that one of them wants, nor those done twice."""
    found = []
    for fused_from in (0, 10**6):
        monkeypatch.setattr(sagan_models, "FUSED_FROM_POSITIONS", fused_from)
        config = resolve(parse(SMALL))
        place = distributed.start(config)
        with speed.counting() as counter:
            cost.Side(config, place).run(1)
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 10**6


@pytest.mark.slow
def test_the_gpu_script_reports_every_step_and_how_it_ended(tmp_path):
    """With a Python that does nothing but say what it was asked for, and fails at one step."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"asked: $*\"\ncase \"$*\" in *fastgan*imsize*256*) exit 4 ;; esac\n")
    python.chmod(0o755)
    script = Path(speed.__file__).parent / "gpu.sh"
    done = subprocess.run(["bash", script, tmp_path / "out"], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHON": str(python)})
    assert done.returncode == 1 and "asked: benchmarks/speed.py" in done.stdout, "what failed is shown"
    report = (tmp_path / "out/report.md").read_text()
    assert re.findall(r"^\| (\w+) \| .*?(\d) \|$", report, re.M) == [
        ("tests", "0"), ("speed_sagan", "0"), ("speed_fastgan", "4"), ("memory", "0"), ("loading", "0"),
        ("train_sagan", "0"), ("train_fastgan", "0"), ("speed_compiled", "0")]
    limits = [int(limit) for limit in re.findall(r"^step \w+ (\d+) ", script.read_text(), re.M)]
    assert len(limits) == 8 and sum(limits) <= 9 * 60
    for flags in re.findall(r"^step train.*?--version (.*)$", script.read_text(), re.M):
        assert resolve(parse(("--dataset", "toy", "--version", *flags.split())))
    assert subprocess.run(["bash", script], capture_output=True).returncode == 2


def test_a_mistake_is_told_in_a_line(capsys, tmp_path):
    assert speed.main(["--results", str(tmp_path / "r.md"), "--imsize", "65"]) == 2
    assert "--imsize 65" in capsys.readouterr().err and not Path(tmp_path / "r.md").exists()
