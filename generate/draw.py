"""Generate images with a generator in evaluation mode, at the precision of `--precision`.

An image does not depend on the other images of its batch, up to rounding.
"""

import itertools
import math

import torch
from torch import nn

from flags.pictures import sides
from gallery.grid import to_uint8
from generate.latents import Inputs
from spectral import shared_weights

BN_STATS_IMAGES = 256       # images for recomputing G_ema's batch-norm statistics before a checkpoint


def batch_for(imsize):
    """Batch size for generating images without gradients: 64 up to 128x128 px, fewer above, at least 8."""
    return max(8, 64 * 128**2 // max(math.prod(sides(imsize)), 128**2))


@torch.no_grad()
def draw(G, inputs, precision, batch):
    """Return G's images (len(inputs), C, H, W) in [-1, 1] on the CPU.

    G is in eval mode, on the device of `precision`; `batch` is the batch size.
    """
    with precision.arithmetic(), shared_weights():
        return torch.cat([G(**part.to(precision.device).as_arguments())[0].cpu() for part in inputs.split(batch)])


@torch.no_grad()
def recompute_bn_stats(G_ema, inputs, precision, batch=64):
    """Recompute G_ema's batch-norm statistics on the images it generates from `inputs`; leave it in eval mode.

    CRUCIAL for image quality: the statistics copied from G belong to G's weights, not to the averaged ones ("standing
    statistics", Brock et al. 2019, arXiv 1809.11096, appendix E). `ema_update` overwrites them at the next step.
    """
    norms = [layer for layer in G_ema.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None                           # cumulative average over the batches
        layer.train()
    # in equal parts: each counts alike, a rest of one image as much as all others of a batch
    parts = -(-len(inputs) // batch)
    bounds = [len(inputs) * number // parts for number in range(parts + 1)]
    with precision.arithmetic(), shared_weights():
        for start, end in itertools.pairwise(bounds):
            G_ema(**inputs[start:end].as_arguments())
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


class DrawnSamples:
    """Samples 0 to count - 1 of a seed as a lazy uint8 array (count, C, H, W): a slice is generated when indexed.

    They equal the pictures that `--mode sample` writes: byte-identical for the slice of all of them, and for 64 from a
    multiple of 64. Other slices change G's batch sizes, and about one value in 100,000 may be rounded differently. G
    is in eval mode, `latents` a Latents, `precision` a Precision.
    """

    def __init__(self, G, latents, count, seed, precision, imsize):
        self.G, self.precision, self.batch = G, precision, batch_for(imsize)
        self.inputs = Inputs.cat(list(itertools.islice(latents.seeded_batches(seed), -(-count // 64))))[:count]

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, part):
        pictures = to_uint8(draw(self.G, self.inputs[part], self.precision, self.batch))    # (N, H, W, C)
        return torch.from_numpy(pictures).permute(0, 3, 1, 2)
