"""Convolutions computed as one matmul equal torch's own: outputs, weights, first and second derivatives. So do those
that are merged with the change of size before or after them.
"""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layers import convolutions
from layers.convolutions import DownConv, FromVector, ToVector, UpConv

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


@pytest.mark.parametrize("cls", [UpConv, DownConv])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_changing_size_and_convolving_at_once_are_the_two_steps(monkeypatch, cls, layout):
    torch.manual_seed(0)
    layer, found = cls(3, 5).to(memory_format=layout), []
    x, by = torch.randn(2, 3, 16, 24).to(memory_format=layout).requires_grad_(), None
    for merged_from in (64, 10_000):
        monkeypatch.setattr(convolutions, "MERGED_FROM_POSITIONS", merged_from)
        with FlopCounterMode(display=False) as counter:
            maps = layer(x)
        by = torch.randn_like(maps) if by is None else by
        found.append((counter.get_total_flops(), maps, *torch.autograd.grad(maps, [x, *layer.parameters()], by)))
    (flops, *merged), (plain_flops, *plain) = found
    assert flops == plain_flops * 4 / 9
    for one, other in zip(merged, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
