"""The convolutional part of torchvision's pretrained VGG-16, for metadata and for LPIPS.

The network is built here, in torchvision's layout: torchvision's constructor draws 138 million random numbers from the
global state, most of them for the classifier, which is not used. Weights are `imagenet` (torchvision's file, verified
at every load), `random` (tests) or the path of a file.
"""

import torch
from torch import nn

from errors import DataError
from pretrained.weights import Published

WIDTH = 512                                             # channels of these layers
LAYERS = {"relu5_3": 30, "relu4_3": 23}                 # the number of `load_vgg`'s modules up to that layer
FILE = Published(
    "--vgg_weights", "imagenet", "torchvision's vgg16", "VGG16", "vgg16-397923af.pth",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0", 553_433_881)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # of ImageNet, in [0, 1]

_PLAN = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")
_SEED = 16                                              # of the random weights, so that they are the same in every run


# ---------------------------------------------------------------------------------------------------- the network


def load_vgg(weights, fallback_hint):
    """Return the convolutions of VGG-16, frozen, in eval mode, on the CPU: 31 modules, numbered as torchvision's.

    Takes `imagenet_normalize`d images (B, 3, H, W), H, W >= 16; its first `LAYERS[layer]` modules return
    (B, 512, H / 16, W / 16) for relu5_3, (B, 512, H / 8, W / 8) for relu4_3. Global random states stay as they are. A
    missing imagenet file is downloaded, by every process that calls this. `fallback_hint` is the flag to do without
    VGG-16, such as "--metadata false", for error messages. Raise DataError, UsageError.
    """
    if weights == "random":
        FILE.warn_of_random()
        state = _random_state()
    else:
        state = _features(FILE.load(weights, fallback_hint), weights)
    net = _build()
    net.load_state_dict(state, assign=True)
    return net.requires_grad_(False).eval()


def imagenet_normalize(images):
    """Images (B, 3, H, W) in [-1, 1] -> the same standardized by ImageNet's mean and standard deviation, for VGG-16."""
    mean, std = (images.new_tensor(channels).view(3, 1, 1) for channels in (MEAN, STD))
    return (images + (1 - 2 * mean)) / (2 * std)


def _build():
    """Build the modules on the meta device: no memory, no random numbers."""
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
    """Return He-initialized weights, which preserve the scale of activations; the same ones every time."""
    generator = torch.Generator().manual_seed(_SEED)
    state = {}
    for name, tensor in _build().state_dict().items():
        fan_in = tensor[0].numel()                      # of a weight; biases are set to 0
        state[name] = (torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5 if tensor.ndim == 4
                       else torch.zeros(tensor.shape))
    return state


def _features(loaded, weights):
    """Return {"0.weight": float32, ...} from a state dict of torchvision's whole vgg16 or of its features only."""
    state = {}
    for name, expected in _build().state_dict().items():
        tensor = loaded.get(f"features.{name}", loaded.get(name))
        if not isinstance(tensor, torch.Tensor) or tensor.shape != expected.shape:
            raise DataError(f"--vgg_weights {weights}: this is not torchvision's vgg16, features.{name} "
                            f"{tuple(expected.shape)} is missing or of another shape")
        state[name] = tensor.float()
    return state
