"""Sets of pictures that metrics take, and the one metric that needs no network: the sliced Wasserstein distance.

A set is uint8 (N, 3, S, S) in 0..255, of which a slice is made when it is asked for: a tensor, files of a folder, a
data set, or what a generator draws. The sliced Wasserstein distance works without weights, hence without a download,
but knows shapes and textures only, not what is in a picture. Numbers compare only where imsize and everything else but
the pictures are equal.
"""

import itertools
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import drawing
import gallery
from failures import DataError

DECODERS = 4                # threads; Pillow lets them run beside each other


class PictureFiles:
    """PNG files of one size as uint8 (N, 3, S, S), of which a slice is read when it is asked for."""

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
                arrays.append(np.asarray(image.convert("RGB")))
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    def halves(self, seed):
        """Two disjoint random halves; of an odd number one is left out."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        half = len(self) // 2
        return (PictureFiles([self.paths[i] for i in order[:half]]),
                PictureFiles([self.paths[i] for i in order[half:2 * half]]))


class Decoded:
    """The pictures of a data set (`[index]` -> uint8 (3, S, S)), decoded by several threads at a time.

    Raises DataError at unreadable pictures, once, with their number and the first of them.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, part):
        with ThreadPoolExecutor(DECODERS) as pool:
            try:
                return torch.stack(list(pool.map(self.dataset.__getitem__, range(len(self))[part])))
            except DataError as error:
                raise self._all_unreadable(pool) or error from None

    def _all_unreadable(self, pool):
        problems = [problem for problem in pool.map(self._problem, range(len(self))) if problem]
        if not problems:                                # a disk may fail once
            return None
        if len(problems) == 1:
            return DataError(problems[0])
        return DataError(f"{len(problems)} of {len(self)} pictures cannot be used; the first:\n{problems[0]}")

    def _problem(self, index):
        try:
            self.dataset[index]
        except DataError as error:
            return str(error)
        return None


class Drawn:
    """Samples 0 to count - 1 of a seed, drawn when they are asked for by G, in eval mode, in this `Precision`.

    They are those that `--mode sample` writes: to the byte if all are asked for, or 64 from a multiple of 64. In other
    slices G's batches are of other sizes, and one number in 100,000 may be rounded the other way. `latents`:
    metadata.Latents.
    """

    def __init__(self, G, latents, count, seed, precision, imsize):
        self.G, self.precision, self.batch = G, precision, drawing.batch_for(imsize)
        chunks = itertools.islice(latents.of_seed(seed), -(-count // 64))
        self.z = torch.cat(list(chunks))[:count]

    def __len__(self):
        return len(self.z)

    def __getitem__(self, part):
        pictures = gallery.to_uint8(drawing.draw(self.G, self.z[part], self.precision, self.batch))
        return torch.from_numpy(pictures).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------ sliced Wasserstein distance
#
# Karras et al. 2018 (arXiv 1710.10196), section 5: one distance per level of the Laplacian pyramid, so that it
# sees the large shapes as well as the texture.

SMALLEST = 16               # pixels: the last level, a plain low-pass picture
PATCH = 7                   # pixels: side of a descriptor
DIRECTIONS = 512            # random projections
DESCRIPTORS = 2**15         # per level and set, whatever the sets' sizes, spread evenly over their pictures
CHUNK = 2**22               # pixels at a time: some 50 MB of floats
SPLITS = 4                  # of the real pictures into halves, for the floor: a single one may be far off
_BINOMIAL = torch.tensor((1.0, 4.0, 6.0, 4.0, 1.0)) / 16


def _smooth(images):
    """(B, C, H, W) -> the same, blurred by the binomial filter, mirrored at the borders."""
    kernel = torch.outer(_BINOMIAL, _BINOMIAL).expand(images.size(1), 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=images.size(1))


def laplacian_pyramid(images):
    """float (B, C, S, S) -> [(B, C, S, S), (B, C, S/2, S/2), ..., (B, C, 16, 16)], the finest level first.

    Each level is what the next smaller picture cannot tell; the last is that picture itself.
    """
    levels = []
    while images.size(-1) > SMALLEST:
        smaller = _smooth(images)[..., ::2, ::2]
        spread = torch.zeros_like(images)
        spread[..., ::2, ::2] = smaller
        levels.append(images - 4 * _smooth(spread))     # 4: three of four pixels of `spread` are zero
        images = smaller
    return [*levels, images]


def descriptors(pictures, count, seed=0):
    """`count` random 7x7 patches of every pyramid level, as [float (count, 3, 49), ...], the finest level first.

    pictures: a set, S a power of two from 16 on. Every picture gives its equal share, up to one patch; where
    they lie follows from the seed, N and S.
    """
    imsize = pictures[0:1].size(-1)
    sizes = [imsize >> level for level in range((imsize // SMALLEST).bit_length())]
    generator = torch.Generator().manual_seed(seed)
    corners = [torch.randint(size - PATCH + 1, (2, count), generator=generator) for size in sizes]
    owner = torch.arange(count) % len(pictures)
    found = [torch.empty(count, 3, PATCH**2) for _ in sizes]
    chunk = max(1, CHUNK // imsize**2)
    for start in range(0, len(pictures), chunk):
        levels = laplacian_pyramid(pictures[start:start + chunk].float())
        mine = ((owner >= start) & (owner < start + chunk)).nonzero()[:, 0]
        for level, (y, x), rows in zip(levels, corners, found, strict=True):
            windows = level.unfold(2, PATCH, 1).unfold(3, PATCH, 1)             # (B, 3, S-6, S-6, 7, 7), a view
            rows[mine] = windows[owner[mine] - start, :, y[mine], x[mine]].flatten(2)
    return found


def sliced_wasserstein(real, fake, count=DESCRIPTORS, directions=DIRECTIONS, seed=0):
    """1000 times the sliced Wasserstein distance of two sets of pictures, averaged over the pyramid's levels.

    real, fake: sets of one S, though not necessarily of one N. Each level is normalized per channel by the real
    set's mean and deviation: were each set to take its own, a wrong colour or contrast would not show.
    Deterministic: the same sets give the same number, the same set twice gives 0. Numbers compare at the same S
    and `count` only.
    """
    distances = []
    generator = torch.Generator().manual_seed(seed)
    for a, b in zip(descriptors(real, count, seed), descriptors(fake, count, seed), strict=True):
        mean, deviation = a.mean((0, 2), keepdim=True), a.std((0, 2), keepdim=True).clamp(min=1e-6)
        a, b = (((rows - mean) / deviation).flatten(1) for rows in (a, b))      # (count, 147)
        axes = F.normalize(torch.randn(directions, a.size(1), generator=generator), dim=1)
        total = 0.0
        for part in axes.split(64):                     # all at once would be a few hundred MB
            # NumPy's sort uses the vector units: on a CPU it takes a twentieth of torch's time
            nearest = [np.sort((part @ rows.T).numpy(), axis=1) for rows in (a, b)]
            total += float(np.abs(nearest[0] - nearest[1]).mean(1).sum())
        distances.append(total / directions)
    return 1000 * statistics.fmean(distances)


def floor(real):
    """What `sliced_wasserstein` says of random halves of `real`, PictureFiles: the mean over `SPLITS` splits."""
    return statistics.fmean(sliced_wasserstein(*real.halves(seed)) for seed in range(SPLITS))
