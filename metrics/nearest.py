"""`nearest`: does G memorize? Median LPIPS from a sample to its nearest training picture, over the median from a
training picture to its nearest other; well under 1 means memorization.

Distances are computed in the embedding space where LPIPS is a squared Euclidean distance, so each picture passes
through VGG-16 only once.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data_loader import to_images
from dataset.images import ThreadedReader
from device import distributed
from device.distributed import say
from flags.pictures import short_side, sides_at
from gallery.sheets import save_reconstructions
from generate.trained import folder_as_file_part
from pretrained import lpips, vgg
from storage.score_table import Score
from utils import spread_indices

SIDE = 64               # pixels: larger pictures are downscaled to this before the search
SAMPLES = 1000          # samples compared with all training pictures, at most
REAL = 500              # training pictures, spread evenly, compared with all others, at most
PAIRS = 16              # closest pairs in the sheet
PER_ROW = 8
FALLBACK_HINT = "--metrics without nearest and lpips"
CHUNK = 64              # batch size
SCALE = 64.0            # factor on embeddings stored as float16, to keep small values out of the subnormal range


def require(config):
    """Raise DataError or UsageError if the weights or packages that `evaluate` needs are missing."""
    lpips.require(config.vgg_weights, FALLBACK_HINT)


def evaluate(evaluation):
    """Yield [Score] for each of the evaluation's sample sets, and write a sheet of its closest pairs."""
    config, place, reference = evaluation.config, evaluation.place, evaluation.reference
    real, real_distances = ThreadedReader(reference.dataset), None
    net = lpips.load_on_every_rank(config.vgg_weights, place.device, FALLBACK_HINT)
    others = f"_real-{folder_as_file_part(config.real_dir)}" if config.real_dir else ""
    for suffix, samples, source in evaluation.sample_sets():
        labels = labels_of(evaluation, samples)
        neighbours = find_neighbours(net, real, samples, place, real_distances, labels)
        real_distances = neighbours.real
        if distributed.is_first():
            path = evaluation.picture_path(f"nearest{suffix}{others}", sampler=False)
            _save_pairs(real, samples, neighbours, path, evaluation.step)
        side = min(short_side(reference.imsize), SIDE)
        nearest, other = ("the nearest of its class among", "the nearest other of their class") if labels else (
            "the nearest of", "the nearest other")
        yield [Score(neighbours.scores(), (
            f"{weights_in_words(config.vgg_weights)} at {side} px from each of {len(neighbours.distance):,} samples to "
            f"{nearest} {reference.words}, over that of {len(real_distances):,} training pictures to {other}; "
            "nearest: ratio of the medians, far under 1 is copying; nearest_copies: share of samples nearer "
            "than 99 % of the training pictures are, or than a hundredth of what is usual"), source)]


def weights_in_words(weights):
    """Describe LPIPS on these `--vgg_weights` for a protocol."""
    return vgg.FILE.in_words(weights, "LPIPS on VGG-16", "LPIPS on VGG-16 with RANDOM weights (for tests)",
                             "LPIPS on a VGG-16 of other weights (sha256 {})")


def labels_of(evaluation, samples):
    """Return the classes (of the real pictures, of the samples), both int64 (N,), so that each sample is compared with
    its class; None in a run without classes, or if the real pictures lack one of them.
    """
    classes = evaluation.trained and evaluation.trained.latents.classes
    if not classes:
        return None
    real = evaluation.reference.labels(classes.names)
    if real is None or not torch.isin(classes.present, real).all() or not len(_with_others(real)):
        say("note: --metrics nearest compares samples with real pictures of all classes: not each class has some")
        return None
    return real, samples.inputs.labels[:SAMPLES]


def _with_others(labels):
    """Return the indices of the real pictures that have another one of their class."""
    return ((labels >= 0) & (torch.bincount(labels + 1)[labels + 1] > 1)).nonzero().flatten()


@dataclass
class Neighbours:
    """Nearest neighbours of N samples and of M training pictures among the training pictures, on the CPU.

    `distance` (N,): LPIPS of each sample to its nearest training picture, `index` (N,): that picture's index. `real`
    (M,): LPIPS of training pictures to their nearest other training picture.
    """

    distance: torch.Tensor
    index: torch.Tensor
    real: torch.Tensor

    def scores(self):
        """Return {name: float}.

        `nearest`: the samples' median distance over that of the training pictures; far under 1 is copying.
        `nearest_copies`: share of samples below the 1 % quantile of the training pictures' distances; new pictures of
        the same distribution would have 0.01. If more than 1 % of the training pictures are duplicates, that quantile
        is 0: the threshold is at least 1 % of the training pictures' median distance.
        """
        real_median = self.real.median().clamp(min=1e-12)
        copies = (self.distance < torch.maximum(self.real.quantile(0.01), 0.01 * real_median)).double().mean()
        return {"nearest": (self.distance.median() / real_median).item(), "nearest_copies": copies.item()}


