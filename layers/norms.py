"""Class-conditional batch norm; batch norm by the batch at hand."""

from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# From so many values of an image on, class-conditional batch norm goes over the images one by one in its backward pass.
ONE_BY_ONE_FROM = 50_000


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


@contextmanager
def batch_statistics(net):
    """In this block the batch norms of `net`, in evaluation mode, take the statistics of each batch, as in training.

    Their running statistics stay as they are.
    """
    norms = [(layer, layer.running_mean, layer.running_var) for layer in net.modules()
             if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    for norm, *_ in norms:
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm, mean, var in norms:
            norm.running_mean, norm.running_var = mean, var


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
