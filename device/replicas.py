"""What makes N ranks compute what one process computes on the same batch.

Every rank holds the same weights and the same random state. Random numbers are drawn on every rank for the whole batch,
and each rank keeps the rows of its own samples (`draw_rows`): this draws more than a rank needs but sends nothing, and
a run can resume with another number of ranks. Batch norm takes its statistics over all ranks (`sync_batch_norm`).
Gradients are averaged (`GradientAverage`). `check_replicas` notices ranks that no longer agree.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from errors import TO_RESUME, NonFiniteError

BUCKET = 2 * 2**20      # bytes of gradients that are sent together, at least; little is left when backward ends
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}     # by bytes per element


class DriftError(NonFiniteError):
    """The ranks no longer hold the same weights."""


def draw_rows(draw, count):
    """Return random numbers of this rank's `count` samples: its rows of `draw(count * world size)`; rows come first.

    CRUCIAL: all that is random in a step is drawn through this function, from the global random state, which is then
    the same on every rank. Without a process group it is `draw(count)`.
    """
    return _draw_rows(draw, count) if _source is None else _source(draw, count)


def _draw_rows(draw, count):
    if not dist.is_initialized():
        return draw(count)
    first = dist.get_rank() * count
    return draw(count * dist.get_world_size())[first:first + count].clone()     # a view would keep all rows in memory


_source = None          # what `draw_rows` calls in the contexts of `Draws`


class Draws:
    """The random numbers of one pass through a network, for another pass that must take the same."""

    def __init__(self):
        self.rows = []

    def kept(self):
        """A context in which what `draw_rows` returns is kept."""
        def draw(*args):
            self.rows.append(_draw_rows(*args))
            return self.rows[-1]

        return _drawing_by(draw)

    def again(self):
        """A context in which `draw_rows` returns what was kept, in the same order."""
        rows = iter(self.rows)
        return _drawing_by(lambda *_: next(rows))


@contextmanager
def _drawing_by(source):
    global _source      # not of a thread: on GPUs, backward passes run in one of their own
    before, _source = _source, source
    try:
        yield
    finally:
        _source = before


# ----------------------------------------------------------------------------------------- batch norm over all ranks


def sync_batch_norm(net, device):
    """Let the batch norms of `net` take their statistics over all ranks, in place. Names and tensors stay as they are.

    On CUDA these are torch's own `SyncBatchNorm`, whose kernels are fused; it has none for CPUs.
    """
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return
    for layer in net.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SyncBatchNorm2d


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`BatchNorm2d` whose statistics in training are those of all ranks' maps. Every rank has equally many."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        y, mean, var = _Normalize.apply(x, self.weight, self.bias, self.running_mean.dtype, self.eps)
        count = _values_per_channel(x)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / (count - 1)), self.momentum)      # unbiased, as torch's
        return y


class _Normalize(torch.autograd.Function):
    """Batch norm with the mean and the biased variance over all ranks, which it returns too, without gradient.

    One collective forward and one backward. The gradient is that of the sum of the ranks' losses: a rank's maps change
    the statistics, and so the losses, of all ranks.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, dtype, eps):
        # var_mean is 30 times as slow on CPUs
        stats = torch.stack(torch.batch_norm_update_stats(x.to(dtype), None, None, 0.0))      # (2, C)
        means, variances = _all_ranks(stats).unbind(1)                  # (ranks, C), (ranks, C)
        mean = means.mean(0)
        # not E[x^2] - mean^2, which loses digits where the mean is large
        var = variances.mean(0) + (means - mean).square().mean(0)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        x, weight, mean, inverse_std = ctx.saved_tensors
        # this rank's sums of g * (x - mean) / std, which is the gradient of the weight, and of g, that of the bias
        _, weight_gradient, bias_gradient = torch.ops.aten.native_batch_norm_backward(
            gradient, x, torch.ones_like(mean), None, None, mean, inverse_std, True, 0.0, [False, True, True])
        sums = torch.stack([weight_gradient, bias_gradient])            # (2, C)
        dist.all_reduce(sums)
        with_x, alone = sums / _values_per_channel(x)
        # scale * (g - mean of g - (x - mean) / std * mean of g (x - mean) / std), as g * scale + x * slope + shift
        scale = inverse_std if weight is None else inverse_std * weight
        slope = -scale * inverse_std * with_x
        shift = -scale * alone - slope * mean
        scale, slope, shift = (row.to(x.dtype)[:, None, None] for row in (scale, slope, shift))     # (C, 1, 1)
        x_gradient = torch.addcmul(shift, gradient, scale).addcmul_(x, slope)
        return x_gradient, *((weight_gradient, bias_gradient) if weight is not None else (None, None)), None, None


