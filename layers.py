"""Layers that several networks use: self-attention, class-conditional batch norm, upsampling, matmul convolutions; and
`capture`, which computes something from the inputs and outputs of layers.

`FromVector` and `ToVector` are convolutions whose kernel covers the whole input (1x1 -> 4x4, 4x4 -> 1x1), computed as
one matmul: convolution kernels are slow at it, and `torch.compile` assumes another memory format of their outputs than
they return. Names and shapes of the weights are those of torch's layers.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from device.precision import exact

# Below this many positions the explicit softmax is faster on CPUs; on GPUs too where the values have more channels than
# this: the fused backward pass through two layers of 512 channels took 10% of a step.
FUSED_FROM_POSITIONS = 512
FUSED_TO_WIDTH = 256
# From so many values of an image on, class-conditional batch norm goes over the images one by one in its backward pass.
ONE_BY_ONE_FROM = 50_000
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


class SelfAttention(nn.Module):
    """y = gamma * softmax(q k^T) v + x over all positions (section 3, eqs. 1-3).

    1x1 convolutions, q and k with C/8 channels; no 1/sqrt(d); gamma starts at 0. With `pool`, keys and values are 2x2
    max-pooled: a quarter of the work. Biases, and v with C channels; or, with `wrap`, as in the authors' own code: no
    biases, v with C/2 channels and an output convolution, each layer made by `wrap(layer)`.
    Input and output are (B, C, H, W). Memory in training is O(N), N = H * W, where `attend` uses the fused kernel.
    """

    def __init__(self, channels, pool=False, wrap=None):
        super().__init__()
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        inner, values = max(1, channels // 8), channels if wrap is None else max(1, channels // 2)

        def conv(channels, out):
            return nn.Conv2d(channels, out, 1) if wrap is None else wrap(nn.Conv2d(channels, out, 1, bias=False))

        self.query, self.key, self.value = conv(channels, inner), conv(channels, inner), conv(channels, values)
        self.out = nn.Identity() if wrap is None else conv(values, channels)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        B, _, H, W = x.size()
        q, k, v = self._project(x)
        q = _positions(q)                                               # (B, N, C/8)
        k = _positions(self.pool(k))                                    # (B, M, C/8), M = N or N / 4
        v = _positions(self.pool(v))                                    # (B, M, C or C/2)
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


def sum_pool(x):
    """(B, C, H, W) -> (B, C), the fp32 sum over all positions; the gradient of a channels-last x is channels-last, too
    (after `sum((2, 3))` it is not, and what follows it becomes slow).
    """
    return _positions(x).float().sum(1)


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


class UpConv(nn.Conv2d):
    """(B, C, H, W) -> (B, out, 2H, 2W): nearest-neighbour upsampling by 2, then a 3x3 convolution.

    The nine weights meet only four different pixels. So both are one transposed convolution with a 4x4 kernel, sums of
    the weights: 4 products instead of 9, and no larger map in between.
    """

    def __init__(self, channels, out, bias=True):
        super().__init__(channels, out, 3, padding=1, bias=bias)
        self.upsample = Upsample2x()

    def forward(self, x):
        if not _is_merged(x):
            return super().forward(self.upsample(x))
        kernel = _sum_neighbours(self.weight.flip(2, 3)).transpose(0, 1)                # (C, out, 4, 4)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


class DownConv(nn.Conv2d):
    """(B, C, H, W) -> (B, out, H/2, W/2): a 3x3 convolution, then 2x2 average pooling; as one convolution, like
    `UpConv`, of 4x4 and stride 2.
    """

    def __init__(self, channels, out, bias=True):
        super().__init__(channels, out, 3, padding=1, bias=bias)

    def forward(self, x):
        if not _is_merged(x, scale=2):
            return F.avg_pool2d(super().forward(x), 2)
        return F.conv2d(x, _sum_neighbours(self.weight) / 4, self.bias, stride=2, padding=1)


def _is_merged(x, scale=1):
    """Whether `UpConv` and `DownConv` merge their two steps for x, whose smaller map has 1 / scale of its sides.

    Where that map is tiny, summing the weights takes longer than it saves; on GPUs it was not measured. Exported and
    compiled networks keep the plain layers.
    """
    if x.device.type != "cpu" or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return x.size(-2) * x.size(-1) >= MERGED_FROM_POSITIONS * scale**2


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


class ClassTable(nn.Embedding):
    """One vector for each class: labels (B,) -> (B, C). Shares of the classes, floats (B, classes), give the mixture of
    their vectors.
    """

    def forward(self, labels):
        if labels.is_floating_point():
            return labels @ self.weight
        return super().forward(labels)


class ConditionalBatchNorm(nn.Module):
    """Batch norm with a scale and a shift for each class; plain batch norm without classes.

    x (B, C, H, W), labels (B,) -> (B, C, H, W). CRUCIAL: no spectral norm on the tables, it cripples G.
    """

    takes = "labels"

    def __init__(self, channels, classes=0):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=not classes)
        self.scale = self.shift = None
        if classes:
            self.scale, self.shift = ClassTable(classes, channels), ClassTable(classes, channels)
            nn.init.ones_(self.scale.weight)
            nn.init.zeros_(self.shift.weight)

    def forward(self, x, labels=None):
        if self.scale is None:
            return self.norm(x)
        scale, shift = self.scale(labels), self.shift(labels)           # (B, C)
        norm = self.norm
        plain = type(norm) is nn.BatchNorm2d                            # else its statistics are those of several ranks
        if plain and self.training and x.device.type == "cpu" and not torch.compiler.is_compiling():
            norm.num_batches_tracked += 1
            return _NormByImage.apply(x, scale, shift, norm.running_mean, norm.running_var, norm.momentum, norm.eps)
        return _affine(norm(x), scale, shift)                           # (B, C, H, W)


def _affine(x, scale, shift):
    """Return scale * x + shift in x's dtype: x (B, C, H, W), scale and shift (B or 1, C)."""
    scale, shift = (t[:, :, None, None].to(x.dtype) for t in (scale, shift))
    return torch.addcmul(shift, x, scale)


