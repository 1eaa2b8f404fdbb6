"""`lpips`: can G reconstruct held-out pictures? LPIPS back-tracking (FastGAN section 4; SLAE-FastGAN table 5).

Adam optimizes a latent for each held-out picture, starting from the nearest of STARTS samples. Distances are computed
in the embedding space where LPIPS is a squared Euclidean distance, so each target passes through VGG-16 only once.
"""

import json
import math
from dataclasses import dataclass, replace

import torch

import data_loader
from data_loader import to_images
from dataset.images import Subset, ThreadedReader, split
from dataset.table import DATASETS, are_same, summarize
from device import distributed
from device.distributed import is_first, say
from gallery.sheets import save_reconstructions
from generate.latents import Inputs
from generate.project import MSE_WEIGHT, RATE, search
from metrics.nearest import CHUNK, FALLBACK_HINT, PER_ROW, SCALE, pictures_at, reduced, weights_in_words
from parameter import dataset_name
from pretrained import lpips
from storage.score_table import Score
from utils import spread_indices, write_atomically

HELD_OUT = 0.1          # share of the pictures that is back-tracked if the run held none out
BACKTRACKED = 100       # pictures that are back-tracked, at most
STARTS = 256            # samples; each search starts at the one nearest to its target
LEAST_STARTS = 16       # of each class, in a run with classes


def require(config):
    """Raise DataError or UsageError if the pictures, weights or packages that `evaluate` needs are missing."""
    DATASETS[config.dataset](config)
    lpips.require(config.vgg_weights, FALLBACK_HINT)


def evaluate(evaluation):
    """Yield [Score]: how well G reconstructs held-out pictures. Write a sheet of some, and a JSON file of all."""
    config, place, trained = evaluation.config, evaluation.place, evaluation.trained
    dataset = data_loader.open_dataset(config)
    _, held_out = split(dataset, config.holdout or HELD_OUT)
    seen_in_training = "never trained on"
    if not config.holdout:
        seen_in_training = "TRAINED ON"
        say(f"note: this run was trained on all pictures, including these {len(held_out)}, so the result is a training "
            "error; train with --holdout 0.1 to hold some out")
    elif trained.data and (trained.data.get("mixed") or not are_same(trained.data, summarize(dataset, config))):
        # which ones are held out depends on how many there are
        seen_in_training = "of a changed set, PARTLY TRAINED ON"
        say("note: the pictures have changed since this run began, so that some of those held out now were trained on")
    if len(held_out) > BACKTRACKED:
        held_out = Subset(held_out, spread_indices(BACKTRACKED, len(held_out)), "")
    pictures, labels = ThreadedReader(held_out), _labels(trained.latents.classes, held_out)
    net = lpips.load_on_every_rank(config.vgg_weights, place.device, FALLBACK_HINT)
    free = config.z_dim if not config.backtrack_metadata else trained.latents.width
    result = backtrack(trained.G, trained.latents, pictures, net, config.backtrack_steps, free, config.seed, place,
                       labels)
    if is_first():
        _write_json(evaluation, held_out, result)
        _save_sheet(evaluation, pictures, result)
    yield [Score(result.scores(), (
        f"{weights_in_words(config.vgg_weights)} at {config.imsize} px between {len(held_out):,} pictures of "
        f"{dataset_name(config)} ({seen_in_training}) and what G draws "
        f"after {config.backtrack_steps} steps of Adam ({RATE}) on "
        f"{'z and metadata' if config.backtrack_metadata else 'z'}, on LPIPS + {MSE_WEIGHT} MSE, from the "
        f"nearest of {_starts(labels):,} samples{' of its class' * (labels is not None)}; mean ± standard deviation "
        "over the pictures"),
        trained.latents.source(config.seed, "as in the data" if labels is None else "of the pictures"))]


def _labels(classes, held_out):
    """Return the classes of the held-out pictures, int64 (N,); None if the run has none, or none of these names."""
    if classes is None or held_out.labels is None:
        return None
    labels = torch.from_numpy(held_out.labels.among(classes.names))
    return labels if (labels >= 0).all() else None


def _write_json(evaluation, held_out, result):
    """Write logs/<version>/<step>_lpips.json: LPIPS and MSE of every picture."""
    names = held_out.sources if len(held_out.sources) == len(held_out) else range(len(held_out))
    entries = [{"picture": name, "lpips": distance, "mse": error} for name, distance, error in zip(
        names, result.lpips.tolist(), result.mse.tolist(), strict=True)]
    path = evaluation.trained.folders.logs / evaluation.picture_path("lpips", sampler=True).with_suffix(".json").name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(entries, indent=1) + "\n",
                                                                  encoding="utf-8"))
    say(f"LPIPS of each picture: {path}")


