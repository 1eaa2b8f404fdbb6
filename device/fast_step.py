"""Faster variants of the training step: compiled networks, then CUDA graph capture. They compute the same update.

Which ones a run uses depends on its flags, its hardware and the number of steps ahead, never on measured times: the
same command computes the same on the same machine. A variant that fails to start (no compiler, an operation that cannot
be captured, too little memory) is reported once, and training continues without it, from the same state.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import utils
from device.distributed import say
from errors import first_line

WARM_UP = 3     # eager steps first: cuDNN chooses its algorithms, Adam allocates its moments


@dataclass(frozen=True)
class StepVariant:
    """`start(step, images)` returns the faster step; `stop()` undoes its changes; `flag` is its command-line name."""

    flag: str
    start: Callable
    stop: Callable = lambda: None


class FastStep:
    """`body(images) -> {name: 0-d tensor}`; after WARM_UP steps with the `variants` applied, each on top of the last.

    `images` is a list of tensors of fixed shapes. `body` changes the `networks` and the state of the `optimizers` and
    of the LossScales `scales` in place, nothing else, and draws from the global random states.
    """

    def __init__(self, body, networks, optimizers, device, variants, scales=()):
        self.step, self.variants, self.calls = body, list(variants), 0
        self.networks, self.optimizers, self.scales, self.device = networks, optimizers, scales, device

    def __call__(self, images):
        for variant in self.variants if self.calls == WARM_UP else ():
            self._start(variant, images)
        self.calls += 1
        return self.step(images)

    def _start(self, variant, images):
        """Start the variant and run one step, which is rolled back: compilers compile at the first call."""
        try:
            with self._rolled_back():
                step = variant.start(self.step, images)
                weights = [weight for net in self.networks for weight in net.parameters()]
                if not all(tensor.isfinite().all() for tensor in (*step(images).values(), *weights)):
                    raise RuntimeError("its step is not finite")        # happened with compiled bf16 on CPUs
            self.step = step
        except Exception as error:                      # whatever a compiler or a driver raises
            variant.stop()
            for net in self.networks:
                net.zero_grad(set_to_none=True)
            say(f"note: --{variant.flag} failed, training continues without it "
                f"({type(error).__name__}: {first_line(error)})")

    @contextmanager
    def _rolled_back(self):
        """Restore networks, optimizers, loss scales and random states at the end."""
        tensors = [tensor for net in self.networks for tensor in (*net.parameters(), *net.buffers())] + [
            tensor for optimizer in self.optimizers for slots in optimizer.state.values() for tensor in slots.values()]
        scales = [(scale, scale.state()) for scale in self.scales]
        saved = {tensor: tensor.detach().to("cpu", copy=True) for tensor in tensors}     # the GPU may be nearly full
        try:
            with utils.forked_random_state(self.device):
                yield
        finally:
            with torch.no_grad():
                for tensor, value in saved.items():
                    tensor.copy_(value)
            for scale, state in scales:
                scale.restore(state)


def capture_cuda_graph(step, images):
    """Capture `step` as one CUDA graph and return its replay, which does not wait for Python to launch each kernel.

    Raise what CUDA raises. Values that `step` reads from anything but device tensors are frozen by the capture.
    """
    if not images[0].is_cuda:
        raise RuntimeError("CUDA graphs need a GPU")
    static_images, graph = [image.clone() for image in images], torch.cuda.CUDAGraph()
    try:        # thread_local: the data loader's pinning thread may call CUDA meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            stats = step(static_images)
            names, values = list(stats), torch.stack([value.float() for value in stats.values()])
    except Exception:
        graph.reset()
        # the global generator is part of the capture and may be unusable after a failed one: replace its state
        generators = torch.cuda.default_generators
        generators[torch.cuda.current_device()].graphsafe_set_state(torch.Generator(static_images[0].device))
        raise

    def replay(images):
        torch._foreach_copy_(static_images, images)
        graph.replay()
        return dict(zip(names, values.clone().unbind(), strict=True))   # a copy: the next replay overwrites them

    return replay
