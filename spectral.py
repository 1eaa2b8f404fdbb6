"""Spectral normalization (Miyato et al. 2018, arXiv 1802.05957, Algorithm 1).

A wrapped layer computes with W / sigma(W), sigma the largest singular value of the weight seen as a matrix
with one row per output channel. sigma is estimated by power iteration: u and v are buffers, and the loop calls
`power_iterate(net)` once per update. A forward pass never iterates, so evaluation and sampling change nothing,
and all passes of one update see the same weight.
"""

import torch
from torch import nn
from torch.nn.utils import parametrize

# Inside `with shared_weights():` W / sigma is computed once per layer and used by every pass of the update.
shared_weights = parametrize.cached

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
        matrix = self._matrix(weight.detach())
        self.register_buffer("u", nn.functional.normalize(torch.randn(matrix.shape[0]), dim=0, eps=_EPS))
        self.register_buffer("v", nn.functional.normalize(torch.randn(matrix.shape[1]), dim=0, eps=_EPS))
        self.iterate(weight, WARM_UP_ITERATIONS)

    def _matrix(self, weight):
        """(out, in, kh, kw), or (in, out, kh, kw) for a transposed convolution -> (out, in * kh * kw) fp32."""
        return weight.movedim(self.out_dim, 0).flatten(1).float()

    @torch.no_grad()
    def iterate(self, weight, steps=1):
        """Take `steps` power iterations on (u, v). In place: CUDA graphs and `state_dict` keep their tensors."""
        matrix = self._matrix(weight)
        for _ in range(steps):
            self.v.copy_(nn.functional.normalize(matrix.T @ self.u, dim=0, eps=_EPS))
            self.u.copy_(nn.functional.normalize(matrix @ self.v, dim=0, eps=_EPS))

    def sigma(self, weight):
        """Estimate of the largest singular value, 0-d. Its gradient runs through W only: u, v are constants."""
        return torch.dot(self.u, self._matrix(weight) @ self.v)

    def forward(self, weight):
        return weight / self.sigma(weight).to(weight.dtype)


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


def power_iterate(net):
    """One power iteration for every wrapped layer under `net`; the loop calls it once per update of `net`."""
    for layer in net.modules():
        if parametrize.is_parametrized(layer, "weight"):
            chain = layer.parametrizations.weight
            chain[0].iterate(chain.original)
