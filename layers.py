"""Layers that several networks use, and `capture`, which computes something from the inputs and outputs of layers.

`FromVector` and `ToVector` are convolutions whose kernel covers the whole input (1x1 -> 4x4, 4x4 -> 1x1), computed as
one matmul: convolution kernels are slow at it, and `torch.compile` assumes another memory format of their outputs than
they return. Names and shapes of the weights are those of torch's layers.
"""

import torch
from torch import nn
from torch.nn import functional as F


class FromVector(nn.ConvTranspose2d):
    """(B, in_channels, 1, 1) -> (B, out_channels, k, k), channels-last: `ConvTranspose2d` on a 1x1 input."""

    def __init__(self, channels, out, kernel, bias=True):
        super().__init__(channels, out, kernel, bias=bias)

    def forward(self, x):
        weight = self.weight.permute(0, 2, 3, 1)                        # (in, k, k, out)
        maps = x.flatten(1) @ weight.flatten(1)                         # (B, k * k * out)
        maps = maps.unflatten(1, weight.shape[1:])                      # (B, k, k, out)
        if self.bias is not None:
            maps = maps + self.bias.to(maps.dtype)
        return maps.permute(0, 3, 1, 2)                                 # (B, out, k, k)


class ToVector(nn.Conv2d):
    """(B, in_channels, k, k) -> (B, out_channels, 1, 1): `Conv2d` whose kernel covers the whole input."""

    def __init__(self, channels, out, kernel, bias=True):
        super().__init__(channels, out, kernel, bias=bias)

    def forward(self, x):
        x, weight = (t.permute(0, 2, 3, 1).flatten(1) for t in (x, self.weight))        # (B or out, k * k * in)
        return F.linear(x, weight, self.bias)[:, :, None, None]


@torch.no_grad()
def capture(net, x, layers, compute):
    """Run net(x) and return {name: compute(layer, input, output)} of `layers` {name: layer}; no layers, no run."""
    results = {}

    def make_hook(name):
        def hook(layer, inputs, output):
            results[name] = compute(layer, inputs[0], output)
        return hook

    hooks = [layer.register_forward_hook(make_hook(name)) for name, layer in layers.items()]
    try:
        if hooks:
            net(x)
    finally:
        for hook in hooks:
            hook.remove()
    return results
