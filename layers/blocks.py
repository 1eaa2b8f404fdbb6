"""Blocks of layers, and what a D has after them: a projection on classes, heads on the maps of a frozen network."""

import torch
from torch import nn


class Block(nn.Sequential):
    """Layers in a row. Some take more than x: of the keyword arguments the one that is named in their `takes`."""

    def forward(self, x, **arguments):
        for layer in self:
            name = getattr(layer, "takes", None)
            x = layer(x) if name is None else layer(x, arguments[name])
        return x


class Projection(nn.Module):
    """features (B, C), labels (B,) -> (B,): the inner product of features and class vector, which a conditional D adds
    to its logit (Miyato and Koyama 2018, arXiv 1802.05637, eq. 5).

    `wrap(layer)` may add spectral norm to the table of class vectors.
    """

    def __init__(self, channels, classes, wrap):
        super().__init__()
        table = nn.Embedding(classes, channels)
        nn.init.xavier_uniform_(table.weight)
        self.table = wrap(table)

    def forward(self, features, labels):
        return (self.table(labels) * features).sum(1)


class FeatureHeads(nn.Module):
    """Feature maps [(B, C, h, w), ...] of a frozen network -> logits (B, L): a small convolutional D on each map.

    A discriminator on features learned elsewhere, at several depths (Sauer et al. 2021, arXiv 2111.01007, section 3;
    here without their random projections). `shapes`: (channels, shorter side) of each map; convolutions of stride 2
    bring that to 8. `wrap(layer)` adds spectral norm.
    """

    WIDTH, HEIGHT = 64, 8

    def __init__(self, shapes, wrap):
        super().__init__()
        self.heads = nn.ModuleList([nn.Sequential(*self._head(*shape, wrap)) for shape in shapes])

    def _head(self, channels, height, wrap):
        downs = max(0, (height // self.HEIGHT).bit_length() - 1)
        kernels = [(4, 2, 1)] * downs or [(1, 1, 0)]                    # kernel, stride, padding
        for kernel in kernels:
            yield wrap(nn.Conv2d(channels, self.WIDTH, *kernel, bias=False))
            yield nn.LeakyReLU(0.2, inplace=True)
            channels = self.WIDTH
        yield wrap(nn.Conv2d(channels, 1, min(4, height), bias=False))

    def forward(self, maps):
        logits = [head(features) for features, head in zip(maps, self.heads, strict=True)]     # (B, 1, 1 to 5, ...)
        return torch.cat([each.flatten(1).float() for each in logits], 1)


def positions(x):
    """(B, C, H, W) -> (B, H * W, C); a view where x is channels-last."""
    return x.flatten(2).transpose(1, 2)


def sum_pool(x):
    """(B, C, H, W) -> (B, C), the fp32 sum over all positions; the gradient of a channels-last x is channels-last, too
    (after `sum((2, 3))` it is not, and what follows it becomes slow).
    """
    return positions(x).float().sum(1)
