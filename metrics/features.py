"""FID, KID, precision, recall, coverage and Inception Score of two sets of pictures, from the features of a network.

`--feature_net` chooses the network (pretrained/feature_nets.py). This file computes features of sets of any size on any
number of ranks, caches those of the real pictures, and words the protocol. The networks' input is the uint8 pixels that
PNG files would hold; each network resizes them itself, once.

Each score has an interval for the choice of the generated pictures; the real pictures are those that they are. FID's is
the infinitesimal jackknife, the others' a jackknife that leaves out one of GROUPS groups at a time. A bootstrap was
tried: resampled sets hold duplicates, which the scores mistake for a lack of variety (docs/evaluation.md has figures).
"""

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import NamedTuple

import torch

from dataset.images import ThreadedReader
from device import distributed
from device.distributed import say
from device.mps import for_float64
from errors import DataError
from flags.scores import score_name
from metrics.meter import refuse_few
from pretrained.feature_nets import FEATURE_NETS
from pretrained.vgg import D_FEATURES
from storage.cache import Cache
from storage.score_table import Score
from utils import as_rgb, spread_indices

MAX_ROWS = 10_000           # pictures of a set used for KID, precision, recall, coverage: more would be gigabytes
CHUNK = 64                  # batch size
KID_SUBSETS, KID_SIZE, IS_SPLITS = 100, 1000, 10        # as published
NEIGHBOURS, COVERAGE_NEIGHBOURS = 3, 5                  # as published
CACHE_VERSION = 3           # increment when reference features or decoding change: invalidates the caches
GROUPS = 20                 # of generated pictures, for intervals; with fewer pictures there are none
T95, IS_T95 = 2.093, 2.262  # Student's t for 95 %: of GROUPS - 1 and of IS_SPLITS - 1 degrees of freedom
BLOCK = 1000                # rows of a matrix of all pairs that are in memory at once


class SetMeter:
    """Scores sets of pictures against one reference with those metrics of this file that are in `config.metrics`.

    All ranks must construct it, then call `prepare`. Raises DataError, UsageError.
    """

    def __init__(self, config, place):
        self.config, self.place, self.reference = config, place, None
        self.kind, self.net_name = FEATURE_NETS[config.feature_net], config.feature_net
        self.chosen = [name for name in _FORMULAS if name in config.metrics]
        if "is" in self.chosen and self.net_name != "inception":        # by default; whoever typed it was refused
            self.chosen.remove("is")
            say(f"note: the Inception Score is left out, as --feature_net is {self.net_name}")
        if config.d_features in D_FEATURES and self.net_name == "vgg16" and not config.fake_dir:
            say(f"note: D was trained on features of {self.net_name}, so these scores flatter this run; compare "
                "runs by another --feature_net")
        self.warned = False
        self.net = load_net(config, place)

    def prepare(self, reference):
        """Set the Reference; compute its features, or read them from the cache."""
        refuse_few(self.chosen, len(reference), "real")
        self.reference = reference
        self.real = reference_features(self.config, self.place, self.net, reference)

    def measure(self, pictures, source, stopped=lambda: False):
        """Return the Score of a set of uint8 pictures, the same on every rank; None if `stopped()` becomes true.

        All ranks must call this. Raises DataError.
        """
        refuse_few(self.chosen, len(pictures), "generated")
        fake = compute_features(self.net, pictures, self.place, "scoring", "is" in self.chosen, stopped)
        if fake is None:
            return None
        self._warn_of_few(min(len(self.reference), len(pictures)))
        refuse_not_finite(fake, self.kind.flag, "generated")
        device = for_float64(self.place.device)
        return distributed.on_first(lambda: Score(
            distances(self.real, fake.divided_by(self.real.scale), self.chosen, device, self.net_name),
            self._protocol(pictures, fake), source))

    def _warn_of_few(self, count):
        """Say once that a Fréchet distance of so few pictures mostly measures their number."""
        width = len(self.real.mean)
        if count < width and "fid" in self.chosen and not self.warned:
            fid, kid = (score_name(name, self.net_name) for name in ("fid", "kid"))
            say(f"warning: {count:,} pictures are fewer than the {width:,} features, so {fid} mostly measures how many "
                f"they are; go by {kid}" + ("" if "kid" in self.chosen else " (add kid to --metrics)"))
        self.warned = True

    def _protocol(self, pictures, fake):
        """Return the protocol, the same for any choice of these metrics, so that FIDs of different choices compare."""
        parts = [self.kind.words(self.config), self.reference.against(pictures)]
        inception = self.net_name == "inception"
        if inception:
            parts += [f"KID: {KID_SUBSETS} subsets of {kid_size(self.real, fake):,}",
                      f"precision, recall: {NEIGHBOURS} nearest neighbours",
                      f"Inception Score: {min(IS_SPLITS, fake.count)} splits"]
        else:
            parts += ["KID: all pairs", f"precision, recall: {NEIGHBOURS} nearest neighbours, coverage: "
                                        f"{COVERAGE_NEIGHBOURS}"]
        if len(self.real.rows) < self.real.count:
            parts.append(f"KID, precision, recall: {len(self.real.rows):,} of the real pictures")
        if len(fake.rows) < fake.count:
            parts.append(f"KID, precision, recall, coverage: {len(fake.rows):,} of the samples")
        width = len(self.real.mean)
        if min(len(self.reference), len(pictures)) < width:
            parts.append(f"fewer than {width:,} pictures, their number moves the {'FID' if inception else 'FD'}")
        return "; ".join(parts)


