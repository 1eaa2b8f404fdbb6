"""SLAE-FastGAN: FastGAN (Liu et al. 2021, arXiv 2101.04775) with spatial attention on its skip-layer excitations
(Wu and Xu 2023, doi 10.12677/CSA.2023.132019) and metadata beside the noise.

G upsamples from 4x4 to imsize in blocks of factor 2; skip-layer excitations let low-resolution maps gate the channels
of high-resolution ones. D has a deep path for the image and an independent small path for the downscaled image. Three
decoders reconstruct real images from D's feature maps, which keeps D from memorizing a small training set.

Both networks support 64, 128, 256, 512 and 1024 px, and rectangles of which the shorter side is one of these. A size is
the shorter side of a map. Below 256 the first blocks of D, the small path and the decoders
shrink with the image, and G's three skip connections lead to its last three maps. At 256 px and width 64, without
`slae` and `metadata`, G and D have 29.13 M and 11.53 M parameters. No layer has a bias.
"""

from collections import OrderedDict
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, zip_longest
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from device.precision import exact
from device.replicas import draw_rows
from flags.pictures import CHANNELS, FIRST, short_side, sides_at
from layers.attention import capture
from layers.blocks import Block, Projection, sum_pool
from layers.convolutions import FromVector, ToVector, UpConv
from layers.norms import ConditionalBatchNorm
from spectral import maybe_spectral_norm

METADATA = 512          # length of the metadata vector appended to z
LAST = 8                # size of the last map of D's deep path

# Channels of a map by its size, in units of conv_dim: conv_dim 64 gives the published 1024, 512, ..., 8.
G_WIDTHS = {4: 16, 8: 8, 16: 4, 32: 2, 64: 2, 128: 1, 256: 1 / 2, 512: 1 / 4, 1024: 1 / 8}
D_WIDTHS = {8: 8, 16: 4, 32: 2, 64: 1, 128: 1 / 2, 256: 1 / 4, 512: 1 / 8}


def small_size(imsize):
    """Size of G's second image, of D's small input and of the reconstructions: half the image's, at most 128."""
    return min(short_side(imsize), 256) // 2


def downscale(images, size):
    """(B, C, H, W) -> the same with a shorter side of `size`, anti-aliased; returns images of that size unchanged."""
    short, smaller = size_of(images), [side * size // size_of(images) for side in images.shape[2:]]
    if short == size:
        return images
    return F.interpolate(images, smaller, mode="bilinear", antialias=True, align_corners=False)


def both_sizes(images):
    """Real images (B, C, H, W) -> D's input: [images, the same downscaled to `small_size`]."""
    return [images, downscale(images, small_size(size_of(images)))]


def size_of(x):
    """Return the shorter side of x (B, C, H, W)."""
    return min(x.size(-2), x.size(-1))


def _width(table, size, conv_dim):
    return max(1, round(table[size] * conv_dim))


class _Layers:
    """Build the layers of one network, with or without spectral norm; batch norm for so many classes, 0 for none."""

    def __init__(self, sn, classes=0):
        self.wrap, self.classes = maybe_spectral_norm(sn), classes
        self.noises = 0     # layers that add noise so far

    def norm(self, channels):
        """Batch norm, in a G with classes the class-conditional one."""
        return ConditionalBatchNorm(channels, self.classes) if self.classes else nn.BatchNorm2d(channels)

    def conv(self, channels, out, kernel, stride=1, padding=0):
        return self.wrap(nn.Conv2d(channels, out, kernel, stride, padding, bias=False))

    def up(self, channels, out):
        """(B, channels, H, W) -> (B, out, 2H, 2W): the plain block."""
        return _block(self.gated(channels, out, up=True))

    def deep_up(self, channels, out):
        """(B, channels, H, W) -> (B, out, 2H, 2W): the deep block, two convolutions with noise after each."""
        return _block(self.gated(channels, out, noise=True, up=True), self.gated(out, out, noise=True))

    def gated(self, channels, out, noise=False, up=False):
        """conv 3x3, of the upsampled map if `up`, noise, batch norm, gated linear unit."""
        yield self.wrap(UpConv(channels, 2 * out, bias=False)) if up else self.conv(channels, 2 * out, 3, padding=1)
        if noise:
            self.noises += 1
            yield Noise(self.noises)
        yield self.norm(2 * out)
        yield GLU(dim=1)


def _block(*parts):
    """Return the layers of all parts as a Block. Numbered from 1: in old checkpoints 0 was an upsampling layer."""
    return Block(OrderedDict((f"{number}", layer) for number, layer in enumerate(chain(*parts), 1)))


class GLU(nn.GLU):
    """a * sigmoid(b) for the halves a, b of x's channels: torch's GLU, but its gradient keeps x's memory format.

    torch's gradient is contiguous, with which a channels-last batch norm took seven times as long on a CPU.
    """

    def forward(self, x):
        a, b = x.chunk(2, self.dim)
        return a * torch.sigmoid(b)


class Noise(nn.Module):
    """x + weight * noise, one N(0, 1) map per image for all channels; the weight starts at 0.

    In eval mode an image's map is a combination of RANK fixed ones, by `noise_coefficients` (B, RANK). `number` is the
    layer's: each has maps of its own, as the two layers of a block would else add up the same one twice.
    """

    RANK = 32
    takes = "coefficients"

    def __init__(self, number):
        super().__init__()
        self.number = number
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, coefficients=None):
        B, _, H, W = x.size()
        if self.training:
            noise = draw_rows(lambda B: torch.randn(B, 1, H, W, device=x.device, dtype=x.dtype), B)
        else:
            with exact(x.device):
                maps = _fixed_normal(self.number, self.RANK, int(H * W), x.device)      # (RANK, H * W)
                noise = (coefficients @ maps.to(coefficients.dtype)).view(B, 1, H, W).to(x.dtype)
        return x + self.weight.to(x.dtype) * noise


