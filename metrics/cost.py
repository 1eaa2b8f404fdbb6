"""Cost of a training step: time, peak memory, parameters (Table 1 of SLAE-FastGAN), of one or several configurations;
and an estimate of its memory, before there is any, for runs that will not fit.

Several configurations are timed alternately in one process, so that drifting machine speed favours none of them. GPU
memory is the peak allocation minus what was allocated before the networks were built. Peak main memory can only be
measured per process, so each configuration gets its own.
"""

import copy
import gc
import multiprocessing
import platform
import re
import statistics
import time
import weakref
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import families
import parameter
from data_loader import Batch
from dataset.decoded_cache import available_memory
from device import distributed, fast_step, mps
from device.loss_scale import LossScale
from device.precision import Precision
from device.replicas import GradientAverage
from errors import Failure, UsageError
from flags.pictures import PictureShape, halved, short_side
from layers.recompute import recompute_activations
from parameter import Config
from pretrained import vgg
from spectral import shared_weights
from storage.score_table import Score
from trainer import Trainer

SECONDS = 60        # of timing per configuration, in at least LEAST rounds
LEAST = 8
TURN = 0.5          # seconds per configuration in a round, at least one step
WARM_UP = fast_step.WARM_UP + 1         # steps: with the last one the faster step variants start
OWN = "the run's model"
MARGIN = 1.15       # of estimated memory: what is advised fits with it, what is refused does not fit without it


def require(config):
    """Raise DataError or UsageError if weights are missing; Failure if the system does not tell a process's memory."""
    families.require(config)
    _peak_resident()


def evaluate(evaluation):
    """Yield [Score, ...]: the cost of training the evaluation's run. Measured on rank 0 only."""
    if distributed.is_first():
        latents = evaluation.trained.latents
        yield measure(evaluation.config, latents.bank, evaluation.place, latents.classes)


class ConstantBatch:
    """Stands in for the data loader: the same batch of noise every time. The content does not affect the timing."""

    def __init__(self, config, device, classes=None):
        generator = torch.Generator().manual_seed(0)
        shape = (config.batch_size, *PictureShape.of_config(config).size)
        self.images = (torch.rand(shape, generator=generator) * 2 - 1).to(device)
        self.labels = None if classes is None else classes.draw(config.batch_size, generator).to(device)
        self.samples_seen = 0

    def __len__(self):
        return len(self.images)

    def __next__(self):
        return Batch(self.images, self.labels)


class TimedConfig:
    """One configuration in training; `seconds` holds the time per step of each round."""

    def __init__(self, config, place, bank=None, classes=None):
        self.config, self.place = config, place
        self.batches = ConstantBatch(config, place.device, classes)
        precision = Precision(config.precision, place.device)
        self.trainer = Trainer(config, place, precision, len(self.batches), bank, classes)
        self.seconds = []

    def run(self, steps):
        """Train for `steps` steps; return the seconds per step, including the device's work."""
        began = time.perf_counter()
        for _ in range(steps):
            self.trainer.train_step(self.batches)
        if self.place.device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - began) / steps

    def parameters(self):
        """Return [number of G's parameters, number of D's parameters]."""
        return [sum(weight.numel() for weight in net.parameters()) for net in (self.trainer.G, self.trainer.D)]


def alternate(sides, seconds=None):
    """Time the TimedConfigs `sides` alternately, `seconds` each (None: SECONDS), reversing the order every round.

    Append to their `seconds`; return the steps per round.
    """
    for side in sides:
        side.run(WARM_UP)
    steps = max(1, round(TURN / sides[0].run(WARM_UP)))
    began = time.perf_counter()
    with distributed.progress(None, "round", "timing steps") as progress:
        while progress.n < LEAST or time.perf_counter() - began < (seconds or SECONDS) * len(sides):
            for side in sides if progress.n % 2 else sides[::-1]:
                side.seconds.append(side.run(steps))
            progress.update()
    return steps


def each_ratio(side, other):
    """Return [time of `side` / time of `other`, ...] for each round."""
    return [a / b for a, b in zip(side.seconds, other.seconds, strict=True)]


