"""Metadata: G's input besides the noise (SLAE-FastGAN, doi 10.12677/CSA.2023.132019, section 3.2).

A row of metadata is the deep VGG-16 feature map of one training picture, averaged over space for each channel, so that
it describes the content of the picture and not the identity of the face. The averages are computed once and cached. A
`Bank` holds them decorrelated; training and sampling draw from it, and checkpoints contain it.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import interpolate

from data_loader import to_images
from dataset.table import fingerprint
from device.distributed import after_first, on_first, progress, say
from errors import DataError
from flags.pictures import sides_at
from pretrained import vgg
from storage.cache import Cache
from utils import spread_indices

CACHE = "metadata"      # its folder below --cache_path
FALLBACK_HINT = "--metadata false"
MAX_ROWS = 4096         # rows in a bank, at most: 4 MB of a checkpoint
CACHE_VERSION = 2       # increment when `_extract` or the decoding of pictures changes: invalidates the caches
LARGEST = 256           # pixels: larger pictures are downscaled to this before VGG-16, which was trained at 224
BATCH = 16              # pictures


# ------------------------------------------------------------------------------------------------------- the bank


@dataclass(frozen=True, eq=False)
class Bank:
    """`rows` (N, 512) float16: decorrelated metadata of training pictures.

    Over the whole training set their mean is 0, their variance, averaged over the dimensions, is 1, and no direction
    dominates; dimensions without variance are 0. `layer` and `weights` (`vgg.FILE.identity`) identify the feature
    extractor, `pictures` is the fingerprint of the data set.
    """

    rows: torch.Tensor
    layer: str
    weights: str
    pictures: str

    @classmethod
    def from_state(cls, state):
        """Rebuild a bank from its `state()`; None for None, a run without metadata."""
        return None if state is None else cls(**state)

    def state(self):
        """Return a dict for a checkpoint; loadable with `weights_only=True`."""
        return {"rows": self.rows.cpu(), "layer": self.layer, "weights": self.weights, "pictures": self.pictures}

    def to(self, device):
        """Return this bank with its rows on `device`."""
        return replace(self, rows=self.rows.to(device))

    def sample(self, count, sampler, generator=None):
        """Draw metadata, float32 (count, 512) on the bank's device, with mean 0 and the covariance of the rows.

        `sampler`: "bank" (the row of one picture), "mix" (a mixture of 2 or 3 rows) or "gauss" (normal distribution).
        Uses `generator`, which must be on the bank's device, or else that device's global random state. Does not
        synchronize with the device.
        """
        return SAMPLERS[sampler](self.rows, count, generator)


def _sample_rows(rows, count, generator):
    chosen = torch.randint(len(rows), (count,), generator=generator, device=rows.device)
    return rows[chosen].float()


def _sample_mixtures(rows, count, generator):
    """Random convex combinations, divided by the 2-norm of their weights to keep the rows' variance.

    Without the division, a mean of k rows would have 1 / k of their variance.
    """
    device = rows.device
    chosen = torch.randint(len(rows), (count, 3), generator=generator, device=device)
    weights = torch.empty(count, 3, device=device).exponential_(generator=generator)    # uniform on the simplex
    weights[:, 2] *= torch.randint(2, (count,), generator=generator, device=device)     # with probability 1/2: of two
    weights /= weights.norm(dim=1, keepdim=True)
    return (weights[:, :, None] * rows[chosen].float()).sum(1)


def _sample_normal(rows, count, generator):
    """Normal with the rows' covariance, as a random linear combination of all rows: no covariance matrix is needed."""
    rows = rows.float()
    coefficients = torch.randn(count, len(rows), generator=generator, device=rows.device)
    return coefficients @ (rows - rows.mean(0)) / len(rows) ** 0.5


SAMPLERS = {"bank": _sample_rows, "mix": _sample_mixtures, "gauss": _sample_normal}     # --metadata_sample


# ----------------------------------------------------------------------------------------- computing it from pictures


def require(config):
    """Raise what `find_bank` raises for missing weights, if it needs them whatever the pictures are.

    That is so if nothing was cached yet: what a cache is worth is known once the pictures have been checked. All ranks
    must call this.
    """
    cached = Path(config.cache_path, CACHE)
    if config.metadata and not on_first(lambda: any(cached.glob("*.pt"))):
        vgg.FILE.require(config.vgg_weights, FALLBACK_HINT)


