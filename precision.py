"""Which arithmetic convolutions and matrix products are done in (`--precision`).

fp32, or tf32 (10 bits of mantissa, on GPUs), or bf16 by autocast. Weights, optimizers, batch statistics, spectral
norms, gradient penalties and losses are fp32 at any precision. What the hardware has not is replaced by what it has.
"""

import contextlib

import torch

from distributed import say


class Precision:
    """The arithmetic of one config on one device; `name` is "fp32", "tf32" or "bf16"."""

    def __init__(self, wanted, device):
        self.device, self.wanted = device, wanted
        if wanted == "auto":
            wanted = "bf16" if has_bf16(device) else "fp32"
        usable = {"fp32": True, "tf32": has_tensor_cores(device), "bf16": has_bf16(device)}[wanted]
        self.name = wanted if usable else "fp32"

    def tell(self):
        """Say if it is not what was wanted."""
        if self.wanted not in ("auto", self.name):
            say(f"note: this device has no {self.wanted} units; --precision fp32 is taken, which is faster here")

    def autocast(self):
        """A context for forward passes and losses."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.name == "bf16")

    @contextlib.contextmanager
    def arithmetic(self):
        """A context for forward passes without a backward one."""
        with self.switched(), self.autocast():
            yield

    @contextlib.contextmanager
    def switched(self):
        """A context for all work on the device, backward passes too: the switches are the process's."""
        if self.device.type != "cuda":
            yield
            return
        products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
        before = products.allow_tf32, convolutions.allow_tf32
        products.allow_tf32 = convolutions.allow_tf32 = self.name != "fp32"
        try:
            yield
        finally:
            products.allow_tf32, convolutions.allow_tf32 = before


def has_tensor_cores(device):
    """Whether the device is a GPU with tf32 and bf16 units (Ampere of 2020 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def has_bf16(device):
    """Whether bf16 is fast there: on processors without units for it, it takes many times fp32's time."""
    if device.type == "cuda":
        return has_tensor_cores(device)
    tell = getattr(torch.cpu, "get_capabilities", dict)     # older torch does not know
    return bool(tell().get("amx_bf16"))


def exact(device):
    """A context in which what must be fp32 is, within `Precision.autocast` too."""
    return torch.autocast(device.type, enabled=False)