class _NormByImage(torch.autograd.Function):
    """scale * (x - mean) / std + shift over a batch, with a scale and a shift for each image, (B, C).

    Plain autograd writes and reads four more maps of x's size than batch norm does, up to 7% of a training step on a
    CPU. Here scale and shift are part of the normalization, and the sums over the batch that its gradient needs follow
    from those over each image, which are the gradients of scale and shift.
    """

    @staticmethod
    def forward(ctx, x, scale, shift, running_mean, running_var, momentum, eps):
        mean, variance = torch.batch_norm_update_stats(x, running_mean, running_var, momentum)
        rstd = torch.rsqrt(variance + eps)                              # (C,)
        ctx.save_for_backward(x, scale, mean, rstd)
        return _affine(x, scale * rstd, shift - mean * scale * rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, scale, mean, rstd = ctx.saved_tensors
        d_scale, d_shift = _sums_by_image(gradient, x, mean, rstd)      # (B, C)
        # dx = rstd * (scale * gradient - mean over the batch of (scale * d_shift + normalized x * scale * d_scale))
        positions = x[0, 0].numel()
        of_x = -rstd**2 * (scale * d_scale).mean(0, keepdim=True) / positions       # (1, C)
        constant = -rstd * (scale * d_shift).mean(0, keepdim=True) / positions - mean * of_x
        dx = _affine(x, of_x, constant)
        dx.addcmul_(gradient, (scale * rstd)[:, :, None, None].to(dx.dtype))
        return dx, d_scale, d_shift, None, None, None, None


def _sums_by_image(gradient, x, mean, rstd):
    """Return the sums over each image's positions of gradient * (x - mean) * rstd and of gradient, fp32 (B, C)."""
    if x[0].numel() < ONE_BY_ONE_FROM:
        total = torch.promote_types(x.dtype, torch.float32)
        gradient, x = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (gradient, x))      # (B, H W, C): summed faster
        d_shift = gradient.sum(1, dtype=total)
        return ((gradient * x).sum(1, dtype=total) - mean * d_shift) * rstd, d_shift
    # batch norm's own kernel gives both from one reading of an image
    sums = [torch.ops.aten.native_batch_norm_backward(*pair, None, None, None, mean, rstd, True, 0.0,
                                                      [False, True, True])[1:]
            for pair in zip(gradient.split(1), x.split(1), strict=True)]
    return tuple(torch.stack(each) for each in zip(*sums, strict=True))


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


class Attentive(nn.Module):
    """A network called as net(x, labels), with self-attention layers in `attention`, {layer: SelfAttention}."""

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
