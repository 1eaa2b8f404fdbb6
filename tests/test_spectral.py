"""Spectral normalization against an SVD."""

import copy

import pytest
import torch
from torch import nn

from spectral import power_iterate, shared_weights, spectral_norm
from utils import ema_update


def matrix(layer):
    weight = layer.weight.detach()
    return (weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight).flatten(1)


def sigma(layer):
    return torch.linalg.svdvals(matrix(layer))[0].item()


LAYERS = [lambda: nn.Conv2d(5, 9, 3), lambda: nn.ConvTranspose2d(5, 9, 4, 2, 1), lambda: nn.Linear(6, 11)]


@pytest.mark.parametrize("make", LAYERS)
def test_sigma_is_the_svds(make):
    torch.manual_seed(0)
    layer = make()
    expected = sigma(layer)
    spectral_norm(layer)
    for _ in range(300):
        power_iterate(layer)
    chain = layer.parametrizations.weight
    assert chain[0].sigma(chain.original).item() == pytest.approx(expected, rel=1e-5)
    assert sigma(layer) == pytest.approx(1, rel=1e-5)


def test_transposed_convolutions_count_output_channels():
    layer = spectral_norm(nn.ConvTranspose2d(5, 9, 4))
    assert layer.parametrizations.weight[0].u.shape == (9,)
    assert layer.parametrizations.weight[0].v.shape == (5 * 4 * 4,)


def test_forward_passes_do_not_iterate_in_training_or_evaluation():
    layer = spectral_norm(nn.Conv2d(3, 4, 3)).train()
    u = layer.parametrizations.weight[0].u.clone()
    layer(torch.randn(1, 3, 8, 8))
    assert torch.equal(layer.parametrizations.weight[0].u, u)
    power_iterate(layer)
    assert not torch.equal(layer.parametrizations.weight[0].u, u)


def test_sigma_keeps_its_gradient_through_the_weight():
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(4, 3))
    chain = layer.parametrizations.weight
    u, v = chain[0].u, chain[0].v
    target = torch.randn(3, 4)
    (layer.weight * target).sum().backward()
    W = chain.original.detach()
    s = u @ W @ v
    expected = target / s - (W * target).sum() / s**2 * torch.outer(u, v)
    assert torch.allclose(chain.original.grad, expected, atol=1e-5)


def test_one_update_shares_one_weight():
    layer = spectral_norm(nn.Linear(4, 3))
    with shared_weights():
        assert layer.weight is layer.weight
    assert layer.weight is not layer.weight


def test_a_networks_weights_can_be_taken_ahead():
    net = nn.Sequential(spectral_norm(nn.Linear(4, 3)), nn.ReLU(), spectral_norm(nn.Linear(3, 2)))
    before = [net[i].weight.detach() for i in (0, 2)]
    with shared_weights(net):
        for i, weight in zip((0, 2), before, strict=True):
            with torch.no_grad():
                net[i].parametrizations.weight.original += 1
            assert torch.equal(net[i].weight, weight)
    assert not torch.equal(net[0].weight, before[0])


def test_the_average_copies_u_and_v():
    torch.manual_seed(0)
    G = spectral_norm(nn.Linear(8, 8))
    G_ema = copy.deepcopy(G)
    for _ in range(5):
        with torch.no_grad():
            G.parametrizations.weight.original.add_(torch.randn(8, 8))
        power_iterate(G)
        ema_update(G_ema, G, 0.5)
    assert torch.equal(G_ema.parametrizations.weight[0].v, G.parametrizations.weight[0].v)
    assert not torch.equal(G_ema.parametrizations.weight.original, G.parametrizations.weight.original)


@pytest.mark.parametrize("layer", [lambda: nn.Conv2d(5, 9, 3), lambda: nn.ConvTranspose2d(5, 9, 4, 2, 1),
                                   lambda: nn.Conv2d(6, 4, 1), lambda: nn.Linear(6, 11)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_normalized_weight_and_its_gradient_equal_autograds(layer, layout):
    torch.manual_seed(0)
    layer = spectral_norm(layer()).to(memory_format=layout)
    chain = layer.parametrizations.weight
    norm, weight = chain[0], chain.original
    power_iterate(layer)
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
        net = nn.Sequential(spectral_norm(nn.Conv2d(5, 9, 3)), spectral_norm(
            nn.ConvTranspose2d(9, 4, 4))).to(memory_format=layout)
        power_iterate(net)
        found.append(torch.cat([buffer for buffer in net.buffers()]))
    torch.testing.assert_close(*found)
