"""Small networks for tests of everything around the networks, and pictures for such tests."""

from functools import cache, partial

import torch
import torch.nn.functional as F

from data_loader import to_images
from device.distributed import Place
from metrics import swd
from pretrained import lpips

CPU = Place(torch.device("cpu"))


class SmallLpips(torch.nn.Module):
    """Stands in for `lpips.Lpips`: embeds each image in 192 numbers. `seen` holds the shapes of all batches."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def embed(self, images):
        self.seen.append(tuple(images.shape))
        return F.adaptive_avg_pool2d(images, 8).flatten(1) / 10

    def forward(self, a, b):
        return (self.embed(a) - self.embed(b)).square().sum(1)


@cache
def random_lpips():
    """LPIPS on a VGG-16 with random weights. Loading takes seconds, so it is done once per process."""
    return lpips.load_lpips("random")


def smooth(n, size=16, seed=0):
    """Smooth random pictures, uint8 (n, 3, size, size)."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def pair_distances(net, a, b):
    """The LPIPS of all pairs of pictures, float64 (len(a), len(b)), by the definition."""
    a, b = (net.embed(to_images(pictures)).double() for pictures in (a, b))
    return (a[:, None] - b).square().sum(2)


def to_others(distances):
    """A square matrix of distances with an infinite diagonal."""
    return distances.fill_diagonal_(torch.inf)


# The full distance takes seconds: 32,768 patches along 512 directions.
small_swd = partial(swd.sliced_wasserstein, count=512, directions=32)
