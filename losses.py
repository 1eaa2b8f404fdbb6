"""Objectives: what D and G minimize. One class per loss; `--adv_loss` chooses a row of `OBJECTIVES`.

    objective.d_loss(D, real, fake, labels) -> (scalar, {name: detached scalar})
    objective.g_loss(D, real, fake, labels) -> (scalar, {...})
    objective.logits(D, images, labels)     -> (B,), one logit per image, for records

`real` is (B, C, H, W) in [-1, 1]; `fake` is what G returns, a list of images, largest first; both already
augmented. `labels` is the pair (labels of real, labels of fake), each (B,), or None in a run without classes; D is
called as D(images, labels). G's loss takes real images too, for losses that compare the two (relativistic ones do).
Objectives only compute: trainer.py owns every `backward()` and every optimizer step.
"""

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from device.precision import exact
from device.replicas import draw_rows

NO_LABELS = (None, None)        # of real, of fake


def on_both(D, real, fake, labels):
    """Return D's (logits of real, logits of fake), (B,) each, in one pass: for a D without batch norm the same."""
    both = None if labels[0] is None else torch.cat(labels)             # (2B,)
    return D(torch.cat([real, fake]), both).chunk(2)


class Hinge:
    """Hinge loss (SAGAN section 4, eq. 4)."""

    double_backward = False     # whether d_loss differentiates through a gradient of D

    def __init__(self, label_noise=0.0):
        self.label_noise = label_noise

    def d_loss(self, D, real, fake, labels=NO_LABELS):
        on_real, on_fake = on_both(D, real, fake[0], labels)           # (B,), (B,)
        return hinge(on_real, on_fake, self.label_noise)

    def g_loss(self, D, real, fake, labels=NO_LABELS):
        return -D(fake[0], labels[1]).mean(), {}

    def logits(self, D, images, labels=None):
        return D(images, labels)


def hinge(on_real, on_fake, label_noise):
    """Return D's hinge loss on logits of any shape, and its statistics.

    The margin of each logit is 1 - label_noise * U(0, 1), drawn from the global random state (FastGAN: label_noise
    0.2), so that D is never pushed to one exact value.
    """
    loss = F.relu(_margins(on_real, label_noise) - on_real).mean() + F.relu(
        _margins(on_fake, label_noise) + on_fake).mean()
    return loss, {"d_real": on_real.detach().mean(), "d_fake": on_fake.detach().mean()}


def _margins(logits, label_noise):
    if not label_noise:
        return 1
    _, *logits_per_image = logits.size()
    return 1 - label_noise * draw_rows(
        lambda B: torch.rand(B, *logits_per_image, device=logits.device, dtype=logits.dtype), len(logits))


class WassersteinGP:
    """WGAN-GP (Gulrajani et al. 2017, arXiv 1704.00028, eq. 3): real + fake + lambda * GP as ONE loss."""

    double_backward = True

    def __init__(self, lambda_gp):
        self.lambda_gp = lambda_gp

    def d_loss(self, D, real, fake, labels=NO_LABELS):
        on_real, on_fake = on_both(D, real, fake[0], labels)           # (B,), (B,)
        penalty = gradient_penalty(D, real, fake[0], labels[0])
        loss = on_fake.mean() - on_real.mean() + self.lambda_gp * penalty
        stats = {"d_real": on_real.detach().mean(), "d_fake": on_fake.detach().mean(), "gp": penalty.detach()}
        return loss, stats

    def g_loss(self, D, real, fake, labels=NO_LABELS):
        return -D(fake[0], labels[1]).mean(), {}

    def logits(self, D, images, labels=None):
        return D(images, labels)


def gradient_penalty(D, real, fake, labels=None):
    """Mean over the batch of (||grad D(x)|| - 1)^2 at random points x between real and fake; a 0-d fp32 tensor.

    One mixing weight and one norm per sample; D gets the `labels` (B,) of the real images there. Draws from the
    global random state.
    """
    alpha = draw_rows(lambda B: torch.rand(B, 1, 1, 1, device=real.device), len(real))
    interpolated = (alpha * real + (1 - alpha) * fake.detach()).float().requires_grad_(True)
    # the fused attention kernels have no double backward
    with sdpa_kernel(SDPBackend.MATH), exact(real.device):
        (gradient,) = torch.autograd.grad(D(interpolated, labels).sum(), interpolated,
                                          create_graph=True)            # (B, C, H, W)
    norm = gradient.flatten(1).norm(dim=1)                 # (B,)
    return (norm - 1).square().mean()


