"""What a training run shows every `--sample_step`: G_ema's samples of the same inputs, what the networks attend to, and
real pictures to compare with.
"""

import math
from collections import Counter
from functools import cached_property

import numpy as np
import torch

import utils
from data_loader import to_images
from dataset.images import split
from families import FAMILIES
from gallery.grid import save_grid
from gallery.health import Health
from gallery.records import Record
from generate.draw import batch_for, draw
from layers.norms import batch_statistics
from storage.folders import step_name

LAST_PICTURE = "_fake.png"  # of a record: where it is, the others are
HEALTH_IMAGES = 16          # that D's logits are compared on, of each kind


class Recorder:
    """Draws the records of a run into its `folders`: `trainer` has its networks, `dataset` the training pictures."""

    def __init__(self, trainer, dataset, folders):
        self.trainer, self.dataset, self.folders = trainer, dataset, folders
        self.config, self.device, self.classes = trainer.config, trainer.place.device, trainer.latents.classes
        self.held_out = split(dataset.whole, self.config.holdout)[1] if self.config.holdout else None
        self.health = Health()
        self.figures = {}                               # numbers from the last record, for the next log line

    @torch.no_grad()
    def write(self):
        """Write a record: the grid of G_ema at the fixed inputs, and what the networks attend to; warn of a dead D, a
        collapsed G, a D that memorizes.
        """
        trainer, config, folders = self.trainer, self.config, self.folders
        trainer.D.eval()
        try:
            # its running statistics mix real with fake images, which its passes in training never do
            with utils.forked_random_state(self.device), batch_statistics(trainer.D):
                inputs = trainer.fixed_inputs
                images = draw(trainer.G_ema, inputs, trainer.precision, batch_for(config.imsize))
                order = slice(None) if self.classes is None else by_classes(inputs.labels)
                names = () if self.classes is None else self.classes.captions(inputs.labels[order])
                record = Record(inputs[order].to(self.device), images[order].to(self.device),
                                self.real_images[order].to(self.device), folders.samples, folders.attention,
                                trainer.step, config.attn_queries, config.attn_raw, names)
                self.figures = self._check_health(record)
                for write in FAMILIES[config.model].records:
                    self.figures |= write(trainer.G_ema, trainer.D, record)
                save_grid(images, record.samples / step_name(record.step, LAST_PICTURE), names=self.row_names)
        finally:
            trainer.D.train()

    def write_real(self):
        """Write real.png, a grid of real pictures."""
        save_grid(self.real_images, self.folders.samples / "real.png", names=self.row_names)

    def _check_health(self, record):
        labels = record.inputs.labels                   # of the real images, too: rows of both grids have one class
        shown = {"fake": (record.images, labels), "real": (record.real, labels)}
        if self.held_out:
            indices = utils.spread_indices(len(record.real), len(self.held_out))
            shown["heldout"] = to_images(self.held_out.load_batch(indices)).to(self.device), self._labels_at(indices)
        logits = {name: self.trainer.objective.logits(self.trainer.D, *(
            part if part is None else part[:HEALTH_IMAGES] for part in shown[name])) for name in shown}
        return self.health.check(record.step, record.images, record.real, logits)

    def _labels_at(self, indices):
        """Return the labels of these held-out pictures on the device; None in a run without classes."""
        if self.classes is None:
            return None
        return torch.from_numpy(self.held_out.labels.numbers[indices]).to(self.device)

    @cached_property
    def real_images(self):
        """Real images for a grid, spread evenly over the data set: (N, C, H, W) in [-1, 1], on the CPU.

        With classes, each row of the grid has those of its class; fewer than a row are repeated.
        """
        fixed = self.trainer.fixed_inputs
        if self.classes is None:
            indices = utils.spread_indices(len(fixed), len(self.dataset))
        else:
            numbers, indices = self.dataset.labels.numbers, []
            for label, count in Counter(fixed.labels.tolist()).items():
                members = np.flatnonzero(numbers == label)
                chosen = members[utils.spread_indices(count, len(members))]
                indices += np.resize(chosen, count).tolist()
        return to_images(self.dataset.load_batch(indices))

    @cached_property
    def row_names(self):
        """The name of the class of each row of a grid, or None."""
        if self.classes is None:
            return None
        labels = self.trainer.fixed_inputs.labels
        return self.classes.captions(labels[::math.isqrt(len(labels))])


def by_classes(labels):
    """Return indices (N,) of images with these labels (N,): one image of each class, then the next one of each."""
    labels, turns, seen = labels.tolist(), [], Counter()
    for label in labels:
        turns.append(seen[label])
        seen[label] += 1
    return torch.tensor(sorted(range(len(labels)), key=lambda index: turns[index]))
