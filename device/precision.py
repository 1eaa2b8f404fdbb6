"""The precision of convolutions and matrix products (`--precision`).

fp32, tf32 (10 bits of mantissa, on GPUs), or bf16 or fp16 by autocast; fp16 trains with loss_scale.py. Weights,
optimizers, batch statistics, spectral norms, gradient penalties and losses are fp32 at any setting; on GPUs that have
it, the penalty's products take tf32 unless it is fp32 that was asked for. Without hardware support the precision falls
back to fp32.
"""

import contextlib
import os

import torch

from device.distributed import say


class Precision:
    """The precision used on one device; `name` is "fp32", "tf32", "bf16" or "fp16"."""

    AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

    def __init__(self, wanted, device):
        self.device, self.wanted = device, wanted
        usable = {"fp32": True, "tf32": has_tensor_cores(device), "bf16": has_bf16(device), "fp16": has_fp16(device)}
        if wanted == "auto":
            # processors with fp16 units have those for bf16, too
            wanted = next((name for name in ("bf16", "fp16") if usable[name]), "fp32")
        self.name = wanted if usable[wanted] else "fp32"

    def announce(self):
        """Report a fallback to fp32."""
        if self.wanted not in ("auto", self.name):
            why = f"this device has no {self.wanted} units; using --precision fp32, which is faster here"
            if (self.device.type, self.wanted) == ("cpu", "fp16"):
                why = "--precision fp16 is slow on every CPU; using --precision fp32"
            if self.device.type == "mps":
                why = f"--precision {self.wanted} is for other GPUs and CPUs; using fp32"
            say(f"note: {why}")

    def autocast(self):
        """Return the autocast context for forward passes and losses."""
        return torch.autocast(_autocast_device(self.device), self.AUTOCAST.get(self.name),
                              enabled=self.name in self.AUTOCAST)

    @contextlib.contextmanager
    def arithmetic(self):
        """Context for inference: `switched` and `autocast`."""
        with self.switched(), self.autocast():
            yield

    @contextlib.contextmanager
    def switched(self):
        """Context for all computation, backward passes too, that sets the process-wide tf32 switches."""
        if self.device.type != "cuda":
            yield
            return
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = self.name != "fp32"
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before


def has_tensor_cores(device):
    """Return whether the device is a GPU with tf32 and bf16 units (Ampere, 2020, or later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def has_bf16(device):
    """Return whether the device has bf16 units: without them bf16 is many times slower than fp32."""
    if device.type != "cpu":
        return has_tensor_cores(device)
    has = getattr(torch.cpu, "get_capabilities", dict)()            # older torch has none
    return any(has.get(name) for name in ("amx_bf16", "avx512_bf16"))   # AVX-512 BF16: AMD since 2022, some Intel


def has_fp16(device):
    """Return whether the device is fast at fp16: a GPU of Volta (2017) or later.

    No CPU is: with AVX-512 FP16 a step took 30 to 100 times as long as in fp32.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def exact(device):
    """Return a context that disables autocast, for what must be computed in fp32."""
    return torch.autocast(_autocast_device(device), enabled=False)


def _autocast_device(device):
    return "cpu" if device.type == "meta" else device.type      # the meta device has no autocast of its own


def choose_algorithms(deterministic):
    """On CUDA, choose the fastest algorithms, or (`--deterministic true`) bitwise reproducible ones."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
