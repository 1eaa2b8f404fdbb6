"""VGG-16 as torchvision trained it: its convolutions for metadata, and LPIPS on top of them.

The network is built here, in torchvision's layout: torchvision's own constructor draws 138 million random
numbers from the global state, most of them for a classifier that nobody asks for. Weights are `imagenet`
(torchvision's file, verified at every load), `random` (tests) or the path of a file.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from failures import DataError, UsageError
from precision import exact
from weights import Published

WIDTH = 512                                             # channels of the layers below
LAYERS = {"relu5_3": 30, "relu4_3": 23}                 # how many modules of `load` run for that layer's output
LPIPS_LAYERS = (4, 9, 16, 23, 30)                       # likewise: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
FILE = Published(
    "--vgg_weights", "imagenet", "torchvision's vgg16", "VGG16", "vgg16-397923af.pth",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0", 553_433_881)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # of ImageNet's pictures in [0, 1]

_PLAN = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")
_SEED = 16                                              # of the random weights: the same in every run


# ---------------------------------------------------------------------------------------------------- the network


def load(weights, otherwise):
    """The convolutional part of VGG-16, frozen, in eval mode, on the CPU: 31 modules, numbered as torchvision's.

    Takes `normalize`d images (B, 3, H, W); its first `LAYERS[layer]` modules give (B, 512, H / 16, W / 16) for
    relu5_3, (B, 512, H / 8, W / 8) for relu4_3. H, W >= 16. Global random states stay as they are.
    Where imagenet's file is missing it is downloaded, by every process that comes here. `otherwise` is the flag
    to go on without VGG-16, such as "--metadata false". Raises DataError, UsageError.
    """
    if weights == "random":
        FILE.warn_of_random()
        state = _random_state()
    else:
        state = _features(FILE.load(weights, otherwise), weights)
    net = _build()
    net.load_state_dict(state, assign=True)
    return net.requires_grad_(False).eval()


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


def _features(loaded, weights):
    """{"0.weight": float32, ...} from a state dict of torchvision's whole vgg16 or of its features alone."""
    state = {}
    for name, expected in _build().state_dict().items():
        tensor = loaded.get(f"features.{name}", loaded.get(name))
        if not isinstance(tensor, torch.Tensor) or tensor.shape != expected.shape:
            raise DataError(f"--vgg_weights {weights}: this is not torchvision's vgg16, features.{name} "
                            f"{tuple(expected.shape)} is missing or of another shape")
        state[name] = tensor.float()
    return state


# ---------------------------------------------------------------------------------------------------------- LPIPS


class Lpips(nn.Module):
    """LPIPS-VGG (Zhang et al. 2018): `features` is what `load` gives, `scale` and `heads` are torchmetrics'."""

    def __init__(self, features, scale, heads):
        super().__init__()
        self.parts = nn.ModuleList([features[a:b] for a, b in pairwise((0, *LPIPS_LAYERS))])
        self.scale = scale
        for i, weight in enumerate(heads):                                      # (1, C, 1, 1), trained to be >= 0
            self.register_buffer(f"head{i}", weight.clamp(min=0))

    def forward(self, a, b):
        """Images a, b (B, 3, H, W) in [-1, 1], H, W >= 16, to their distances (B,)."""
        return sum(F.conv2d((x - y).square(), weight).float().mean((1, 2, 3))           # (B, C, h, w) -> (B,)
                   for (x, weight), (y, _) in zip(self._layers(a), self._layers(b), strict=True))

    def embed(self, images):
        """Points (B, D) of the images (B, 3, H, W) whose squared Euclidean distances are their LPIPS.

        For many distances between few images, or to one image many times: an image goes through the network once. D is
        some 120 times the number of pixels.
        """
        return torch.cat([(unit * (weight / unit[0, 0].numel()).sqrt()).flatten(1)
                          for unit, weight in self._layers(images)], 1)

    def _layers(self, images):
        """(features (B, C, h, w) of length 1 in each position, weights (1, C, 1, 1)) of each layer."""
        x = self.scale(images)
        for i, part in enumerate(self.parts):
            x = part(x)
            with exact(x.device):           # else a map is copied to be summed up in fp32
                length = (x.square().sum(1, keepdim=True, dtype=torch.float32) + 1e-8).sqrt()       # (B, 1, h, w)
                unit = x / length.to(x.dtype)
            yield unit, getattr(self, f"head{i}").to(x.dtype)


def lpips(weights, otherwise="--recon l1"):
    """`Lpips` on these VGG-16 weights, on the CPU, frozen; gradients reach its inputs alone.

    Global random states stay as they are. Raises what `load` does, and UsageError where torchmetrics is missing.
    """
    try:
        from torchmetrics.functional.image.lpips import _LPIPS  # takes seconds to import, so only when needed
    except ImportError as error:
        raise UsageError(f"LPIPS needs torchmetrics ({error}): pip install torchmetrics, "
                         f"or go on without it: {otherwise}") from None
    features = load(weights, otherwise)
    with torch.random.fork_rng(devices=[]):             # it builds, and initializes, torchvision's whole network
        theirs = _LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    heads = [head.model[-1].weight.detach() for head in theirs.lins]
    # channels last as the networks are whose images it sees, or each map would be turned over
    return Lpips(features, theirs.scaling_layer, heads).to(memory_format=torch.channels_last)
