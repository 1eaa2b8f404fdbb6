"""`share`: does G use what it is fed? The share of its images' variance that comes from each of its inputs, by pixels
and by LPIPS; what a share means is said in gallery/variation.py.
"""

import torch

from device import distributed
from flags.pictures import short_side
from gallery import variation
from metrics import features
from metrics.nearest import SIDE, reduced, weights_in_words
from pretrained import lpips
from storage.score_table import Score

SAMPLES = 256
BATCH = 64              # samples that swap inputs with each other; that of `Latents.seeded_batches`
FALLBACK_HINT = "--metrics without share"


def require(config):
    """Raise DataError or UsageError if the weights or packages that `evaluate` needs are missing."""
    lpips.require(config.vgg_weights, FALLBACK_HINT)


def evaluate(evaluation):
    """Yield one [Score]: share/INPUT by pixels, share_lpips/INPUT by LPIPS, with intervals."""
    config, trained, place = evaluation.config, evaluation.trained, evaluation.place
    net = lpips.load_on_every_rank(config.vgg_weights, place.device, FALLBACK_HINT)
    distances = measure_swaps(trained.G, trained.latents.seeded_batches(config.seed), trained.draw, net, place)
    values = {}
    for (measure, name), moved in distances.items():
        if name is not None:
            key = f"{measure}/{name}"
            values[key], values[f"{key}_low"], values[f"{key}_high"] = ratio(moved, distances[measure, None])
    yield [Score(values, (
        f"share of the variance of G's images from each input: how far {SAMPLES} samples move when this input alone is "
        "that of another sample, over how far two samples are apart; share: by squared differences of pixels, "
        f"share_lpips: by {weights_in_words(config.vgg_weights)} at {min(short_side(config.imsize), SIDE)} px; in "
        f"brackets the 95 % interval, by a jackknife of {features.GROUPS} groups of samples"),
        trained.latents.source(config.seed))]


@torch.no_grad()
def measure_swaps(G, batches, draw, net, place):
    """Return {(measure, input): squared distances (SAMPLES,)} from each sample to itself with this input of another.

    The input None stands for all inputs: the distances between two samples. Measures are "share" (pixels) and
    "share_lpips", by the Lpips `net`. `batches` yields Inputs of BATCH samples, `draw` their images in [-1, 1]. The
    batches are split among the ranks; all ranks must call this.
    """
    mine, results = set(place.share(SAMPLES, BATCH)), {}
    with distributed.progress(SAMPLES, "sample", "shares of the inputs") as progress:
        for start in range(0, SAMPLES, BATCH):
            inputs = next(batches)
            if start not in mine:
                continue
            images, found = draw(inputs), {}                            # (64, C, H, W)
            embedded = _embed(net, images, place)
            shown = {None: (images.roll(1, 0), embedded.roll(1, 0))}
            shown |= {name: (image, _embed(net, image, place)) for name, image in variation.swaps(G, inputs, draw)}
            for name, (image, embedding) in shown.items():
                found["share", name] = variation.in_pixels(images, image)
                found["share_lpips", name] = (embedded - embedding).square().sum(1)
            results[start] = found
            progress.update(min(place.world_size * BATCH, SAMPLES - progress.n))
    parts = distributed.gather_in_order(results)
    return {key: torch.cat([part[key] for part in parts]).double() for key in parts[0]}


def _embed(net, images, place):
    """Return LPIPS embeddings (N, D) of images on the CPU; passes 16 at a time: D is half a million."""
    return torch.cat([net.embed(reduced(part.to(place.device))).float().cpu() for part in images.split(16)])


def ratio(moved, apart):
    """Return (mean of `moved` (N,) over mean of `apart` (N,), and the ends of its 95 % interval), floats.

    Groups of neighbours are left out, not single ones: each sample is compared with the next.
    """
    of_moved, of_apart = (torch.stack([group.sum() for group in each.chunk(features.GROUPS)])
                          for each in (moved, apart))
    without = (of_moved.sum() - of_moved) / (of_apart.sum() - of_apart).clamp(min=1e-12)
    share = (moved.sum() / apart.sum().clamp(min=1e-12)).item()
    half = features.T95 * features.jackknife(without)
    return share, max(0.0, share - half), share + half
