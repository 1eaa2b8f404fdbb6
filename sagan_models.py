"""SAGAN: generator and discriminator with self-attention (Zhang et al. 2019, arXiv 1805.08318).

The DCGAN-shaped model whose command line this program follows; imsize is 32, 64, 128 or 256. At imsize 64 and conv_dim
64 it has 3,832,885 (G) and 3,175,299 (D) parameters. Widths double towards the 4x4 end and are capped at 16 x conv_dim;
uncapped, 256 px would need 2,048 channels. With classes, which the original lacks, G has class-conditional batch norm,
D a projection. The paper's own networks are in resnet_models.py.
"""

import torch
from torch import nn

from flags.sagan import d_feature_sizes, g_feature_sizes
from layers import Attentive, Block, ConditionalBatchNorm, FromVector, Projection, SelfAttention, ToVector, sum_pool
from spectral import maybe_spectral_norm

MAX_WIDTH_MULTIPLE = 16


class Generator(Attentive):
    """z (B, z_dim), labels (B,) if there are `classes` -> [image (B, 3, imsize, imsize) in [-1, 1]].

    4x4 transposed convolutions, batch norm and ReLU after every layer but the last; attention after the layers whose
    output height is in `attention`; with `sn`, spectral norm on every layer but the last and the attention.
    """

    parts = {"z": slice(None)}      # of the input z: {name: slice}
    has_noise = False

    def __init__(self, imsize, z_dim, conv_dim, attention=(), sn=True, pool=False, classes=0):
        super().__init__()
        sizes = g_feature_sizes(imsize)                                 # 4, 8, ..., imsize / 2
        widths = [min(imsize // (2 * size), MAX_WIDTH_MULTIPLE) * conv_dim for size in sizes]
        wrap = maybe_spectral_norm(sn)
        self.blocks = nn.ModuleDict()
        self.attention = nn.ModuleDict()
        channels = z_dim
        for size, width in zip(sizes, widths, strict=True):
            self.blocks[f"{size}"] = Block(
                wrap(FromVector(channels, width, 4) if size == 4 else nn.ConvTranspose2d(channels, width, 4, 2, 1)),
                ConditionalBatchNorm(width, classes) if classes else nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),                                  # in place: one activation less in memory
            )
            if size in attention:
                self.attention[f"g{size}"] = SelfAttention(width, pool)
            channels = width
        self.to_rgb = nn.ConvTranspose2d(channels, 3, 4, 2, 1)

    def forward(self, z, labels=None):
        x = z[:, :, None, None]                                         # (B, z_dim, 1, 1)
        for size, block in self.blocks.items():
            x = block(x, labels=labels)                                 # (B, width, size, size)
            if f"g{size}" in self.attention:
                x = self.attention[f"g{size}"](x)
        return [torch.tanh(self.to_rgb(x).float())]                     # (B, 3, imsize, imsize)


class Discriminator(Attentive):
    """image (B, 3, imsize, imsize) in [-1, 1], labels (B,) if there are `classes` -> logits (B,).

    Labels of None leave out the projection: the logits say how real the images are, of whatever class.

    4x4 convolutions with stride 2 and LeakyReLU 0.1 down to 4x4; no batch norm, since a gradient penalty is per sample;
    attention as in G; with `sn`, spectral norm on every layer but the last and the attention.
    """

    def __init__(self, imsize, conv_dim, attention=(), sn=True, pool=False, classes=0):
        super().__init__()
        wrap = maybe_spectral_norm(sn)
        self.blocks = nn.ModuleDict()
        self.attention = nn.ModuleDict()
        channels = 3
        for size in d_feature_sizes(imsize):                            # imsize / 2, ..., 8, 4
            width = min(imsize // (2 * size), MAX_WIDTH_MULTIPLE) * conv_dim
            self.blocks[f"{size}"] = nn.Sequential(
                wrap(nn.Conv2d(channels, width, 4, 2, 1)), nn.LeakyReLU(0.1, inplace=True)
            )
            if size in attention:
                self.attention[f"d{size}"] = SelfAttention(width, pool)
            channels = width
        self.to_logit = ToVector(channels, 1, 4)
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


def build(config, classes=0):
    """Return (G, D) of the config for so many classes, newly initialized, on the CPU."""
    pool = config.attn_pool
    G = Generator(config.imsize, config.z_dim, config.g_conv_dim, config.g_attn, config.sn in ("both", "g"), pool,
                  classes)
    D = Discriminator(config.imsize, config.d_conv_dim, config.d_attn, config.sn in ("both", "d"), pool, classes)
    return G, D
