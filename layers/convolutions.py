"""Convolutions computed in a faster way than torch's: the same function, with the same names and shapes of weights.

`FromVector` and `ToVector` are convolutions whose kernel covers the whole input (1x1 -> 4x4, 4x4 -> 1x1), computed as
one matmul: convolution kernels are slow at it, and `torch.compile` assumes another memory format of their outputs than
they return. `UpConv` and `DownConv` are a 3x3 convolution and the change of size before or after it.
"""

import torch
from torch import nn
from torch.nn import functional as F

from device.precision import exact

# From so many positions of the smaller map on, a 3x3 convolution is merged with the change of size before or after it.
MERGED_FROM_POSITIONS = 64


class FromVector(nn.ConvTranspose2d):
    """(B, in_channels, 1, 1) -> (B, out_channels, h, w), channels-last: `ConvTranspose2d` with a kernel of h x w on a
    1x1 input.
    """

    def __init__(self, channels, out, kernel, bias=True):
        super().__init__(channels, out, kernel, bias=bias)

    def forward(self, x):
        weight = self.weight.permute(0, 2, 3, 1)                        # (in, h, w, out)
        maps = x.flatten(1) @ weight.flatten(1)                         # (B, h * w * out)
        maps = maps.unflatten(1, weight.shape[1:])                      # (B, h, w, out)
        if self.bias is not None:
            maps = maps + self.bias.to(maps.dtype)
        return maps.permute(0, 3, 1, 2)                                 # (B, out, h, w)


class ToVector(nn.Conv2d):
    """(B, in_channels, h, w) -> (B, out_channels, 1, 1): `Conv2d` whose kernel, h x w, covers the whole input."""

    def __init__(self, channels, out, kernel, bias=True):
        super().__init__(channels, out, kernel, bias=bias)

    def forward(self, x):
        x, weight = (t.permute(0, 2, 3, 1).flatten(1) for t in (x, self.weight))        # (B or out, h * w * in)
        return F.linear(x, weight, self.bias)[:, :, None, None]


class Resampling(nn.Conv2d):
    """A 3x3 convolution with a change of size before or after it, merged into one convolution on devices of the types
    `merged_on`, where that is faster. On GPUs it was not measured: `benchmarks/gpu.sh OUT speed` does.
    """

    merged_on = ("cpu",)

    def __init__(self, channels, out, bias=True):
        super().__init__(channels, out, 3, padding=1, bias=bias)

    def is_merged(self, x, scale=1):
        """Return whether the two steps are merged for x, whose smaller map has 1 / scale of its sides.

        Where that map is tiny, summing the weights takes longer than it saves. Exported and compiled networks keep the
        plain layers.
        """
        if x.device.type not in self.merged_on or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return False
        return x.size(-2) * x.size(-1) >= MERGED_FROM_POSITIONS * scale**2


class UpConv(Resampling):
    """(B, C, H, W) -> (B, out, 2H, 2W): nearest-neighbour upsampling by 2, then a 3x3 convolution.

    The nine weights meet only four different pixels. So both are one transposed convolution with a 4x4 kernel, sums of
    the weights: 4 products instead of 9, and no larger map in between.
    """

    def __init__(self, channels, out, bias=True):
        super().__init__(channels, out, bias)
        self.upsample = Upsample2x()

    def forward(self, x):
        if not self.is_merged(x):
            return super().forward(self.upsample(x))
        kernel = _sum_neighbours(self.weight.flip(2, 3)).transpose(0, 1)                # (C, out, 4, 4)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


class DownConv(Resampling):
    """(B, C, H, W) -> (B, out, H/2, W/2): a 3x3 convolution, then 2x2 average pooling; as one convolution, like
    `UpConv`, of 4x4 and stride 2.
    """

    def forward(self, x):
        if not self.is_merged(x, scale=2):
            return F.avg_pool2d(super().forward(x), 2)
        return F.conv2d(x, _sum_neighbours(self.weight) / 4, self.bias, stride=2, padding=1)


def _sum_neighbours(weight):
    """(out, C, 3, 3) -> (out, C, 4, 4): at each position the sum of the up to four weights around it."""
    weight = F.pad(weight, (0, 1)) + F.pad(weight, (1, 0))
    return F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))


class Upsample2x(nn.Upsample):
    """Nearest-neighbour upsampling by 2, in x's dtype: autocast would use fp32, no more exact for copied values."""

    def __init__(self):
        super().__init__(scale_factor=2)

    def forward(self, x):
        if torch.compiler.is_compiling():       # else the gradient takes four atomic additions per value
            B, C, H, W = x.size()
            x = x.permute(0, 2, 3, 1)[:, :, None, :, None]              # (B, H, 1, W, 1, C)
            return x.expand(B, H, 2, W, 2, C).reshape(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)
        with exact(x.device):
            return super().forward(x)
