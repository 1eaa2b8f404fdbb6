"""Self-attention (Zhang et al. 2019, arXiv 1805.08318, section 3), and the maps and gammas that pictures and logs show.

`capture` computes something from the inputs and outputs of layers.
"""

import torch
from torch import nn
from torch.nn import functional as F

from layers.blocks import positions

# Below this many positions the explicit softmax is faster on CPUs; on GPUs too where the values have more channels than
# this: the fused backward pass through two layers of 512 channels took 10% of a step.
FUSED_FROM_POSITIONS = 512
FUSED_TO_WIDTH = 256


class SelfAttention(nn.Module):
    """y = gamma * softmax(q k^T) v + x over all positions (section 3, eqs. 1-3).

    1x1 convolutions, q and k with C/8 channels; no 1/sqrt(d); gamma starts at 0. With `pool`, keys and values are 2x2
    max-pooled: a quarter of the work. Biases, and v with C channels; or, with `wrap`, as in the authors' own code: no
    biases, v with C/2 channels and an output convolution, each layer made by `wrap(layer)`.
    Input and output are (B, C, H, W). Memory in training is O(N), N = H * W, where `attend` uses the fused kernel.
    """

    def __init__(self, channels, pool=False, wrap=None):
        super().__init__()
        self.pool = nn.MaxPool2d(2, ceil_mode=True) if pool else nn.Identity()
        inner, values = max(1, channels // 8), channels if wrap is None else max(1, channels // 2)

        def conv(channels, out):
            return nn.Conv2d(channels, out, 1) if wrap is None else wrap(nn.Conv2d(channels, out, 1, bias=False))

        self.query, self.key, self.value = conv(channels, inner), conv(channels, inner), conv(channels, values)
        self.out = nn.Identity() if wrap is None else conv(values, channels)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        B, _, H, W = x.size()
        q, k, v = self._project(x)
        q = positions(q)                                                # (B, N, C/8)
        k = positions(self.pool(k))                                     # (B, M, C/8), M = N or N / 4
        v = positions(self.pool(v))                                     # (B, M, C or C/2)
        out = attend(q, k, v)                                           # (B, N, C or C/2)
        out = self.out(out.transpose(1, 2).reshape(B, -1, H, W))        # (B, C, H, W)
        return self.gamma.to(out.dtype) * out + x

    def _project(self, x):
        """Return query(x), key(x), value(x), computed as one convolution: reading x is what bounds their speed."""
        layers = self.query, self.key, self.value
        weight = torch.cat([layer.weight for layer in layers])
        bias = None if self.query.bias is None else torch.cat([layer.bias for layer in layers])
        return F.conv2d(x, weight, bias).split([layer.out_channels for layer in layers], dim=1)

    def maps(self, x, queries):
        """Return the attention maps of the given queries, by explicit softmax.

        x (B, C, H, W); queries (Q, 2) as (y, x) fractions of the image in [0, 1]. The result is (B, Q, H, W),
        with `pool` (B, Q, H / 2, W / 2), rounded up; each map sums to 1.
        """
        B, _, H, W = x.size()
        size = torch.tensor([H, W], device=x.device)
        cell = (queries.to(x.device) * size).long().clamp(min=0).minimum(size - 1)      # (Q, 2)
        at = cell[:, 0] * W + cell[:, 1]                                # (Q,)
        q = positions(self.query(x))[:, at]                             # (B, Q, C/8)
        keys = self.pool(self.key(x))                                   # (B, C/8, H, W) or half as high and wide
        weights = torch.softmax((q @ keys.flatten(2)).float(), dim=-1)  # (B, Q, M)
        return weights.view(B, -1, *keys.shape[2:])


def attend(q, k, v):
    """softmax(q k^T) v: q (B, N, D), k (B, M, D), v (B, M, C) -> (B, N, C).

    The fused kernels never materialize the N x M matrix. They have no double backward: a gradient penalty runs D under
    `sdpa_kernel(SDPBackend.MATH)`.
    """
    N, M, C = q.size(1), k.size(1), v.size(2)
    on_gpu = q.is_cuda or q.is_meta     # estimates of memory, which use the meta device, are for GPUs
    if N * M < FUSED_FROM_POSITIONS**2 and not (on_gpu and C <= FUSED_TO_WIDTH):
        return torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v
    # the CPU's fused kernel needs one head size for q, k and v; the GPU's in bf16 a multiple of 8
    padding = (-q.size(2) % 8 if on_gpu else C - q.size(2))
    if padding:
        q, k = (F.pad(t, (0, padding)) for t in (q, k))                 # zeros do not change any q.k
    # CRUCIAL: inputs that are not contiguous silently fall back to materializing the N x M matrix
    q, k, v = (t.contiguous().unsqueeze(1) for t in (q, k, v))          # one head: (B, 1, N or M, ·)
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).squeeze(1)


class Attentive(nn.Module):
    """A network called as net(x, labels), with `blocks`, a ModuleDict or ModuleList, and self-attention layers in
    `attention`, {layer: SelfAttention}.
    """

    def large_blocks(self):
        """Return the blocks whose activations `--checkpointing` computes again."""
        return list(self.blocks.values()) if isinstance(self.blocks, nn.ModuleDict) else list(self.blocks)

    def attention_maps(self, x, queries, labels=None):
        """Return {layer: (B, Q, h, w)} for an input x and queries (Q, 2); see `SelfAttention.maps`."""
        return capture(lambda: self(x, labels), self.attention,
                       lambda layer, features, output: layer.maps(features, queries))


def gammas(G, D):
    """Return {layer: gamma (1,), detached}; while gamma is near 0, the layer has no effect."""
    layers = {**G.attention, **D.attention}
    return {name: layer.gamma.detach() for name, layer in layers.items()}


@torch.no_grad()
def capture(run, layers, compute):
    """Call run() and return {name: compute(layer, input, output)} of `layers` {name: layer}; no layers, no call."""
    results = {}

    def make_hook(name):
        def hook(layer, inputs, output):
            results[name] = compute(layer, inputs[0], output)
        return hook

    hooks = [layer.register_forward_hook(make_hook(name)) for name, layer in layers.items()]
    try:
        if hooks:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return results
