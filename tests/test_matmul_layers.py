"""Convolutions computed as one matmul equal torch's own: outputs, weights, first and second derivatives."""

import pytest
import torch
from torch import nn

from layers import FromVector, ToVector

LAYERS = {
    "from": (FromVector, nn.ConvTranspose2d, (6, 5, 4), (3, 6, 1, 1)),
    "to": (ToVector, nn.Conv2d, (6, 5, 4), (3, 6, 4, 4)),
    "to, 1x1": (ToVector, nn.Conv2d, (6, 5, 1), (3, 6, 1, 1)),
}


def pair(case, bias):
    """Our layer and torch's of the same weights, and an input."""
    kind, usual, arguments, shape = LAYERS[case]
    torch.manual_seed(0)
    ours, torchs = (layer(*arguments, bias=bias).double() for layer in (kind, usual))
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs, torch.randn(shape, dtype=torch.float64)


def gradients(layer, x):
    """Of a nonlinear function of layer(x), and those of a penalty on its gradient with respect to x, as in WGAN-GP."""
    x = x.clone().requires_grad_()
    out = layer(x).tanh()
    out = (out * torch.arange(out.numel()).view(out.shape)).sum()          # no two positions may change places
    first = torch.autograd.grad(out, [x, *layer.parameters()], create_graph=True)
    return out, *first, *torch.autograd.grad(first[0].square().sum(), [*layer.parameters()])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", LAYERS)
def test_numbers_and_gradients_are_those_of_torchs_convolution(case, bias, channels_last):
    ours, torchs, x = pair(case, bias)
    if channels_last:
        ours = ours.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    for found, expected in zip(gradients(ours, x), gradients(torchs, x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", LAYERS)
def test_bf16_stays_bf16(case):
    ours, _, x = pair(case, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.float()(x.float()).dtype is torch.bfloat16


def test_maps_from_a_vector_lie_channels_last():
    ours, _, x = pair("from", bias=True)
    assert ours(x).is_contiguous(memory_format=torch.channels_last)