def measure(config, bank, place, classes=None):
    """Return [Score, ...]: the cost of the run's model and, with `--against`, of the baseline. Raises Failure."""
    sides = {OWN: (config, bank)}
    if config.against:
        name, changes = families.FAMILIES[config.model].baselines[config.against]
        sides[name] = (Config.of({**vars(config), **changes}), None)
    memory = {name: peak_memory(its, bank, place, classes=classes) for name, (its, bank) in sides.items()}
    timed = {name: TimedConfig(its, place, bank, classes) for name, (its, bank) in sides.items()}
    alternate(list(timed.values()))
    unit = "allocated on the GPU" if place.device.type == "cuda" else "resident, over an idle process"
    in_turn = " in turn (time_ratio ± its standard deviation over them)" if config.against else ""
    protocol = (f"cost of training: {config.imsize} px, batch {config.batch_size}, {config.d_iters} D to 1 G, "
                f"{hardware(place.device)}; median over rounds{in_turn}, loading left out; memory: peak {unit}")
    scores = []
    for name, side in timed.items():
        g_parameters, d_parameters = side.parameters()
        values = {"sec_per_1000_steps": 1000 * statistics.median(side.seconds), "peak_memory_mib": memory[name] / 2**20,
                  "g_parameters": g_parameters, "d_parameters": d_parameters}
        scores.append(Score(values, protocol, name))
    if config.against:
        ratios = each_ratio(*timed.values())
        scores[0].values.update(time_ratio=statistics.median(ratios), time_ratio_std=statistics.stdev(ratios))
    return scores


# ------------------------------------------------------------------------------------------------------------ memory


def peak_memory(config, bank, place, kind=TimedConfig, classes=None):
    """Return the peak memory of training `config`, in bytes; `kind` is the class that trains.

    Raises Failure if the process that measures it dies or the system does not report a process's peak memory.
    """
    if place.device.type == "cuda":
        return _peak_of_gpu(partial(kind, config, place, bank, classes), place)
    context = multiprocessing.get_context("spawn")      # a forked process would start with this one's memory
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_peak_memory, args=(vars(config), bank, place, kind, classes, sender))
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        raise Failure("--metrics cost: the process that measures memory ended without a result "
                      "(out of memory?)") from None
    finally:
        child.join()
    if isinstance(result, Failure):
        raise result
    return result


def _peak_of_gpu(build, place):
    gc.collect()                    # reference cycles of an earlier configuration
    before = torch.cuda.memory_allocated(place.device)
    torch.cuda.reset_peak_memory_stats(place.device)
    build().run(WARM_UP)
    return torch.cuda.max_memory_allocated(place.device) - before


def _send_peak_memory(values, bank, place, kind, classes, sender):
    try:
        before = _peak_resident()
        kind(Config.of(values), place, bank, classes).run(WARM_UP)
        sender.send(_peak_resident() - before)
    except Failure as failure:
        sender.send(failure)


def _peak_resident():
    """Return this process's peak resident memory in bytes. Raises Failure if the system does not report it."""
    try:                    # preferred, because on Linux ru_maxrss includes the memory of the parent before the exec
        table = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"^VmHWM:\s*(\d+) kB$", table, re.MULTILINE).group(1)) * 1024
    except (OSError, AttributeError):
        pass
    try:
        import resource
    except ImportError:                                 # Windows
        raise Failure("--metrics cost: this system does not report a process's peak memory") from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024   # bytes on macOS, KiB elsewhere


# --------------------------------------------------------------------------------------------------- estimated memory


class Estimate(NamedTuple):
    """The bytes that a training step takes: `constant` for weights, G_ema and Adam's moments, `step` for the rest."""

    constant: int
    step: int

    @property
    def total(self):
        return self.constant + self.step


