"""LPIPS-VGG: the perceptual distance of Zhang et al. 2018 (arXiv 1801.03924) on VGG-16, with torchmetrics' heads."""

from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from device import distributed
from device.mps import memory_format
from device.precision import exact
from errors import UsageError
from pretrained import vgg
from utils import as_rgb

# The number of `load_vgg`'s modules up to relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
LPIPS_LAYERS = (4, 9, 16, 23, 30)


class Lpips(nn.Module):
    """LPIPS-VGG. `features` is the network of `vgg.load_vgg`; `scale` and `heads` are torchmetrics'."""

    def __init__(self, features, scale, heads):
        super().__init__()
        self.parts = nn.ModuleList([features[a:b] for a, b in pairwise((0, *LPIPS_LAYERS))])
        self.scale = scale
        for i, weight in enumerate(heads):                                      # (1, C, 1, 1), trained to be >= 0
            self.register_buffer(f"head{i}", weight.clamp(min=0))

    def forward(self, a, b):
        """Return the distances (B,) of images a, b (B, C, H, W) in [-1, 1], H, W >= 16."""
        distances = []
        for (x, weight), (y, _) in zip(self._layers(a), self._layers(b), strict=True):
            with exact(x.device) if x.dtype == torch.float32 else nullcontext():
                distances.append(F.conv2d((x - y).square(), weight).float().mean((1, 2, 3)))    # (B, C, h, w) -> (B,)
        return sum(distances)

    def embed(self, images):
        """Return embeddings (B, D) of images (B, C, H, W) whose squared Euclidean distances are their LPIPS.

        For many distances between few images: each image passes the network once. D is some 120 times the number of
        pixels.
        """
        return torch.cat([(unit * (weight / unit[0, 0].numel()).sqrt()).flatten(1)
                          for unit, weight in self._layers(images)], 1)

    def _layers(self, images):
        """Yield (features (B, C, h, w) of unit length at each position, weights (1, C, 1, 1)) for each layer."""
        x = self.scale(as_rgb(images))
        for i, part in enumerate(self.parts):
            x = part(x)
            with exact(x.device):           # autocast would copy the map to fp32 before the sum
                length = (x.square().sum(1, keepdim=True, dtype=torch.float32) + 1e-8).sqrt()       # (B, 1, h, w)
                # fp32 for fp16, in which squares of differences under 0.0002 are 0
                unit = x / (length if x.dtype == torch.float16 else length.to(x.dtype))
            yield unit, getattr(self, f"head{i}").to(unit.dtype)


def require(weights, fallback_hint="--recon l1"):
    """Raise what `load_lpips` raises where torchmetrics or these VGG-16 weights are missing. All ranks must call this.

    Weights that torchvision publishes are downloaded.
    """
    _torchmetrics_lpips(fallback_hint)
    vgg.FILE.require(weights, fallback_hint)


def _torchmetrics_lpips(fallback_hint):
    """Return torchmetrics' class of LPIPS. Raise UsageError."""
    try:
        from torchmetrics.functional.image.lpips import _LPIPS  # takes seconds to import, so only when needed
    except ImportError as error:
        raise UsageError(f"LPIPS needs torchmetrics ({error}): pip install torchmetrics, "
                         f"or do without it: {fallback_hint}") from None
    return _LPIPS


def load_lpips(weights, fallback_hint="--recon l1"):
    """Return `Lpips` with these VGG-16 weights, on the CPU, frozen: gradients flow to its inputs only.

    Global random states stay as they are. Raise what `load_vgg` does, and UsageError if torchmetrics is missing.
    """
    kind = _torchmetrics_lpips(fallback_hint)
    features = vgg.load_vgg(weights, fallback_hint)
    with torch.random.fork_rng(devices=[]):             # builds and initializes torchvision's whole network
        reference = kind(pretrained=True, net="vgg", pnet_rand=True)
    heads = [head.model[-1].weight.detach() for head in reference.lins]
    # channels-last like G and D, so that no map is converted between memory formats
    return Lpips(features, reference.scaling_layer, heads).to(memory_format=torch.channels_last)


def load_on_every_rank(weights, device, fallback_hint="--recon l1"):
    """Return `load_lpips` on `device`, on every rank: rank 0 loads first, as it may have to download the weights.

    The meta device needs neither weights nor torchmetrics.
    """
    if device.type == "meta":
        features = vgg.build_on_meta().requires_grad_(False)
        heads = [features[last - 2].bias.view(1, -1, 1, 1) for last in LPIPS_LAYERS]
        return Lpips(features, nn.Identity(), heads).to(memory_format=torch.channels_last)

    def load():
        return load_lpips(weights, fallback_hint)

    return distributed.after_first(load, load).to(device, memory_format=memory_format(device))
