"""SAGAN: generator and discriminator with self-attention (Zhang et al. 2019, arXiv 1805.08318).

The unconditional DCGAN-shaped model whose command line this program follows; imsize is 32, 64, 128 or 256.
At imsize 64 and conv_dim 64 it has 3,832,885 (G) and 3,175,299 (D) parameters. Widths double towards the 4x4
end and are capped at 16 x conv_dim; uncapped, 256 px would need 2,048 channels.
"""

import torch
from torch import nn
from torch.nn import functional as F

from flags.sagan import d_feature_sizes, g_feature_sizes
from layers import FromVector, ToVector, capture
from spectral import maybe_spectral_norm

MAX_WIDTH_MULTIPLE = 16
# Below this many positions the explicit softmax is faster on CPUs; on GPUs too where the values have more channels than
# this: the fused backward pass through two layers of 512 channels took 10% of a step.
FUSED_FROM_POSITIONS = 512
FUSED_TO_WIDTH = 256


class SelfAttention(nn.Module):
    """y = gamma * softmax(q k^T) v + x over all positions (section 3, eqs. 1-3).

    1x1 convolutions with bias, q and k with C/8 channels, v with C; no 1/sqrt(d); gamma starts at 0. With `pool`, keys
    and values are 2x2 max-pooled, as in the authors' own code: a quarter of the work.
    Input and output are (B, C, H, W). Memory in training is O(N), N = H * W, where `attend` uses the fused kernel.
    """

    def __init__(self, channels, pool=False):
        super().__init__()
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        inner = max(1, channels // 8)
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        B, C, H, W = x.size()
        q, k, v = self._project(x)
        q = _positions(q)                                               # (B, N, C/8)
        k = _positions(self.pool(k))                                    # (B, M, C/8), M = N or N / 4
        v = _positions(self.pool(v))                                    # (B, M, C)
        out = attend(q, k, v)                                           # (B, N, C)
        return self.gamma.to(out.dtype) * out.transpose(1, 2).reshape(B, C, H, W) + x

    def _project(self, x):
        """Return query(x), key(x), value(x), computed as one convolution: reading x is what bounds their speed."""
        layers = self.query, self.key, self.value
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        return F.conv2d(x, weight, bias).split([layer.out_channels for layer in layers], dim=1)

    def maps(self, x, queries):
        """Return the attention maps of the given queries, by explicit softmax.

        x (B, C, H, W); queries (Q, 2) as (y, x) fractions of the image in [0, 1]. The result is (B, Q, H, W),
        with `pool` (B, Q, H / 2, W / 2); each map sums to 1.
        """
        B, _, H, W = x.size()
        size = torch.tensor([H, W], device=x.device)
        cell = (queries.to(x.device) * size).long().clamp(min=0).minimum(size - 1)      # (Q, 2)
        at = cell[:, 0] * W + cell[:, 1]                                # (Q,)
        q = _positions(self.query(x))[:, at]                            # (B, Q, C/8)
        keys = self.pool(self.key(x))                                   # (B, C/8, H, W) or half as high and wide
        weights = torch.softmax((q @ keys.flatten(2)).float(), dim=-1)  # (B, Q, M)
        return weights.view(B, -1, *keys.shape[2:])


def _positions(x):
    """(B, C, H, W) -> (B, H * W, C); a view where x is channels-last."""
    return x.flatten(2).transpose(1, 2)


def attend(q, k, v):
    """softmax(q k^T) v: q (B, N, D), k (B, M, D), v (B, M, C) -> (B, N, C).

    The fused kernels never materialize the N x M matrix. They have no double backward: a gradient penalty runs D under
    `sdpa_kernel(SDPBackend.MATH)`.
    """
    N, M, C = q.size(1), k.size(1), v.size(2)
    if N * M < FUSED_FROM_POSITIONS**2 and not (q.is_cuda and C <= FUSED_TO_WIDTH):
        return torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v
    # the CPU's fused kernel needs one head size for q, k and v; the GPU's in bf16 a multiple of 8
    padding = (-q.size(2) % 8 if q.is_cuda else C - q.size(2))
    if padding:
        q, k = (F.pad(t, (0, padding)) for t in (q, k))                 # zeros do not change any q.k
    # CRUCIAL: inputs that are not contiguous silently fall back to materializing the N x M matrix
    q, k, v = (t.contiguous().unsqueeze(1) for t in (q, k, v))          # one head: (B, 1, N or M, ·)
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).squeeze(1)


