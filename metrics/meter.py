"""The metrics of `--metrics` that compare two sets of pictures, one of which is a fixed reference.

The table `METRICS` in flags/scores.py lists the metrics and the file of this folder that computes each. Such a file has
a class `SetMeter(config, place)`, whose constructor loads what the metric needs, or raises DataError or UsageError.
`prepare(reference)` raises DataError if the metric cannot be computed against these pictures, and precomputes what it
needs of them; `measure(pictures, source, stopped)` returns a Score.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from dataset.check import sample_levels
from dataset.decode import MAX_PIXELS
from dataset.images import ImageDataset, open_pictures
from dataset.table import fingerprint
from errors import DataError
from flags.pictures import PictureShape, as_imsize
from flags.scores import METRICS, scores_by_rank
from parameter import Config, dataset_name


@dataclass(frozen=True)
class Reference:
    """The real pictures: a data set of uint8 (C, H, W), its description in protocols, its fingerprint."""

    dataset: ImageDataset
    words: str
    fingerprint: str
    imsize: int | str

    def __len__(self):
        return len(self.dataset)

    def labels(self, names):
        """Return the class of each picture, see `Labels.among`; None if they have no classes. Raises DataError."""
        found = self.dataset.labels
        return None if found is None else torch.from_numpy(found.among(names))

    def against(self, pictures):
        """Describe for a protocol what is compared."""
        C, H, W = pictures[0:1].shape[1:]
        as_rgb = {1: " (grey, as RGB)", 4: " (as RGB on white)"}.get(C, "")
        return (f"{len(pictures):,} samples at {as_imsize(f'{H}x{W}')} px as 8-bit PNGs hold them{as_rgb}, against "
                f"{self.words}, unflipped")


def of_run(config, dataset):
    """The default reference of a run: its training set `dataset`. Raises DataError if a file is missing."""
    held_out = f", less the {config.holdout:g} held out" if config.holdout else ""
    return Reference(dataset, f"all {len(dataset):,} pictures of {dataset_name(config)}{held_out}"
                     f"{_fitted(PictureShape.of_config(config).fit)}",
                     fingerprint(dataset, config), config.imsize)


def of_folder(path, shape, flag, max_pixels=MAX_PIXELS):
    """The pictures of the folder, or archive, given by `flag`, brought to `shape`, a PictureShape or the side of square
    RGB pictures, as in training; `max_pixels` as of --max_pixels. Raises DataError.
    """
    shape = PictureShape.of(shape)
    config = Config.of({"dataset": "folder", "image_path": str(path), "imsize": shape.imsize,
                        "channels": shape.channels, "fit": shape.fit})
    try:
        dataset = open_pictures(Path(path), shape, max_pixels=max_pixels)
        dataset.use_levels(sample_levels(dataset))
    except DataError as error:
        raise DataError(f"{flag}: {error}; name a folder of pictures") from None
    return Reference(dataset, f"all {len(dataset):,} pictures of folder {Path(path).name}{_fitted(shape.fit)}",
                     fingerprint(dataset, config), config.imsize)


def _fitted(fit):
    """Return in words how pictures were brought to their size, if not by cropping: scores tell such sets apart."""
    return "" if fit == "crop" else f" by --fit {fit}"


def refuse_few(metrics, count, who):
    """Raise DataError if a set of `count` pictures, "real" or "generated", is too small for one of `metrics`."""
    needy = [name for name in metrics if count < METRICS[name].least]
    if needy:
        least, one = max(METRICS[name].least for name in needy), len(needy) == 1
        raise DataError(f"{count} {who} picture{'s' * (count != 1)}: --metrics {','.join(needy)} need{'s' * one} at "
                        f"least {least}, and thousands for meaningful values; leave {'it' if one else 'them'} out, or "
                        "add pictures")


class Meter:
    """Scores sets of pictures against one reference with those of `config.metrics` that compare two sets.

    The constructor loads what they need, `prepare` computes the features of the reference. All ranks must call both and
    `measure`. Raises DataError, UsageError.
    """

    def __init__(self, config, place):
        files = dict.fromkeys(METRICS[name].file for name in config.metrics if METRICS[name].of_sets)
        self.meters = [import_module(f"metrics.{file}").SetMeter(config, place) for file in files]
        self.feature_net, self.reference = config.feature_net, None

    def prepare(self, reference):
        """Set the Reference that sets are scored against."""
        self.reference = reference
        for meter in self.meters:
            meter.prepare(reference)

    def scores_by_rank(self):
        """Return the names of the scores that decide which checkpoint is best: the first that was measured counts."""
        return scores_by_rank(self.feature_net, len(self.reference))

    def measure(self, pictures, source, stopped=lambda: False):
        """Return [Score, ...] of a set of uint8 pictures, the same on every rank; None if `stopped()` becomes true.

        Raises DataError.
        """
        scores = []
        for meter in self.meters:
            score = meter.measure(pictures, source, stopped)
            if score is None:
                return None
            scores.append(score)
        return scores
