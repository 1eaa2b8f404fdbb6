"""Images from a generator in evaluation mode, in the arithmetic of `--precision`: none depends on its neighbours."""

import torch
from torch import nn

from spectral import shared_weights

SETTLING_IMAGES = 256       # that G_ema's batch statistics are measured on before it is looked at or saved


def batch_for(imsize):
    """How many images G draws at once without gradients: 64, fewer where they are large."""
    return max(8, 64 * 128**2 // max(imsize, 128) ** 2)


@torch.no_grad()
def draw(G, z, precision, batch):
    """Images (len(z), 3, imsize, imsize) in [-1, 1] on the CPU, by G in eval mode on the device of `precision`."""
    with precision.arithmetic(), shared_weights():
        return torch.cat([G(part.to(precision.device))[0].cpu() for part in z.split(batch)])


@torch.no_grad()
def settle_batch_statistics(G_ema, z, precision, batch=64):
    """Measure G_ema's batch-norm statistics on its own images of z (N, ...), and leave it in eval mode.

    CRUCIAL for the picture: the statistics copied from G belong to G's weights, not to their average ("standing
    statistics", Brock et al. 2019, arXiv 1809.11096, appendix E). `ema_update` copies over them at the next step.
    """
    norms = [layer for layer in G_ema.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None                           # a plain mean over the batches
        layer.train()
    with precision.arithmetic(), shared_weights():
        for part in z.split(batch):
            G_ema(part)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
