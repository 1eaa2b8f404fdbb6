"""G's inputs: noise z, metadata appended to it if there is a bank, and labels if the run has classes."""

import hashlib
import tokenize
import zipfile
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from device.distributed import say
from device.replicas import draw_rows
from errors import DataError, UsageError
from pretrained import vgg
from utils import write_atomically


@dataclass(frozen=True)
class Inputs:
    """G's inputs for N images: `z` (N, z_dim), or (N, z_dim + 512) with metadata; `labels` (N,) for a conditional G, or
    shares of the classes (N, classes), for images between them.

    `noise`, latents like z: images get the noise maps that belong to these, instead of those of z. Slicing, `split` and
    `to` apply to all. Call G as `G(**inputs.as_arguments())`.
    """

    z: torch.Tensor
    labels: torch.Tensor | None = None
    noise: torch.Tensor | None = None

    def __len__(self):
        return len(self.z)

    def __getitem__(self, part):
        return self._each(lambda tensor: tensor[part])

    def to(self, device):
        """Copy the inputs to `device`."""
        return self._each(lambda tensor: tensor.to(device))

    def split(self, size):
        """Split into [Inputs, ...] of at most `size` each, in order."""
        return [self[start:start + size] for start in range(0, len(self), size)]

    def as_arguments(self):
        """Return {name: tensor}, the keyword arguments of G."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def _each(self, function):
        return Inputs(**{name: function(tensor) for name, tensor in self.as_arguments().items()})

    @classmethod
    def cat(cls, parts):
        """Concatenate several Inputs."""
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].as_arguments()})


def save_latents(inputs, path, classes=None):
    """Write Inputs as .npz, for `read_latents`: the array z (N, width), and `classes`, the names of their classes."""
    arrays = {"z": inputs.z.numpy()}
    if inputs.labels is not None:
        arrays["classes"] = np.array([classes.names[label] for label in inputs.labels.tolist()])
    write_atomically(path, lambda temporary: _save_npz(temporary, arrays))


def _save_npz(path, arrays):
    with open(path, "wb") as file:          # given a name, numpy appends .npz to it
        np.savez(file, **arrays)


# What numpy raises on files that are no such archives, or damaged.
_DAMAGE = (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, SyntaxError, MemoryError, zlib.error,
           zipfile.BadZipFile, tokenize.TokenError)


def read_latents(paths, latents, typed_classes=None):
    """Return the Inputs in `.npz` files of `save_latents`, in order, for a G with these Latents.

    With `typed_classes`, the value of `--classes`, those of the files are not needed. Raise DataError for a file that
    is none of them, UsageError if they do not fit this G.
    """
    rows, names = [], []
    if latents.truncation is not None:
        say("note: --truncation leaves the latents of --latents as they are; it recomputes batch norm's statistics")
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                z = arrays["z"]
                classes = list(arrays["classes"].tolist()) if "classes" in arrays else [None] * len(z)
        except _DAMAGE as error:
            reason = getattr(error, "strerror", None) or "holds no array z"
            raise DataError(f"--latents {path}: {reason}; give files that --mode project wrote") from None
        with np.errstate(over="ignore"):
            z = z.astype(np.float32) if z.dtype.kind == "f" else z
        if z.ndim != 2 or not len(z) or z.dtype.kind != "f" or not np.isfinite(z).all() or len(classes) != len(z):
            raise DataError(f"--latents {path}: z is no array of finite numbers, a row and, with classes, a name a "
                            "picture")
        names += classes
        if z.shape[1] != latents.width:
            raise UsageError(f"--latents {path}: has latents of {z.shape[1]} numbers, this run's have {latents.width}")
        rows.append(torch.from_numpy(z))
    if latents.classes is None or typed_classes is not None:
        return Inputs(torch.cat(rows))
    unknown = [name for name in names if name not in latents.classes.names]
    if unknown:
        what = "they name no classes" if unknown[0] is None else f"{unknown[0]} is no class of this run"
        raise UsageError(f"--latents: {what}; choose with --classes")
    return Inputs(torch.cat(rows), torch.tensor([latents.classes.names.index(name) for name in names]))


def digest_of(inputs):
    """Return eight hex digits that tell these Inputs from others, for the names of what is drawn from them."""
    labels = b"" if inputs.labels is None else inputs.labels.numpy().tobytes()
    return hashlib.sha256(inputs.z.numpy().tobytes() + labels).hexdigest()[:8]


class Latents:
    """Draws G's inputs: z ~ N(0, 1), concatenated with 512 dimensions of metadata if there is a `bank`; and labels, if
    there are `classes`.

    In training each z gets the metadata of one training picture, and labels are uniform. For samples,
    `metadata_sample`, a key of `metadata.SAMPLERS`, says how metadata are drawn, and labels are as frequent as in the
    data; with a `truncation` the components of z beyond +-truncation are resampled.
    """

    def __init__(self, z_dim, bank=None, metadata_sample="mix", device="cpu", classes=None, truncation=None):
        self.z_dim, self.metadata_sample, self.device, self.classes = z_dim, metadata_sample, device, classes
        self.truncation = truncation
        self._present = None if classes is None else classes.present.to(device)
        if bank is not None and bank.weights == "random":
            vgg.FILE.warn_of_random()
        self.bank = None if bank is None else bank.to(device)
        self._bank_on_cpu = None if bank is None else bank.to("cpu")

    @property
    def width(self):
        """Dimension of z, metadata included."""
        return self.z_dim + (0 if self.bank is None else self.bank.rows.shape[1])

    def state(self):
        """Return the bank's state for a checkpoint; None without a bank."""
        return None if self.bank is None else self.bank.state()

    def source(self, seed, labels="as in the data"):
        """Describe the samples of this seed: the `source` of their scores. `labels`: how theirs were chosen."""
        parts = [f"G_ema, seed {seed}"]
        if self.classes is not None:
            parts.append(f"labels {labels}")
        if self.bank is not None:
            parts.append(f"metadata {self.metadata_sample}")
        if self.truncation is not None:
            parts.append(f"truncation {self.truncation:g}")
        return ", ".join(parts)

    def training(self, count):
        """Draw the `Inputs` of a training batch on the device, with its global random state. Does not synchronize."""
        z = draw_rows(lambda B: torch.randn(B, self.z_dim, device=self.device), count)              # (count, z_dim)
        if self.bank is not None:
            metadata = draw_rows(lambda B: self.bank.sample(B, "bank"), count)                      # (count, 512)
            z = torch.cat([z, metadata], 1)
        if self.classes is None:
            return Inputs(z)
        return Inputs(z, draw_rows(self._uniform_labels, count))

    def _uniform_labels(self, count):
        """Labels (count,) of the classes that have pictures, on the device."""
        return self._present[torch.randint(len(self._present), (count,), device=self.device)]

    def sampling(self, count, generator):
        """Draw the `Inputs` of samples on the CPU, with a CPU `generator`."""
        z = self._normal(count, generator)
        if self.bank is not None:
            z = torch.cat([z, self._bank_on_cpu.sample(count, self.metadata_sample, generator)], 1)
        return Inputs(z, None if self.classes is None else self.classes.draw(count, generator))

    def for_bn_stats(self, count, generator):
        """Draw the `Inputs` that G's batch-norm statistics are taken on, on the CPU: as samples are, but of all classes
        equally often, as in training, whose statistics G has learned with.
        """
        inputs = self.sampling(count, generator)
        if self.classes is None:
            return inputs
        present = self.classes.present
        turns = [torch.randperm(len(present), generator=generator) for _ in range(-(-count // len(present)))]
        return replace(inputs, labels=present[torch.cat(turns)[:count]])    # any first part is mixed, too

    def _normal(self, count, generator):
        """Draw z (count, z_dim) ~ N(0, 1), cut off at +-truncation (Brock et al. 2019, arXiv 1809.11096, 3.1)."""
        z = torch.randn(count, self.z_dim, generator=generator)
        while self.truncation is not None and (outside := z.abs() > self.truncation).any():
            z[outside] = torch.randn(int(outside.sum()), generator=generator)
        return z

    def settings(self):
        """Return {"truncation": ..., "metadata_sample": ...}, those that apply: how `sampling` draws."""
        return {**({} if self.truncation is None else {"truncation": float(self.truncation)}),
                **({} if self.bank is None else {"metadata_sample": self.metadata_sample})}

    def of_seed(self, seed):
        """Draw the Inputs of the one picture of a seed of its own, on the CPU."""
        return self.sampling(1, torch.Generator().manual_seed(seed))

    def seeded_batches(self, seed):
        """Yield the Inputs of samples 0, 1, 2, ... of this seed, on the CPU, 64 at a time, endlessly.

        Sample i has the same inputs however many are drawn.
        """
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.sampling(64, generator)
