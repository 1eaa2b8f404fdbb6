"""VGG-16 as torchvision trained it: its convolutions for metadata, and LPIPS on top of them.

The network is built here, in torchvision's layout: torchvision's own constructor draws 138 million random
numbers from the global state, most of them for a classifier that nobody asks for. Weights are `imagenet`
(torchvision's file, verified at every load), `random` (tests) or the path of a file.
"""

import hashlib
import http.client
import os
import pickle
import socket
from pathlib import Path

import torch
from torch import nn

from distributed import is_first, say
from parameter import DataError, UsageError

WIDTH = 512                                             # channels of the layers below
LAYERS = {"relu5_3": 30, "relu4_3": 23}                 # how many modules of `load` run for that layer's output
NAME = "vgg16-397923af.pth"
URL = f"https://download.pytorch.org/models/{NAME}"
SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
BYTES = 553_433_881
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # of ImageNet's pictures in [0, 1]

_PLAN = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")
_SEED = 16                                              # of the random weights: the same in every run
_TIMEOUT = 30                                           # seconds without a byte before a download is given up
# What torch.load raises on files that are damaged, or no tensors at all.
_DAMAGE = (EOFError, OSError, RuntimeError, pickle.UnpicklingError,
           KeyError, ValueError, TypeError, AttributeError)


# ---------------------------------------------------------------------------------------------- where weights are


def places():
    """Where torchvision's file is looked for: where download.sh puts it, then where torchvision itself does."""
    return [Path("data", "VGG16", NAME), Path(torch.hub.get_dir(), "checkpoints", NAME)]


def is_there(weights):
    """Whether `weights` can be loaded without a network, as far as names and sizes tell. False for "random": a
    perceptual loss on random weights is worth nothing.
    """
    if weights == "imagenet":
        return any(os.path.isfile(path) and os.path.getsize(path) == BYTES for path in places())
    return weights != "random" and os.path.isfile(weights)


def identity(weights):
    """What tells these weights from others: "random", or the hex sha256 of the file (of imagenet's it is known, so
    that it need not be there). Raises UsageError if a path cannot be read.
    """
    if weights in ("imagenet", "random"):
        return SHA256 if weights == "imagenet" else weights
    try:
        return _sha256(weights)
    except OSError as error:
        raise _unreadable(weights, error) from None


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _unreadable(weights, error):
    return UsageError(f"--vgg_weights {weights}: cannot be read ({error.strerror}); give imagenet, or the path "
                      "of a state dict of torchvision's vgg16")


# ---------------------------------------------------------------------------------------------------- the network


def load(weights, otherwise):
    """The convolutional part of VGG-16, frozen, in eval mode, on the CPU: 31 modules, numbered as torchvision's.

    Takes `normalize`d images (B, 3, H, W); its first `LAYERS[layer]` modules give (B, 512, H / 16, W / 16) for
    relu5_3, (B, 512, H / 8, W / 8) for relu4_3. H, W >= 16. Global random states stay as they are.
    Where imagenet's file is missing it is downloaded, by every process that comes here. `otherwise` is the flag
    to go on without VGG-16, such as "--metadata false". Raises DataError, UsageError.
    """
    if weights == "random":
        warn_of_random()
        state = _random_state()
    elif weights == "imagenet":
        state = _read(_find(otherwise), weights)
    else:
        state = _read(Path(weights), weights)
    net = _build()
    net.load_state_dict(state, assign=True)
    return net.requires_grad_(False).eval()


def warn_of_random():
    """Says that `--vgg_weights random` is for tests; whoever uses what came of such weights says so too."""
    say("--vgg_weights random: VGG-16 has random weights; that is for tests, use imagenet for anything else")


def normalize(images):
    """Images (B, 3, H, W) in [-1, 1] as VGG-16 was trained on them: ImageNet's mean 0, standard deviation 1."""
    mean, std = (images.new_tensor(channels).view(3, 1, 1) for channels in (MEAN, STD))
    return (images + (1 - 2 * mean)) / (2 * std)


def _build():
    """The modules without memory: the meta device draws no random numbers."""
    modules, width = [], 3
    with torch.device("meta"):
        for step in _PLAN:
            if step == "pool":
                modules.append(nn.MaxPool2d(2))
            else:
                modules += [nn.Conv2d(width, step, 3, padding=1), nn.ReLU(inplace=True)]
                width = step
    return nn.Sequential(*modules)


