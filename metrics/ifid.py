"""`ifid`: the Fréchet distance between the samples of a class and its real pictures, averaged over the classes
(intra-class FID: Miyato and Koyama 2018, arXiv 1802.05637, section 4).

fid compares all samples with all pictures, so it hardly notices that G draws one class badly, or mistakes it for
another. The network is that of `--feature_net`. The features of at most features.MAX_ROWS pictures, or of one class,
are in memory at once.
"""

from dataclasses import replace
from functools import partial

import torch

from dataset.decode import printable
from dataset.images import Subset, ThreadedReader
from device import distributed
from device.distributed import say
from device.mps import for_float64
from errors import DataError
from flags.scores import score_name
from generate.classes import LISTED
from generate.draw import DrawnSamples
from generate.latents import Inputs
from metrics import features
from metrics.features import Features, compute_features, frechet_distance
from pretrained.feature_nets import FEATURE_NETS
from storage.score_table import Score

LEAST = 2           # pictures of a class: fewer have no covariance
NAMED = 5           # classes that were left out and are named


def require(config):
    """Raise DataError or UsageError if the weights or packages that `evaluate` needs are missing."""
    def load():
        FEATURE_NETS[config.feature_net].load(config)

    distributed.after_first(load, load)


def evaluate(evaluation):
    """Yield one [Score]: the mean over the classes, that of two halves of the real pictures, and each class's distance.

    Raises DataError if no class has enough real pictures.
    """
    config, place, reference, trained = (getattr(evaluation, name) for name in (
        "config", "place", "reference", "trained"))
    names = trained.latents.classes.names
    pictures = pictures_of_classes(reference, names)
    net = features.load_net(config, place)
    real = features.reference_features(config, place, net, reference)
    count = max(LEAST, config.num_eval // len(pictures))
    name, width = score_name("ifid", config.feature_net), len(real.mean)
    is_few = min(count, *map(len, pictures.values())) < width
    if is_few:
        say(f"warning: classes have fewer pictures, or samples, than there are features ({width:,}), so {name} mostly "
            "measures how many they are; compare equal numbers only")
    found = {}                                                          # {label: (distance, floor)}
    for group in in_groups({label: max(count, len(indices)) for label, indices in pictures.items()}):
        chosen = {label: pictures[label] for label in group}
        found |= distributed.on_first(partial(
            _compare, _features_of_real(evaluation, net, real, chosen),
            _features_of_samples(evaluation, net, real, group, count), chosen, count, for_float64(place.device)))
    floors = [floor for _, floor in found.values() if floor is not None]
    values = {name: sum(distance for distance, _ in found.values()) / len(found)}
    if len(floors) == len(found):                   # a mean over fewer classes would not compare
        values[f"{name}_floor"] = sum(floors) / len(floors)
    score = Score(values, _protocol(evaluation, pictures, count, is_few and width),
                  trained.latents.source(config.seed, "of each class"),
                  {name: {names[label]: distance for label, (distance, _) in found.items()}})
    say(f"{name} of {len(found):,} class{'es' * (len(found) > 1)}: {_in_words(score.by_class[name])}")
    yield [score]


def pictures_of_classes(reference, names):
    """Return {label: indices (N,) of its pictures in the Reference}, of the classes that have LEAST or more.

    Names those that have fewer. Raises DataError if all have.
    """
    labels = reference.labels(names)
    counts = torch.bincount(labels[labels >= 0], minlength=len(names))
    left_out = [printable(names[label]) for label in (counts < LEAST).nonzero().flatten()]
    if len(left_out) == len(names):
        raise DataError(f"--metrics ifid: no class has {LEAST} real pictures; leave it out, or add pictures")
    if left_out:
        say(f"note: --metrics ifid leaves out {_listed(left_out)}, of fewer than {LEAST} real pictures")
    order = labels.argsort(stable=True).split([int((labels < 0).sum()), *counts.tolist()])[1:]
    return {label: order[label] for label in (counts >= LEAST).nonzero().flatten().tolist()}


def _in_words(distances):
    """Return 'worst a (304.4), b (290.1), best c (253.7)' of {class: distance}; of many classes the ends alone."""
    words = [f"{printable(name)} ({value:.4g})" for name, value in sorted(
        distances.items(), key=lambda item: -item[1])]
    between = words[1:-1] if len(words) <= LISTED else []
    return ", ".join([f"worst {words[0]}", *between, f"best {words[-1]}"])


def _listed(names):
    shown = ", ".join(names[:NAMED]) + f" and {len(names) - NAMED:,} more" * (len(names) > NAMED)
    return f"{len(names):,} class{'es' * (len(names) > 1)}: {shown}"


def in_groups(sizes):
    """Return [[label, ...], ...]: classes of {label: size} in their order, of at most MAX_ROWS pictures together.

    A larger class is a group of its own.
    """
    groups, total = [], 0
    for label, size in sizes.items():
        if not groups or total + size > features.MAX_ROWS:
            groups.append([])
            total = 0
        groups[-1].append(label)
        total += size
    return groups


# ------------------------------------------------------------------------------ the features of the classes of a group


def _features_of_real(evaluation, net, real, pictures):
    """Return the Features of the real pictures of {label: indices}, class after class."""
    indices = torch.cat(list(pictures.values()))
    if len(real.rows) == real.count:                # all of them are there
        return Features.of_rows(real.rows[indices])
    dataset = Subset(evaluation.reference.dataset, indices.tolist(), "")
    return compute_features(net, ThreadedReader(dataset), evaluation.place, _describe("real pictures", pictures)
                            ).divided_by(real.scale)


def _features_of_samples(evaluation, net, real, labels, count):
    """Return the Features of samples 0 to count - 1 of the seed, of each of these classes in turn."""
    config, trained = evaluation.config, evaluation.trained
    samples = DrawnSamples(trained.G, trained.latents, count, config.seed, trained.precision, config.imsize)
    samples.inputs = Inputs.cat([replace(samples.inputs, labels=torch.full((count,), label)) for label in labels])
    found = compute_features(net, samples, evaluation.place, _describe("samples", labels))
    features.refuse_not_finite(found, FEATURE_NETS[config.feature_net].flag, "generated")
    return found.divided_by(real.scale)


def _describe(what, labels):
    return f"{what} of {len(labels)} class{'es' * (len(labels) > 1)}"


def _compare(real, fake, pictures, count, device):
    """Return {label: (distance, floor or None)} of the Features of a group."""
    parts = zip(pictures, _split(real, list(map(len, pictures.values())), device),
                _split(fake, [count] * len(pictures), device), strict=True)
    return {label: (frechet_distance(of_real, of_fake, device), _floor(of_real.rows))
            for label, of_real, of_fake in parts}


def _split(found, sizes, device):
    """Yield the Features of each class of a group of these sizes."""
    if len(found.rows) < found.count:               # one class: its mean and covariance are of all pictures
        yield found
        return
    for rows in found.rows.split(sizes):
        yield Features.of_rows(rows.to(device))


def _floor(rows):
    """Return the distance of two random halves of the real pictures; None if a half has fewer than LEAST."""
    half = len(rows) // 2
    if half < LEAST:
        return None
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).to(rows.device)
    return frechet_distance(*(Features.of_rows(rows[part]) for part in order[:2 * half].split(half)), rows.device)


def _protocol(evaluation, pictures, count, width):
    """Return the protocol. `width`: the number of features if some class has fewer pictures, else a false value."""
    config, reference = evaluation.config, evaluation.reference
    left_out = len(evaluation.trained.latents.classes) - len(pictures)
    parts = [FEATURE_NETS[config.feature_net].words(config),
             f"{count:,} samples of each of {len(pictures):,} class{'es' * (len(pictures) > 1)} at {config.imsize} px "
             f"as 8-bit PNGs hold them, against the pictures of the class among {reference.words}, unflipped",
             "mean of the classes' distances"]
    if left_out:
        parts.append(f"without {left_out:,} class{'es' * (left_out > 1)} of fewer than {LEAST} pictures")
    if width:
        parts.append(f"fewer than {width:,} pictures of a class, their number moves its distance")
    return "; ".join(parts)
