"""Spectral normalization (Miyato et al. 2018, arXiv 1802.05957, Algorithm 1).

A wrapped layer computes with W / sigma(W), sigma the largest singular value of the weight seen as a matrix
with one row per output channel. sigma is estimated by power iteration: u and v are buffers, and the loop calls
`power_iterate(net)` once per update. A forward pass never iterates, so evaluation and sampling change nothing,
and all passes of one update see the same weight.
"""

from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import nn
from torch.nn.utils import parametrize

from precision import exact

# Steps taken at construction, so that the first forward is already near norm 1 (cf. a random u, v: far above).
WARM_UP_ITERATIONS = 15
_EPS = 1e-12


class SpectralNorm(nn.Module):
    """The parametrization W -> W / sigma(W) of one weight.

    `out_dim` is the axis of the weight that counts output channels: 0 for Linear and Conv, 1 for ConvTranspose.
    """

    def __init__(self, weight, out_dim):
        super().__init__()
        self.out_dim = out_dim
        rows = weight.shape[out_dim]
        self.register_buffer("u", nn.functional.normalize(torch.randn(rows), dim=0, eps=_EPS))
        self.register_buffer("v", nn.functional.normalize(torch.randn(weight.numel() // rows), dim=0, eps=_EPS))
        self.iterate(weight, WARM_UP_ITERATIONS)

    def _times(self, weight, vector, u):
        """W^T u (in * kh * kw,) for `u`, else W v (out,); of the type of u and v, fp32.

        The weight is read as it lies in memory, contiguous or channels-last: a copy, as a transposed convolution's
        matrix by output channel would be, is a pass over all weights more, and such passes were a tenth of a step's
        time on a CPU.
        """
        with exact(weight.device):
            return self._product(weight.detach().to(vector.dtype), vector, u)

    def _product(self, weight, vector, u):
        if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
            weight = weight.permute(0, 2, 3, 1)                         # as it lies: (0, kh, kw, 1)
            if self.out_dim == 1:                                       # (in, kh, kw, out)
                return (weight.flatten(0, 2) @ vector) if u else (vector @ weight.flatten(0, 2))
            rows, taps = weight.flatten(1), weight.shape[1:3].numel()   # (out, kh * kw * in)
            if u:
                return (vector @ rows).view(taps, -1).T.flatten()
            return rows @ vector.view(-1, taps).T.flatten()
        rows = weight.flatten(1 + self.out_dim)                         # (out, in * kh * kw), or (in, out, kh * kw)
        if u:
            return (vector @ rows).flatten()
        return rows @ vector if self.out_dim == 0 else (rows @ vector.view(rows.size(0), -1, 1)).sum((0, 2))

    @torch.no_grad()
    def iterate(self, weight, steps=1):
        """Take `steps` power iterations on (u, v)."""
        for _ in range(steps):
            _iterate([self], [weight])

    @torch.no_grad()
    def sigma(self, weight):
        """Estimate of the largest singular value, 0-d."""
        return torch.dot(self.u, self._times(weight, self.v, u=False))

    def forward(self, weight):
        shape = list(weight.shape)
        u = self.u.view([size if axis == self.out_dim else 1 for axis, size in enumerate(shape)])
        v = self.v.view([1 if axis == self.out_dim else size for axis, size in enumerate(shape)])
        return _Divide.apply(weight, self.sigma(weight), u, v)


class _Divide(torch.autograd.Function):
    """W / sigma for sigma = u^T W v, u and v constants (section 2.1 and eq. 12).

    Autograd's own way through the same formula reads and writes the weight three times as often.
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
        along = (gradient * divided).sum()
        # (gradient - (gradient . W/sigma) u v^T) / sigma, laid out as the weight is: or it would be copied once more
        result = torch.div(gradient, sigma.to(gradient.dtype), out=torch.empty_like(divided))
        return result.addcmul_(u * (-along / sigma), v), None, None, None


def spectral_norm(layer):
    """Wrap the `weight` of a Linear, Conv or ConvTranspose layer and return the layer.

    Initialize before wrapping: afterwards `layer.weight` is a computed tensor and an in-place init of it is lost.
    """
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    norm = SpectralNorm(layer.weight, out_dim=1 if transposed else 0)
    # unsafe: the check would run a forward and compare shapes, which W / sigma keeps by construction
    return parametrize.register_parametrization(layer, "weight", norm, unsafe=True)


def normalizer(sn):
    """`spectral_norm`, or where `sn` is false what leaves a layer as it is."""
    return spectral_norm if sn else lambda layer: layer


def _wrapped(net):
    return [layer for layer in net.modules() if parametrize.is_parametrized(layer, "weight")]


@contextmanager
def shared_weights(net=None):
    """A context in which W / sigma is computed once per layer and used by every pass; for `net` at its beginning."""
    with parametrize.cached():
        for layer in _wrapped(net) if net is not None else ():
            layer.weight  # noqa: B018 - reading it puts it into the cache
        yield


def power_iterate(net):
    """One power iteration for every wrapped layer under `net`; the loop calls it once per update of `net`."""
    chains = [layer.parametrizations.weight for layer in _wrapped(net)]
    if chains:
        _iterate([chain[0] for chain in chains], [chain.original for chain in chains])


@torch.no_grad()
def _iterate(norms, weights):
    """A power iteration on (u, v) of each of `norms`. In place: CUDA graphs and `state_dict` keep their tensors."""
    us, vs = [norm.u for norm in norms], [norm.v for norm in norms]
    for vectors, into in ((us, vs), (vs, us)):
        _normalize([norm._times(weight, vector, u=vectors is us)
                    for norm, weight, vector in zip(norms, weights, vectors, strict=True)], into)


def _normalize(vectors, into):
    """Write each vector over its norm `into` its place: some seven kernels for all layers, not four for each."""
    counts = tuple(map(len, vectors))
    norms = torch.stack(torch._foreach_norm(vectors)).clamp(min=_EPS)           # (layers,)
    flat = torch.cat(vectors) / norms[_owners(counts, vectors[0].device)]       # (sum of counts,)
    torch._foreach_copy_(into, flat.split(counts))


@lru_cache(maxsize=64)
def _owners(counts, device):
    """(sum of counts,): the number of the vector that each element of all, one after the other, belongs to."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)
