"""Metadata: what G is fed beside the noise (SLAE-FastGAN, doi 10.12677/CSA.2023.132019, section 3.2).

A row of metadata is the deep VGG-16 features of one training picture, averaged per channel over space, so that it
says what is there and not whose face it is. Rows are taken from the pictures once and cached as they are; a `Bank`
holds them decorrelated, travels in the checkpoint and is what training and sampling draw from.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import interpolate

import vgg
from cache import Cache
from data_loader import normalize
from datasets import fingerprint
from distributed import after_first, progress, say
from failures import DataError

MAX_ROWS = 4096         # in a bank: 4 MB of a checkpoint
PROCEDURE = 1           # to be raised when `_extract`, or how pictures are decoded, changes: caches are made anew
LARGEST = 256           # pixels: larger pictures are reduced to this before VGG-16, which was trained at 224
BATCH = 16              # pictures


# ------------------------------------------------------------------------------------------------------- the bank


@dataclass(frozen=True, eq=False)
class Bank:
    """`rows` (N, 512) float16: metadata of training pictures, over all of these of mean 0 and mean variance 1, with
    no direction that stands out; a dimension in which they do not differ is 0. `layer` and `weights`
    (`vgg.FILE.identity`) are what they were seen through, `pictures` is the fingerprint of the data set.
    """

    rows: torch.Tensor
    layer: str
    weights: str
    pictures: str

    @classmethod
    def from_state(cls, state):
        """The bank that `state()` was taken of; None for None, a run without metadata."""
        return None if state is None else cls(**state)

    def state(self):
        """A dict that a checkpoint can hold: `weights_only=True` loads it."""
        return {"rows": self.rows.cpu(), "layer": self.layer, "weights": self.weights, "pictures": self.pictures}

    def to(self, device):
        """This bank with its rows on `device`."""
        return replace(self, rows=self.rows.to(device))

    def draw(self, count, how, generator=None):
        """Metadata float32 (count, 512) on the bank's device, with the rows' mean 0 and covariance.

        `how` is one of "bank" (one picture's), "mix" (of 2 or 3 pictures), "gauss" (normal). Drawn from
        `generator`, which is of the bank's device, or else from that device's global random state. Never waits
        for the device.
        """
        return HOW[how](self.rows, count, generator)


def _one_each(rows, count, generator):
    chosen = torch.randint(len(rows), (count,), generator=generator, device=rows.device)
    return rows[chosen].float()


def _mixtures(rows, count, generator):
    """Convex mixtures, divided by the 2-norm of their weights: or a mean of k rows has 1 / k of their variance."""
    device = rows.device
    chosen = torch.randint(len(rows), (count, 3), generator=generator, device=device)
    weights = torch.empty(count, 3, device=device).exponential_(generator=generator)    # uniform on the simplex
    weights[:, 2] *= torch.randint(2, (count,), generator=generator, device=device)     # every other one: of two
    weights /= weights.norm(dim=1, keepdim=True)
    return (weights[:, :, None] * rows[chosen].float()).sum(1)


def _normal(rows, count, generator):
    """Normal with the rows' covariance, without computing it: a random combination of all of them."""
    rows = rows.float()
    coefficients = torch.randn(count, len(rows), generator=generator, device=rows.device)
    return coefficients @ (rows - rows.mean(0)) / len(rows) ** 0.5


HOW = {"bank": _one_each, "mix": _mixtures, "gauss": _normal}       # --metadata_sample


class Latents:
    """What G is fed: z ~ N(0, 1), followed by 512 numbers of metadata where there is a `bank`.

    `how` is the way that samples draw them, one of `HOW`; in training each is one picture's.
    """

    def __init__(self, z_dim, bank=None, how="mix", device="cpu"):
        self.z_dim, self.how, self.device = z_dim, how, device
        if bank is not None and bank.weights == "random":
            vgg.FILE.warn_of_random()
        self.bank = None if bank is None else bank.to(device)
        self._on_cpu = None if bank is None else bank.to("cpu")

    @property
    def width(self):
        """Numbers of each."""
        return self.z_dim + (0 if self.bank is None else self.bank.rows.shape[1])

    def state(self):
        """The bank's, for a checkpoint; None without one."""
        return None if self.bank is None else self.bank.state()

    def source(self, seed):
        """What protocols call the samples of this seed."""
        return f"G_ema, seed {seed}" + ("" if self.bank is None else f", metadata {self.how}")

    def of_seed(self, seed):
        """Those of samples 0, 1, 2, ... of this seed, on the CPU, endlessly and 64 at a time: sample i's are the same
        however many are drawn.
        """
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.sampling(64, generator)

    def training(self, count):
        """(count, z_dim) or (count, z_dim + 512) on the device, from its global random state."""
        z = torch.randn(count, self.z_dim, device=self.device)
        return z if self.bank is None else torch.cat([z, self.bank.draw(count, "bank")], 1)

    def sampling(self, count, generator):
        """The same for samples, on the CPU, from a CPU `generator`."""
        z = torch.randn(count, self.z_dim, generator=generator)
        return z if self.bank is None else torch.cat([z, self._on_cpu.draw(count, self.how, generator)], 1)


# --------------------------------------------------------------------------------------- taking it from pictures


def find_bank(config, dataset, device):
    """The Bank of `dataset` on `device`, from the cache below `config.cache_path` or, where that has none, freshly
    taken and cached. Says which.

    The cache is used if the pictures (`datasets.fingerprint`), VGG-16's weights, the layer and the procedure
    are all the same. Of several processes the first takes it and the others read it: all come here. Global random
    states stay as they are. Raises DataError, UsageError.
    """
    # the fingerprint before the pictures: one that changes meanwhile belongs to another fingerprint
    origin = {"pictures": fingerprint(dataset, config), "weights": vgg.FILE.identity(config.vgg_weights),
              "layer": config.metadata_layer, "procedure": PROCEDURE}
    cache = Cache(config.cache_path, "metadata", origin)
    averages = after_first(lambda: _read_or_take(cache, config, dataset, device), lambda: _read(cache, len(dataset)))
    if averages is None:
        raise DataError(f"--cache_path {config.cache_path}: the first process left no {cache.path}.\n"
                        "Unless it said why, name a folder that all processes share.")
    return Bank(_decorrelate(averages), origin["layer"], origin["weights"], origin["pictures"]).to(device)


def same_pictures(bank, config, dataset):
    """Whether `dataset` shows the pictures that `bank` was taken from. Raises DataError if a file has gone."""
    return bank.pictures == fingerprint(dataset, config)


def _read_or_take(cache, config, dataset, device):
    averages = _read(cache, len(dataset))
    if averages is None:
        say(f"metadata: taking {config.metadata_layer} of VGG-16 from {len(dataset)} pictures, this once")
        averages = _extract(config, dataset, device)
        cache.write({"averages": averages}, needed=True)
        return averages
    say(f"metadata: {config.metadata_layer} of VGG-16 from {len(dataset)} pictures, read from {cache.path}")
    return averages


def _read(cache, count):
    """The averages of `count` pictures in the cache, or None if it has none."""
    def fits(kept):
        averages = kept.get("averages")
        return (isinstance(averages, torch.Tensor) and averages.dtype == torch.float16
                and averages.shape == (count, vgg.WIDTH))

    kept = cache.read(fits)
    return None if kept is None else kept["averages"]


@torch.no_grad()
def _extract(config, dataset, device):
    """The layer's averages over space, float16 (len(dataset), 512), of every picture in order, without flips."""
    net = vgg.load(config.vgg_weights, "--metadata false")[: vgg.LAYERS[config.metadata_layer]].to(device)
    averages = torch.empty(len(dataset), vgg.WIDTH, dtype=torch.float16)
    with progress(len(dataset), "picture", "metadata") as done:
        for indices in torch.arange(len(dataset)).split(BATCH):
            images = normalize(dataset.gather(indices.tolist()).to(device))
            if images.shape[-1] > LARGEST:
                images = interpolate(images, size=(LARGEST, LARGEST), mode="bilinear", antialias=True)
            averages[indices] = net(vgg.normalize(images)).mean((2, 3)).half().cpu()
            done.update(len(indices))
    if not averages.isfinite().all():
        raise DataError(f"--vgg_weights {config.vgg_weights}: these weights give numbers that are not finite")
    return averages


def _decorrelate(averages):
    """Rows float16 (at most MAX_ROWS, 512), evenly spread over `averages`; all of these count for the statistics.

    Every dimension is standardized; then directions of more than the average variance are brought to about equal
    ones (whitening with a ridge of 1), those of less, mostly noise, hardly grow; the mean variance is 1 again.
    CRUCIAL: features vary together, and a direction that holds a tenth or a half of their variance would drown the
    noise that they are added to: G then draws a handful of images.
    """
    kept = torch.arange(min(len(averages), MAX_ROWS)) * len(averages) // min(len(averages), MAX_ROWS)
    spread, mean = torch.std_mean(averages.float(), 0, correction=0)
    flat = spread <= 2**-10 * mean.abs()                # no more than float16's rounding makes
    x = ((averages.float() - mean) / spread).masked_fill(flat, 0)                   # (N, 512)
    variance, direction = torch.linalg.eigh((x.T @ x).double() / len(x))            # (512,), (512, 512)
    variance = variance.clamp(min=0)
    shrunk = variance / (variance + 1)
    factor = (variance + 1).rsqrt() * (vgg.WIDTH / shrunk.sum().clamp(min=1e-6)) ** 0.5
    return (x[kept].double() @ (direction * factor) @ direction.T).half()
