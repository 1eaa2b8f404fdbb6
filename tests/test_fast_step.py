"""Faster ways to the same step: tried once, kept if their numbers are the plain way's, left without a trace if not."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_state, state
from torch import nn

import distributed
import fast_step
import trainer
from cost import OneBatch
from fast_step import FastStep, Unusable, Way
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

    def step(self, images, scale=1.0):
        loss = scale * (self.net(images[0] + torch.randn(16, 8)) - 1).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach()}

    def fast(self, *ways):
        return FastStep(self.step, [self.net], [self.optimizer], CPU, list(ways))

    def after(self, step, steps=8):
        """Losses, and all that training leaves."""
        losses = [step(self.images)["loss"].item() for _ in range(steps)]
        return losses, [*self.net.state_dict().values(), *self.optimizer.state_dict()["state"][0].values(),
                        torch.get_rng_state()]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; `clock.now += seconds` moves it."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(fast_step.time, "perf_counter", lambda: clock.now)
    return clock


def taking(clock, seconds, step):
    def timed(images):
        clock.now += seconds
        return step(images)
    return timed


def ways(training, clock, kind, always=False, seconds=0.05):
    """[Way] of one kind, and the number of times that its step and its `stop` were called."""
    calls = SimpleNamespace(step=0, stop=0)

    def start(step, images):
        def other(images):
            calls.step += 1
            clock.now += seconds
            if kind == "other losses":
                return {"loss": step(images)["loss"] * 1.1}
            if kind == "other gradients":
                return {"loss": training.step(images, -1)["loss"] * -1}
            if kind == "no update":
                with torch.no_grad():
                    return {"loss": (training.net(images[0] + torch.randn(16, 8)) - 1).square().mean()}
            if kind == "not finite":
                return {"loss": step(images)["loss"] * float("nan")}
            if kind == "fails midway":
                training.net(images[0]).sum().backward()
                raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")
            if kind == "does not compile":
                raise RuntimeError("backend='inductor' raised:\nNoCompiler: install one\nSet TORCHDYNAMO_VERBOSE=1")
            stats = step(images)
            if kind == "other random numbers":
                torch.rand(1)
            return stats
        if kind == "cannot start":
            raise Unusable("it takes a GPU")
        return other

    def stop():
        calls.stop += 1

    return [Way("quick", always, start, stop)], calls


def test_a_faster_way_with_the_same_numbers_is_kept(clock, capsys):
    plain = Training()
    expected = plain.after(plain.step)
    training = Training()
    training.step = taking(clock, 0.1, training.step)
    [way], calls = ways(training, clock, "same", seconds=-0.05)
    assert_equal(training.after(training.fast(way)), expected)
    assert calls.step == 1 + fast_step.TIMED + 8 - fast_step.WARM_UP and calls.stop == 0
    assert capsys.readouterr().out == "--quick: a step takes 50 ms, a plain one 100\n"


def assert_equal(found, expected):
    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize(("kind", "word"), [
    ("other losses", "loss was"), ("not finite", "loss was nan"), ("other gradients", "weights otherwise"),
    ("no update", "weights otherwise"), ("other random numbers", "other random numbers"),
    ("fails midway", "(RuntimeError: CUDA error: operation not permitted)"), ("cannot start", "(it takes a GPU)"),
    ("does not compile", "(RuntimeError: backend='inductor' raised: NoCompiler: install one)")])
@pytest.mark.parametrize("always", [False, True])
def test_a_way_that_is_not_the_same_is_said_once_and_leaves_no_trace(clock, capsys, kind, word, always):
    plain = Training()
    expected = plain.after(plain.step)
    training = Training()
    [way], calls = ways(training, clock, kind, always, seconds=-1)
    assert_equal(training.after(training.fast(way)), expected)
    out = capsys.readouterr().out
    assert out.startswith("note: --quick is of no use here, steps go on without it (") and word in out
    assert out.count("\n") == 1 and calls.stop == 1 and calls.step <= 1 + fast_step.TIMED


@pytest.mark.parametrize(("always", "said"), [
    (False, ""), (True, "--quick: a step takes 150 ms, a plain one 100\n")])
def test_a_slower_way_is_kept_only_if_it_was_asked_for(clock, capsys, always, said):
    training = Training()
    training.step = taking(clock, 0.1, training.step)
    found, calls = ways(training, clock, "same", always)
    training.after(training.fast(*found))
    assert (calls.stop, calls.step > 1 + fast_step.TIMED) == (int(not always), always)
    assert capsys.readouterr().out == said


def test_each_way_builds_on_the_one_before(clock):
    training, order = Training(), []
    training.step = taking(clock, 10.0, training.step)

    def way(name):
        def start(step, images):
            def other(images):
                order.append(name)
                clock.now -= 1
                return step(images)
            return other
        return Way(name, False, start)

    step = training.fast(way("compiled"), way("recorded"))
    training.after(step, fast_step.WARM_UP + 1)
    assert order[-2:] == ["recorded", "compiled"]


def test_a_way_is_judged_by_what_the_next_makes_of_it(clock, capsys):
    training, plain = Training(), None
    state = SimpleNamespace(compiled=False, ran=False)

    def body(images):
        clock.now += 1.5 if state.compiled else 1.0             # slower where each kernel is started by itself
        state.ran = state.compiled
        return plain(images)

    plain, training.step = training.step, body

    def compile(step, images):
        state.compiled = True                                   # of what the step calls: the step is the same
        return step

    def record(step, images):
        assert state.ran == state.compiled, "what is compiled at its first call cannot be recorded at it"
        return taking(clock, -1.2 if state.compiled else -0.5, step)

    step = training.fast(Way("compile", False, compile), Way("record", False, record))
    training.after(step, fast_step.WARM_UP + 1)
    assert capsys.readouterr().out.splitlines() == [
        "--record: a step takes 500 ms, a plain one 1e+03", "--compile: a step takes 300 ms, a plain one 1e+03"]


def recording(clock, fails_at=None):
    """Way "record", which halves a second, and the steps that it was started on, at the `fails_at`th without room."""
    started = []

    def record(step, images):
        started.append(step)
        if len(started) == fails_at:
            raise torch.OutOfMemoryError("no room")
        return taking(clock, -0.5, step)

    return Way("record", False, record), started


def test_what_cannot_be_made_again_is_left_too(clock, capsys):
    plain = Training()
    expected = plain.after(plain.step)
    training = Training()
    training.step = taking(clock, 1.0, training.step)
    found, _ = ways(training, clock, "other losses")
    way, _ = recording(clock, fails_at=3)
    assert_equal(training.after(training.fast(*found, way)), expected)
    assert [line.split(" (")[0] for line in capsys.readouterr().out.splitlines()] == [
        "--record: a step takes 500 ms, a plain one 1e+03", *(
            f"note: --{flag} is of no use here, steps go on without it" for flag in ("quick", "record"))]


@pytest.mark.parametrize("kind", ["other losses", "fails midway", "cannot start", "same"])
def test_what_was_kept_goes_on_where_the_way_before_it_is_of_no_use(clock, capsys, kind):
    plain = Training()
    expected = plain.after(plain.step)
    training = Training()
    training.step = taking(clock, 1.0, training.step)
    found, calls = ways(training, clock, kind, seconds=0.1)
    way, started = recording(clock)
    step = training.fast(*found, way)
    assert_equal(training.after(step), expected)
    assert started[0] == started[-1] == training.step, "recorded anew, on the plain step"
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("--record: a step takes 500 ms") and len(out) == 1 + (kind != "same") and calls.stop == 1
    began = clock.now
    step(training.images)
    assert clock.now - began == pytest.approx(0.5)


# ---- of a real training ----

TINY = ("--dataset", "toy", "--imsize", "32", "--batch_size", "8", "--g_conv_dim", "8", "--d_conv_dim", "8", "--z_dim",
        "16", "--preset", "published")
FASTGAN = ("--dataset", "toy", "--model", "fastgan", "--imsize", "64", "--batch_size", "4", "--g_conv_dim", "4",
           "--d_conv_dim", "4", "--z_dim", "16", "--metadata", "false", "--recon", "l1")


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
    (TINY, ["Generator", "g_loss", "d_loss"]), ((*TINY, "--adv_loss", "wgan-gp", "--sn", "both", "--d_iters", "1"),
                                                ["Generator", "g_loss"]),
    (FASTGAN, ["Generator", "g_loss", "d_loss"])], ids=["hinge", "penalty", "fastgan"])
def test_compiled_networks_train_as_plain_ones(traced, capsys, flags, compiled):
    found = []
    for more in ((), ("--compile", "true")):
        config = resolve(parse((*flags, "--device", "cpu", *more)))
        place = distributed.start(config)
        training = Trainer(config, OneBatch(config, place.device), place)
        found.append([training.train_step(training.dataset) for _ in range(fast_step.WARM_UP + 3)])
        weights = [weight.detach().clone() for weight in training.G_ema.parameters()]
        found.append(weights)
    assert traced.names == compiled and "--compile: a step takes" in capsys.readouterr().out
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


@pytest.mark.parametrize("flags", [("--compile", "true"), ("--cuda_graph", "true"), ("--compile", "--cuda_graph")])
def test_what_is_not_there_is_said_once_and_changes_nothing(run, monkeypatch, flags):
    def missing(net, **_):
        def call(*_):
            raise RuntimeError("no C++ compiler found")
        return call

    monkeypatch.setattr(trainer.torch, "compile", missing)
    code, plain, _ = run("--version", "plain", "--total_step", 6)
    assert code == 0 and "compil" not in plain and "cuda_graph" not in plain, "auto tries nothing on a CPU"
    code, out, err = run("--version", "a", "--total_step", 6, *flags)
    assert code == 0, err
    for flag in ("compile", "cuda_graph"):
        assert out.count(f"note: --{flag} is of no use here") == (f"--{flag}" in flags)
    assert ("no C++ compiler found" in out) == ("--compile" in flags)
    assert ("it takes a GPU" in out) == ("--cuda_graph" in flags)
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
        fake = SimpleNamespace(config=config, place=place, step=0, _compile=None, _do_not_compile=None)
        assert [way.flag for way in Trainer._ways(fake)] == expected
        fake.place = distributed.Place(torch.device(device), 0, 2)
        assert list(Trainer._ways(fake)) == [], "one of several processes must not decide alone"


# ---- on a GPU ----


def on_gpu(*flags):
    config = resolve(parse(("--device", "cuda", "--compile", "false", *flags)))
    place = distributed.start(config)
    return Trainer(config, OneBatch(config, place.device), place)


def several(flags):
    return [flags, (*flags, "--accumulate", "2"), (*flags, "--precision", "bf16")]


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [*several(TINY), (*TINY, "--adv_loss", "wgan-gp"), *several(FASTGAN)])
def test_a_recorded_step_gives_the_numbers_of_a_plain_one(flags, capsys):
    found = []
    for graph in ("false", "true"):
        training = on_gpu(*flags, "--cuda_graph", graph)
        found.append(torch.tensor([[value.item() for value in training.train_step(training.dataset).values()]
                                   for _ in range(fast_step.WARM_UP + 5)]))
    assert "--cuda_graph: a step takes" in capsys.readouterr().out
    assert (found[0] - found[1]).abs().max() < 0.05 and found[1].isfinite().all()
    assert len(set(found[1][-5:, 0].tolist())) == 5, "each step draws its own numbers"


@pytest.mark.gpu
def test_a_compiled_and_recorded_step_gives_the_numbers_of_a_plain_one(capsys):
    found = []
    for fast in ((), ("--compile", "true")):
        training = on_gpu(*TINY, "--cuda_graph", "true" if fast else "false", *fast)
        found.append(torch.tensor([[value.item() for value in training.train_step(training.dataset).values()]
                                   for _ in range(fast_step.WARM_UP + 3)]))
    out = capsys.readouterr().out
    assert "--compile: a step takes" in out and "--cuda_graph: a step takes" in out and "note:" not in out
    assert (found[0] - found[1]).abs().max() < 0.05 and found[1].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["false", "true"])
@pytest.mark.parametrize("flags", [TINY, (*TINY, "--adv_loss", "wgan-gp"), FASTGAN],
                         ids=["hinge", "penalty", "fastgan"])
def test_a_step_never_waits_for_the_gpu(flags, graph):
    training = on_gpu(*flags, "--cuda_graph", graph, "--augment", "color,translation,cutout", "--lr_decay", "0.9")
    for _ in range(fast_step.WARM_UP + 1):
        training.train_step(training.dataset)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waited:
            warnings.simplefilter("always")
            for _ in range(3):
                training.train_step(training.dataset)
            steps = len(waited)
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waited) == steps + 1, "this one is counted"
    assert steps == 0, [str(warning.message) for warning in waited]


@pytest.mark.gpu
def test_a_step_that_cannot_be_recorded_goes_on_as_it_is(monkeypatch, capsys):
    updates = Trainer._updates

    def waiting(self, batches):
        stats = updates(self, batches)
        stats["d_loss"].item()
        return stats

    plain = on_gpu(*TINY, "--cuda_graph", "false")
    monkeypatch.setattr(Trainer, "_updates", waiting)
    training = on_gpu(*TINY, "--cuda_graph", "true")
    plain, found = ([side.train_step(side.dataset)["d_loss"].item() for _ in range(fast_step.WARM_UP + 4)]
                    for side in (plain, training))
    assert capsys.readouterr().out.count("note: --cuda_graph is of no use here") == 1
    assert found == pytest.approx(plain, abs=0.02)


@pytest.mark.gpu
def test_a_recorded_run_goes_on_where_it_was_saved(run):
    flags = ("--device", "cuda", "--cuda_graph", "true", "--model_save_step", 8)
    run("--version", "whole", "--total_step", 16, *flags)
    run("--version", "parts", "--total_step", 8, *flags)
    run("--version", "parts", "--total_step", 16, *flags)
    whole, parts = (state(version, 16) for version in ("whole", "parts"))
    assert torch.equal(whole["random"][0]["cuda"], parts["random"][0]["cuda"])
    for name, weight in whole["G"].items():
        assert torch.allclose(weight.float(), parts["G"][name].float(), atol=1e-2), name
