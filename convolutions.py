"""Convolutions that meet their input in one place only, computed as the one matrix product that they are.

What G does first (1x1 -> 4x4), what D and the gates of a skip-layer excitation do last (4x4 -> 1x1). A convolution's
kernels are slow at it, and `torch.compile` expects them to answer in another layout than they do. Weights, their names
and their shapes are those of torch's own layers.
"""

from torch import nn
from torch.nn import functional as F


class FromVector(nn.ConvTranspose2d):
    """(B, in_channels, 1, 1) -> (B, out_channels, k, k), channels-last: `ConvTranspose2d` on one position."""

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
    """(B, in_channels, k, k) -> (B, out_channels, 1, 1): `Conv2d` whose kernel covers its whole input."""

    def __init__(self, channels, out, kernel, bias=True):
        super().__init__(channels, out, kernel, bias=bias)

    def forward(self, x):
        x, weight = (t.permute(0, 2, 3, 1).flatten(1) for t in (x, self.weight))        # (B or out, k * k * in)
        return F.linear(x, weight, self.bias)[:, :, None, None]
