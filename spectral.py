"""Spectral normalization (Miyato et al. 2018, arXiv 1802.05957, Algorithm 1).

A wrapped layer computes with W / sigma(W), where sigma is the largest singular value of the weight as a matrix with
one row per output channel. sigma is estimated by power iteration: u and v are buffers, and the trainer calls
`power_iterate(net)` once per update. A forward pass never iterates, so evaluation and sampling leave u and v as they
are, and all passes of one update use the same weight.
"""

from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import nn
from torch.nn.utils import parametrize

from device.precision import exact

# Iterations at construction: the first forward pass then has a spectral norm near 1; with random u, v it is far above.
WARM_UP_ITERATIONS = 15
_EPS = 1e-12


class SpectralNorm(nn.Module):
    """The parametrization W -> W / sigma(W) of one weight.

    `out_dim` is the output-channel axis of the weight: 0 for Linear and Conv, 1 for ConvTranspose.
    """

    def __init__(self, weight, out_dim):
        super().__init__()
        self.out_dim = out_dim
        self.kept = None                    # W / sigma, see `kept_weights`
        rows = weight.shape[out_dim]
        self.register_buffer("u", torch.randn(rows))
        self.register_buffer("v", torch.randn(weight.numel() // rows))
        if not weight.is_meta:              # on the meta device a network is built for its shapes alone
            self.u = nn.functional.normalize(self.u, dim=0, eps=_EPS)
            self.v = nn.functional.normalize(self.v, dim=0, eps=_EPS)
            self.iterate(weight, WARM_UP_ITERATIONS)

    def _times(self, weight, vector, transpose):
        """W^T u (in * kh * kw,) if `transpose`, else W v (out,), in fp32.

        Reads the weight in its own memory format, contiguous or channels-last, to avoid a copy: copying all weights
        took 10% of a step on a CPU.
        """
        with exact(weight.device):
            return self._product(weight.detach().to(vector.dtype), vector, transpose)

    def _product(self, weight, vector, transpose):
        if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
            weight = weight.permute(0, 2, 3, 1)                         # in memory order: (0, kh, kw, 1)
            if self.out_dim == 1:                                       # (in, kh, kw, out)
                return (weight.flatten(0, 2) @ vector) if transpose else (vector @ weight.flatten(0, 2))
            rows, taps = weight.flatten(1), weight.shape[1:3].numel()   # (out, kh * kw * in)
            if transpose:
                return (vector @ rows).view(taps, -1).T.flatten()
            return rows @ vector.view(-1, taps).T.flatten()
        rows = weight.flatten(1 + self.out_dim)                         # (out, in * kh * kw), or (in, out, kh * kw)
        if transpose:
            return (vector @ rows).flatten()
        return rows @ vector if self.out_dim == 0 else (rows @ vector.view(rows.size(0), -1, 1)).sum((0, 2))

    @torch.no_grad()
    def iterate(self, weight, steps=1):
        """Run `steps` power iterations on (u, v)."""
        for _ in range(steps):
            _iterate([self], [weight])

    @torch.no_grad()
    def sigma(self, weight):
        """Return the estimate of the largest singular value, 0-d."""
        return torch.dot(self.u, self._times(weight, self.v, transpose=False))

    def forward(self, weight):
        if self.kept is not None:
            return self.kept
        shape = list(weight.shape)
        u = self.u.view([size if axis == self.out_dim else 1 for axis, size in enumerate(shape)])
        v = self.v.view([1 if axis == self.out_dim else size for axis, size in enumerate(shape)])
        return _Divide.apply(weight, self.sigma(weight), u, v)


class _Divide(torch.autograd.Function):
    """W / sigma for sigma = u^T W v, u and v constants (section 2.1 and eq. 12).

    Autograd through the same formula reads and writes the weight three times as often.
    """

    @staticmethod
    def forward(ctx, weight, sigma, u, v):
        divided = weight / sigma.to(weight.dtype)
        ctx.save_for_backward(divided, sigma, u, v)
        return divided

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        divided, sigma, u, v = ctx.saved_tensors
        inner = (gradient * divided).sum()
        # (gradient - (gradient . W/sigma) u v^T) / sigma, in the weight's memory format, which avoids another copy
        result = torch.div(gradient, sigma.to(gradient.dtype), out=torch.empty_like(divided))
        return result.addcmul_(u * (-inner / sigma), v), None, None, None


def spectral_norm(layer):
    """Wrap the `weight` of a Linear, Conv or ConvTranspose layer and return the layer.

    Initialize before wrapping: afterwards `layer.weight` is a computed tensor, and initializing it in place is lost.
    """
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    norm = SpectralNorm(layer.weight, out_dim=1 if transposed else 0)
    # unsafe skips a check by a forward pass that W / sigma keeps the shape, which it does by construction
    return parametrize.register_parametrization(layer, "weight", norm, unsafe=True)


def maybe_spectral_norm(sn):
    """Return `spectral_norm` if `sn`, else the identity."""
    return spectral_norm if sn else lambda layer: layer


def _wrapped(net):
    return [layer for layer in net.modules() if parametrize.is_parametrized(layer, "weight")]


@contextmanager
def shared_weights(net=None):
    """Compute W / sigma once per layer in this context, and use it in every pass; for `net`, compute it on entry."""
    with parametrize.cached():
        for layer in _wrapped(net) if net is not None else ():
            layer.weight  # noqa: B018 - reading it fills the cache
        yield


def current_weights(net):
    """Return {SpectralNorm: W / sigma} of all wrapped layers in `net`, for `kept_weights`."""
    return {layer.parametrizations.weight[0]: layer.weight for layer in _wrapped(net)}


@contextmanager
def kept_weights(weights):
    """Let layers use these {SpectralNorm: W / sigma} in this context instead of computing their own."""
    for norm, weight in weights.items():
        norm.kept = weight
    try:
        yield
    finally:
        for norm in weights:
            norm.kept = None


def power_iterate(net):
    """Run one power iteration for every wrapped layer of `net`; the trainer calls it once per update of `net`."""
    parametrizations = [layer.parametrizations.weight for layer in _wrapped(net)]
    if parametrizations:
        _iterate([p[0] for p in parametrizations], [p.original for p in parametrizations])


@torch.no_grad()
def _iterate(norms, weights):
    """Run one power iteration on (u, v) of each of `norms`, in place: CUDA graphs hold these tensors."""
    us, vs = [norm.u for norm in norms], [norm.v for norm in norms]
    for vectors, into in ((us, vs), (vs, us)):
        _normalize([norm._times(weight, vector, transpose=vectors is us)
                    for norm, weight, vector in zip(norms, weights, vectors, strict=True)], into)


def _normalize(vectors, into):
    """Write each vector, divided by its norm, to `into`: some seven kernel launches in all, not four per layer."""
    counts = tuple(map(len, vectors))
    norms = torch.stack(torch._foreach_norm(vectors)).clamp(min=_EPS)           # (layers,)
    flat = torch.cat(vectors) / norms[_vector_indices(counts, vectors[0].device)]       # (sum of counts,)
    torch._foreach_copy_(into, flat.split(counts))


@lru_cache(maxsize=64)
def _vector_indices(counts, device):
    """(sum of counts,): for each element of the concatenated vectors, the index of its vector."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)