def _random_state():
    """Weights that keep the scale of what passes (He's initialization), the same ones every time."""
    generator = torch.Generator().manual_seed(_SEED)
    state = {}
    for name, tensor in _build().state_dict().items():
        fan_in = tensor[0].numel()                      # of a weight; biases are 0
        state[name] = (torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5 if tensor.ndim == 4
                       else torch.zeros(tensor.shape))
    return state


def _read(path, weights):
    """{"0.weight": float32, ...} from the file at `path`: torchvision's whole vgg16 or its features alone."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise _unreadable(weights, error) from None
    except _DAMAGE as error:
        raise DataError(f"--vgg_weights {weights}: {path} holds no state dict that can be read "
                        f"({type(error).__name__})") from None
    if not isinstance(loaded, dict):
        raise DataError(f"--vgg_weights {weights}: {path} holds a {type(loaded).__name__}, no state dict")
    state = {}
    for name, expected in _build().state_dict().items():
        tensor = loaded.get(f"features.{name}", loaded.get(name))
        if not isinstance(tensor, torch.Tensor) or tensor.shape != expected.shape:
            raise DataError(f"--vgg_weights {weights}: {path} is not torchvision's vgg16, features.{name} "
                            f"{tuple(expected.shape)} is missing or of another shape")
        state[name] = tensor.float()
    return state


def _find(otherwise):
    """The path of torchvision's file, verified; downloaded where it is nowhere."""
    paths = [path for path in places() if os.path.isfile(path)]
    path = paths[0] if paths else _download(otherwise)
    try:
        found = _sha256(path)
    except OSError as error:
        raise DataError(f"--vgg_weights imagenet: cannot read {path} ({error.strerror})") from None
    if found != SHA256:
        raise DataError(f"--vgg_weights imagenet: {path} is damaged or another file (sha256 {found}, expected "
                        f"{SHA256}).\nDelete it and give the same command again, or fetch it with "
                        "`bash download.sh VGG16`.")
    return path


def _download(otherwise):
    path = places()[-1]
    say(f"--vgg_weights imagenet: fetching {NAME} ({BYTES / 1e6:.0f} MB, once) into {path.parent}")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)                  # torch.hub sets none: silence would hold us for good
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256, progress=is_first())
    except (OSError, RuntimeError, http.client.HTTPException) as error:     # RuntimeError: another hash
        raise DataError(
            f"--vgg_weights imagenet: {NAME} is neither in {places()[0].parent} nor in {path.parent}, and "
            f"downloading it failed ({getattr(error, 'reason', None) or error}).\n"
            f"Fetch it with `bash download.sh VGG16`, or go on without it: {otherwise}."
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return path


# ---------------------------------------------------------------------------------------------------------- LPIPS


class Lpips(nn.Module):
    """LPIPS-VGG (Zhang et al. 2018) around torchmetrics' network; always in eval mode: its heads have dropout."""

    def __init__(self, net):
        super().__init__()
        self.net = net.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)

    def forward(self, a, b):
        """Images a, b (B, 3, H, W) in [-1, 1], H, W >= 16, to their distances (B,)."""
        return self.net(a, b).flatten()


def lpips(weights, otherwise="--recon l1"):
    """`Lpips` on these VGG-16 weights, on the CPU, frozen; gradients reach its inputs alone.

    Global random states stay as they are. Raises what `load` does, and UsageError where torchmetrics is missing.
    """
    try:
        from torchmetrics.functional.image.lpips import _LPIPS  # takes seconds to import, so only when needed
    except ImportError as error:
        raise UsageError(f"LPIPS needs torchmetrics ({error}): pip install torchmetrics, "
                         f"or go on without it: {otherwise}") from None
    features = load(weights, otherwise).state_dict()
    with torch.random.fork_rng(devices=[]):             # it builds, and initializes, torchvision's whole network
        net = _LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    # its keys are "slice3.10.weight": torchvision's number of the module after the slice's
    net.net.load_state_dict({key: features[key.split(".", 1)[1]] for key in net.net.state_dict()})
    return Lpips(net)
