"""--precision: what is computed in bf16 or tf32, what stays fp32, and the fallback on devices that have neither."""

import pytest
import torch
from conftest import SMALL, SMALL_FASTGAN, assert_same_state, begun, state, step_losses, tensors

from device import precision
from device.precision import has_bf16
from metrics import swd


@pytest.mark.parametrize("flags", [SMALL, (*SMALL, "--adv_loss", "wgan-gp", "--sn", "both"), SMALL_FASTGAN],
                         ids=["hinge", "penalty", "fastgan"])
def test_bf16_losses_are_close_to_fp32_losses(flags, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)         # slow on processors without it
    exact, rounded, auto = (step_losses(begun((*flags, "--precision", name))) for name in ("fp32", "bf16", "auto"))
    assert 0 < (exact - rounded).abs().max() < 0.1
    assert auto.equal(rounded)


def test_weights_and_statistics_stay_fp32(run, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    assert run("--precision", "bf16", "--version", "a", "--total_step", 2)[0] == 0
    kept = [thing for thing in tensors(state("a", 2)).values() if isinstance(thing, torch.Tensor)]
    assert {thing.dtype for thing in kept if thing.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("wanted", ["tf32", "bf16"])
def test_an_unsupported_precision_is_replaced_and_said_once(run, pictures, monkeypatch, wanted):
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    monkeypatch.setattr(swd, "sliced_wasserstein", lambda *_: 1.0)          # takes two seconds
    few = "--dataset", "folder", "--image_path", pictures
    _, out, _ = run(*few, "--precision", wanted, "--version", "a", "--total_step", 2)
    assert out.count(f"this device has no {wanted} units; using --precision fp32") == 1
    _, out, _ = run(*few, "--version", "b", "--total_step", 2)
    assert "units" not in out
    _, out, _ = run(*few, "--version", "b", "--mode", "evaluate", "--precision", wanted, "--num_eval", 4, "--metrics",
                    "swd")
    assert out.count(f"this device has no {wanted} units") == 1
    assert_same_state(state("a", 2), state("b", 2))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("bf16", "taken"), [(False, "fp32"), (True, "bf16")])
def test_auto_is_bf16_where_the_device_is_fast_at_it(monkeypatch, capsys, device, bf16, taken):
    monkeypatch.setattr(precision, "has_bf16", lambda device: bf16)
    monkeypatch.setattr(precision, "has_tensor_cores", lambda device: bf16)
    chosen = precision.Precision("auto", torch.device(device))
    chosen.announce()
    assert chosen.name == taken and capsys.readouterr().out == ""


@pytest.mark.parametrize(("units", "fast"), [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True),
                                             ({"avx512_bf16": False, "avx512_f": True}, False), ({}, False)])
def test_processors_with_bf16_products_are_fast_at_bf16(monkeypatch, units, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    assert has_bf16(torch.device("cpu")) is fast


@pytest.mark.gpu
@pytest.mark.parametrize(("wanted", "switch"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_the_tf32_switches_are_restored_after_the_step(wanted, switch):
    device = torch.device("cuda")
    before = torch.backends.cuda.matmul.allow_tf32
    with precision.Precision(wanted, device).switched():
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == switch
    assert torch.backends.cuda.matmul.allow_tf32 == before
