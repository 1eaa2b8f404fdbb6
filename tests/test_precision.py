"""--precision: what is computed in bf16, fp16 or tf32, what stays fp32, the loss scale of fp16, and the fallback on
devices that have none of them.
"""

import pytest
import torch
from conftest import SMALL, SMALL_FASTGAN, assert_same_state, begun, lines, state, step_losses, tensors

from device import loss_scale, precision
from device.precision import has_bf16
from metrics import swd


@pytest.mark.parametrize(("name", "flags"), [
    ("bf16", SMALL), ("fp16", (*SMALL, "--adv_loss", "wgan-gp", "--sn", "both")), ("bf16", SMALL_FASTGAN)],
    ids=["hinge", "penalty", "fastgan"])
def test_losses_are_close_to_fp32_losses(name, flags, monkeypatch):
    monkeypatch.setattr(precision, f"has_{name}", lambda device: True)      # slow on processors without it
    exact, rounded = (step_losses(begun((*flags, "--precision", wanted))) for wanted in ("fp32", name))
    assert 0 < (exact - rounded).abs().max() < {"bf16": 0.1, "fp16": 0.01}[name]
    assert precision.Precision("auto", torch.device("cpu")).name == name


def dtypes(saved):
    """The types of the numbers in a checkpoint's tensors that are not whole."""
    return {thing.dtype for thing in tensors(saved).values()
            if isinstance(thing, torch.Tensor) and thing.is_floating_point()}


def test_weights_and_statistics_stay_fp32(monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    training = begun((*SMALL, "--precision", "bf16"))
    training.run(2)
    assert dtypes(training.trainer.state()) == {torch.float32}


@pytest.fixture
def fp16(monkeypatch):
    """This processor as one with units for fp16."""
    monkeypatch.setattr(precision, "has_fp16", lambda device: True)


def overflowing(training, steps=1):
    """Statistics of steps of this training in which the gradients of both networks overflow."""
    trainer = training.trainer
    for scale in trainer.loss_scales.values():
        scale.restore({**scale.state(), "scale": 3e38})
    return [trainer.train_step(training.batches) for _ in range(steps)]


@pytest.mark.parametrize("flags", [(*SMALL, "--accumulate", "2"), SMALL_FASTGAN], ids=["accumulated", "fastgan"])
def test_an_update_that_overflows_in_fp16_is_skipped_and_its_scale_halved(fp16, flags):
    training = begun((*flags, "--precision", "fp16"))
    trainer = training.trainer
    trainer.train_step(training.batches)
    before = {name: weight.clone() for name, weight in trainer.G.named_parameters()}
    moments = next(iter(trainer.d_optimizer.state.values()))["step"].clone()
    (stats,) = overflowing(training)
    assert all(weight.equal(before[name]) for name, weight in trainer.G.named_parameters())
    assert next(iter(trainer.d_optimizer.state.values()))["step"].equal(moments)
    assert {net: scale.figures() for net, scale in trainer.loss_scales.items()} == {
        net: {"scale": pytest.approx(1.5e38), "skipped": 1} for net in ("G", "D")}
    assert all(value.isfinite() for value in stats.values()) and trainer.is_finite()
    trainer.loss_scales["G"].restore({**trainer.loss_scales["G"].state(), "scale": 1024.0})
    trainer.train_step(training.batches)
    assert not all(weight.equal(before[name]) for name, weight in trainer.G.named_parameters())


def test_maps_that_overflow_in_fp16_leave_no_trace(fp16):
    """Even in the running statistics of batch norm, which a forward pass changes."""
    training = begun((*SMALL_FASTGAN, "--precision", "fp16"))
    trainer = training.trainer
    usual = trainer.train_step(training.batches)
    norm = next(layer for layer in trainer.D.modules() if isinstance(layer, torch.nn.BatchNorm2d))
    before = norm.running_var.clone()
    hook = norm.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * float("inf"),))
    stats = trainer.train_step(training.batches)
    hook.remove()
    assert norm.running_var.equal(before) and trainer.is_finite()
    assert stats["d_loss"].equal(usual["d_loss"]), "that of the last finite step counts in the mean"
    assert trainer.loss_scales["D"].figures()["skipped"] == 1
    assert not trainer.train_step(training.batches)["d_loss"].equal(usual["d_loss"])