class Generator(nn.Module):
    """z (B, z_dim) -> [image (B, 3, imsize, imsize) in [-1, 1]].

    4x4 transposed convolutions, batch norm and ReLU after every layer but the last; attention after the layers whose
    output height is in `attention`; with `sn`, spectral norm on every layer but the last and the attention.
    """

    def __init__(self, imsize, z_dim, conv_dim, attention=(), sn=True, pool=False):
        super().__init__()
        sizes = g_feature_sizes(imsize)                                 # 4, 8, ..., imsize / 2
        widths = [min(imsize // (2 * size), MAX_WIDTH_MULTIPLE) * conv_dim for size in sizes]
        wrap = maybe_spectral_norm(sn)
        self.blocks = nn.ModuleDict()
        self.attention = nn.ModuleDict()
        channels = z_dim
        for size, width in zip(sizes, widths, strict=True):
            self.blocks[f"{size}"] = nn.Sequential(
                wrap(FromVector(channels, width, 4) if size == 4 else nn.ConvTranspose2d(channels, width, 4, 2, 1)),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),                                  # in place: one activation less in memory
            )
            if size in attention:
                self.attention[f"g{size}"] = SelfAttention(width, pool)
            channels = width
        self.to_rgb = nn.ConvTranspose2d(channels, 3, 4, 2, 1)

    def forward(self, z):
        x = z[:, :, None, None]                                         # (B, z_dim, 1, 1)
        for size, block in self.blocks.items():
            x = block(x)                                                # (B, width, size, size)
            if f"g{size}" in self.attention:
                x = self.attention[f"g{size}"](x)
        return [torch.tanh(self.to_rgb(x).float())]                     # (B, 3, imsize, imsize)

    @property
    def parts(self):
        """The parts of the input z, {name: slice}."""
        return {"z": slice(None)}

    has_noise = False

    def attention_maps(self, z, queries):
        """Return {layer: (B, Q, size, size)} for z (B, z_dim) and queries (Q, 2); see `SelfAttention.maps`."""
        return _attention_maps(self, z, queries)


class Discriminator(nn.Module):
    """image (B, 3, imsize, imsize) in [-1, 1] -> logits (B,).

    4x4 convolutions with stride 2 and LeakyReLU 0.1 down to 4x4; no batch norm, since a gradient penalty is per sample;
    attention as in G; with `sn`, spectral norm on every layer but the last and the attention.
    """

    def __init__(self, imsize, conv_dim, attention=(), sn=True, pool=False):
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

    def forward(self, image):
        x = image
        for size, block in self.blocks.items():
            x = block(x)                                                # (B, width, size, size)
            if f"d{size}" in self.attention:
                x = self.attention[f"d{size}"](x)
        return self.to_logit(x).flatten().float()                       # (B, 1, 1, 1) -> (B,)

    def attention_maps(self, image, queries):
        """Return {layer: (B, Q, size, size)} for images (B, 3, imsize, imsize) and queries (Q, 2)."""
        return _attention_maps(self, image, queries)


def _attention_maps(net, x, queries):
    """Run net(x) and compute the maps of each attention layer from its input."""
    return capture(net, x, net.attention, lambda layer, features, output: layer.maps(features, queries))


def gammas(G, D):
    """Return {layer: gamma (1,), detached}; while gamma is near 0, the layer has no effect."""
    layers = {**G.attention, **D.attention}
    return {name: layer.gamma.detach() for name, layer in layers.items()}


def build(config):
    """Return (G, D) of the config, newly initialized, on the CPU."""
    pool = config.attn_pool
    G = Generator(config.imsize, config.z_dim, config.g_conv_dim, config.g_attn, config.sn in ("both", "g"), pool)
    D = Discriminator(config.imsize, config.d_conv_dim, config.d_attn, config.sn in ("both", "d"), pool)
    return G, D
