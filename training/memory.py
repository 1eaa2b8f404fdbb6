"""The memory of a training step, estimated before there is any; and what fits where a run will not.

The step is run on the meta device: nothing is computed, and living tensors are counted.
"""

import copy
import weakref
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import families
import parameter
from dataset.decoded_cache import available_memory
from device import distributed, mps
from device.loss_scale import LossScale
from device.precision import Precision
from device.replicas import GradientAverage
from errors import UsageError
from flags.pictures import PictureShape, halved, short_side
from flags.values import written
from layers.recompute import recompute_activations
from parameter import Config
from pretrained import vgg
from spectral import shared_weights
from trainer import Trainer

ATTENTION = ("g_attn", "d_attn")
MARGIN = 1.15       # of estimated memory: what is advised fits with it, what is refused does not fit without it


class Estimate(NamedTuple):
    """The bytes that a training step takes: `constant` for weights, G_ema and Adam's moments, `step` for the rest."""

    constant: int
    step: int

    @property
    def total(self):
        return self.constant + self.step


def estimate(config, place, classes=0, precision=None):
    """Return the Estimate for one process of a run with so many classes; on a GPU, within some 15 %. `precision` is
    that of the config on the place, if no other is given.

    Tensors alone are counted, not what libraries need. Nothing is computed, and no weights are needed: it takes seconds
    at most, whatever the size.
    """
    # of a batch in parts only two: more take no more memory, but for their images
    parts, count = min(config.accumulate, 2), config.batch_size // place.world_size
    few = parts * count // config.accumulate
    shapes = _Shapes(Config.of({**vars(config), "accumulate": parts}), classes,
                     precision or Precision(config.precision, place.device))
    tensors = [torch.empty(few, *PictureShape.of_config(config).size, device="meta")] * config.d_iters
    if classes:
        tensors += [torch.zeros(few, dtype=torch.long, device="meta")] * config.d_iters
    with _Ledger() as ledger, _AsOnGPU():
        shapes.update(tensors)
    images = sum(tensor.nbytes for tensor in tensors)
    augmented = tensors[0].nbytes * bool(config.augment)                # held by the step until G's phase
    more = count / few - 1
    return Estimate(shapes.constant_bytes(), ledger.peak + images + round(more * (images + augmented)))


def describe(found, place):
    """Return a line on an Estimate and on the memory that is free."""
    free = _free_memory(place)
    return (f"memory of a step: about {_in_words(found.total)}, of which weights, averages and Adam's moments "
            f"{_in_words(found.constant)}" + (f"; {_holder(place)} has {_in_words(free)} free" if free else ""))


def require(config, place, classes, resuming, found=None):
    """Raise UsageError, with flags that fit, if a step clearly needs more memory than is free. `found`: the Estimate of
    the config, if it is known.
    """
    free = _free_memory(place)
    if not free or _bound(config, place) < free:        # the estimate takes a second
        return
    found = found or estimate(config, place, classes)
    if found.total > free * MARGIN:
        raise UsageError(f"--batch_size {config.batch_size} at --imsize {config.imsize}: a step needs about "
                         f"{_in_words(found.total)}, and {_holder(place)} has {_in_words(free)} free.\n"
                         + _what_fits(config, place, classes, resuming, found, free))


def exhausted(config, place, classes, resuming, where):
    """Return the UsageError for a step that ran out of memory on `where`, though it had been expected to fit."""
    found = estimate(config, place, classes)
    needed = found.total
    # what was taken when it ran out may not be free yet
    there = (torch.cuda.mem_get_info(place.device)[1] if place.device.type == "cuda" else _free_memory(place)) or needed
    return UsageError(f"out of memory on {where}: a step needs about {_in_words(needed)}.\n"
                      + _what_fits(config, place, classes, resuming, found, min(needed, there)))


def _bound(config, place):
    """Return bytes that are more than any step here takes."""
    shape, wide = PictureShape.of_config(config), max(1, config.g_conv_dim / 64, config.d_conv_dim / 64)
    attention = max((*(config.g_attn or ()), *(config.d_attn or ())), default=0)        # positions on the shorter side
    aspect = shape.height * shape.width / min(shape.height, shape.width)**2
    per_image = 8000 * shape.values * wide**2 + 48 * (attention**2 * aspect)**2         # WGAN-GP holds the N x N matrix
    batch = config.batch_size // place.world_size
    images = 4 * config.d_iters * batch * shape.values
    constant = 2 * 2**30 * wide**2 + 2**19 * wide * config.z_dim
    return constant + images + batch // config.accumulate * per_image


def _free_memory(place):
    """Return the bytes of memory that this process can get on its device, 0 if unknown."""
    if place.device.type == "cuda":
        return torch.cuda.mem_get_info(place.device)[0]
    if place.device.type == "mps":
        return mps.free_memory()
    return available_memory() // distributed.on_this_machine()


def _what_fits(config, place, classes, resuming, found, free):
    """Return in words with which flags a step fits into `free` bytes: a batch in more parts, or smaller pictures.
    `found` is the Estimate of the config.
    """
    for changed in _smaller(config, place, resuming):
        if found.step * config.accumulate > 4 * free * changed.accumulate and changed.imsize == config.imsize:
            continue                                    # clearly too few parts: each estimate takes a second
        needed = estimate(changed, place, classes).total
        if needed * MARGIN < free:
            flags = [f"--{name} {written(getattr(changed, name))}" for name in _named(config, changed)]
            parts = " (a batch in parts)" if changed.accumulate > 1 else ""
            return f"Give {' '.join(flags)}{parts}, which needs about {_in_words(needed)}"
    if resuming:
        return "Not even one picture at a time fits; this run needs a larger machine"
    return "Give smaller --g_conv_dim and --d_conv_dim, or a smaller --imsize" + (
        ", or --d_features none" if config.d_features != "none" else "")