def test_a_run_in_fp16_resumes_exactly_and_logs_its_loss_scales(fp16, run, monkeypatch):
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", 2.0**26)         # the first updates overflow
    flags = "--precision", "fp16", "--log_step", 3, "--model_save_step", 3
    assert run(*flags, "--version", "whole", "--total_step", 6)[0] == 0
    assert run(*flags, "--version", "halves", "--total_step", 3)[0] == 0
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", 2.0)
    assert run(*flags, "--version", "halves", "--total_step", 6)[0] == 0
    whole, halves = state("whole", 6), state("halves", 6)
    assert_same_state(whole, halves)
    assert dtypes(whole) == {torch.float32}
    assert whole["loss_scales"] == halves["loss_scales"] and whole["loss_scales"]["G"]["skipped"] > 0
    line = lines("whole")[-1]
    assert line["loss_scale/G_scale"] == whole["loss_scales"]["G"]["scale"] < 2.0**26
    assert line["loss_scale/D_skipped"] == whole["loss_scales"]["D"]["skipped"]


def test_fp16_that_overflows_without_end_is_exit_4(fp16, run, monkeypatch):
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", 2.0**100)
    code, _, err = run("--precision", "fp16", "--version", "a", "--total_step", 100, "--log_step", 30)
    assert code == 4 and "25 times or more in a row" in err and "--precision fp32" in err and "0 and 30" in err


@pytest.mark.parametrize("wanted", ["bf16", *(pytest.param(name, marks=pytest.mark.soak) for name in ("tf32", "fp16"))])
def test_an_unsupported_precision_is_replaced_and_said_once(run, pictures, monkeypatch, wanted):
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    monkeypatch.setattr(swd, "sliced_wasserstein", lambda *_: 1.0)          # takes two seconds
    few = "--dataset", "folder", "--image_path", pictures
    _, out, _ = run(*few, "--precision", wanted, "--version", "a", "--total_step", 2)
    told = "fp16 is slow on every CPU" if wanted == "fp16" else f"this device has no {wanted} units"
    assert out.count(f"{told}; using --precision fp32") == 1
    _, out, _ = run(*few, "--version", "b", "--total_step", 2)
    assert "units" not in out
    _, out, _ = run(*few, "--version", "b", "--mode", "evaluate", "--precision", wanted, "--num_eval", 4, "--metrics",
                    "swd")
    assert out.count(told) == 1
    assert_same_state(state("a", 2), state("b", 2))


@pytest.mark.parametrize(("capability", "taken"), [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"),
                                                   ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_what_the_gpu_is_fast_at(monkeypatch, capsys, capability, taken):
    monkeypatch.setattr(precision, "has_bf16", has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen = precision.Precision("auto", torch.device("cuda"))
    chosen.announce()
    assert chosen.name == taken and capsys.readouterr().out == ""


@pytest.mark.parametrize(("units", "fast"), [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True),
                                             ({"avx512_bf16": False, "avx512_f": True}, False), ({}, False)])
def test_processors_with_bf16_products_are_fast_at_bf16(monkeypatch, units, fast):
    monkeypatch.setattr(precision, "has_bf16", has_bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    assert has_bf16(torch.device("cpu")) is fast
    assert precision.Precision("auto", torch.device("cpu")).name == ("bf16" if fast else "fp32")


def test_no_processor_takes_fp16_which_is_many_times_slower_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_fp16": True, "amx_fp16": True}, raising=False)
    for wanted in ("auto", "fp16"):
        chosen = precision.Precision(wanted, torch.device("cpu"))
        chosen.announce()
        assert chosen.name == "fp32"
    assert capsys.readouterr().out.count("--precision fp16 is slow on every CPU; using --precision fp32") == 1


@pytest.mark.parametrize("wanted", ["false", "true"])
def test_deterministic_algorithms_are_chosen_by_the_flag(run, monkeypatch, wanted):
    switched = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", switched.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", wanted == "true")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert run("--deterministic", wanted, "--dry_run")[0] == 0
    assert switched == [True] * (wanted == "true") and torch.backends.cudnn.benchmark is (wanted == "false")


@pytest.mark.parametrize(("wanted", "switch"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_the_tf32_switches_are_restored_after_the_step(monkeypatch, wanted, switch):
    def switches():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    before = switches()
    with precision.Precision(wanted, torch.device("cuda")).switched():
        assert switches() == (switch, switch)
    assert switches() == before
    with precision.Precision(wanted, torch.device("cpu")).switched():
        assert switches() == before