# ----------------------------------------------------------------------------------------------- passes over a set


def load_net(config, place):
    """Return the network of `--feature_net` on the device. All ranks must call this. Raises DataError, UsageError."""
    def load():
        return FEATURE_NETS[config.feature_net].load(config)

    # rank 0 first, since it may have to download the weights
    return distributed.after_first(load, load).to(place.device)


@dataclass
class Features:
    """A network's features of a set of `count` pictures, on the CPU.

    `mean` (D,) and `covariance` (D, D), float64, are over all pictures. `rows`, float32 (at most MAX_ROWS, D), are the
    features of pictures spread evenly over the set, of all if there are no more. `logits` (count, 1008); None if not
    requested.
    """

    count: int
    mean: torch.Tensor
    covariance: torch.Tensor
    rows: torch.Tensor
    logits: torch.Tensor | None = None

    @classmethod
    def of_rows(cls, rows):
        """The Features, on the device of `rows` (N, D), of the pictures whose features these are."""
        exact = rows.double()
        return cls(len(rows), exact.mean(0), torch.cov(exact.T), rows)

    def divided_by(self, scale):
        """Return these with each feature divided by its entry of `scale` (D,)."""
        return Features(self.count, self.mean / scale, self.covariance / torch.outer(scale, scale),
                        (self.rows / scale).float(), self.logits)


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
    total = outer = torch.zeros((), dtype=torch.float64, device=for_float64(place.device))
    chunks = {}                                         # {first picture: (its rows, its logits)}
    with distributed.progress(count, "picture", what) as progress:
        for start in place.share(count, CHUNK):
            if stopped():
                return None
            features, part = net(as_rgb(pictures[start:start + CHUNK].to(place.device)))
            exact = features.to(total.device).double()  # (B, D)
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


def refuse_not_finite(features, flag, who):
    """Raise DataError if features of the `who` pictures, "real" or "generated", are not finite: the weights are bad."""
    if not features.covariance.isfinite().all():
        raise DataError(f"{flag}: the features of the {who} pictures are not finite")


# ------------------------------------------------------------------------------------------------ the real pictures


@dataclass
class RealFeatures(Features):
    """The features of the real pictures, each over its entry of `scale` (D,), and what follows from them alone.

    `root` (D, D): the covariance's square root. `kernel`: mean of KID's kernel over pairs of two of them. `radii` and
    `coverage_radii` (R,): the distance of each row to its nearest neighbours. `floors`: {metric: its value between two
    random halves of the rows}; {} for fewer than four.
    """

    CACHED = ("mean", "covariance", "rows", "scale", "root", "kernel", "radii", "coverage_radii", "floors")

    scale: torch.Tensor | None = None
    root: torch.Tensor | None = None
    kernel: float = 0.0
    radii: torch.Tensor | None = None
    coverage_radii: torch.Tensor | None = None
    floors: dict = field(default_factory=dict)

    @staticmethod
    def is_valid(entry):
        """Whether a dict read from a cache holds all of this, in shapes that belong together."""
        tensors = [entry.get(name) for name in ("mean", "scale", "covariance", "root", "rows", "radii",
                                                "coverage_radii")]
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors) or tensors[4].ndim != 2:
            return False
        R, D = tensors[4].shape
        shapes = [(D,), (D,), (D, D), (D, D), (R, D), (R,), (R,)]
        return [tuple(tensor.shape) for tensor in tensors] == shapes and isinstance(entry.get("kernel"), float) and (
            isinstance(entry.get("floors"), dict))


