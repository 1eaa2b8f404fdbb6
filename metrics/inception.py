"""FID, KID, precision, recall and Inception Score of two sets of pictures, from the features of the Inception network.

Network and formulas are torch-fidelity's. This file computes features of sets of any size on any number of ranks,
caches those of the real pictures, and words the protocol. The network's input is the uint8 pixels that PNG files would
hold; the network itself resizes them, once.
"""

from dataclasses import dataclass
from importlib.metadata import version

import torch

from dataset.images import ThreadedReader
from device import distributed
from device.distributed import say
from errors import DataError
from metrics.meter import refuse_few
from pretrained import inception
from storage.cache import Cache
from storage.score_table import Score
from utils import spread_indices

MAX_ROWS = 10_000           # pictures of a set used for KID, precision and recall, at most: more would be gigabytes
CHUNK = 64                  # batch size
KID_SUBSETS, KID_SIZE, IS_SPLITS, NEIGHBOURS = 100, 1000, 10, 3     # as published
CACHE_VERSION = 1           # increment when the computation of reference features changes: invalidates the caches
FEW = 2048                  # pictures: with fewer, the FID's covariance is rank-deficient


class SetMeter:
    """Scores sets of pictures against one reference with those metrics of this file that are in `config.metrics`.

    All ranks must construct it, then call `prepare`. Raises DataError, UsageError.
    """

    def __init__(self, config, place):
        self.config, self.place, self.reference = config, place, None
        self.chosen = [name for name in _FORMULAS if name in config.metrics]

        def load():
            return inception.load_inception(config.inception_weights)

        # rank 0 first, since it may have to download the weights
        self.net = distributed.after_first(load, load).to(place.device)

    def prepare(self, reference):
        """Set the Reference; compute its features, or read them from the cache."""
        refuse_few(self.chosen, len(reference), "real")
        self.reference = reference
        self.real = self._reference_features()
        _refuse_not_finite(self.real, "real")

    def measure(self, pictures, source, stopped=lambda: False):
        """Return the Score of a set of uint8 pictures, the same on every rank; None if `stopped()` becomes true.

        All ranks must call this. Raises DataError.
        """
        refuse_few(self.chosen, len(pictures), "generated")
        fake = compute_features(self.net, pictures, self.place, "scoring", "is" in self.chosen, stopped)
        if fake is None:
            return None
        return distributed.on_first(lambda: Score(distances(self.real, fake, self.chosen, self.place.device),
                                                  self._protocol(pictures, fake), source))

    def _reference_features(self):
        config, reference = self.config, self.reference
        cache = Cache(config.cache_path, "reference", {
            "pictures": reference.fingerprint, "weights": inception.FILE.identity(config.inception_weights),
            "procedure": CACHE_VERSION, "rows": MAX_ROWS, "torch-fidelity": version("torch-fidelity")})
        entry = distributed.gather(cache.read(_is_valid) if distributed.is_first() else None)[0]
        if entry is not None:
            say(f"reference: {reference.words}, features read from {cache.path}")
            return Features(len(reference), entry["mean"], entry["covariance"], entry["rows"])
        say(f"reference: {reference.words}, computing features once")
        features = compute_features(self.net, ThreadedReader(reference.dataset), self.place, "reference")
        if distributed.is_first():
            cache.write({"mean": features.mean, "covariance": features.covariance, "rows": features.rows})
        return features

    def _protocol(self, pictures, fake):
        """Return the protocol, the same for any choice of these metrics, so that FIDs of different choices compare."""
        parts = [f"{weights_in_words(self.config.inception_weights)}, torch-fidelity {version('torch-fidelity')}, "
                 "one resize to 299 px", self.reference.against(pictures),
                 f"KID: {KID_SUBSETS} subsets of {kid_size(self.real, fake):,}",
                 f"precision, recall: {NEIGHBOURS} nearest neighbours",
                 f"Inception Score: {min(IS_SPLITS, fake.count)} splits"]
        if len(self.real.rows) < self.real.count:
            parts.append(f"KID, precision, recall: {len(self.real.rows):,} of the real pictures")
        if min(len(self.reference), len(pictures)) < FEW:
            parts.append(f"fewer than {FEW:,} pictures, their number moves the FID")
        return "; ".join(parts)


def _is_valid(entry):
    shapes = [tuple(entry[name].shape) if isinstance(entry.get(name), torch.Tensor) else () for name in
              ("mean", "covariance", "rows")]
    return all(shapes) and shapes[1] == shapes[0] * 2 and shapes[2][1:] == shapes[0]


def weights_in_words(weights):
    """Describe these `--inception_weights` for a protocol."""
    return inception.FILE.in_words(
        weights, "TF-Inception 2015-12-05 (sha256 {})", "Inception with RANDOM weights (for tests, compares with "
        "nothing)", "Inception of other weights than the standard ones (sha256 {})")


