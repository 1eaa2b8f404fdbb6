"""Objectives: what D and G minimize. One class per loss, one row in `OBJECTIVES`.

    objective.d_loss(D, real, fake) -> (scalar, {name: detached scalar})
    objective.g_loss(D, fake)       -> (scalar, {...})

`real` is (B, 3, imsize, imsize) in [-1, 1]; `fake` is what G returns, a list of images, largest first. They only
compute: the loop owns every `backward()` and every optimizer step.
"""

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


class Hinge:
    """Hinge loss (SAGAN section 4, eq. 4)."""

    def d_loss(self, D, real, fake):
        # one pass for both: D has no batch statistics, so the logits are those of two passes
        on_real, on_fake = D(torch.cat([real, fake[0]])).chunk(2)      # (B,), (B,)
        loss = F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()
        return loss, {"d_real": on_real.detach().mean(), "d_fake": on_fake.detach().mean()}

    def g_loss(self, D, fake):
        return -D(fake[0]).mean(), {}


class WassersteinGP:
    """WGAN-GP (Gulrajani et al. 2017, arXiv 1704.00028, eq. 3): real + fake + lambda * GP as ONE loss."""

    def __init__(self, lambda_gp):
        self.lambda_gp = lambda_gp

    def d_loss(self, D, real, fake):
        on_real, on_fake = D(torch.cat([real, fake[0]])).chunk(2)      # (B,), (B,)
        penalty = gradient_penalty(D, real, fake[0])
        loss = on_fake.mean() - on_real.mean() + self.lambda_gp * penalty
        stats = {"d_real": on_real.detach().mean(), "d_fake": on_fake.detach().mean(), "gp": penalty.detach()}
        return loss, stats

    def g_loss(self, D, fake):
        return -D(fake[0]).mean(), {}


def gradient_penalty(D, real, fake):
    """Mean over the batch of (||grad D(x)|| - 1)^2 at random points x between real and fake; a 0-d fp32 tensor.

    One mixing weight and one norm per sample. Draws from the global random state.
    """
    B = real.size(0)
    alpha = torch.rand(B, 1, 1, 1, device=real.device)
    between = (alpha * real + (1 - alpha) * fake.detach()).float().requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH):                     # the fused attention kernels have no double backward
        (gradient,) = torch.autograd.grad(D(between).sum(), between, create_graph=True)   # (B, 3, H, W)
    norm = gradient.flatten(1).norm(dim=1)                 # (B,)
    return (norm - 1).square().mean()


OBJECTIVES = {
    "hinge": lambda config: Hinge(),
    "wgan-gp": lambda config: WassersteinGP(config.lambda_gp),
}


def adversarial(config):
    """The objective of `--adv_loss`."""
    return OBJECTIVES[config.adv_loss](config)
