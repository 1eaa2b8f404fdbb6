"""TF-Inception's view of pictures, and what it says of two sets: FID, KID, precision and recall, Inception Score.

The network and every formula are torch-fidelity's; here are the files, the passes over sets of any size, on any number
of processes, and the sums. Pictures go in as the bytes that their PNGs hold, and are resized once, by the network.
"""

import io
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import distributed
from failures import DataError, UsageError
from weights import Published

FILE = Published(
    "--inception_weights", "standard", "torch-fidelity's Inception", "Inception",
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", 95_628_359,
    aliases=("pt_inception-2015-12-05-6726825d.pth",))      # pytorch-fid's name for it
METRICS = ("fid", "kid", "pr", "is")
OTHERWISE = "--metrics swd"
MAX_ROWS = 10_000           # pictures of a set that KID, precision and recall look at: more would be gigabytes
CHUNK = 64                  # pictures at a time
KID_SUBSETS, KID_SIZE, IS_SPLITS, NEIGHBOURS = 100, 1000, 10, 3     # as published
_SEED = 15                  # of the random weights: the same in every run


# ---------------------------------------------------------------------------------------------------- the network


class Inception(nn.Module):
    """uint8 pictures (B, 3, H, W) of any size -> pool3 features float32 (B, 2048), logits without bias (B, 1008)."""

    def __init__(self, net):
        super().__init__()
        # channels last: on a CPU the convolutions take half the time
        self.net = net.to(memory_format=torch.channels_last)

    def forward(self, pictures):
        # on CUDA convolutions would round to 10 bits: that alone moves a FID in its third digit
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.net(pictures)


def load(weights):
    """The Inception of these weights, frozen, on the CPU. Global random states stay as they are.

    Raises DataError, UsageError.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UsageError(f"--metrics fid, kid, pr and is need torch-fidelity ({error}): pip install torch-fidelity, "
                         f"or go on without it: {OTHERWISE}") from None

    class Extractor(FeatureExtractorInceptionV3):
        """Theirs but that it takes a state dict that was read safely: theirs unpickles whatever a file holds."""

        def load_state_dict(self, state_dict, *arguments, **options):
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        net = Extractor("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing)
        if weights == "random":
            FILE.warn_of_random()
            _randomize(net)
    if weights != "random":
        state = FILE.load(weights, OTHERWISE)
        try:
            nn.Module.load_state_dict(net, state)
        except (RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise DataError(f"--inception_weights {weights}: this is not {FILE.net} ({reason})") from None
    return Inception(_folded(net.requires_grad_(False).eval()))


def _folded(net):
    """The network with every batch norm folded into its convolution: a pass over each map less."""
    for block in list(net.modules()):
        if isinstance(getattr(block, "bn", None), nn.BatchNorm2d):
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
    return net


def _randomize(net):
    """Weights that keep the scale of what passes (He's initialization)."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


# ----------------------------------------------------------------------------------------------- passes over a set


@dataclass
class Features:
    """What the network says of a set of `count` pictures. `mean` (2048,) and `covariance` (2048, 2048), float64, are
    over all of them; `rows`, float32 (at most MAX_ROWS, 2048), are features of pictures spread evenly over the set;
    `logits` (count, 1008), None where they were not asked for. All on the CPU.
    """

    count: int
    mean: torch.Tensor
    covariance: torch.Tensor
    rows: torch.Tensor
    logits: torch.Tensor | None = None


@torch.inference_mode()
def take(net, pictures, place, what, logits=False, stopped=lambda: False):
    """The `Features` of a set of pictures, the same on every process: each takes its share, all must call this.

    `what` is the set's name on the progress bar. `stopped()` is asked between chunks; when it is true the answer is
    None. Raises ValueError for fewer than two pictures, and what reading them raises.
    """
    count = len(pictures)
    if count < 2:
        raise ValueError("a set needs two pictures at the least")
    kept = set((torch.arange(min(count, MAX_ROWS)) * count // min(count, MAX_ROWS)).tolist())
    total = outer = torch.zeros((), dtype=torch.float64, device=place.device)
    rows, all_logits = {}, {}
    starts = range(place.rank * CHUNK, count, place.world * CHUNK)
    with distributed.progress(count, "picture", what) as progress:
        for start in starts:
            if stopped():
                return None
            features, part = net(pictures[start:start + CHUNK].to(place.device))
            exact = features.double()
            total, outer = total + exact.sum(0), outer + exact.T @ exact
            chosen = [i for i in range(len(features)) if start + i in kept]
            rows[start] = features[chosen].cpu()
            if logits:
                all_logits[start] = part.cpu()
            progress.update(min(place.world * CHUNK, count - progress.n))
    shares = distributed.gather({"total": total.cpu(), "outer": outer.cpu(), "rows": rows, "logits": all_logits})
    mean = sum(share["total"] for share in shares) / count
    # unbiased, as numpy's: sum of (x - mean)(x - mean)' over count - 1
    covariance = (sum(share["outer"] for share in shares) - count * torch.outer(mean, mean)) / (count - 1)
    return Features(count, mean, covariance, _joined(shares, "rows"), _joined(shares, "logits") if logits else None)


def _joined(shares, name):
    """The chunks that the processes took, in the order of the pictures."""
    chunks = {start: chunk for share in shares for start, chunk in share[name].items()}
    return torch.cat([chunks[start] for start in sorted(chunks)])


# ----------------------------------------------------------------------------------------------------- the numbers


def distances(real, fake, metrics, device="cpu"):
    """{name: float} of those of `METRICS` that are in `metrics`, of two sets' `Features`.

    kid_std is over KID's subsets, inception_score_std over its splits. The same features give the same numbers. Raises
    DataError where the features are not finite.
    """
    for who, features in (("real", real), ("generated", fake)):
        if not features.covariance.isfinite().all():
            raise DataError(f"--inception_weights: the features of the {who} pictures are not finite")
    return {name: value for metric in METRICS if metric in metrics
            for name, value in _FORMULAS[metric](real, fake, device).items()}


def _fid(real, fake, device):
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    first, second = ({"mu": features.mean.numpy(), "sigma": features.covariance.numpy()} for features in (fake, real))
    return {"fid": fid_statistics_to_metric(first, second, verbose=False)["frechet_inception_distance"]}


def kid_size(real, fake):
    """Pictures in each of KID's subsets: a thousand, or the smaller set's number."""
    return min(KID_SIZE, len(real.rows), len(fake.rows))


def _kid(real, fake, device):
    from torch_fidelity.metric_kid import kid_features_to_metric

    found = kid_features_to_metric(fake.rows, real.rows, kid_subsets=KID_SUBSETS, kid_subset_size=kid_size(real, fake),
                                   verbose=False)
    return {"kid": found["kernel_inception_distance_mean"], "kid_std": found["kernel_inception_distance_std"]}


def _precision_and_recall(real, fake, device):
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = prc_features_to_metric(fake.rows.to(device), real.rows.to(device), prc_neighborhood=NEIGHBOURS,
                                   prc_batch_size=2048, save_cpu_ram=True, verbose=False)
    return {"precision": found["precision"], "recall": found["recall"]}


def _inception_score(real, fake, device):
    from torch_fidelity.metric_isc import isc_features_to_metric

    found = isc_features_to_metric(fake.logits, splits=min(IS_SPLITS, fake.count))
    return {"inception_score": found["inception_score_mean"], "inception_score_std": found["inception_score_std"]}


_FORMULAS = {"fid": _fid, "kid": _kid, "pr": _precision_and_recall, "is": _inception_score}
