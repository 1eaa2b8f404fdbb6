"""`--checkpointing`: blocks compute their activations again in the backward pass instead of keeping them (Chen et al.
2016, arXiv 1604.06174).

Of a block only the input is kept. Its second pass gives what the first gave, bit for bit: it takes the weights and the
random numbers of the first, and leaves batch norm's running statistics as they are.
"""

from contextlib import contextmanager
from itertools import count

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from device.replicas import Draws
from spectral import current_weights, kept_weights


def recompute_activations(blocks):
    """Let each of these modules compute its activations again in the backward pass, in place."""
    for block in blocks:
        block.forward = _Recomputed(block)


class _Recomputed:
    """The forward pass of one block."""

    def __init__(self, block):
        self.block, self.forward = block, block.forward

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        weights, draws, passes = current_weights(self.block), Draws(), count()

        def forward(*args, **kwargs):
            is_first = next(passes) == 0                        # a gradient penalty asks for several more
            with kept_weights(weights), draws.kept() if is_first else self._again(draws):
                return self.forward(*args, **kwargs)

        # the random state is left alone: reading it is forbidden while a CUDA graph is captured, and `draws` do as well
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    @contextmanager
    def _again(self, draws):
        """Context of all passes but the first."""
        statistics = [(norm, *named) for norm in self.block.modules() if isinstance(norm, _BatchNorm)
                      for named in norm.named_buffers(recurse=False)]
        for norm, name, buffer in statistics:
            setattr(norm, name, buffer.clone())                 # what batch norm updates in this pass
        try:
            with draws.again():
                yield
        finally:
            for norm, name, buffer in statistics:
                setattr(norm, name, buffer)