def reference_features(config, place, net, reference):
    """Return the RealFeatures of a Reference by the network of `--feature_net`, computed once, then read from a cache.

    All ranks must call this. Raises DataError.
    """
    kind = FEATURE_NETS[config.feature_net]
    library = version("torch-fidelity") if kind.of_torch_fidelity else ""
    cache = Cache(config.cache_path, "reference", {
        "pictures": reference.fingerprint, "net": config.feature_net, "weights": kind.identity(config),
        "procedure": CACHE_VERSION, "rows": MAX_ROWS, "torch-fidelity": library})
    entry = distributed.gather(cache.read(RealFeatures.is_valid) if distributed.is_first() else None)[0]
    if entry is not None:
        say(f"reference: {reference.words}, features read from {cache.path}")
        return RealFeatures(len(reference), **{name: entry[name] for name in RealFeatures.CACHED})
    say(f"reference: {reference.words}, computing features once")
    features = compute_features(net, ThreadedReader(reference.dataset), place, "reference")
    refuse_not_finite(features, kind.flag, "real")
    real = distributed.on_first(lambda: prepare_real(features, kind.standardize, for_float64(place.device)))
    if distributed.is_first():
        cache.write({name: getattr(real, name) for name in RealFeatures.CACHED})
    return real


def prepare_real(features, standardize=False, device="cpu"):
    """Return the RealFeatures of these Features. `standardize`: divide each feature by its standard deviation."""
    scale = torch.ones_like(features.mean)
    if standardize:
        deviation = features.covariance.diagonal().clamp(min=0).sqrt()
        least = float(deviation.median() or deviation.max()) / 2
        if not least:
            raise DataError("the real pictures are all the same: no score tells how near others are to them")
        # a feature that a small set hardly shows must not rule the distances
        scale = deviation.clamp(min=least)
    features = features.divided_by(scale)
    rows = features.rows.to(device).double()
    near = _nearest(rows, COVERAGE_NEIGHBOURS + 1)[0]
    radii = [near[:, min(k, near.shape[1] - 1)].cpu() for k in (NEIGHBOURS, COVERAGE_NEIGHBOURS)]
    return RealFeatures(features.count, features.mean, features.covariance, features.rows, scale=scale,
                        root=_square_root(features.covariance.to(device)).cpu(), kernel=_mean_of_pairs(rows),
                        radii=radii[0], coverage_radii=radii[1], floors=_floors(rows))


def _floors(rows):
    """Return fid and kid between two random halves of the real pictures' rows."""
    half = len(rows) // 2
    if half < 2:
        return {}
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).to(rows.device)
    first, second = rows[order[:half]], rows[order[half:2 * half]]
    root = _square_root(torch.cov(first.T))
    fid = _frechet(first.mean(0), root, second.mean(0), torch.cov(second.T))[0]
    kid = _mean_of_pairs(first) + _mean_of_pairs(second) - 2 * _kernel_sums(first, second).item() / half**2
    return {"fid": fid, "kid": kid}


# ----------------------------------------------------------------------------------------------------- the metrics


class Estimate(NamedTuple):
    """A score; its standard error over the generated pictures, None if unknown; a standard deviation that is reported
    beside it; the factor of its 95 % interval; the least and the highest value that it can have.
    """

    value: float
    error: float | None = None
    std: float | None = None
    t: float = T95
    least: float = -torch.inf
    most: float = torch.inf


def distances(real, fake, metrics, device="cpu", net="inception"):
    """Return {name: float}: those metrics of this file that are in `metrics`, of RealFeatures and Features.

    NAME_low and NAME_high are the 95 % interval, NAME_floor the value between two halves of the real pictures. kid_std
    is the standard deviation over KID's subsets, inception_score_std over its splits. Deterministic.
    """
    values = {}
    for metric, formula in _FORMULAS.items():
        for score, estimate in formula(real, fake, device, net).items() if metric in metrics else ():
            name = score_name(score, net)
            values[name] = estimate.value
            if estimate.std is not None:
                values[f"{name}_std"] = estimate.std
            if estimate.error:                          # neither None nor 0: groups that all agree tell nothing
                values[f"{name}_low"] = max(estimate.least, estimate.value - estimate.t * estimate.error)
                values[f"{name}_high"] = min(estimate.most, estimate.value + estimate.t * estimate.error)
            if score in real.floors:
                values[f"{name}_floor"] = real.floors[score]
    return values


def _groups(count, device):
    """Return the group of each generated picture, (count,), or None if they are too few for an interval."""
    return torch.arange(count, device=device) % GROUPS if count >= GROUPS else None


