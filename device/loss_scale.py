"""Loss scaling for fp16 (`--precision fp16`; Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).

fp16 has no numbers under 6e-8 and none over 65,504. Losses are multiplied by a scale before backward, so that small
gradients do not vanish, and gradients divided by it before the optimizer. An update whose gradients overflow is
skipped and the scale halved; after 2,000 updates without overflow it is doubled. All of this happens on the device.
"""

from contextlib import contextmanager

import torch

FIRST_SCALE = 2.0**16
LONGEST_STREAK = 25     # skipped updates in a row that end a run: the scale fell from 65,536 to 1/512, and none helped


class LossScale:
    """Backward passes and updates of one `optimizer`; where not `enabled`, plain ones."""

    def __init__(self, optimizer, device, enabled):
        self.optimizer, self.enabled = optimizer, enabled
        self.scaler = torch.amp.GradScaler(device.type, FIRST_SCALE, enabled=enabled)
        self._one = torch.ones((), device=device)
        # skipped updates: of the whole run, in a row now, and in a row at most since this process started
        self._skipped, self._streak, self._longest = torch.zeros(3, device=device).unbind()

    def backward(self, loss):
        """Add the gradients of a 0-d fp32 loss, times the scale."""
        self.scaler.scale(loss).backward()

    def step(self):
        """Update the weights, unless a gradient overflowed; never waits for the device.

        Adam must be fused: its kernel then divides by the scale and skips the update by itself.
        """
        if not self.enabled:
            self.optimizer.step()
            return
        before = self._scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        is_skipped = (self._scale() < before).float()
        self._skipped.add_(is_skipped)
        self._streak.add_(1).mul_(is_skipped)
        self._longest.copy_(torch.maximum(self._longest, self._streak))

    def _scale(self):
        return self.scaler.scale(self._one)             # a new 0-d tensor

    def figures(self):
        """Return {"scale": the scale now, "skipped": updates skipped so far}; {} if not enabled. Synchronizes."""
        if not self.enabled:
            return {}
        scale, skipped = torch.stack([self._scale(), self._skipped]).tolist()
        return {"scale": scale, "skipped": skipped}

    def is_stuck(self):
        """Return whether too many updates in a row were skipped. Synchronizes."""
        return self.enabled and self._longest.item() >= LONGEST_STREAK

    def state(self):
        """Return what a checkpoint keeps of it. Synchronizes."""
        if not self.enabled:
            return {}
        return {**self.scaler.state_dict(), "skipped": self._skipped.item(), "streak": self._streak.item()}

    def restore(self, state):
        """Go on from what `state` returned; in place, as CUDA graphs hold these tensors. {}: from a new scale."""
        if not self.enabled or not state:
            return
        self.scaler.load_state_dict(state)
        self._skipped.fill_(state["skipped"])
        self._streak.fill_(state["streak"])
        self._longest.fill_(state["streak"])


@contextmanager
def finite_statistics(nets, enabled):
    """Undo, on the device, what an overflow in this context leaves in the running statistics of batch norm."""
    statistics = [buffer for net in nets for name, buffer in net.named_buffers()
                  if name.endswith(("running_mean", "running_var"))] if enabled else []
    before = [buffer.clone() for buffer in statistics]
    yield
    for buffer, value in zip(statistics, before, strict=True):
        buffer.copy_(torch.where(buffer.isfinite(), buffer, value))
