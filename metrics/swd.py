"""The sliced Wasserstein distance of two sets of pictures (Karras et al. 2018, arXiv 1710.10196, section 5).

There is one distance per level of the Laplacian pyramid, so that both large shapes and texture count. The metric needs
no network, hence no download of weights; it compares shapes and textures, not semantic content. Values are comparable
only at equal imsize and settings.

A set of pictures is uint8 (N, C, H, W) in 0..255 that supports slices, possibly lazy: a tensor, files of a folder, a
data set, or the samples of a generator.
"""

import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dataset.images import ThreadedReader
from device.distributed import on_first
from errors import DataError
from flags.pictures import short_side, sides
from storage.score_table import Score
from utils import as_rgb

SMALLEST = 16               # pixels: the coarsest level, the low-pass picture
PATCH = 7                   # pixels: side of a descriptor
DIRECTIONS = 512            # random projections
DESCRIPTORS = 2**15         # per level and set, independent of the sets' sizes, spread evenly over their pictures
CHUNK = 2**22               # pixels per batch: some 50 MB of floats
SPLITS = 4                  # random splits into halves that `floor` averages, because a single one varies much
_BINOMIAL = torch.tensor((1.0, 4.0, 6.0, 4.0, 1.0)) / 16


class SetMeter:
    """Scores sets of pictures against one reference."""

    def __init__(self, config, place):
        self.reference = None                           # it needs nothing but the pictures

    def prepare(self, reference):
        """Set the Reference. Raise DataError if its pictures cannot be halved down to SMALLEST px."""
        short = short_side(reference.imsize)
        if short & (short - 1) or any(side * SMALLEST % short for side in sides(reference.imsize)):
            raise DataError(f"--metrics swd: needs pictures of 16, 32, 64, ... px, these have {reference.imsize}; "
                            "add --imsize 64, or another power of two")
        self.reference = reference

    def measure(self, pictures, source, stopped=lambda: False):
        """Return the Score of a set of uint8 pictures, the same on every rank. All ranks must call this."""
        return on_first(lambda: Score(
            {"swd": sliced_wasserstein(ThreadedReader(self.reference.dataset), pictures)},
            "sliced Wasserstein distance x 1000 (7x7 patches of a Laplacian pyramid); "
            f"{self.reference.against(pictures)}", source))


class PictureFiles:
    """PNG files of one size as a lazy uint8 array (N, 3, H, W), as RGB: a slice is read when indexed."""

    def __init__(self, paths):
        self.paths = list(paths)

    @classmethod
    def below(cls, folder):
        """The PNG files of a folder, sorted by name."""
        return cls(sorted(Path(folder).glob("*.png")))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, part):
        arrays = []
        for path in self.paths[part]:
            with Image.open(path) as image:
                pixels = np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))      # (H, W, C)
            arrays.append(as_rgb(torch.from_numpy(pixels).permute(2, 0, 1)[None]))
        return torch.cat(arrays)

    def halves(self, seed):
        """Return two disjoint random halves; of an odd number of files one is left out."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        half = len(self) // 2
        return (PictureFiles([self.paths[i] for i in order[:half]]),
                PictureFiles([self.paths[i] for i in order[half:2 * half]]))


def _smooth(images):
    """Blur images (B, C, H, W) with the binomial filter, with reflection padding."""
    kernel = torch.outer(_BINOMIAL, _BINOMIAL).expand(images.size(1), 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=images.size(1))


def laplacian_pyramid(images):
    """float (B, C, S, S) -> [(B, C, S, S), (B, C, S/2, S/2), ..., (B, C, 16, 16)], the finest level first; of other
    shapes until the shorter side is 16.

    Each level is the difference between a picture and its upsampled half-size version; the last level is the smallest
    picture itself.
    """
    levels = []
    while min(images.shape[2:]) > SMALLEST:
        smaller = _smooth(images)[..., ::2, ::2]
        upsampled = torch.zeros_like(images)
        upsampled[..., ::2, ::2] = smaller
        levels.append(images - 4 * _smooth(upsampled))  # 4, because three of four pixels are zero before smoothing
        images = smaller
    return [*levels, images]


def descriptors(pictures, count, seed=0):
    """Sample `count` random 7x7 patches of every pyramid level: [float (count, 3, 49), ...], the finest level first.

    pictures: a set, its shorter side a power of two, at least 16. The numbers of patches per picture differ by at most
    one; of more than `count` pictures, those with a patch are spread evenly. The positions depend on `seed`, N, H and
    W only. Grey and transparent pictures count as RGB.
    """
    H, W = pictures[0:1].shape[2:]
    sizes = [(H >> level, W >> level) for level in range((min(H, W) // SMALLEST).bit_length())]
    generator = torch.Generator().manual_seed(seed)
    corners = [[torch.randint(side - PATCH + 1, (count,), generator=generator) for side in size] for size in sizes]
    N = len(pictures)
    owner = torch.arange(count) * N // count if count < N else torch.arange(count) % N
    patches = [torch.empty(count, 3, PATCH**2) for _ in sizes]
    chunk = max(1, CHUNK // (H * W))
    for start in range(0, len(pictures), chunk):
        levels = laplacian_pyramid(as_rgb(pictures[start:start + chunk]).float())
        mine = ((owner >= start) & (owner < start + chunk)).nonzero()[:, 0]
        for level, (y, x), rows in zip(levels, corners, patches, strict=True):
            windows = level.unfold(2, PATCH, 1).unfold(3, PATCH, 1)             # (B, 3, H-6, W-6, 7, 7), a view
            rows[mine] = windows[owner[mine] - start, :, y[mine], x[mine]].flatten(2)
    return patches


def sliced_wasserstein(real, fake, count=DESCRIPTORS, directions=DIRECTIONS, seed=0):
    """Return 1000 times the sliced Wasserstein distance of two sets of pictures, averaged over the pyramid's levels.

    real, fake: sets of the same size, not necessarily of the same N. Each level of both is normalized per channel by
    the real set's mean and standard deviation: normalizing each by its own would hide a wrong colour or contrast.
    Deterministic; identical sets have distance 0. Values are comparable only at the same size and `count`.
    """
    distances = []
    generator = torch.Generator().manual_seed(seed)
    for a, b in zip(descriptors(real, count, seed), descriptors(fake, count, seed), strict=True):
        mean, deviation = a.mean((0, 2), keepdim=True), a.std((0, 2), keepdim=True).clamp(min=1e-6)
        a, b = (((rows - mean) / deviation).flatten(1) for rows in (a, b))      # (count, 147)
        axes = F.normalize(torch.randn(directions, a.size(1), generator=generator), dim=1)
        total = 0.0
        for part in axes.split(64):                     # all at once would take a few hundred MB
            # NumPy's sort is vectorized: on a CPU it takes a twentieth of the time of PyTorch's
            sorted_a, sorted_b = (np.sort((part @ rows.T).numpy(), axis=1) for rows in (a, b))
            total += float(np.abs(sorted_a - sorted_b).mean(1).sum())
        distances.append(total / directions)
    return 1000 * statistics.fmean(distances)


def floor(real):
    """Return the `sliced_wasserstein` of random halves of `real` (PictureFiles), averaged over SPLITS splits.

    It is the noise floor: the distance between two sets of real pictures.
    """
    return statistics.fmean(sliced_wasserstein(*real.halves(seed)) for seed in range(SPLITS))