# ----------------------------------------------------------------------------------------------- passes over a set


@dataclass
class Features:
    """Inception features of a set of `count` pictures, on the CPU.

    `mean` (2048,) and `covariance` (2048, 2048), float64, are over all pictures. `rows`, float32 (at most MAX_ROWS,
    2048), are the features of pictures spread evenly over the set. `logits` (count, 1008); None if not requested.
    """

    count: int
    mean: torch.Tensor
    covariance: torch.Tensor
    rows: torch.Tensor
    logits: torch.Tensor | None = None


@torch.inference_mode()
def compute_features(net, pictures, place, what, logits=False, stopped=lambda: False):
    """Compute the `Features` of a set of pictures, the same on every rank.

    The pictures are split among the ranks; all ranks must call this. `what` labels the progress bar. Return None as
    soon as `stopped()`, called before each batch, is true. Raises ValueError for fewer than two pictures, and what
    reading them raises.
    """
    count = len(pictures)
    if count < 2:
        raise ValueError("a set needs at least two pictures")
    kept = set(spread_indices(MAX_ROWS, count))
    total = outer = torch.zeros((), dtype=torch.float64, device=place.device)
    chunks = {}                                         # {first picture: (its rows, its logits)}
    with distributed.progress(count, "picture", what) as progress:
        for start in place.share(count, CHUNK):
            if stopped():
                return None
            features, part = net(pictures[start:start + CHUNK].to(place.device))
            exact = features.double()                   # (B, 2048)
            total, outer = total + exact.sum(0), outer + exact.T @ exact
            chosen = [i for i in range(len(features)) if start + i in kept]
            chunks[start] = features[chosen].cpu(), part.cpu() if logits else None
            progress.update(min(place.world_size * CHUNK, count - progress.n))
    sums = distributed.gather((total.cpu(), outer.cpu()))
    mean = sum(total for total, _ in sums) / count
    # unbiased, as numpy.cov: sum of (x - mean)(x - mean)ᵀ over count - 1
    covariance = (sum(outer for _, outer in sums) - count * torch.outer(mean, mean)) / (count - 1)
    rows, all_logits = zip(*distributed.gather_in_order(chunks), strict=True)
    return Features(count, mean, covariance, torch.cat(rows), torch.cat(all_logits) if logits else None)


# ----------------------------------------------------------------------------------------------------- the metrics


def distances(real, fake, metrics, device="cpu"):
    """Return {name: float}: those metrics of this file that are in `metrics`, for the `Features` of two sets.

    kid_std is the standard deviation over KID's subsets, inception_score_std over its splits. Deterministic. Raises
    DataError if features are not finite.
    """
    _refuse_not_finite(real, "real")
    _refuse_not_finite(fake, "generated")
    return {name: value for metric, formula in _FORMULAS.items() if metric in metrics
            for name, value in formula(real, fake, device).items()}


def _refuse_not_finite(features, who):
    if not features.covariance.isfinite().all():
        raise DataError(f"--inception_weights: the features of the {who} pictures are not finite")


def _fid(real, fake, device):
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    first, second = ({"mu": features.mean.numpy(), "sigma": features.covariance.numpy()} for features in (fake, real))
    return {"fid": fid_statistics_to_metric(first, second, verbose=False)["frechet_inception_distance"]}


def kid_size(real, fake):
    """Size of KID's subsets: 1000, or the size of the smaller set."""
    return min(KID_SIZE, len(real.rows), len(fake.rows))


def _kid(real, fake, device):
    from torch_fidelity.metric_kid import kid_features_to_metric

    result = kid_features_to_metric(fake.rows, real.rows, kid_subsets=KID_SUBSETS, kid_subset_size=kid_size(real, fake),
                                    verbose=False)
    return {"kid": result["kernel_inception_distance_mean"], "kid_std": result["kernel_inception_distance_std"]}


def _precision_and_recall(real, fake, device):
    from torch_fidelity.metric_prc import prc_features_to_metric

    result = prc_features_to_metric(fake.rows.to(device), real.rows.to(device), prc_neighborhood=NEIGHBOURS,
                                    prc_batch_size=2048, save_cpu_ram=True, verbose=False)
    return {"precision": result["precision"], "recall": result["recall"]}


def _inception_score(real, fake, device):
    from torch_fidelity.metric_isc import isc_features_to_metric

    result = isc_features_to_metric(fake.logits, splits=min(IS_SPLITS, fake.count))
    return {"inception_score": result["inception_score_mean"], "inception_score_std": result["inception_score_std"]}


_FORMULAS = {"fid": _fid, "kid": _kid, "pr": _precision_and_recall, "is": _inception_score}
