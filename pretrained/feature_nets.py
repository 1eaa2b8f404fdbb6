"""The networks of `--feature_net`, in whose features fid, kid and pr compare two sets of pictures.

`FEATURE_NETS` is the table of them. Each network takes uint8 pictures (B, 3, H, W) of any size, resizes them itself and
returns features float32 (B, width), and logits or None. Weights of Inception, VGG-16 and CLIP are verified by their
sha256 or named by it; those of DINOv2 come through torch.hub, which runs code of facebookresearch/dinov2.
"""

import os
import socket
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import nn
from torch.nn import functional as F

from device.distributed import say
from device.mps import memory_format
from errors import DataError, UsageError, first_line
from flags.pictures import sides_at
from pretrained import inception, vgg
from pretrained.weights import TIMEOUT, Published

VGG_LAYER = "relu5_3"
LEAST_SIDE, MOST_SIDE = 96, 224     # pixels at which pictures enter VGG-16
DINOV2, CLIP = "dinov2-vit-l-14", "clip-vit-b-32"           # torch-fidelity's names
FALLBACK_HINT = "--feature_net vgg16 --vgg_weights PATH"
_CLIP_SHA256 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
CLIP_FILE = Published(
    "--feature_net", "clip", "OpenAI's CLIP ViT-B/32", None, f"{CLIP}-{_CLIP_SHA256}.pt",    # torch-fidelity's name
    f"https://openaipublic.azureedge.net/clip/models/{_CLIP_SHA256}/ViT-B-32.pt", _CLIP_SHA256, 353_976_522)


class VggFeatures(nn.Module):
    """uint8 pictures (B, 3, H, W) -> relu5_3 of VGG-16 averaged over space, float32 (B, 512); None."""

    def __init__(self, features):
        super().__init__()
        # channels-last is faster on a CPU
        self.net = features[:vgg.LAYERS[VGG_LAYER]].to(memory_format=torch.channels_last)

    def forward(self, pictures):
        images = vgg.imagenet_normalize(pictures.float() / 127.5 - 1)
        height, width = pictures.shape[2:]
        size = sides_at(f"{height}x{width}", vgg_side(min(height, width)))
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        with _exact_convolutions():
            images = images.contiguous(memory_format=memory_format(images.device))
            maps = self.net(images)                                     # (B, 512, side/16, side/16)
        return maps.float().mean((2, 3)), None


class FidelityFeatures(nn.Module):
    """uint8 pictures (B, 3, H, W) -> the only features of one of torch-fidelity's extractors, float32; None."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pictures):
        with _exact_convolutions():
            (features,) = self.net(pictures)
        return features, None


def vgg_side(side):
    """Return the shorter side, in pixels, of pictures of a `side` as they enter VGG-16: twice it, within 96 to 224."""
    return min(MOST_SIDE, max(LEAST_SIDE, 2 * side))


@contextmanager
def _exact_convolutions():
    """Without tf32, whose 10 bits of mantissa change the third digit of a Fréchet distance."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


# ----------------------------------------------------------------------------------------------------------- loading


def _load_vgg(config):
    return VggFeatures(vgg.load_vgg(config.vgg_weights, "--metrics swd"))


def _load_clip(config):
    try:
        from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP
    except ImportError as error:
        raise _without_torch_fidelity("clip", error) from None
    path = CLIP_FILE.find(FALLBACK_HINT)
    # A TorchScript archive, of which only the tensors are taken; torch.load cannot read it with weights_only.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", FutureWarning)  # that torch.jit.load is deprecated
        return FidelityFeatures(FeatureExtractorCLIP(CLIP, ["clip"], feature_extractor_weights_path=str(path)))


def _load_dinov2(config):
    try:
        from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
    except ImportError as error:
        raise _without_torch_fidelity("dinov2", error) from None
    say("--feature_net dinov2: torch.hub fetches code and weights of facebookresearch/dinov2 (1.2 GB, once)")
    timeout, forced = socket.getdefaulttimeout(), os.environ.get(_FORCE)
    socket.setdefaulttimeout(TIMEOUT)                   # torch.hub sets none: a stalled connection would hang forever
    os.environ[_FORCE] = "1"                            # the code in torch.hub loads its weights without weights_only
    try:
        with torch.random.fork_rng(devices=[]):
            return FidelityFeatures(FeatureExtractorDinoV2(DINOV2, ["dinov2"]))
    except Exception as error:                          # code from the network may raise anything
        reason = getattr(error, "reason", None) or first_line(error)
        raise DataError(f"--feature_net dinov2: facebookresearch/dinov2 could not be fetched or loaded by torch.hub "
                        f"({reason}).\nRun it once where there is a network and copy {torch.hub.get_dir()}, or do "
                        f"without it: {FALLBACK_HINT}.") from None
    finally:
        socket.setdefaulttimeout(timeout)
        if forced is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = forced


_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def _without_torch_fidelity(name, error):
    return UsageError(f"--feature_net {name} needs torch-fidelity ({error}): pip install torch-fidelity, or do without "
                      f"it: {FALLBACK_HINT}")


# --------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class FeatureNet:
    """One network of `--feature_net`. `flag` names the flag that its weights come from.

    `load(config)` returns the network on the CPU, or raises DataError or UsageError; `identity(config)` returns a text
    that tells its weights from others; `words(config)` describes it for protocols. `standardize`: each feature is to be
    divided by its standard deviation over the real pictures. `of_torch_fidelity`: the network is that package's.
    """

    flag: str
    load: Callable
    identity: Callable
    words: Callable
    standardize: bool = False
    of_torch_fidelity: bool = True


def _inception_words(config):
    weights = inception.FILE.in_words(
        config.inception_weights, "TF-Inception 2015-12-05 (sha256 {})", "Inception with RANDOM weights (for tests, "
        "compares with nothing)", "Inception of other weights than the standard ones (sha256 {})")
    return f"{weights}, torch-fidelity {version('torch-fidelity')}, one resize to 299 px"


def _vgg_words(config):
    named = f"VGG-16 {VGG_LAYER} averaged over space (sha256 {{}})"
    weights = vgg.FILE.in_words(
        config.vgg_weights, named, "VGG-16 with RANDOM weights (for tests, compares with nothing)", named)
    return (f"{weights}, pictures enter at twice their size, {LEAST_SIDE} to {MOST_SIDE} px, each feature over its "
            "standard deviation on the real pictures (at least half the median one)")


def _fidelity_words(name):
    return lambda config: f"{name}, torch-fidelity {version('torch-fidelity')}, one resize to 224 px"


FEATURE_NETS = {
    # by its module, so that there is one place to replace it
    "inception": FeatureNet("--inception_weights", lambda config: inception.load_inception(config.inception_weights),
                            lambda config: inception.FILE.identity(config.inception_weights), _inception_words),
    "vgg16": FeatureNet("--vgg_weights", _load_vgg, lambda config: vgg.FILE.identity(config.vgg_weights), _vgg_words,
                        standardize=True, of_torch_fidelity=False),
    "dinov2": FeatureNet("--feature_net", _load_dinov2, lambda config: DINOV2, _fidelity_words("DINOv2 ViT-L/14")),
    "clip": FeatureNet("--feature_net", _load_clip, lambda config: _CLIP_SHA256, _fidelity_words("CLIP ViT-B/32")),
}