def _values_per_channel(x):
    """Return the number of values behind each statistic, over all ranks."""
    return x.numel() // x.size(1) * dist.get_world_size()


def _all_ranks(values):
    """Return (ranks, *values.shape): this tensor of every rank."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts)


# ---------------------------------------------------------------------------------------- gradients over all ranks


class GradientAverage:
    """Replaces the gradients of `parameters` by their means over the ranks, while backward still computes others.

    Backward goes through a network from its end to its start, so the gradients are grouped into buckets from the last
    parameter to the first. The all-reduce of a bucket starts as soon as backward has run `parts` times through all of
    its parameters. `finish()` starts those that lack a gradient, and waits for all.

    This is explicit, since DDP's wrapper does not support the double backward of a gradient penalty. Without a process
    group it does nothing.
    """

    def __init__(self, parameters, parts=1):
        # the same at every step: with other buckets the sum over three ranks or more may round differently
        buckets = _bucket(parameters) if dist.is_initialized() else []
        self.buckets = [_Bucket(bucket, parts) for bucket in buckets]

    def finish(self):
        """Replace the gradients. Call it after the last backward pass of an update, on all ranks."""
        for bucket in self.buckets:
            if bucket.work is None:
                bucket.start()
        for bucket in self.buckets:
            bucket.finish()


def _bucket(parameters):
    """Return the parameters, last first, as lists of at least BUCKET bytes each; the last list may be smaller."""
    buckets, size = [[]], 0
    for parameter in reversed(list(parameters)):
        if size >= BUCKET:
            buckets, size = [*buckets, []], 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets


class _Bucket:
    """Parameters whose gradients travel together, as one flat tensor."""

    def __init__(self, parameters, parts):
        self.parameters, self.passes = parameters, parts * len(parameters)
        self.missing, self.flat, self.work = self.passes, None, None
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._count)

    def _count(self, parameter):
        self.missing -= 1
        if not self.missing:
            self.start()

    def _gradients(self):
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    @torch.no_grad()
    def start(self):
        """Start the all-reduce of the gradients that there are."""
        gradients = self._gradients()
        if gradients:
            self.flat = torch.cat([gradient.flatten() for gradient in gradients])
            self.work = dist.all_reduce(self.flat, async_op=True)

    @torch.no_grad()
    def finish(self):
        """Wait for the all-reduce and replace the gradients."""
        self.missing = self.passes
        if self.work is None:
            return
        self.work.wait()
        self.flat.div_(dist.get_world_size())
        gradients = self._gradients()
        for gradient, part in zip(gradients, self.flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        self.flat = self.work = None


# ------------------------------------------------------------------------------------------------------- the check


@torch.no_grad()
def check_replicas(tensors, step):
    """Compare {name: tensor} bit for bit with those of the other ranks. All ranks must call this; it synchronizes.

    Raise DriftError on every rank; it names the first tensor that differs.
    """
    digests = _all_ranks(torch.stack([_digest(tensor) for tensor in tensors.values()])).cpu()       # (ranks, tensors)
    differs = digests != digests[0]
    if not differs.any():
        return
    first = int(differs.any(0).nonzero()[0])
    ranks = differs[:, first].nonzero().flatten().tolist()
    who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
    raise DriftError(f"step {step}: {list(tensors)[first]} of {who} is no longer that of rank 0.\n"
                     f"Run {TO_RESUME}; if this returns, suspect the hardware.")


def _digest(tensor):
    """Return a number of 64 bits, 0-d, that changes with any single element; the same on every device."""
    bits = tensor.detach().reshape(-1).contiguous().view(INTEGERS[tensor.element_size()]).long()
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()     # odd factors, modulo 2^64