def _save_sheet(evaluation, pictures, result):
    """Write a sheet of held-out pictures above their reconstructions, evenly spread from the best to the worst."""
    order = result.lpips.argsort()
    shown = order[torch.linspace(0, len(order) - 1, min(PER_ROW, len(order))).round().long()].tolist()
    label = "closest images of G, from best to worst"
    save_reconstructions(
        {"held-out pictures": to_images(pictures_at(pictures, shown)), label: result.images[shown]},
        evaluation.picture_path("backtrack", sampler=True), "back-tracking", evaluation.step,
        {label: [f"LPIPS {result.lpips[i].item():.3f}" for i in shown]})


# --------------------------------------------------------------------------------------------------------- the search


@dataclass
class Backtracked:
    """G's best reconstruction of each of N pictures: `images` (N, C, H, W) in [-1, 1], their `lpips` (N,) and mean
    squared error `mse` (N,), on the scale of [-1, 1]. On the CPU.
    """

    images: torch.Tensor
    lpips: torch.Tensor
    mse: torch.Tensor

    def scores(self):
        """Return {name: float}. lpips_std is the standard deviation over the pictures, 0 for a single one."""
        return {"lpips": self.lpips.mean().item(), "lpips_std": self.lpips.std(correction=0).item(),
                "lpips_mse": self.mse.mean().item()}


def backtrack(G, latents, pictures, net, steps, free, seed, place, labels=None):
    """Optimize a latent for each of a set of uint8 pictures with Adam on LPIPS + 0.2 MSE (FastGAN section 4).

    Return a `Backtracked`. G is frozen, in eval mode; `net` is an Lpips. Adam changes the first `free` dimensions of
    the latents (z_dim: not the metadata). Each search starts at the nearest of the first STARTS samples of `seed`, or
    with the `labels` (N,) of the pictures at the nearest of its class; the step of lowest LPIPS is returned. The
    pictures are split among the ranks; all ranks must call this.
    """
    starts = _find_starts(latents, seed, labels).to(place.device)
    mine = list(place.share(len(pictures)))
    batch = max(1, min(16, 16 * 64**2 // math.prod(pictures[0:1].shape[2:])))
    groups = [mine[start:start + batch] for start in range(0, len(mine), batch)]
    embeddings = _embed_samples(net, G, starts, batch) if groups else None
    results = {}
    with distributed.progress(len(groups) * steps, "step", "back-tracking") as progress:
        for group in groups:
            target = to_images(pictures_at(pictures, group).to(place.device))
            allowed = None if labels is None else labels[group, None] == starts.labels.cpu()    # (B, starts)
            nearest = starts[_nearest_samples(net, embeddings, target, allowed)]
            found = search(G, net, nearest, target, steps, free, progress.update)
            for number, *each in zip(group, found.images, found.lpips, found.mse, strict=True):
                results[number] = [tensor.clone() for tensor in each]   # gathering a view would send its whole batch
    return Backtracked(*map(torch.stack, zip(*distributed.gather_in_order(results), strict=True)))


def _starts(labels):
    """Return among how many samples the start of each search is chosen."""
    return STARTS if labels is None else max(LEAST_STARTS, STARTS // len(labels.unique()))


def _find_starts(latents, seed, labels):
    """Return the Inputs of the samples at which searches may start; with `labels` as many of each class."""
    batches = latents.seeded_batches(seed)
    starts = Inputs.cat([next(batches) for _ in range(STARTS // 64)])
    if labels is None:
        return starts
    first = starts[:_starts(labels)]
    return Inputs.cat([replace(first, labels=torch.full((len(first),), label)) for label in labels.unique().tolist()])


@torch.no_grad()
def _embed_samples(net, G, inputs, batch):
    """Return embeddings float16 (N, D) of G's images for `inputs`, on the CPU."""
    return torch.cat([(SCALE * net.embed(reduced(G(**part.as_arguments())[0]))).half().cpu()
                      for part in inputs.split(batch)])


@torch.no_grad()
def _nearest_samples(net, samples, target, allowed=None):
    """Return the index of the nearest sample for each target image, (B,) on the CPU; `samples` are embeddings.

    `allowed` (B, samples), bool: those to choose from.
    """
    queries = (SCALE * net.embed(reduced(target))).half().float().cpu()
    distances = [queries.square().sum(1)[:, None] + part.float().square().sum(1) - 2 * queries @ part.float().T
                 for part in samples.split(CHUNK)]
    distances = torch.cat(distances, 1)                                 # (B, samples)
    return (distances if allowed is None else distances.masked_fill(~allowed, torch.inf)).argmin(1)