def estimate_memory(config, place, classes=0, precision=None):
    """Return the Estimate for one process of a run with so many classes; on a GPU, within some 15 %. `precision` is
    that of the config on the place, if no other is given.

    Tensors alone are counted, not what libraries need. Nothing is computed, and no weights are needed: it takes a
    second or less, whatever the size.
    """
    shapes = _Shapes(config, classes, precision or Precision(config.precision, place.device))
    count = config.batch_size // place.world_size
    tensors = [torch.empty(count, *PictureShape.of_config(config).size, device="meta")] * config.d_iters
    if classes:
        tensors += [torch.zeros(count, dtype=torch.long, device="meta")] * config.d_iters
    with _Ledger() as ledger, _AsOnGPU():
        shapes.update(tensors)
    return Estimate(shapes.constant_bytes(), ledger.peak + sum(tensor.nbytes for tensor in tensors))


def describe_memory(estimate, place):
    """Return a line on an Estimate and on the memory that is free."""
    free = _free_memory(place)
    return (f"memory of a step: about {_in_words(estimate.total)}, of which weights, averages and Adam's moments "
            f"{_in_words(estimate.constant)}" + (f"; {_holder(place)} has {_in_words(free)} free" if free else ""))


def require_memory(config, place, classes, resuming, estimate=None):
    """Raise UsageError, with flags that fit, if a step clearly needs more memory than is free. `estimate`: that of the
    config, if it is known.
    """
    free = _free_memory(place)
    if not free or _bound(config, place) < free:        # the estimate takes a second
        return
    estimate = estimate or estimate_memory(config, place, classes)
    if estimate.total > free * MARGIN:
        raise UsageError(f"--batch_size {config.batch_size} at --imsize {config.imsize}: a step needs about "
                         f"{_in_words(estimate.total)}, and {_holder(place)} has {_in_words(free)} free.\n"
                         + _what_fits(config, place, classes, resuming, estimate, free))


def out_of_memory(config, place, classes, resuming, where):
    """Return the UsageError for a step that ran out of memory on `where`, though it had been expected to fit."""
    estimate = estimate_memory(config, place, classes)
    needed = estimate.total
    # what was taken when it ran out may not be free yet
    there = (torch.cuda.mem_get_info(place.device)[1] if place.device.type == "cuda" else _free_memory(place)) or needed
    return UsageError(f"out of memory on {where}: a step needs about {_in_words(needed)}.\n"
                      + _what_fits(config, place, classes, resuming, estimate, min(needed, there)))


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


def _what_fits(config, place, classes, resuming, estimate, free):
    """Return in words with which flags a step fits into `free` bytes: a batch in more parts, or smaller pictures.
    `estimate` is that of the config.
    """
    for changed in _smaller(config, place, resuming):
        if estimate.step * config.accumulate > 4 * free * changed.accumulate and changed.imsize == config.imsize:
            continue                                    # clearly too few parts: each estimate takes a second
        needed = estimate_memory(changed, place, classes).total
        if needed * MARGIN < free:
            flags = [f"--{name} {str(getattr(changed, name)).lower()}" for name in (
                "imsize", "accumulate", "checkpointing") if getattr(changed, name) != getattr(config, name)]
            parts = " (a batch in parts)" if changed.accumulate > 1 else ""
            return f"Give {' '.join(flags)}{parts}, which needs about {_in_words(needed)}"
    if resuming:
        return "Not even one picture at a time fits; this run needs a larger machine"
    return "Give smaller --g_conv_dim and --d_conv_dim, or a smaller --imsize" + (
        ", or leave out --d_features" if config.d_features != "none" else "")


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
        values = {**vars(config), "imsize": size, "g_attn": None, "d_attn": None}
        family.fill_in(values, lambda *_: True)         # attention goes by the size
        for parts in divisors:
            yield Config.of({**values, "accumulate": parts})
        size = halved(size)


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
        with device:
            nets = families.build(config, classes)
        self.G, self.D = (net.to(memory_format=torch.channels_last).train() for net in nets)
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


def hardware(device):
    """Describe the processor, the number of threads or the GPU, and the version of PyTorch.

    With a GPU too the processor is named, because it determines the time of kernel launches.
    """
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} on {processor()}, torch {torch.__version__}"
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def processor():
    """Return the name of this machine's processor, as far as the system reports it."""
    try:
        table = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"^model name\s*:\s*(.+)$", table, re.MULTILINE).group(1)
    except (OSError, AttributeError):                   # not Linux, or no "model name"
        return platform.processor() or platform.machine()
