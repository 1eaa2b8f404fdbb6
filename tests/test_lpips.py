"""LPIPS on VGG-16: the published formula, gradients for its inputs only, and the errors when it cannot be loaded."""

import copy
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from torch import nn

from errors import DataError, UsageError
from pretrained import lpips, vgg


@pytest.fixture(scope="module")
def loaded():
    """(the network, the global random state before loading it, the state after)."""
    before = torch.get_rng_state()
    return lpips.load_lpips("random"), before, torch.get_rng_state()


@pytest.fixture
def net(loaded):
    return loaded[0]


def test_global_random_state_stays(loaded):
    _, before, after = loaded
    assert torch.equal(before, after)


def images(seed, count=3, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def by_the_formula(a, b, heads):
    """Zhang et al. 2018: the sum over five layers of the weighted squared differences of unit-length features, averaged
    over positions. Images are shifted and scaled per channel first.
    """
    features = vgg.load_vgg("random", "")
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    a, b = (a - shift) / scale, (b - shift) / scale
    total = 0
    for number, module in enumerate(features):
        a, b = module(a), module(b)
        if number in (3, 8, 15, 22, 29):                # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
            apart = nn.functional.normalize(a) - nn.functional.normalize(b)
            total = total + nn.functional.conv2d(apart**2, heads[number]).mean((1, 2, 3))
    return total


def test_lpips_is_the_formula_on_our_weights(net):
    import torchmetrics.functional.image.lpips as theirs

    shipped = Path(theirs.__file__).parent / "lpips_models" / "vgg.pth"
    file = torch.load(shipped, map_location="cpu", weights_only=True)
    heads = {number: file[f"lin{k}.model.1.weight"] for k, number in enumerate((3, 8, 15, 22, 29))}
    a, b = images(0), images(1)
    distances = net(a, b)
    assert distances.shape == (3,) and (distances > 0).all()
    assert torch.allclose(distances, by_the_formula(a, b, heads), rtol=1e-4)
    assert torch.equal(net(a, a), torch.zeros(3))


def test_lpips_is_frozen_and_its_inputs_get_gradients(net):
    a, b = images(0).requires_grad_(), images(1).requires_grad_()
    net(a, b).sum().backward()
    assert a.grad.abs().sum() > 0 and b.grad.abs().sum() > 0
    assert all(not p.requires_grad for p in net.parameters())


def test_lpips_has_no_dropout_whatever_mode_is_asked(net):
    net, a, b = copy.deepcopy(net), images(0), images(1)
    expected = net(a, b)
    outer = nn.ModuleList([net]).train()
    assert torch.equal(outer[0](a, b), expected) and torch.equal(net(a, b), expected)


def test_lpips_of_one_image(net):
    assert net(images(0, 1, 16), images(1, 1, 16)).shape == (1,)


def test_lpips_without_torchmetrics(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image.lpips", None)
    with pytest.raises(UsageError, match="pip install torchmetrics.*--recon l1"):
        lpips.load_lpips("random")


@pytest.mark.parametrize(("hint", "said"), [((), "--recon l1"), (("--metrics swd",), "--metrics swd")])
def test_lpips_without_weights(tmp_path, monkeypatch, hint, said):
    def no_network(url, *args, **kwargs):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(DataError, match=said):
        lpips.load_lpips("imagenet", *hint)