def find_bank(config, dataset, device):
    """Return the Bank of `dataset` on `device`, from the cache below `config.cache_path` or newly computed and cached.

    Prints which. The cache is valid if the pictures (`table.fingerprint`), VGG-16's weights, the layer and
    CACHE_VERSION are all the same. Rank 0 computes it, the other ranks read it: all ranks must call this. Global random
    states do not change. Raises DataError, UsageError.
    """
    # the fingerprint first: if a picture changes while it is read, the next run has another fingerprint and recomputes
    origin = {"pictures": fingerprint(dataset, config), "weights": vgg.FILE.identity(config.vgg_weights),
              "layer": config.metadata_layer, "procedure": CACHE_VERSION}
    cache = Cache(config.cache_path, CACHE, origin)
    averages = after_first(lambda: _read_or_compute(cache, config, dataset, device), lambda: _read(cache, len(dataset)))
    if averages is None:
        raise DataError(f"--cache_path {config.cache_path}: rank 0 did not write {cache.path}.\n"
                        "Unless it reported an error, use a folder that all processes share.")
    return Bank(_decorrelate(averages), origin["layer"], origin["weights"], origin["pictures"]).to(device)


def same_pictures(bank, config, dataset):
    """Whether `bank` was computed from the pictures of `dataset`. Raises DataError if a file is missing."""
    return bank.pictures == fingerprint(dataset, config)


def _read_or_compute(cache, config, dataset, device):
    averages = _read(cache, len(dataset))
    if averages is None:
        say(f"metadata: computing {config.metadata_layer} of VGG-16 for {len(dataset)} pictures, once")
        averages = _extract(config, dataset, device)
        cache.write({"averages": averages}, needed=True)
        return averages
    say(f"metadata: {config.metadata_layer} of VGG-16 for {len(dataset)} pictures, read from {cache.path}")
    return averages


def _read(cache, count):
    """Return the cached averages of `count` pictures, or None."""
    def is_valid(entry):
        averages = entry.get("averages")
        return (isinstance(averages, torch.Tensor) and averages.dtype == torch.float16
                and averages.shape == (count, vgg.WIDTH))

    entry = cache.read(is_valid)
    return None if entry is None else entry["averages"]


@torch.no_grad()
def _extract(config, dataset, device):
    """Return the layer's spatial averages, float16 (len(dataset), 512), of all pictures in order, not flipped."""
    net = vgg.load_vgg(config.vgg_weights, FALLBACK_HINT)[: vgg.LAYERS[config.metadata_layer]].to(device)
    averages = torch.empty(len(dataset), vgg.WIDTH, dtype=torch.float16)
    with progress(len(dataset), "picture", "metadata") as done:
        for indices in torch.arange(len(dataset)).split(BATCH):
            images = to_images(dataset.load_batch(indices.tolist()).to(device))
            if min(images.shape[2:]) > LARGEST:
                images = interpolate(images, size=sides_at(config.imsize, LARGEST), mode="bilinear", antialias=True)
            averages[indices] = net(vgg.imagenet_normalize(images)).mean((2, 3)).half().cpu()
            done.update(len(indices))
    if not averages.isfinite().all():
        raise DataError(f"--vgg_weights {config.vgg_weights}: features of these weights are not finite")
    return averages


def _decorrelate(averages):
    """Standardize, then shrinkage-whiten (eigenvalue λ → λ / (λ + 1)), then rescale to mean variance 1.

    Return float16 (at most MAX_ROWS, 512): rows evenly spread over `averages`; the statistics use all of `averages`.
    Directions of large variance become about equal; those of small variance, mostly noise, are hardly amplified.
    CRUCIAL: features are correlated. Without whitening, one direction with a tenth to a half of their variance would
    swamp the noise z, and G would generate only a handful of different images.
    """
    kept = torch.tensor(spread_indices(MAX_ROWS, len(averages)))
    std, mean = torch.std_mean(averages.float(), 0, correction=0)
    constant = std <= 2**-10 * mean.abs()               # within float16's rounding error
    x = ((averages.float() - mean) / std).masked_fill(constant, 0)                  # (N, 512)
    variance, direction = torch.linalg.eigh((x.T @ x).double() / len(x))            # (512,), (512, 512)
    variance = variance.clamp(min=0)
    shrunk = variance / (variance + 1)
    factor = (variance + 1).rsqrt() * (vgg.WIDTH / shrunk.sum().clamp(min=1e-6)) ** 0.5
    return (x[kept].double() @ (direction * factor) @ direction.T).half()
