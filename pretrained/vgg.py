"""The convolutional part of torchvision's pretrained VGG-16, for metadata, for LPIPS and for features of D.

The network is built here, in torchvision's layout: torchvision's constructor draws 138 million random numbers from the
global state, most of them for the classifier, which is not used. Weights are `imagenet` (torchvision's file, verified
at every load), `random` (tests) or the path of a file.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from device import distributed
from device.mps import memory_format
from errors import DataError
from flags.pictures import short_side
from pretrained.weights import Published
from utils import as_rgb

WIDTH = 512                                             # channels of the layers of metadata
LAYERS_OF_D = {     # modules up to the layer, channels, stride
    "relu2_2": (9, 128, 2), "relu3_3": (16, 256, 4), "relu4_3": (23, 512, 8)}
D_FEATURES = {      # --d_features: layers; images enter scaled down by this, their shorter side this at most
    "vgg16": (("relu3_3", "relu4_3"), 2, 128), "vgg16_fine": (("relu2_2", "relu3_3"), 1, 256)}
LAYERS = {"relu5_3": 30, "relu4_3": 23}                 # the number of `load_vgg`'s modules up to that layer
FILE = Published(
    "--vgg_weights", "imagenet", "torchvision's vgg16", "VGG16", "vgg16-397923af.pth",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0", 553_433_881)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # of ImageNet, in [0, 1]

_PLAN = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")
_SEED = 16                                              # of the random weights, so that they are the same in every run


# -------------------------------------------------------------------------------------- features that D is trained on


class FrozenMaps(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> feature maps of each layer of `D_FEATURES[name]`, of images of `features_size`.

    Nothing in it is trained, but gradients flow through it to the images. `net` is the network of `load_vgg`.
    """

    def __init__(self, net, name):
        super().__init__()
        self.name = name
        ends = [LAYERS_OF_D[layer][0] for layer in D_FEATURES[name][0]]
        self.parts = nn.ModuleList([net[start:end] for start, end in pairwise((0, *ends))])
        # on the device: to copy them there in each step would wait for the GPU, and cannot be captured
        for statistic, of_channels in (("mean", MEAN), ("std", STD)):
            self.register_buffer(statistic, torch.tensor(of_channels), persistent=False)

    def forward(self, images):
        short = min(images.shape[2:])
        images = F.avg_pool2d(images, short // features_size(self.name, short))
        maps = [imagenet_normalize(images, self.mean, self.std)]        # (B, 3, h, w)
        for part in self.parts:
            maps.append(part(maps[-1]))
        return maps[1:]                                                 # (B, channels, h / stride, w / stride)


def features_size(name, imsize):
    """Return the shorter side of images of `imsize` as they enter `FrozenMaps`."""
    _, scale, most = D_FEATURES[name]
    return min(short_side(imsize) // scale, most)


def features_shapes(name, imsize):
    """Return [(channels, shorter side), ...] of the maps that `FrozenMaps` returns for images of `imsize`."""
    of_layers = map(LAYERS_OF_D.get, D_FEATURES[name][0])
    return [(channels, features_size(name, imsize) // stride) for _, channels, stride in of_layers]


def load_maps_on_every_rank(weights, name, device, fallback_hint):
    """Return `FrozenMaps` with these weights on `device`, on every rank: rank 0 loads first, as it may download them.

    The meta device needs no weights. Raise what `load_vgg` does.
    """
    if device.type == "meta":
        return FrozenMaps(build_on_meta().requires_grad_(False), name).to(memory_format=torch.channels_last)

    def load():
        return FrozenMaps(load_vgg(weights, fallback_hint), name)

    return distributed.after_first(load, load).to(device, memory_format=memory_format(device))


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
    net = build_on_meta()
    net.load_state_dict(state, assign=True)
    return net.requires_grad_(False).eval()


def imagenet_normalize(images, mean=MEAN, std=STD):
    """Images (B, C, H, W) in [-1, 1] -> (B, 3, H, W): as RGB (see `utils.as_rgb`), standardized by ImageNet's mean and
    standard deviation, for VGG-16. These may be given as tensors (3,).
    """
    images = as_rgb(images)
    mean, std = (torch.as_tensor(channels, dtype=images.dtype, device=images.device).view(3, 1, 1)
                 for channels in (mean, std))
    return (images + (1 - 2 * mean)) / (2 * std)


def build_on_meta():
    """Return the modules of `load_vgg` on the meta device: shapes alone, no memory, no random numbers."""
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
    for name, tensor in build_on_meta().state_dict().items():
        fan_in = tensor[0].numel()                      # of a weight; biases are set to 0
        state[name] = (torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5 if tensor.ndim == 4
                       else torch.zeros(tensor.shape))
    return state


def _features(loaded, weights):
    """Return {"0.weight": float32, ...} from a state dict of torchvision's whole vgg16 or of its features only."""
    state = {}
    for name, expected in build_on_meta().state_dict().items():
        tensor = loaded.get(f"features.{name}", loaded.get(name))
        if not isinstance(tensor, torch.Tensor) or tensor.shape != expected.shape:
            raise DataError(f"--vgg_weights {weights}: this is not torchvision's vgg16, features.{name} "
                            f"{tuple(expected.shape)} is missing or of another shape")
        state[name] = tensor.float()
    return state