def noise_coefficients(z):
    """z (B, z_dim) -> (B, RANK), of unit length: which noise maps an image gets in evaluation.

    A fixed random projection: an image depends on its z alone, and changes smoothly with it. One map for all images
    would leave the same stripes and specks in every one of them.
    """
    with exact(z.device):
        return F.normalize(z @ _fixed_normal(0, int(z.size(1)), Noise.RANK, z.device).to(z.dtype))


@lru_cache(maxsize=16)
def _fixed_normal(seed, rows, columns, device):
    """N(0, 1) numbers (rows, columns), always the same. Plain ints find them in the cache, so that exports hold them as
    constants: TorchScript's tracer has sizes of a kind of its own.
    """
    with torch.inference_mode(False):           # also for a later search by gradients
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(device)


@contextmanager
def initialized_apart():
    """Initialize an addition to FastGAN without moving the random state.

    With the same seed, all other weights then start as they do without the addition: an ablation compares the two.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), device="cpu")))      # numbers that no other layer gets
        yield


class SpatialAttention(nn.Module):
    """x (B, C, H, W) -> mask (B, 1, H, W) in (0, 1): sigma(conv_k([mean over channels, max over channels])).

    Two pooling layers and one convolution without bias or spectral norm (Wu and Xu 2023, section 3.1).
    """

    def __init__(self, kernel):
        super().__init__()
        with initialized_apart():
            self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x):
        # not amax: its gradient goes to the values that equal the maximum, and compiled in bf16 none did
        largest = x.max(1, keepdim=True).values                                         # (B, 1, H, W)
        pooled = torch.cat([x.mean(1, keepdim=True), largest], dim=1)                   # (B, 2, H, W)
        return torch.sigmoid(self.conv(pooled))                                         # (B, 1, H, W)


class SkipExcitation(nn.Module):
    """source (B, C, h, w), target (B, C', H, W) -> target, each channel scaled by a gate computed from source, which is
    pooled to the sides `first` of G's first map.

    Skip-layer excitation (Liu et al. 2021, section 3.1); with a `kernel` the source is first multiplied by its
    spatial attention mask, which makes it SLAE (Wu and Xu 2023, section 3.1).
    """

    def __init__(self, layers, channels, out, first, kernel=None):
        super().__init__()
        self.first = first
        self.attention = SpatialAttention(kernel) if kernel else None
        self.gate = nn.Sequential(
            layers.wrap(ToVector(channels, out, first, bias=False)), nn.SiLU(),
            layers.wrap(ToVector(out, out, 1, bias=False)), nn.Sigmoid(),
        )

    def forward(self, source, target):
        if self.attention is not None:
            source = source * self.attention(source)
        return target * self.gate(_pool_to(self.first, source))         # (B, C', 1, 1) * (B, C', H, W)


def _pool_to(sides, x):
    """(B, C, H, W) -> (B, C, *sides), average pooling. Adaptive pooling has no deterministic backward on CUDA."""
    height, width = sides
    if x.device.type != "cpu":      # avg_pool2d is slow on CUDA: one thread reads a whole window
        return x.unflatten(3, (width, -1)).unflatten(2, (height, -1)).mean((3, 5))
    return F.avg_pool2d(x, x.size(-1) // width)


def _skips(layers, sources, width, first, slae):
    """{"<size of the target>": SkipExcitation} for {size of the target: size of the source}."""
    return nn.ModuleDict({f"{target}": SkipExcitation(layers, width[source], width[target], first, slae)
                          for target, source in sources.items()})


class Generator(nn.Module):
    """(B, z_dim) or, with metadata, (B, z_dim + 512) -> [image (B, channels, H, W), the same at `small_size`].

    Both in [-1, 1]. With `classes` it takes labels (B,), too, for class-conditional batch norm. `slae` is the
    kernel size of the spatial attention, None for no attention; `metadata_weight`, in [0, 1), the share of the latent's
    variance that metadata get.
    """

    def __init__(self, imsize, z_dim, conv_dim, slae=7, metadata=True, sn=True, metadata_weight=0.5,
                 classes=0, channels=3):
        super().__init__()
        layers, first = _Layers(sn, classes), sides_at(imsize, FIRST)
        self.size, self.small_size, self.z_dim = short_side(imsize), small_size(imsize), z_dim
        width = {size: _width(G_WIDTHS, size, conv_dim) for size in G_WIDTHS if size <= self.size}
        self.mix, self.metadata_weight = None, metadata_weight
        if metadata:
            with initialized_apart():
                self.mix = nn.Linear(METADATA, z_dim, bias=False)
                nn.init.normal_(self.mix.weight, std=METADATA**-0.5)    # maps metadata of variance 1 to variance 1
        self.start = Block(
            layers.wrap(FromVector(z_dim, 2 * width[4], first, bias=False)), layers.norm(2 * width[4]), GLU(dim=1),
        )
        self.blocks = nn.ModuleDict()
        for size in (size for size in width if size > 4):
            # deep at 8, 32, 128, 512; plain at 16, 64, 256, 1024
            block = layers.deep_up if size.bit_length() % 2 == 0 else layers.up
            self.blocks[f"{size}"] = block(width[size // 2], width[size])
        top = min(self.size, 256)
        self.sources = {top // 4: 4, top // 2: 8, top: 16}              # {size of the skip's target: of its source}
        if self.size > 256:
            self.sources[512] = 32
        self.skips = _skips(layers, self.sources, width, first, slae)
        self.to_small = layers.conv(width[self.small_size], channels, 1)
        self.to_rgb = layers.conv(width[self.size], channels, 3, padding=1)

    has_noise = True        # maps, which in evaluation depend on z

    def forward(self, z, labels=None, style=None, noise=None, style_labels=None):
        """With `style`, latents like z, the skips take their sources from the maps of `style` (style mixing), which has
        labels of its own.

        With `noise`, latents like z, the noise maps of evaluation are those of `noise`.
        """
        maps = self._maps(z, labels, None if style is None else self._maps(style, style_labels), noise)
        x = maps[self.size]                                             # (B, width, imsize, imsize)
        small = self.to_small(maps[self.small_size])                    # (B, channels, imsize / 2, imsize / 2)
        return [torch.tanh(self.to_rgb(x).float()), torch.tanh(small.float())]

    def _maps(self, z, labels=None, sources=None, noise=None):
        """Return {size: (B, width, size, size)}. The skips read `sources`, by default these maps themselves."""
        source = z if noise is None else noise
        coefficients = None if self.training else noise_coefficients(source[:, :self.z_dim])        # (B, RANK)
        arguments = {"coefficients": coefficients, "labels": labels}
        x = self.start(self.latent(z)[:, :, None, None], **arguments)                   # (B, width, 4, 4)
        maps = {4: x}
        for name, block in self.blocks.items():
            x = block(x, **arguments)                                   # (B, width, size, size)
            size = int(name)
            if size in self.sources:
                x = self.skips[name]((sources or maps)[self.sources[size]], x)
            maps[size] = x
        return maps

    def latent(self, z):
        """(B, z_dim [+ 512]) -> (B, z_dim): noise and metadata, mixed at variance 1 (section 3.2)."""
        if self.mix is None:
            return z
        z, metadata = z.split([self.z_dim, METADATA], dim=1)            # (B, z_dim), (B, 512)
        # normalized, so that the metadata keep the scale of the noise whatever `mix` learns
        mixed = F.rms_norm(self.mix(metadata), (self.z_dim,))           # (B, z_dim)
        # N pictures span N - 1 directions. With few, G learns to look at these alone, where equal lengths leave z weak.
        weight = self.metadata_weight
        return (z + (weight / (1 - weight))**0.5 * mixed) * (1 - weight)**0.5

    def large_blocks(self):
        """Return the blocks whose activations `--checkpointing` computes again."""
        return list(self.blocks.values())

    @property
    def parts(self):
        """The parts of the input z, {name: slice}."""
        metadata = {} if self.mix is None else {"metadata": slice(self.z_dim, None)}
        return {"z": slice(self.z_dim), **metadata}

    def attention_maps(self, z, queries=None, labels=None):
        """Return {"slae<size>": mask (B, 1, size, size) in (0, 1)}, of each skip's source; masks need no queries."""
        return _attention_masks(self, lambda: self(z, labels), "slae")


class DiscriminatorOutput(NamedTuple):
    """The logits of both paths, concatenated, the feature maps that the decoders take and, with classes, the features
    that the projection takes.
    """

    logits: torch.Tensor        # (B, 50): 5 x 5 from each path; of images that are not square more, as of all maps
    middle: torch.Tensor        # (B, C / 2, 16, 16)
    last: torch.Tensor          # (B, C, 8, 8)
    small: torch.Tensor         # (B, C / 2, 8, 8)
    features: torch.Tensor | None           # (B, 2C)


class Discriminator(nn.Module):
    """Images in [-1, 1] -> DiscriminatorOutput.

    Takes [image (B, channels, H, W), the same at `small_size`] as G returns them, or the image alone for real ones.
    With `classes` it takes labels (B,), too, and adds a projection of the deep path's features, those before its
    logits, to these; labels of None leave it out. `slae` is the kernel size of the spatial attention in the skip
    excitations, None for no attention. `reconstructs`: whether the decoders are trained.
    """

    def __init__(self, imsize, conv_dim, slae=None, sn=True, classes=0, channels=3, reconstructs=True):
        super().__init__()
        self.reconstructs = reconstructs
        layers = _Layers(sn)
        top = min(short_side(imsize), 256)                              # the stem's output, whatever the imsize
        sizes = [size for size in sorted(D_WIDTHS, reverse=True) if size < 2 * top]
        width = {size: _width(D_WIDTHS, size, conv_dim) for size in sizes}
        self.stem = nn.Sequential(*_stem(layers, channels, short_side(imsize), conv_dim, width[top]))
        self.blocks = nn.ModuleDict({
            f"{size}": _ResidualDown(layers, width[2 * size], width[size]) for size in sizes if size < top
        })
        self.sources = {size // 8: size for size in sizes if size // 8 >= LAST}
        self.skips = _skips(layers, self.sources, width, sides_at(imsize, FIRST), slae)
        last = width[LAST]
        self.to_logits = nn.Sequential(
            layers.conv(last, 2 * last, 1), nn.BatchNorm2d(2 * last), _leaky(), layers.conv(2 * last, 1, 4)
        )
        self.projection = None
        if classes:
            with initialized_apart():
                self.projection = Projection(2 * last, classes, layers.wrap)
        half = small_size(imsize)
        steps = [size for size in sizes if LAST <= size < half]         # half / 2, ..., 8
        small = [width[2 * size] for size in steps]                     # ends with half the deep path's width
        self.small_path = nn.Sequential(
            layers.conv(channels, small[0], 4, 2, 1), _leaky(),
            *(layer for i, out in enumerate(small[1:]) for layer in _down(layers, small[i], out)),
        )
        self.small_to_logits = layers.conv(small[-1], 1, 4)
        middle = width[2 * LAST]
        self.decode_last = _decoder(layers, last, channels, half, conv_dim)
        self.decode_middle = _decoder(layers, middle, channels, half, conv_dim)
        self.decode_small = _decoder(layers, small[-1], channels, half, conv_dim)

    def forward(self, images, labels=None):
        image, small = both_sizes(images) if isinstance(images, torch.Tensor) else images
        x = self.stem(image)                                            # (B, width, top, top)
        maps = {size_of(x): x}
        for name, block in self.blocks.items():
            x = block(x)                                                # (B, width, size, size)
            size = int(name)
            if size in self.sources:
                x = self.skips[name](maps[self.sources[size]], x)
            maps[size] = x
        from_small = self.small_path(small)                             # (B, C / 2, 8, 8)
        hidden = self.to_logits[:-1](x)                                 # (B, 2C, 8, 8)
        features = None if self.projection is None else sum_pool(hidden) / hidden[0, 0].numel()     # (B, 2C)
        deep = self.to_logits[-1](hidden).flatten(1).float()            # (B, 5 * 5)
        if features is not None and labels is not None:
            deep = deep + self.projection(features, labels)[:, None]
        logits = torch.cat([deep, self.small_to_logits(from_small).flatten(1).float()], dim=1)
        return DiscriminatorOutput(logits, maps[2 * LAST], x, from_small, features)     # logits (B, 2 * 5 * 5)

    def with_labels(self, output, labels, others):
        """Return the deep path's logits (B, 25) for the labels `others`, from the `output` for `labels`."""
        deep = output.logits.chunk(2, dim=1)[0]                         # (B, 25)
        change = self.projection(output.features, others) - self.projection(output.features, labels)
        return deep + change[:, None]

    def large_blocks(self):
        """Return the blocks whose activations `--checkpointing` computes again."""
        return [*self.blocks.values(), self.small_path, self.decode_last, self.decode_middle, self.decode_small]

    def stages(self):
        """Return [[module, ...], ...]: the layers of each block from the image on, for `--freeze_d`.

        Those of the small path, one convolution each, belong to the deep path's of the same number.
        """
        convolutions = [layer for layer in self.small_path if isinstance(layer, nn.Conv2d)]
        deep = [[self.stem], *([block, *([self.skips[size]] if size in self.skips else [])]
                               for size, block in self.blocks.items())]
        small = [[layer] for layer in convolutions]
        return [[*stage, *other] for stage, other in zip_longest(deep, small, fillvalue=())]

    def reconstruct(self, output, real, quadrant=None):
        """Return {name: (reconstruction, target)}, pairs of (B, channels, small_size, small_size) in [-1, 1].

        `output` is D's on the images `real` (B, channels, H, W). "last" and "small" reconstruct the whole image,
        "middle" one quadrant from that quadrant of the 16x16 map: `quadrant` (B,), or drawn from the global random
        state.
        """
        B, size = len(real), small_size(size_of(real))
        whole = downscale(real, size)
        if quadrant is None:
            quadrant = draw_rows(lambda B: torch.randint(0, 4, (B,), device=real.device), B)
        return {
            "last": (self.decode_last(output.last), whole),
            "middle": (self.decode_middle(take_quadrant(output.middle, quadrant)),
                       downscale(take_quadrant(real, quadrant), size)),
            "small": (self.decode_small(output.small), whole),
        }

    def reconstructions(self, real):
        """Return {caption: images (B, channels, small_size, small_size)}: targets and what each decoder makes of them.
        """
        quadrant = torch.arange(len(real), device=real.device) % 4      # the same in every record
        output = self(real)
        rebuilt = self.reconstruct(output, real, quadrant)
        last, middle = ("x".join(map(str, maps.shape[2:])) for maps in (output.last, output.middle))
        return {
            "real": rebuilt["last"][1], f"from D's {last} map": rebuilt["last"][0],
            "from the small path": rebuilt["small"][0],
            "one quadrant": rebuilt["middle"][1], f"from its part of the {middle} map": rebuilt["middle"][0],
        }

    def attention_maps(self, images, queries=None):
        """Return {"slae_d<size>": mask (B, 1, size, size)} for images (B, channels, H, W); {} without `slae`."""
        return _attention_masks(self, lambda: self(images), "slae_d")


def take_quadrant(x, quadrant):
    """x (B, C, H, W), quadrant (B,) of 0 to 3 in reading order -> (B, C, H / 2, W / 2)."""
    B, C, H, W = x.size()
    x = x.view(B, C, 2, H // 2, 2, W // 2)
    image = torch.arange(B, device=x.device)
    return x[image, :, quadrant // 2, :, quadrant % 2]                  # the indexed axes come first: (B, C, H/2, W/2)


def _stem(layers, channels, size, conv_dim, out):
    """The layers from the image to the first map, 256 px at most: 512 px are halved once, 1024 px twice."""
    if size <= 256:
        return [layers.conv(channels, out, 3, padding=1), _leaky()]
    if size == 512:
        return [layers.conv(channels, out, 4, 2, 1), _leaky()]
    first = _width(D_WIDTHS, 512, conv_dim)
    return [layers.conv(channels, first, 4, 2, 1), _leaky(), *_down(layers, first, out)]


def _leaky():
    return nn.LeakyReLU(0.2, inplace=True)              # in place, as nothing else reads its input: saves memory


def _down(layers, channels, out):
    """conv 4x4 with stride 2, batch norm, LeakyReLU."""
    return [layers.conv(channels, out, 4, 2, 1), nn.BatchNorm2d(out), _leaky()]


class _ResidualDown(nn.Module):
    """(B, channels, H, W) -> (B, out, H / 2, W / 2): the mean of a convolved and a pooled branch."""

    def __init__(self, layers, channels, out):
        super().__init__()
        self.convolved = nn.Sequential(
            *_down(layers, channels, out), layers.conv(out, out, 3, padding=1), nn.BatchNorm2d(out), _leaky()
        )
        self.pooled = nn.Sequential(
            nn.AvgPool2d(2), layers.conv(channels, out, 1), nn.BatchNorm2d(out), _leaky()
        )

    def forward(self, x):
        return (self.convolved(x) + self.pooled(x)) / 2


def _decoder(layers, width, channels, size, conv_dim):
    """(B, width, 8, 8) -> (B, channels, size, size) in [-1, 1]."""
    blocks, reached = [], LAST
    while reached < size:
        reached *= 2
        out = max(1, round({16: 2, 32: 1, 64: 1, 128: 1 / 2}[reached] * conv_dim))
        blocks.append(layers.up(width, out))
        width = out
    return nn.Sequential(*blocks, layers.conv(width, channels, 3, padding=1), nn.Tanh())


def _attention_masks(net, run, prefix):
    """Call run(), a pass of `net`, and return the mask of each skip excitation with attention; no call if none has."""
    attention = {f"{prefix}{source}": net.skips[f"{target}"].attention for target, source in net.sources.items()}
    layers = {name: layer for name, layer in attention.items() if layer is not None}
    return capture(run, layers, lambda layer, features, mask: mask)


def build(config, classes=0):
    """Return (G, D) of the config for so many classes, newly initialized, on the CPU."""
    kernel, channels = config.slae_kernel, CHANNELS[config.channels]
    G = Generator(config.imsize, config.z_dim, config.g_conv_dim, kernel if config.slae else None, config.metadata,
                  config.sn in ("both", "g"), config.metadata_weight, classes, channels)
    D = Discriminator(config.imsize, config.d_conv_dim, kernel if config.slae_d else None, config.sn in ("both", "d"),
                      classes, channels, reconstructs=config.recon_weight > 0)
    return G, D