def jackknife(values):
    """Return the standard error that follows from the values (groups,) without each group."""
    return float(((values - values.mean()).square().sum() * (len(values) - 1) / len(values)).sqrt())


# FID

def _fid(real, fake, device, net):
    root = real.root.to(device)
    value, eigen = _frechet(real.mean.to(device), root, fake.mean.to(device), fake.covariance.to(device))
    if fake.count < GROUPS:
        return {"fid": Estimate(value)}
    # Infinitesimal jackknife: the derivative of the distance by the weight of each picture x. With S = root C root and
    # the centred x: 2 (m_fake - m_real) x + x x - (root x) S^-1/2 (root x); C, m: covariance and mean.
    values, vectors = eigen
    inverse = torch.where(values > 1e-10 * values.max(), values.clamp(min=1e-300).rsqrt(), 0)
    x = fake.rows.to(device).double() - fake.mean.to(device)                            # (R, D)
    influence = (2 * x @ (fake.mean - real.mean).to(device) + x.square().sum(1)
                 - ((x @ root @ vectors).square() * inverse).sum(1))
    return {"fid": Estimate(value, float(influence.std()) / fake.count**0.5, least=0.0)}


def _square_root(covariance):
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _frechet(mean, root, other_mean, other_covariance):
    """Return the Fréchet distance of two normal distributions, and eigenvalues and -vectors of root C root.

    `root` is the square root of the first covariance, C = `other_covariance`.
    """
    values, vectors = torch.linalg.eigh(root @ other_covariance @ root)
    distance = ((mean - other_mean).square().sum() + root.square().sum() + other_covariance.trace()
                - 2 * values.clamp(min=0).sqrt().sum())
    return max(0.0, float(distance)), (values, vectors)         # below 0 by rounding