class SelfSupervisedHinge:
    """FastGAN's objective: hinge loss on the logits of both paths of D, plus, in D's loss, the distance of real images
    from their reconstructions by D's decoders (Liu et al. 2021, section 3.2, eqs. 1-3).

    `distance(a, b)` takes images (B, C, H, W) and returns (B,); with a `recon_weight` of 0 it may be None.

    With labels, real images with the labels of the fakes, where these are others, count as fakes, too (Reed et al.
    2016, arXiv 1605.05396, algorithm 1). Without it G drew faces that anyone calls faces, and of no class: D tells the
    fakes of this small G by their looks, and so learns classes late.
    """

    double_backward = False
    MISMATCH_WEIGHT = 0.25      # with 1 the pictures became worse

    def __init__(self, distance, recon_weight, label_noise):
        self.distance, self.recon_weight, self.label_noise = distance, recon_weight, label_noise

    def d_loss(self, D, real, fake, labels=NO_LABELS):
        # two passes: D's batch norm must not mix real with fake
        on_real = D(real, labels[0])
        on_fake = D(fake, labels[1])
        loss, stats = hinge(on_real.logits, on_fake.logits, self.label_noise)
        if labels[0] is not None:
            mismatch = self._mismatch(D, on_real, *labels)
            loss, stats["mismatch"] = loss + self.MISMATCH_WEIGHT * mismatch, mismatch.detach()
        if not self.recon_weight:                           # the decoders then take no time
            return loss, stats
        pairs = D.reconstruct(on_real, real)
        rebuilt, targets = (torch.cat(images) for images in zip(*pairs.values(), strict=True))
        # all decoders in one pass; the mean over the batch keeps recon_weight independent of the batch size
        distances = self.distance(rebuilt, targets).view(len(pairs), -1).mean(1)            # (pairs,)
        stats |= {f"recon/{name}": value for name, value in zip(pairs, distances.detach(), strict=True)}
        return loss + self.recon_weight * distances.sum(), stats

    def _mismatch(self, D, on_real, labels, others):
        """Return the hinge loss of real images whose labels are `others`; 0 for those of which they are the own."""
        logits = D.with_labels(on_real, labels, others)                 # (B, 25)
        losses = F.relu(_margins(logits, self.label_noise) + logits).mean(1)            # (B,)
        return (losses * (labels != others)).mean()

    def g_loss(self, D, real, fake, labels=NO_LABELS):
        return -D(fake, labels[1]).logits.mean(), {}

    def logits(self, D, images, labels=None):
        return D(images, labels).logits.mean(1)


class OnFeatures:
    """Another objective, and beside it the hinge loss of D's heads on the features of a frozen network.

    `maps(images)` returns its feature maps; `D.feature_heads` takes them. Such a D learns from few pictures and in few
    steps what they show (Sauer et al. 2021, arXiv 2111.01007); D's own layers see what the features do not. The heads'
    losses count `weight` times. To save time they see only the first `share` of a batch, at least one image.
    """

    def __init__(self, objective, maps, label_noise, weight=1.0, share=1.0):
        self.objective, self.maps, self.label_noise = objective, maps, label_noise
        self.weight, self.share = weight, share
        self.double_backward, self.logits = objective.double_backward, objective.logits

    def d_loss(self, D, real, fake, labels=NO_LABELS):
        loss, stats = self.objective.d_loss(D, real, fake, labels)
        # in one pass: neither the maps nor the heads mix images
        on_real, on_fake = self._on_heads(D, real, fake[0]).chunk(2)
        on_features, of_heads = hinge(on_real, on_fake, self.label_noise)
        return (loss + self.weight * on_features,
                stats | {f"features/{name}": value for name, value in of_heads.items()})

    def g_loss(self, D, real, fake, labels=NO_LABELS):
        loss, stats = self.objective.g_loss(D, real, fake, labels)
        return loss - self.weight * self._on_heads(D, fake[0]).mean(), stats

    def _on_heads(self, D, *batches):
        seen = [images[:max(1, round(self.share * len(images)))] for images in batches]
        return D.feature_heads(self.maps(torch.cat(seen)))              # (len(batches) * share * B, L)


def l1(a, b):
    """Return the mean absolute difference (B,) of images a, b (B, C, H, W)."""
    return (a - b).abs().mean((1, 2, 3))


OBJECTIVES = {      # --adv_loss
    "hinge": lambda config: Hinge(config.label_noise),
    "wgan-gp": lambda config: WassersteinGP(config.lambda_gp),
}
