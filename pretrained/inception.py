"""The Inception network of FID: TensorFlow's of 2015-12-05, as torch-fidelity ported it."""

import io

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from errors import DataError, UsageError
from pretrained.weights import Published

FILE = Published(
    "--inception_weights", "standard", "torch-fidelity's Inception", "Inception",
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", 95_628_359,
    aliases=("pt_inception-2015-12-05-6726825d.pth",))      # pytorch-fid's name for it
FALLBACK_HINT = "--feature_net vgg16, or --metrics swd, which needs no weights"
_SEED = 15                  # of the random weights, so that they are the same in every run


class Inception(nn.Module):
    """uint8 pictures (B, 3, H, W) of any size -> pool3 features float32 (B, 2048), logits without bias (B, 1008)."""

    def __init__(self, net):
        super().__init__()
        # channels-last halves the time of the convolutions on a CPU
        self.net = net.to(memory_format=torch.channels_last)

    def forward(self, pictures):
        # without tf32 (10 bits of mantissa), which alone changes the third digit of a FID
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.net(pictures)


def load_inception(weights):
    """Return Inception with these weights, frozen, on the CPU. Global random states stay as they are.

    Raise DataError, UsageError.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UsageError(f"--metrics fid, kid, pr and is need torch-fidelity ({error}): pip install torch-fidelity, "
                         f"or do without it: {FALLBACK_HINT}") from None

    class Extractor(FeatureExtractorInceptionV3):
        """Skips the loading at construction: torch-fidelity's would unpickle arbitrary objects from a file."""

        def load_state_dict(self, state_dict, *arguments, **options):
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        net = Extractor("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty)
        if weights == "random":
            FILE.warn_of_random()
            _randomize(net)
    if weights != "random":
        state = FILE.load(weights, FALLBACK_HINT)
        try:
            nn.Module.load_state_dict(net, state)
        except (RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise DataError(f"--inception_weights {weights}: this is not {FILE.net} ({reason})") from None
    return Inception(_fold_batch_norm(net.requires_grad_(False).eval()))


def _fold_batch_norm(net):
    """Fold every batch norm into its convolution, which saves a pass over each map. Return the network."""
    for block in list(net.modules()):
        if isinstance(getattr(block, "bn", None), nn.BatchNorm2d):
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
    return net


def _randomize(net):
    """He initialization of all convolutions, which preserves the scale of activations."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