def _smaller(config, place, resuming):
    """Yield the config with a batch in more and more parts, then with recomputed activations, too, then, unless
    `resuming` a run, with smaller pictures.
    """
    count, family = config.batch_size // place.world_size, parameter.FAMILIES[config.model]
    divisors = [parts for parts in range(1, count + 1) if count % parts == 0]
    for parts in divisors:
        if parts > config.accumulate:
            yield Config.of({**vars(config), "accumulate": parts})
    if not config.checkpointing:
        yield Config.of({**vars(config), "accumulate": count, "checkpointing": True})
    size = None if resuming else halved(config.imsize)
    while size and short_side(size) in family.IMSIZES:
        values = {**vars(config), "imsize": size}
        try:
            family.check(values)
        except UsageError:                              # attention at sizes that are not there
            values |= _usual_attention(config, size)
        for parts in divisors:
            yield Config.of({**values, "accumulate": parts})
        size = halved(size)


def _usual_attention(config, imsize):
    """Return {flag: value} of the feature sizes with attention that a run at `imsize` has, if none are typed."""
    values = {**vars(config), "imsize": imsize, **dict.fromkeys(ATTENTION)}
    parameter.FAMILIES[config.model].fill_in(values, lambda *_: True)
    return {name: values[name] for name in ATTENTION}


def _named(config, changed):
    """Return the flags that make `config` the `changed` one; attention that goes by the size needs none."""
    usual = _usual_attention(config, config.imsize)
    return [name for name in ("imsize", *ATTENTION, "accumulate", "checkpointing")
            if getattr(changed, name) != getattr(config, name) != usual.get(name)]


def _holder(place):
    return "this machine" if place.device.type == "cpu" else place.device


def _in_words(size):
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(1, size / 2**20):.0f} MiB"


class _Shapes(Trainer):
    """A Trainer on the meta device: with the shapes of a run's tensors, but no memory, and nothing is computed."""

    def __init__(self, config, classes, precision):
        # not Trainer's own, which initializes a run
        device = torch.device("meta")
        self.config, self.place, self.classes = config, distributed.Place(device), classes
        self.precision = copy.copy(precision)
        self.precision.device = device
        self.G, self.D = (net.to(memory_format=torch.channels_last).train()
                          for net in families.build_shapes(config, classes))
        for net in (self.G, self.D) if config.checkpointing else ():
            for block in net.large_blocks():
                block.forward = _as_on_gpu(block.forward)       # backward passes, which call it again, leave this mode
            recompute_activations(net.large_blocks())
        self.objective = families.build_objective(config, device)
        self._use_eager_networks()
        frozen = set(families.frozen_of_d(self.D, config.freeze_d).values())
        self._trained_of_d = [weight for weight in self.D.parameters() if weight not in frozen]
        # without moments; those of Adam, which has no meta device, are of known size
        self.g_scale, self.d_scale = (LossScale(torch.optim.SGD(net.parameters()), device, enabled=False)
                                      for net in (self.G, self.D))
        self.g_average = self.d_average = GradientAverage([])

    def generate(self, count):
        config = self.config
        z = torch.empty(count, config.z_dim + (vgg.WIDTH if config.metadata else 0), device="meta")
        labels = torch.zeros(count, dtype=torch.long, device="meta") if self.classes else None
        with shared_weights(), self.precision.autocast():
            return self.G(z, labels), labels

    def constant_bytes(self):
        """Return the bytes of weights, G_ema, Adam's moments and a frozen VGG-16."""
        frozen = [getattr(self.objective, name, None) for name in ("distance", "maps")]
        return sum(times * sum(weight.nbytes for weight in net.parameters())
                   for times, net in ((4, self.G), (3, self.D), *((1, net) for net in frozen))
                   if isinstance(net, torch.nn.Module))


class _Ledger(TorchDispatchMode):
    """`peak`: the most bytes that tensors made inside held at one time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.held, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key = storage._cdata
        if key not in self.sizes:                       # not that of a view
            self.sizes[key] = storage.nbytes()
            self.held += self.sizes[key]
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._free, key)

    def _free(self, key):
        self.held -= self.sizes.pop(key)


class _AsOnGPU(TorchFunctionMode):
    """On the meta device: autocast as on a GPU, and attention by a kernel that never holds the N x N matrix."""

    ROUNDED = (F.conv2d, F.conv_transpose2d, F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention and torch.backends.cuda.mem_efficient_sdp_enabled():
            return _FusedAttention.apply(*args)
        if function in self.ROUNDED and torch.is_autocast_enabled("cpu"):       # see `Precision.autocast`
            dtype = torch.get_autocast_dtype("cpu")
            args = [arg.to(dtype) if isinstance(arg, torch.Tensor) else arg for arg in args]
        return function(*args, **(kwargs or {}))


def _as_on_gpu(forward):
    """Return a forward pass in the mode `_AsOnGPU`."""
    def run(*args, **kwargs):
        with _AsOnGPU():
            return forward(*args, **kwargs)
    return run


class _FusedAttention(torch.autograd.Function):
    """The tensors that the fused kernel keeps: q (B, 1, N, D), k (B, 1, M, D), v (B, 1, M, C) -> (B, 1, N, C)."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = q.new_empty(*q.shape[:-1], v.size(-1))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