@torch.no_grad()
def find_neighbours(net, real, fake, place, real_distances=None, labels=None):
    """Return the `Neighbours` of two sets of uint8 pictures (N, C, H, W); `net` is an Lpips.

    Searches the first SAMPLES of `fake` among all of `real`, and REAL of `real` among the others. `real_distances`:
    `Neighbours.real` of an earlier call with the same `real`, to skip the second search. `labels`, of `real` and of
    `fake`: neighbours are of the same class. The work is split among the ranks; all ranks must call this.
    """
    chosen = []
    if real_distances is None:
        numbers = list(range(len(real))) if labels is None else _with_others(labels[0]).tolist()
        chosen = [numbers[i] for i in spread_indices(REAL, len(numbers))]
    mine = [list(place.share(count)) for count in (min(len(fake), SAMPLES), len(chosen))]
    chosen = [chosen[i] for i in mine[1]]
    queries = _embed(net, ((fake, mine[0]), (real, chosen)), place)                     # (N, D)
    excluded = torch.tensor([-1] * len(mine[0]) + chosen, device=place.device)          # (N,)
    asked = labels and torch.cat([labels[1][mine[0]], labels[0][chosen]])               # (N,), or None
    distance, index = _search(net, queries, excluded, real, place, labels and (labels[0], asked))
    results = list(zip(distance.tolist(), index.tolist(), strict=True))
    of_fake, of_real = (distributed.gather_in_order(dict(zip(numbers, part, strict=True))) for numbers, part in (
        (mine[0], results[:len(mine[0])]), (mine[1], results[len(mine[0]):])))
    distance, index = map(torch.tensor, zip(*of_fake, strict=True))
    if real_distances is None:
        real_distances = torch.tensor([real_distance for real_distance, _ in of_real])
    return Neighbours(distance, index, real_distances)


def _search(net, queries, excluded, real, place, labels=None):
    """Return LPIPS to and index of the nearest picture of `real` for each embedding in `queries` (N, D), both (N,).

    `excluded` (N,): index of the query itself in `real`, which does not count as its neighbour, or -1. `labels`, of
    `real` and of `queries`: pictures of other classes do not count either.
    """
    real_labels, labels = (each.to(place.device) for each in labels) if labels else (None, None)
    distance = torch.full((len(queries),), torch.inf, device=place.device)
    index = torch.zeros(len(queries), dtype=torch.long, device=place.device)
    norms = torch.cat([part.float().square().sum(1) for part in queries.split(CHUNK)])
    with distributed.progress(len(real), "picture", "neighbours") as progress:
        for start in range(0, len(real), CHUNK):
            keys = _embed_chunk(net, real[start:start + CHUNK], place).float()          # (64, D)
            square = keys.square().sum(1)
            numbers = torch.arange(start, start + len(keys), device=place.device)
            for part in torch.arange(len(queries), device=place.device).split(CHUNK):
                distances = norms[part, None] + square - 2 * queries[part].float() @ keys.T     # (64, 64)
                distances = distances.masked_fill(excluded[part, None] == numbers, torch.inf)
                if labels is not None:
                    distances = distances.masked_fill(labels[part, None] != real_labels[numbers], torch.inf)
                best, best_key = distances.min(1)
                closer = best < distance[part]
                distance[part] = torch.where(closer, best, distance[part])
                index[part] = torch.where(closer, numbers[best_key], index[part])
            progress.update(len(keys))
    return distance.clamp(min=0) / SCALE**2, index


def _embed(net, chosen, place):
    """Return embeddings float16 (N, D) of the pictures in ((set, indices), ...), in this order.

    D is about 500,000, so they are written into one preallocated tensor instead of being concatenated.
    """
    total, row, embeddings = sum(len(numbers) for _, numbers in chosen), 0, None
    with distributed.progress(total, "picture", "samples and training pictures") as progress:
        for pictures, numbers in chosen:
            for start in range(0, len(numbers), CHUNK):
                part = _embed_chunk(net, pictures_at(pictures, numbers[start:start + CHUNK]), place)
                embeddings = part.new_empty(total, part.shape[1]) if embeddings is None else embeddings
                embeddings[row:row + len(part)] = part
                row += len(part)
                progress.update(len(part))
    if embeddings is None:                              # with many ranks, one may have no query
        return _embed_chunk(net, chosen[0][0][0:1], place)[:0]
    return embeddings


def pictures_at(pictures, numbers):
    """Return the pictures of a set at these indices: uint8 (len(numbers), C, H, W)."""
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return pictures[numbers[0]:numbers[0] + len(numbers)]           # one slice, decoded by several threads
    return torch.cat([pictures[number:number + 1] for number in numbers])


def _embed_chunk(net, pictures, place):
    # queries and keys are rounded identically, so that exact copies have distance 0
    return (SCALE * net.embed(reduced(to_images(pictures.to(place.device))))).half()


def reduced(images):
    """Downscale images in [-1, 1] to SIDE px at the shorter side if they are larger."""
    height, width = images.shape[2:]
    if min(height, width) <= SIDE:
        return images
    return F.interpolate(images, size=sides_at(f"{height}x{width}", SIDE), mode="bilinear", antialias=True)


def _save_pairs(real, samples, neighbours, path, step):
    """Write a sheet of the closest pairs, PER_ROW to a row, with each distance over the real pictures' median."""
    real_median = neighbours.real.median().clamp(min=1e-12)
    closest = neighbours.distance.argsort()[:PAIRS].tolist()
    rows, captions = {}, {}
    for start in range(0, len(closest), PER_ROW):
        pairs = closest[start:start + PER_ROW]
        sample_row = f"samples {start + 1} to {start + len(pairs)}"
        rows[sample_row] = to_images(pictures_at(samples, pairs))
        real_row = f"the training pictures nearest to {sample_row}"
        rows[real_row] = to_images(pictures_at(real, neighbours.index[pairs].tolist()))
        captions[real_row] = [f"{(neighbours.distance[i] / real_median).item():.2f}" for i in pairs]
        if len(pairs) < PER_ROW and start:              # pad: all rows must have the same length
            for row in (sample_row, real_row):
                blank = rows[row].new_full((PER_ROW - len(pairs), *rows[row].shape[1:]), -1)
                rows[row] = torch.cat([rows[row], blank])
    save_reconstructions(rows, path, "samples nearest to a training picture", step, captions,
                         "numbers: LPIPS of the pair / median LPIPS between nearest training pictures")
