"""SAGAN: generator and discriminator with self-attention (Zhang et al. 2019, arXiv 1805.08318).

The DCGAN-shaped model whose command line this program follows; imsize is 32, 64, 128 or 256, or a rectangle whose
shorter side is. At imsize 64 and conv_dim
64 it has 3,832,885 (G) and 3,175,299 (D) parameters. Widths double towards the 4x4 end and are capped at 16 x conv_dim;
uncapped, 256 px would need 2,048 channels. With classes, which the original lacks, G has class-conditional batch norm,
D a projection. The paper's own networks are in resnet_models.py.
"""

import torch
from torch import nn

from flags.pictures import CHANNELS, FIRST, short_side, sides_at
from flags.sagan import d_feature_sizes, g_feature_sizes
from layers.attention import Attentive, SelfAttention
from layers.blocks import Block, Projection, sum_pool
from layers.convolutions import FromVector, ToVector
from layers.norms import ConditionalBatchNorm
from spectral import maybe_spectral_norm

MAX_WIDTH_MULTIPLE = 16


class Generator(Attentive):
    """z (B, z_dim), labels (B,) if there are `classes` -> [image (B, channels, H, W) in [-1, 1]].

    4x4 transposed convolutions, batch norm and ReLU after every layer but the last; attention after the layers whose
    output size is in `attention`; with `sn`, spectral norm on every layer but the last and the attention. A size is the
    shorter side of a map; for images that are not square the first one has more than 4x4 positions.
    """

    parts = {"z": slice(None)}      # of the input z: {name: slice}
    has_noise = False

    def __init__(self, imsize, z_dim, conv_dim, attention=(), sn=True, pool=False, classes=0, channels=3):
        super().__init__()
        wrap = maybe_spectral_norm(sn)
        self.blocks = nn.ModuleDict()
        self.attention = nn.ModuleDict()
        before = z_dim
        for size in g_feature_sizes(imsize):                            # 4, 8, ..., imsize / 2
            width = _width(imsize, size, conv_dim)
            self.blocks[f"{size}"] = Block(
                wrap(FromVector(before, width, sides_at(imsize, FIRST)) if size == FIRST else
                     nn.ConvTranspose2d(before, width, 4, 2, 1)),
                ConditionalBatchNorm(width, classes) if classes else nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),                                  # in place: one activation less in memory
            )
            if size in attention:
                self.attention[f"g{size}"] = SelfAttention(width, pool)
            before = width
        self.to_rgb = nn.ConvTranspose2d(before, channels, 4, 2, 1)

    def forward(self, z, labels=None):
        x = z[:, :, None, None]                                         # (B, z_dim, 1, 1)
        for size, block in self.blocks.items():
            x = block(x, labels=labels)                                 # (B, width, size, size)
            if f"g{size}" in self.attention:
                x = self.attention[f"g{size}"](x)
        return [torch.tanh(self.to_rgb(x).float())]                     # (B, channels, imsize, imsize)


class Discriminator(Attentive):
    """image (B, channels, H, W) in [-1, 1], labels (B,) if there are `classes` -> logits (B,).

    Labels of None leave out the projection: the logits say how real the images are, of whatever class.

    4x4 convolutions with stride 2 and LeakyReLU 0.1 down to 4x4; no batch norm, since a gradient penalty is per sample;
    attention as in G; with `sn`, spectral norm on every layer but the last and the attention.
    """

    def __init__(self, imsize, conv_dim, attention=(), sn=True, pool=False, classes=0, channels=3):
        super().__init__()
        wrap = maybe_spectral_norm(sn)
        self.blocks = nn.ModuleDict()
        self.attention = nn.ModuleDict()
        for size in d_feature_sizes(imsize):                            # imsize / 2, ..., 8, 4
            width = _width(imsize, size, conv_dim)
            self.blocks[f"{size}"] = nn.Sequential(
                wrap(nn.Conv2d(channels, width, 4, 2, 1)), nn.LeakyReLU(0.1, inplace=True)
            )
            if size in attention:
                self.attention[f"d{size}"] = SelfAttention(width, pool)
            channels = width
        self.to_logit = ToVector(channels, 1, sides_at(imsize, FIRST))
        self.projection = Projection(channels, classes, wrap) if classes else None

    def forward(self, image, labels=None):
        x = image
        for size, block in self.blocks.items():
            x = block(x)                                                # (B, width, size, size)
            if f"d{size}" in self.attention:
                x = self.attention[f"d{size}"](x)
        logits = self.to_logit(x).flatten().float()                     # (B, 1, 1, 1) -> (B,)
        if self.projection is not None and labels is not None:
            logits = logits + self.projection(sum_pool(x), labels)      # (B,)
        return logits

    def stages(self):
        """Return [[module, ...], ...]: the layers of each block from the image on, for `--freeze_d`."""
        return [[block, *(self.attention[name] for name in (f"d{size}",) if name in self.attention)]
                for size, block in self.blocks.items()]


def _width(imsize, size, conv_dim):
    """Return the channels of the maps of a size."""
    return min(short_side(imsize) // (2 * size), MAX_WIDTH_MULTIPLE) * conv_dim


def build(config, classes=0):
    """Return (G, D) of the config for so many classes, newly initialized, on the CPU."""
    last = config.attn_pool, classes, CHANNELS[config.channels]
    G = Generator(config.imsize, config.z_dim, config.g_conv_dim, config.g_attn, config.sn in ("both", "g"), *last)
    D = Discriminator(config.imsize, config.d_conv_dim, config.d_attn, config.sn in ("both", "d"), *last)
    return G, D