def frechet_distance(real, fake, device="cpu"):
    """Return the Fréchet distance of two `Features`.

    Of a set of fewer pictures than features it takes the pictures' (N, N) matrix, which has the same eigenvalues, but
    for zeros, as the (D, D) one and is far smaller.
    """
    small, large = sorted((real, fake), key=lambda features: features.count)
    (mean, covariance), (other_mean, other_covariance) = (
        (features.mean.to(device), features.covariance.to(device)) for features in (small, large))
    if small.count >= len(mean) or len(small.rows) < small.count:
        return _frechet(mean, _square_root(covariance), other_mean, other_covariance)[0]
    x = small.rows.to(device).double() - mean                                           # (N, D)
    values = torch.linalg.eigvalsh(x @ other_covariance @ x.T / (small.count - 1))
    return max(0.0, float((mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace()
                          - 2 * values.clamp(min=0).sqrt().sum()))


# KID

def kid_size(real, fake):
    """Size of KID's subsets: 1000, or the size of the smaller set."""
    return min(KID_SIZE, len(real.rows), len(fake.rows))


def _kid(real, fake, device, net):
    a, b = fake.rows.to(device).double(), real.rows.to(device).double()
    groups = _groups(len(a), device)
    within, across = _kernel_sums(a, a, groups, groups), _kernel_sums(a, b, groups)     # (G, G), (G, 1)
    within -= torch.diag(_per_group(_kernel_of_itself(a), groups))
    n = len(a)

    def mmd(within, across, count):
        return within / (count * (count - 1)) + real.kernel - 2 * across / (count * len(b))

    error = None
    if groups is not None:
        left = n - torch.bincount(groups)                                               # pictures without each group
        without = within.sum() - within.sum(0) - within.sum(1) + within.diagonal()
        error = jackknife(mmd(without, across.sum() - across[:, 0], left))
    if net != "inception":
        return {"kid": Estimate(mmd(within.sum(), across.sum(), n).item(), error)}
    from torch_fidelity.metric_kid import kid_features_to_metric

    result = kid_features_to_metric(fake.rows, real.rows, kid_subsets=KID_SUBSETS, kid_subset_size=kid_size(real, fake),
                                    verbose=False)
    value, std = result["kernel_inception_distance_mean"], result["kernel_inception_distance_std"]
    # the choice of the subsets adds to it
    return {"kid": Estimate(value, error and (error**2 + std**2 / KID_SUBSETS)**0.5, std)}


def _kernel_sums(a, b, groups=None, other_groups=None):
    """Return the sums of KID's kernel (x·y / D + 1)³ over the pairs of each two groups of rows: (G, H); None: one."""
    sums = []
    for block in a.split(BLOCK):
        kernel = (block @ b.T / a.shape[1] + 1) ** 3                                    # (B, M)
        sums.append(_per_group(kernel.T, other_groups))                                 # (H, B)
    return _per_group(torch.cat(sums, 1).T, groups)


def _kernel_of_itself(rows):
    return (rows.square().sum(1) / rows.shape[1] + 1) ** 3


def _per_group(rows, groups):
    """Return the sum of the rows of each group, (G, ...); of all, (1, ...), if `groups` is None."""
    if groups is None:
        return rows.sum(0, keepdim=True)
    return rows.new_zeros(GROUPS, *rows.shape[1:]).index_add_(0, groups, rows)


def _mean_of_pairs(rows):
    """Return the mean of KID's kernel over all pairs of two different rows."""
    n = len(rows)
    return (_kernel_sums(rows, rows).item() - _kernel_of_itself(rows).sum().item()) / (n * (n - 1))


# precision, recall, coverage

def _precision_and_recall(real, fake, device, net):
    """Precision and recall (Kynkäänniemi et al. 2019) and coverage (Naeem et al. 2020, section 4)."""
    a, b = fake.rows.to(device).double(), real.rows.to(device).double()
    groups = _groups(len(a), device)
    all_of = torch.zeros(len(a), dtype=torch.long, device=device) - 1                   # no group is left out first
    radii = _radii_without(a, all_of if groups is None else groups)                     # (1 + G, N)
    real_radii, coverage_radii = (each.to(device) for each in (real.radii, real.coverage_radii))
    inside, recalled, covered = [], [], []
    for start in range(0, len(b), BLOCK):
        distance = torch.cdist(b[start:start + BLOCK], a)                               # (B, N)
        part = slice(start, start + BLOCK)
        inside.append((distance <= real_radii[part][:, None]).any(0))
        recalled.append(torch.stack([(distance <= each).any(1) for each in radii]))
        near = distance <= coverage_radii[part][:, None]
        covered.append(_any_without(near, groups))                                      # (1 + G, B)
    inside = torch.stack(inside).any(0).double()                                        # (N,)
    shares = {"precision": [inside.mean()], "recall": torch.cat(recalled, 1).double().mean(1),
              "coverage": torch.cat(covered, 1).double().mean(1)}
    if groups is not None:
        left = len(a) - torch.bincount(groups)
        shares["precision"] = [inside.mean(), *((inside.sum() - _per_group(inside, groups)) / left)]
    return {name: Estimate(float(values[0]), None if groups is None else jackknife(torch.stack([*values[1:]])),
                           least=0.0, most=1.0) for name, values in shares.items()}


def _nearest(rows, count):
    """Return the distances of each row to its `count` nearest rows, itself among them, ascending, and which they are:
    both (N, count).
    """
    found = [torch.cdist(block, rows).topk(min(count, len(rows)), largest=False) for block in rows.split(BLOCK)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def _radii_without(rows, groups):
    """Return the distance of each row to its neighbour number NEIGHBOURS, (1 + G, N): among all rows, then without each
    group, whose own rows get a negative one.
    """
    distance, index = _nearest(rows, 4 * (NEIGHBOURS + 1))      # of so many, hardly ever most are in one group
    radii = [distance[:, NEIGHBOURS]]
    for group in range(GROUPS if len(rows) >= GROUPS else 0):
        left = groups[index] != group                                                   # (N, count)
        reached = (left.cumsum(1) <= NEIGHBOURS).sum(1).clamp(max=distance.shape[1] - 1)
        radii.append(distance.gather(1, reached[:, None])[:, 0].masked_fill(groups == group, -1))
    return torch.stack(radii)


def _any_without(near, groups):
    """Return whether any column of `near` (B, N) is true, (1 + G, B): of all columns, then without each group."""
    if groups is None:
        return near.any(1)[None]
    counts = _per_group(near.T.double(), groups)                                        # (G, B)
    return torch.cat([counts.sum(0, keepdim=True), counts.sum(0) - counts]) > 0


# Inception Score

def _inception_score(real, fake, device, net):
    from torch_fidelity.metric_isc import isc_features_to_metric

    splits = min(IS_SPLITS, fake.count)
    result = isc_features_to_metric(fake.logits, splits=splits)
    std = result["inception_score_std"]
    # the splits are independent, and the score is their mean
    error = std / (splits - 1)**0.5 if fake.count >= GROUPS else None
    return {"inception_score": Estimate(result["inception_score_mean"], error, std, t=IS_T95, least=1.0)}


_FORMULAS = {"fid": _fid, "kid": _kid, "pr": _precision_and_recall, "is": _inception_score}
