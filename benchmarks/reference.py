"""The same networks trained the plain published way: what `speed.py` compares with. For measuring alone.

Eager, contiguous, in fp32 or tf32; spectral norm iterates in every forward pass; attention holds its N x N matrix; Adam
without fusing; D is not frozen in G's phase. SAGAN draws fakes for D and again for G, and nothing is detached in D's
phase, so its backward pass runs through G as well. FastGAN, as published, draws once and detaches.
"""

if __name__ == "__main__":
    raise SystemExit("this file is a part of another program: python benchmarks/speed.py --help")

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from device.precision import Precision
from diffaug import augment
from families import build, build_objective
from fastgan_models import GLU
from generate.latents import Latents
from layers.attention import SelfAttention
from layers.convolutions import DownConv, FromVector, ToVector, UpConv
from metrics.cost import ConstantBatch, TimedConfig


class PlainAttention(SelfAttention):
    """`SelfAttention` as published: the whole matrix of weights."""

    def forward(self, x):
        B, _, H, W = x.size()
        q = self.query(x).view(B, -1, H * W)                            # (B, C/8, N)
        k = self.pool(self.key(x)).flatten(2)                           # (B, C/8, M), M = N or N / 4
        v = self.pool(self.value(x)).flatten(2)                         # (B, C or C/2, M)
        weights = torch.softmax(torch.bmm(q.transpose(1, 2), k), dim=-1)                # (B, N, M)
        out = torch.bmm(v, weights.transpose(1, 2)).view(B, -1, H, W)
        return self.gamma * self.out(out) + x


class PlainUpConv(UpConv):
    """`UpConv` in two steps."""

    def forward(self, x):
        return nn.Conv2d.forward(self, self.upsample(x))


class PlainDownConv(DownConv):
    """`DownConv` in two steps."""

    def forward(self, x):
        return F.avg_pool2d(nn.Conv2d.forward(self, x), 2)


PUBLISHED = {SelfAttention: PlainAttention, GLU: nn.GLU, FromVector: nn.ConvTranspose2d, ToVector: nn.Conv2d,
             UpConv: PlainUpConv, DownConv: PlainDownConv}


def published(net):
    """The product's network, its layers and its spectral norm replaced by the published kind. In place."""
    for layer in net.modules():
        normed = nn.utils.parametrize.is_parametrized(layer, "weight")
        if normed:
            nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        layer.__class__ = PUBLISHED.get(type(layer), type(layer))
        if normed:
            spectral_norm(layer, dim=1 if isinstance(layer, nn.ConvTranspose2d) else 0)
    return net


class PlainTrainer:
    """Trains the networks of `config` on `device`; `train_step(batches)` is one step on the next of them.

    With `classes`, the Classes of a data set, both networks get labels. There is no metadata.
    """

    def __init__(self, config, device, classes=None):
        torch.manual_seed(config.seed)
        self.config = config
        self.latents = Latents(config.z_dim, device=device, classes=classes)
        self.G, self.D = (published(net).to(device).train() for net in build(config, len(classes or ())))
        self.G_ema = copy.deepcopy(self.G).requires_grad_(False)
        self.objective = build_objective(config, device)
        distance = getattr(self.objective, "distance", None)
        if isinstance(distance, nn.Module):                                     # LPIPS
            distance.to(memory_format=torch.contiguous_format)
        betas = (config.beta1, config.beta2)
        self.g_optimizer = torch.optim.Adam(self.G.parameters(), config.g_lr, betas=betas)
        self.d_optimizer = torch.optim.Adam(self.D.parameters(), config.d_lr, betas=betas)
        self.precision = Precision(config.precision, device)
        self.draws_again = config.model == "sagan"

    def train_step(self, batches):
        """Update D on each of the next `d_iters` batches, and G once."""
        with self.precision.switched():
            for _ in range(self.config.d_iters):
                batch = next(batches)
                real = self.augment(batch.images)
                fake, labels = self.train_d(real, batch.labels)
            self.train_g(real, fake, (batch.labels, labels))
        with torch.no_grad():
            for averaged, weight in zip(self.G_ema.parameters(), self.G.parameters(), strict=True):
                averaged.mul_(self.config.ema_decay).add_(weight, alpha=1 - self.config.ema_decay)

    def train_d(self, real, real_labels):
        """Update D once. Return (the images that G drew for it, their labels or None)."""
        fake, labels = self.generate(real.size(0))
        shown = [self.augment(image if self.draws_again else image.detach()) for image in fake]
        loss, _ = self.objective.d_loss(self.D, real, shown, (real_labels, labels))
        self.update(loss, self.d_optimizer)
        return fake, labels

    def train_g(self, real, fake, labels):
        """Update G once, on what it drew for D, or on what it draws again."""
        if self.draws_again:
            fake, of_fake = self.generate(real.size(0))
            labels = labels[0], of_fake
        loss, _ = self.objective.g_loss(self.D, real, [self.augment(image) for image in fake], labels)
        self.update(loss, self.g_optimizer)

    def generate(self, count):
        """Return (what G makes of fresh z, their labels or None)."""
        inputs = self.latents.training(count)
        return self.G(**inputs.as_arguments()), inputs.labels

    def augment(self, images):
        """Images as D sees them, augmented."""
        return augment(images, self.config.augment)

    def update(self, loss, optimizer):
        """Both networks' gradients are cleared, as published, and one is updated."""
        self.g_optimizer.zero_grad()
        self.d_optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class PlainConfig(TimedConfig):
    """One configuration, trained the plain way."""

    def __init__(self, config, place, bank=None, classes=None):
        self.config, self.place, self.seconds = config, place, []
        self.batches = ConstantBatch(config, place.device, classes)
        self.trainer = PlainTrainer(config, place.device, classes)
