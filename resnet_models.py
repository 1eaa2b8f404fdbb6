"""The SAGAN paper's own networks (Zhang et al. 2019, arXiv 1805.08318, sections 3 and 4): residual, class-conditional.

G: residual up-blocks with class-conditional batch norm; D: residual down-blocks, sum pooling, projection (Miyato and
Koyama 2018, arXiv 1802.05637). Without classes G has plain batch norm and D no projection. imsize is 32 (the paper's
128-px networks cut down as for CIFAR-10), 64, 128 or 256, or a rectangle whose shorter side is. At 128 px, width 64,
1,000 classes and attention at 32x32 they have 42,078,852 (G) and 39,463,618 (D) parameters. Spectral norm on every
layer, attention included; on no batch norm.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from device.mps import memory_format
from flags.pictures import CHANNELS, FIRST, short_side, sides_at
from layers.attention import Attentive, SelfAttention
from layers.blocks import Projection, sum_pool
from layers.convolutions import DownConv, UpConv, Upsample2x
from layers.norms import ConditionalBatchNorm
from spectral import maybe_spectral_norm

# Channels of G's first map and of its blocks' outputs, in units of conv_dim.
G_WIDTHS = {
    32: (4, 4, 4, 4),
    64: (16, 8, 4, 2, 1),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
}
# Channels of the outputs of D's blocks, of which the last ones keep the size of their maps.
D_WIDTHS = {
    32: (2, 2, 2, 2),
    64: (1, 2, 4, 8, 16),
    128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
}
D_KEEP_SIZE = {32: 2, 64: 1, 128: 1, 256: 1}        # so many blocks


def _layers(sn):
    """Return wrap(layer): Xavier initialization, zero bias, then spectral norm if `sn`."""
    normalize = maybe_spectral_norm(sn)

    def wrap(layer):
        nn.init.xavier_uniform_(layer.weight)
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)
        return normalize(layer)                                         # last: it keeps the initial weight

    return wrap


def _conv(wrap, channels, out, kernel):
    return wrap(nn.Conv2d(channels, out, kernel, padding=kernel // 2))


class UpBlock(nn.Module):
    """x (B, channels, H, W), labels (B,) -> (B, out, 2H, 2W): two 3x3 convolutions, beside an upsampled 1x1 one."""

    def __init__(self, channels, out, classes, wrap):
        super().__init__()
        self.norm1, self.norm2 = ConditionalBatchNorm(channels, classes), ConditionalBatchNorm(out, classes)
        self.conv1, self.conv2 = wrap(UpConv(channels, out)), _conv(wrap, out, out, 3)
        self.skip, self.upsample = _conv(wrap, channels, out, 1), Upsample2x()

    def forward(self, x, labels=None):
        # CRUCIAL: no ReLU in place here, the skip needs x itself
        h = self.conv1(F.relu(self.norm1(x, labels)))                     # (B, out, 2H, 2W)
        h = self.conv2(F.relu(self.norm2(h, labels)))                   # (B, out, 2H, 2W)
        # a 1x1 convolution commutes with repeating pixels; before it, it has a quarter of the work
        return h + self.upsample(self.skip(x))


class DownBlock(nn.Module):
    """x (B, channels, H, W) -> (B, out, H/2, W/2), without `down` (B, out, H, W).

    The `first` block has no ReLU before its first convolution, as images are its input.
    """

    def __init__(self, channels, out, wrap, down=True, first=False):
        super().__init__()
        self.first, self.pool = first, nn.AvgPool2d(2) if down else nn.Identity()
        self.conv1 = _conv(wrap, channels, out, 3)
        self.conv2 = wrap(DownConv(out, out)) if down else _conv(wrap, out, out, 3)
        self.skip = _conv(wrap, channels, out, 1) if down or channels != out else nn.Identity()

    def forward(self, x):
        h = self.conv1(x if self.first else F.relu(x))                  # (B, out, H, W); not in place, as above
        h = self.conv2(F.relu(h))                                       # (B, out, H/2, W/2)
        return h + self.skip(self.pool(x))                              # pooled first: the same, a quarter of the work


class Generator(Attentive):
    """z (B, z_dim), labels (B,) if there are `classes` -> [image (B, channels, H, W) in [-1, 1]].

    Attention after the blocks whose output size is in `attention`. A size is the shorter side of a map.
    """

    parts = {"z": slice(None)}      # of the input z: {name: slice}
    has_noise = False

    def __init__(self, imsize, z_dim, conv_dim, attention=(), sn=True, classes=0, channels=3):
        super().__init__()
        wrap = _layers(sn)
        before, *outs = [width * conv_dim for width in G_WIDTHS[short_side(imsize)]]
        self.first = sides_at(imsize, FIRST)                                # (4, 4) for squares
        self.start = wrap(nn.Linear(z_dim, math.prod(self.first) * before))
        self.blocks, self.attention = nn.ModuleDict(), nn.ModuleDict()
        size = min(self.first)
        for out in outs:
            size *= 2
            self.blocks[f"{size}"] = UpBlock(before, out, classes, wrap)
            if size in attention:
                self.attention[f"g{size}"] = SelfAttention(out, pool=True, wrap=wrap)
            before = out
        self.norm = nn.BatchNorm2d(before)
        self.to_rgb = _conv(wrap, before, channels, 3)

    def forward(self, z, labels=None):
        x = self.start(z).unflatten(1, (-1, *self.first))               # (B, width, 4, 4)
        x = x.contiguous(memory_format=memory_format(x.device))
        for size, block in self.blocks.items():
            x = block(x, labels)                                        # (B, width, size, size)
            if f"g{size}" in self.attention:
                x = self.attention[f"g{size}"](x)
        x = F.relu(self.norm(x))                                        # (B, conv_dim, imsize, imsize)
        return [torch.tanh(self.to_rgb(x).float())]                     # (B, channels, imsize, imsize)


class Discriminator(Attentive):
    """image (B, channels, H, W) in [-1, 1], labels (B,) if there are `classes` -> logits (B,).

    No batch norm; attention after the blocks that halve their maps to a size in `attention`. Labels of None leave out
    the projection: the logits say how real the images are, of whatever class.
    """

    def __init__(self, imsize, conv_dim, attention=(), sn=True, classes=0, channels=3):
        super().__init__()
        wrap, size = _layers(sn), short_side(imsize)
        widths = [width * conv_dim for width in D_WIDTHS[size]]
        halving = len(widths) - D_KEEP_SIZE[size]
        self.blocks, self.attention = nn.ModuleList(), nn.ModuleDict()
        self.attention_after = {}                                       # {number of a block: layer}
        for number, out in enumerate(widths):
            down = number < halving
            self.blocks.append(DownBlock(channels, out, wrap, down, first=number == 0))
            size = size // 2 if down else size
            if down and size in attention:
                self.attention[f"d{size}"] = SelfAttention(out, pool=True, wrap=wrap)
                self.attention_after[number] = f"d{size}"
            channels = out
        self.to_logit = wrap(nn.Linear(channels, 1))
        self.projection = Projection(channels, classes, wrap) if classes else None

    def forward(self, image, labels=None):
        x = image
        for number, block in enumerate(self.blocks):
            x = block(x)                                                # (B, width, size, size)
            if number in self.attention_after:
                x = self.attention[self.attention_after[number]](x)
        features = sum_pool(F.relu(x))                                  # (B, width)
        logits = self.to_logit(features).flatten().float()              # (B,)
        if self.projection is not None and labels is not None:
            logits = logits + self.projection(features, labels)         # (B,)
        return logits

    def stages(self):
        """Return [[module, ...], ...]: the layers of each block from the image on, for `--freeze_d`."""
        after = self.attention_after
        return [[block, *(self.attention[after[number]] for _ in range(number in after))]
                for number, block in enumerate(self.blocks)]


def build(config, classes=0):
    """Return (G, D) of the config for so many classes, newly initialized, on the CPU."""
    last = classes, CHANNELS[config.channels]
    G = Generator(config.imsize, config.z_dim, config.g_conv_dim, config.g_attn, config.sn in ("both", "g"), *last)
    D = Discriminator(config.imsize, config.d_conv_dim, config.d_attn, config.sn in ("both", "d"), *last)
    return G, D
