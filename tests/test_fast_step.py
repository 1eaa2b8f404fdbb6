"""Faster variants of the step: same results as the plain step; a variant that fails leaves the state unchanged."""

import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_state, state
from torch import nn

import trainer
from device import distributed, fast_step
from device.fast_step import FastStep, StepVariant
from device.loss_scale import LossScale
from device.precision import Precision
from metrics.cost import ConstantBatch
from parameter import parse, resolve
from trainer import Trainer

CPU = torch.device("cpu")


class Training:
    """A linear network, its Adam, and a step on them that draws noise."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.optimizer = torch.optim.Adam(self.net.parameters(), 0.01, fused=True)
        self.images = [torch.randn(16, 8)]
        self.backward, self.update = torch.Tensor.backward, self.optimizer.step

    def step(self, images, scale=1.0):
        loss = scale * (self.net(images[0] + torch.randn(16, 8)) - 1).square().mean()
        self.backward(loss)
        self.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach()}

    def fast(self, *variants):
        return FastStep(self.step, [self.net], [self.optimizer], CPU, variants)

    def after(self, step, steps=8):
        """Losses, and all that training leaves."""
        losses = [step(self.images)["loss"].item() for _ in range(steps)]
        return losses, [*self.net.state_dict().values(), *self.optimizer.state_dict()["state"][0].values(),
                        torch.get_rng_state()]


NO_COMPILER = RuntimeError("backend='inductor' raised:\nNoCompiler: install one\nSet VERBOSE=1")


def variant(name, calls, change=lambda step: step, fails_at=None, with_what=NO_COMPILER):
    """A StepVariant that writes its name, or "stop <name>", into `calls`; it may fail at "start" or at "step"."""
    def start(step, images):
        if fails_at == "start":
            raise with_what
        changed = change(step)

        def other(images):
            calls.append(name)
            if fails_at == "step":
                step(images)
                raise with_what
            return changed(images)
        return other
    return StepVariant(name, start, lambda: calls.append(f"stop {name}"))


def assert_equal(found, expected):
    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def test_variants_take_over_after_the_warm_up_each_on_top_of_the_one_before(capsys):
    plain = Training()
    expected = plain.after(plain.step)
    training, calls = Training(), []
    step = training.fast(variant("compiled", calls), variant("captured", calls))
    assert_equal(training.after(step), expected)
    trials = ["compiled", "captured", "compiled"]       # of each variant one step is undone
    assert calls == trials + ["captured", "compiled"] * (8 - fast_step.WARM_UP)
    assert capsys.readouterr().out == ""


def test_the_loss_scale_of_fp16_is_that_without_trials():
    """Each trial step overflows, too."""
    found = []
    for variants in ([], [variant("quick", [])]):
        training = Training()
        scale = LossScale(training.optimizer, CPU, enabled=True)
        scale.restore({**scale.state(), "scale": 2.0**127})
        training.backward, training.update = scale.backward, scale.step
        step = FastStep(partial(training.step, scale=1e6), [training.net], [training.optimizer], CPU, variants, [scale])
        found.append((training.after(step), scale.state()))
    assert_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] and found[0][1]["skipped"] >= 5


def nan(step):
    return lambda images: {name: value * float("nan") for name, value in step(images).items()}


@pytest.mark.parametrize(("flaw", "word"), [
    ({"fails_at": "start"}, "(RuntimeError: backend='inductor' raised: NoCompiler: install one)"),
    ({"fails_at": "step"}, "(RuntimeError: backend='inductor' raised: NoCompiler: install one)"),
    ({"change": nan}, "(RuntimeError: its step is not finite)"),
    ({"fails_at": "step", "with_what": torch.OutOfMemoryError("no room")}, "(OutOfMemoryError: no room)")])
def test_a_variant_that_fails_is_announced_once_and_leaves_no_trace(capsys, flaw, word):
    plain = Training()
    expected = plain.after(plain.step)
    training, calls = Training(), []
    step = training.fast(variant("quick", calls, **flaw), variant("other", calls))
    assert_equal(training.after(step), expected)
    assert capsys.readouterr().out == f"note: --quick failed, training continues without it {word}\n"
    assert calls.count("stop quick") == 1 and calls.count("other") == 1 + 8 - fast_step.WARM_UP, "the next is tried"


# ---- of a real training ----

TINY = ("--dataset", "toy", "--imsize", "32", "--batch_size", "8", "--g_conv_dim", "8", "--d_conv_dim", "8", "--z_dim",
        "16", "--preset", "published")
FASTGAN = ("--dataset", "toy", "--model", "fastgan", "--imsize", "64", "--batch_size", "4", "--g_conv_dim", "4",
           "--d_conv_dim", "4", "--z_dim", "16", "--metadata", "false", "--recon", "l1")


def built(config):
    """A Trainer of the config, and a source of the same batch for ever."""
    place = distributed.start(config)
    batches = ConstantBatch(config, place.device)
    return Trainer(config, place, Precision(config.precision, place.device), len(batches)), batches


@pytest.fixture
def traced(monkeypatch):
    """`--compile true` traces the networks as ever, but leaves the compiler out, which takes a minute.

    `names` of what it was asked to compile, `graphs` that this became.
    """
    found, compile = SimpleNamespace(names=[], graphs=[]), torch.compile

    def kept(graph, inputs):
        found.graphs.append(graph)
        return graph.forward

    def without_inductor(net, options, **more):
        assert options == {"fallback_random": True, "reorder_for_peak_memory": False}
        found.names.append(getattr(net, "__name__", type(net).__name__))
        return compile(net, backend=kept, **more)

    monkeypatch.setattr(trainer.torch, "compile", without_inductor)
    torch._dynamo.reset()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "compiled"), [
    (TINY, ["Generator", "g_loss", "d_loss"]),
    pytest.param((*TINY, "--adv_loss", "wgan-gp", "--sn", "both", "--d_iters", "1"), ["Generator", "g_loss"],
                 marks=pytest.mark.soak),
    pytest.param(FASTGAN, ["Generator", "g_loss", "d_loss"], marks=pytest.mark.soak)],
    ids=["hinge", "penalty", "fastgan"])
def test_compiled_networks_train_as_plain_ones(traced, capsys, flags, compiled):
    found = []
    for more in ((), ("--compile", "true")):
        config = resolve(parse((*flags, "--device", "cpu", *more)))
        training, batches = built(config)
        found.append([training.train_step(batches) for _ in range(fast_step.WARM_UP + 3)])
        weights = [weight.detach().clone() for weight in training.G_ema.parameters()]
        found.append(weights)
    out = capsys.readouterr().out
    assert traced.names == compiled and "--compile: compiling" in out and "note:" not in out
    for plain, fast in zip(found[0], found[2], strict=True):
        assert plain.keys() == fast.keys()
        for name in plain:
            assert abs(plain[name] - fast[name]) < 1e-3, name
    assert len(traced.graphs) == len(compiled), "one graph for each: what is between graphs is not fused"
    assert not [node for graph in traced.graphs for node in graph.graph.nodes if "autograd" in str(node.target)], \
        "W / sigma is computed ahead: CUDA lays it out otherwise than the compiler assumes"
    assert not [node for graph in traced.graphs for node in graph.graph.nodes
                if node.target == "amax" or "nearest" in (*node.args, *node.kwargs.values())], \
        "compiled in bf16 the gradients of these are NaN"


@pytest.mark.parametrize("flags", [
    ("--compile", "--cuda_graph"), *(pytest.param(flags, marks=pytest.mark.soak) for flags in (
        ("--compile", "true"), ("--cuda_graph", "true")))])
def test_what_is_missing_is_announced_once_and_changes_nothing(run, monkeypatch, flags):
    def missing(net, **_):
        def call(*_, **__):
            raise RuntimeError("no C++ compiler found")
        return call

    monkeypatch.setattr(trainer.torch, "compile", missing)
    code, plain, _ = run("--version", "plain", "--total_step", 6)
    assert code == 0 and "compil" not in plain and "cuda_graph" not in plain, "auto tries nothing on a CPU"
    code, out, err = run("--version", "a", "--total_step", 6, *flags)
    assert code == 0, err
    for flag in ("compile", "cuda_graph"):
        assert out.count(f"note: --{flag} failed, training continues without it") == (f"--{flag}" in flags)
    assert ("no C++ compiler found" in out) == ("--compile" in flags)
    assert ("CUDA graphs need a GPU" in out) == ("--cuda_graph" in flags)
    assert_same_state(state("plain", 6), state("a", 6))


def test_compile_auto_asks_for_a_gpu_and_a_long_run(monkeypatch):
    monkeypatch.setattr(trainer.importlib.util, "find_spec", lambda name: name == "triton")
    for device, ahead, flags, expected in (
            ("cpu", 10**6, (), []), ("cuda", 10**6, (), ["compile", "cuda_graph"]),
            ("cuda", 50_000, (), ["cuda_graph"]),
            ("cuda", 10**6, ("--compile", "false"), ["cuda_graph"]), ("cuda", 10, ("--cuda_graph", "no"), []),
            ("cuda", 10**6, ("--deterministic", "true"), []),
            ("cuda", 10, ("--compile",), ["compile", "cuda_graph"])):
        config = resolve(parse(("--dataset", "toy", "--total_step", str(ahead), *flags)))
        place = distributed.Place(torch.device(device))
        asked = SimpleNamespace(config=config, place=place, step=0, _compile=None, _use_eager_networks=None)
        assert [variant.flag for variant in Trainer.step_variants(asked)] == expected
        asked.place = distributed.Place(torch.device(device), 0, 2)
        assert Trainer.step_variants(asked) == [], "one of several ranks must not fall back alone"


# ---- on a GPU ----


def on_gpu(*flags):
    return built(resolve(parse(("--device", "cuda", "--compile", "false", *flags))))


def several(flags):
    return [flags, (*flags, "--accumulate", "2"), (*flags, "--precision", "bf16"), (*flags, "--precision", "fp16"),
            (*flags, "--checkpointing", "true")]


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [*several(TINY), (*TINY, "--adv_loss", "wgan-gp"), *several(FASTGAN)])
def test_a_captured_step_gives_the_numbers_of_a_plain_one(flags, capsys):
    found = []
    for graph in ("false", "true"):
        training, batches = on_gpu(*flags, "--cuda_graph", graph)
        found.append(torch.tensor([[value.item() for value in training.train_step(batches).values()]
                                   for _ in range(fast_step.WARM_UP + 5)]))
    assert "note:" not in capsys.readouterr().out
    assert (found[0] - found[1]).abs().max() < 0.05 and found[1].isfinite().all()
    assert len(set(found[1][-5:, 0].tolist())) == 5, "each step draws its own numbers"


@pytest.mark.gpu
def test_a_compiled_and_captured_step_gives_the_numbers_of_a_plain_one(capsys):
    found = []
    for fast in ((), ("--compile", "true")):
        training, batches = on_gpu(*TINY, "--cuda_graph", "true" if fast else "false", *fast)
        found.append(torch.tensor([[value.item() for value in training.train_step(batches).values()]
                                   for _ in range(fast_step.WARM_UP + 3)]))
    out = capsys.readouterr().out
    assert "--compile: compiling" in out and "note:" not in out
    assert (found[0] - found[1]).abs().max() < 0.05 and found[1].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["false", "true"])
@pytest.mark.parametrize("flags", [TINY, (*TINY, "--adv_loss", "wgan-gp"), FASTGAN, (*FASTGAN, "--precision", "fp16"),
                                   (*FASTGAN, "--checkpointing", "true")],
                         ids=["hinge", "penalty", "fastgan", "fp16", "recomputed"])
def test_a_step_never_waits_for_the_gpu(flags, graph):
    augmented = ("--augment", "color,translation,mirror,cutout", "--lr_decay", "0.9")
    training, batches = on_gpu(*flags, *augmented, "--cuda_graph", graph)
    for _ in range(fast_step.WARM_UP + 1):
        training.train_step(batches)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waited:
            warnings.simplefilter("always")
            for _ in range(3):
                training.train_step(batches)
            steps = len(waited)
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waited) == steps + 1, "this one is counted"
    assert steps == 0, [str(warning.message) for warning in waited]


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_goes_on_as_it_is(monkeypatch, capsys):
    update = Trainer.update

    def waiting(self, batches):
        stats = update(self, batches)
        stats["d_loss"].item()
        return stats

    plain = on_gpu(*TINY, "--cuda_graph", "false")
    monkeypatch.setattr(Trainer, "update", waiting)
    captured = on_gpu(*TINY, "--cuda_graph", "true")
    plain, found = ([side.train_step(batches)["d_loss"].item() for _ in range(fast_step.WARM_UP + 4)]
                    for side, batches in (plain, captured))
    assert capsys.readouterr().out.count("note: --cuda_graph failed") == 1
    assert found == pytest.approx(plain, abs=0.02)


@pytest.mark.gpu
def test_a_captured_run_goes_on_where_it_was_saved(run):
    flags = ("--device", "cuda", "--cuda_graph", "true", "--model_save_step", 8)
    run("--version", "whole", "--total_step", 16, *flags)
    run("--version", "parts", "--total_step", 8, *flags)
    run("--version", "parts", "--total_step", 16, *flags)
    whole, parts = (state(version, 16) for version in ("whole", "parts"))
    assert torch.equal(whole["random"][0]["cuda"], parts["random"][0]["cuda"])
    for name, weight in whole["G"].items():
        assert torch.allclose(weight.float(), parts["G"][name].float(), atol=1e-2), name
