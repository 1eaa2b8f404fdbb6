"""What is different on the GPUs of Apple's processors (`--device mps`).

Written from PyTorch's documentation and its list of bugs, and tested on an imitation: no Mac was at hand. Operations
that PyTorch has not for them run on the CPU (PYTORCH_ENABLE_MPS_FALLBACK, which main.py sets).
"""

import torch
from torch import nn


def is_available():
    """Return whether there is such a GPU, and a PyTorch that can use it."""
    return torch.backends.mps.is_available()


def memory_format(device):
    """Return the memory format of feature maps: channels-last, the fastest for convolutions, but contiguous on MPS."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def with_contiguous_maps(net, device):
    """Return `net`, whose batch norms and pooling on MPS make their inputs contiguous first.

    CRUCIAL: their gradients are wrong there for maps in other memory formats (pytorch issues 175189 and 175190), and
    what is permuted, such as loaded pictures, is in others.
    """
    if device.type == "mps":
        for module in net.modules():
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.AvgPool2d)):
                module.register_forward_pre_hook(_make_contiguous)
    return net


def _make_contiguous(module, inputs):
    return tuple(x.contiguous() for x in inputs)


def for_float64(device):
    """Return the device on which float64 is computed for this one: MPS has none."""
    return torch.device("cpu") if device.type == "mps" else device


def free_memory():
    """Return the bytes that Metal recommends to use at most and that are not in use by this process."""
    return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
