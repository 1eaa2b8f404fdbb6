"""ONE training step: D phase, G phase, EMA; and the state that it changes.

One step is one update of G. The trainer owns every `backward()` and every optimizer step. The objective computes the
losses and is the only one to unpack what D returns. A step never synchronizes with the device: statistics stay there
until `--log_step`, and what changes between steps is in tensors, so that a step can be captured as a CUDA graph.
"""

import copy
import importlib.util
import json
from dataclasses import replace
from functools import cached_property, partial

import torch

import utils
from device import distributed
from device.distributed import say
from device.fast_step import FastStep, StepVariant, capture_cuda_graph
from device.loss_scale import LossScale, finite_statistics
from device.replicas import GradientAverage, check_replicas, draw_rows, sync_batch_norm
from diffaug import augment
from families import FAMILIES, build_networks, build_objective, frozen_of_d
from gallery.grid import grid_side
from generate.draw import BN_STATS_IMAGES, batch_for, recompute_bn_stats
from generate.latents import Latents
from layers.recompute import recompute_activations
from parameter import as_json
from spectral import power_iterate, shared_weights


class Trainer:
    """Networks, optimizers and counters of one run, and the step on them.

    `epoch_length` is the number of training pictures. `bank` holds the metadata that G takes beside its noise, or is
    None; `classes`, the Classes, too. Raise DataError if weights that the objective needs are missing.
    """

    def __init__(self, config, place, precision, epoch_length, bank=None, classes=None):
        self.config, self.place, self.precision, self.epoch_length = config, place, precision, epoch_length
        self.step = self.samples_seen = 0
        self.is_whole = True                                # whether the state is that after a whole step
        device = place.device
        if device.type == "cpu":
            utils.keep_freed_memory()
        utils.seed_everything(config.seed)
        self.G, self.D = (net.train() for net in build_networks(config, device, classes))
        self.objective = build_objective(config, device)
        self.latents = Latents(config.z_dim, bank, config.metadata_sample, device, classes)
        distributed.broadcast(self.G, self.D)
        self.G_ema = copy.deepcopy(self.G).requires_grad_(False).eval()
        # G_ema keeps the plain batch norm: its statistics come from the same images on every rank
        self.sync_bn = place.world_size > 1 and config.sync_bn is not False
        for net in (self.G, self.D) if self.sync_bn else ():
            sync_batch_norm(net, device)
        for net in (self.G, self.D) if config.checkpointing else ():
            recompute_activations(net.large_blocks())
        self._use_eager_networks()
        self.g_optimizer = self._adam(self.G, config.g_lr)
        self.d_optimizer = self._adam(self.D, config.d_lr)
        self.is_fp16 = precision.name == "fp16"
        self.g_scale, self.d_scale = (LossScale(optimizer, device, self.is_fp16)
                                      for optimizer in (self.g_optimizer, self.d_optimizer))
        self.loss_scales = {"G": self.g_scale, "D": self.d_scale}
        self._finite_stats = {}                         # in fp16: those of the last steps
        frozen = set(frozen_of_d(self.D, config.freeze_d).values())
        for weight in frozen:
            weight.requires_grad_(False)
        self._trained_of_d = [weight for weight in self.D.parameters() if weight not in frozen]
        self.g_average, self.d_average = (GradientAverage(parameters, config.accumulate)
                                          for parameters in (self.G.parameters(), self._trained_of_d))
        # a separate generator: a run's fixed inputs depend on the seed alone
        generator = torch.Generator().manual_seed(config.seed)
        side = grid_side(config.imsize)
        self.fixed_inputs = self.latents.sampling(side**2, generator)
        if classes is not None:
            self.fixed_inputs = replace(self.fixed_inputs, labels=classes.rows(side, config.classes))
        self.bn_stats_inputs = self.latents.for_bn_stats(BN_STATS_IMAGES, generator).to(device)
        utils.seed_everything(config.seed)      # CRUCIAL: the same on every rank, see `draw_rows`
        self._is_checked = False

    # ------------------------------------------------------------------------------------------ the algorithm

    def train_step(self, batches):
        """Train one step on the next `d_iters` of `batches`, an iterator over Batch. Return {name: 0-d tensor}."""
        batches_of_d = [next(batches) for _ in range(self.config.d_iters)]
        tensors = [batch.images for batch in batches_of_d]              # each (B, C, H, W)
        if self.latents.classes is not None:
            tensors += [batch.labels for batch in batches_of_d]         # each (B,)
        self.is_whole = False                               # until the end of the step, the state belongs to no step
        self._set_learning_rates()
        with self.precision.switched():
            stats = self._without_overflows(self._fast_step(tensors))
        # EMA warm-up, so that early averages forget the initialization
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        utils.ema_update(self.G_ema, self.G, decay if self.step >= self.config.ema_start else 0)
        self.step += 1
        self.samples_seen = batches.samples_seen
        self.is_whole = True
        self._check_replicas()
        return stats

    def update(self, tensors):
        """Update D once on each batch of real images, then G once. Return {name: 0-d tensor}.

        `tensors`: the images of each batch, then, in a run with classes, the labels of each.
        """
        config = self.config
        images, labels = tensors[:config.d_iters], tensors[config.d_iters:]
        # use D's fake batch again for G; not with --accumulate, which would hold the graphs of all parts in memory
        reuse_fake = config.d_iters == 1 and config.accumulate == 1
        power_iterate(self.G)

        # D phase: minimize d_loss(D)
        self._train_d(True)
        for batch in zip(images, labels, strict=True) if labels else zip(images):
            power_iterate(self.D)
            reals, d_stats = [], []
            for real, real_labels in self._parts(*batch):
                with torch.set_grad_enabled(reuse_fake):
                    fake, fake_labels = self.generate(len(real))
                with shared_weights(self._compiled(self.D)), self.precision.autocast():
                    reals.append((self.augment(real), real_labels))
                    loss, stats = self._d_loss(self.D, reals[-1][0], [self.augment(x.detach()) for x in fake],
                                               (real_labels, fake_labels))
                self._backward(loss, self.d_scale)
                d_stats.append({"d_loss": loss.detach(), **stats})
            self._optimize(self.d_scale, self.d_average)

        # G phase: minimize g_loss(G). Freezing D skips its weight gradients, which halves the backward pass.
        self._train_d(False)
        g_stats = []
        for real, real_labels in reals:
            if not reuse_fake:
                fake, fake_labels = self.generate(len(real))
            with shared_weights(self._compiled(self.D)), self.precision.autocast():
                loss, stats = self._g_loss(self.D, real, [self.augment(x) for x in fake], (real_labels, fake_labels))
            self._backward(loss, self.g_scale)
            g_stats.append({"g_loss": loss.detach(), **stats})
        self._optimize(self.g_scale, self.g_average)
        return {**_mean(d_stats), **_mean(g_stats)}

    def _without_overflows(self, stats):
        """In fp16: return the statistics, and for what overflowed in this step that of the last finite one.

        Its update was skipped; what is not finite for long still ends the run, see `LossScale.is_stuck`.
        """
        if self.is_fp16:
            self._finite_stats = {name: value.where(value.isfinite(), self._finite_stats.get(name, value.new_zeros(())))
                                  for name, value in stats.items()}
        return self._finite_stats if self.is_fp16 else stats

    def _parts(self, images, labels=None):
        """Return [(images, labels or None), ...]: the `--accumulate` parts of a batch."""
        count = self.config.accumulate
        of_labels = [None] * count if labels is None else labels.chunk(count)
        return list(zip(images.chunk(count), of_labels, strict=True))

    def augment(self, images):
        """Apply `--augment`: to all images that D takes, real and fake, in both phases."""
        augmented = augment(images, self.config.augment, draw_rows)
        return augmented.contiguous() if images.device.type == "mps" else augmented     # see device/mps.py

    def generate(self, count):
        """Return (G's [images, ...], largest first; their labels or None) for `count` newly drawn inputs."""
        inputs = self.latents.training(count)
        with shared_weights(self._compiled(self.G)), self.precision.autocast():
            return self._G(**inputs.as_arguments()), inputs.labels

    def _backward(self, loss, scale):
        """Accumulate the gradients of one of the `--accumulate` parts of a batch."""
        scale.backward(loss / self.config.accumulate)

    @staticmethod
    def _optimize(scale, average):
        average.finish()                                    # before `step`: ranks must skip the same updates
        scale.step()
        scale.optimizer.zero_grad(set_to_none=True)

    def _adam(self, net, lr):
        device = self.place.device
        on_gpu = device.type == "cuda"
        return utils.Adam(net.parameters(), torch.tensor(lr, device=device) if on_gpu else lr,
                          (self.config.beta1, self.config.beta2), fused=device.type != "mps", capturable=on_gpu)

    def _train_d(self, wanted):
        """Switch the gradients of D's weights on or off."""
        for weight in self._trained_of_d:
            weight.requires_grad_(wanted)

    def _set_learning_rates(self):
        factor = self.config.lr_decay ** (self.samples_seen // self.epoch_length)
        for optimizer, lr in ((self.g_optimizer, self.config.g_lr), (self.d_optimizer, self.config.d_lr)):
            (group,) = optimizer.param_groups
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr * factor)
            else:
                group["lr"] = lr * factor

    # --------------------------------------------------------------------------------- faster variants of the same step

    @cached_property
    def _fast_step(self):
        def body(tensors):
            with finite_statistics((self.G, self.D), self.is_fp16):
                return self.update(tensors)

        return FastStep(body, (self.G, self.D), (self.g_optimizer, self.d_optimizer), self.place.device,
                        self.step_variants(), self.loss_scales.values())

    def step_variants(self):
        """Return the [StepVariant, ...] that flags, hardware and the number of steps ahead call for."""
        config, on_gpu = self.config, self.place.device.type == "cuda"
        if self.place.world_size > 1:
            # a rank whose variant fails to start would leave the others waiting
            for flag in ("compile", "cuda_graph"):
                if getattr(config, flag) is True:
                    say(f"note: --{flag} is for one process; training continues without it")
            return []
        if config.checkpointing and config.compile is True:
            say("note: --compile is not for --checkpointing true; training continues without it")
        # not on CPUs: on two cores compiling took one to three minutes and saved 10% of a step
        auto = on_gpu and not config.deterministic
        ahead = config.total_step - self.step
        pays = auto and ahead >= FAMILIES[config.model].compile_from and importlib.util.find_spec("triton")
        variants = []
        if not config.checkpointing and (pays if config.compile == "auto" else config.compile):
            variants.append(StepVariant("compile", self._compile, self._use_eager_networks))
        if auto if config.cuda_graph == "auto" else config.cuda_graph:
            variants.append(StepVariant("cuda_graph", capture_cuda_graph))
        return variants

    def _compile(self, step, images):
        say("--compile: compiling the networks, which takes a minute or two")
        # the random numbers of an eager step, at the cost of one kernel launch per draw, and in the same order:
        # reordering for peak memory swapped FastGAN's draws of label noise and of quadrants
        options = {"fallback_random": True, "reorder_for_peak_memory": False}
        compiled = partial(torch.compile, dynamic=False, options=options)
        self._G, self._g_loss = compiled(self.G), compiled(self.objective.g_loss)
        if not self.objective.double_backward:              # compiled graphs have no double backward
            self._d_loss = compiled(self.objective.d_loss)
        return step

    def _use_eager_networks(self):
        # what a step calls; `_compile` replaces them
        self._G, self._d_loss, self._g_loss = self.G, self.objective.d_loss, self.objective.g_loss

    def _compiled(self, net):
        """Return the network if it is compiled, else None: `shared_weights` then computes W / sigma before its graph.

        Inside the graph, CUDA's convolutions got weights in another memory format than the compiler had assumed.
        """
        return net if self._G is not self.G else None

    # ---------------------------------------------------------------------------------------------- the state

    def state(self):
        """Return everything needed to resume: bit for bit, or up to rounding with another number of ranks."""
        return {
            "step": self.step, "samples_seen": self.samples_seen,
            "config": json.loads(as_json(self.config)),
            "G": self.G.state_dict(), "D": self.D.state_dict(), "G_ema": self.G_ema.state_dict(),
            "g_optimizer": self.g_optimizer.state_dict(), "d_optimizer": self.d_optimizer.state_dict(),
            "fixed_z": self.fixed_inputs.z, "metadata": self.latents.state(),
            "classes": self.latents.classes and self.latents.classes.state(),
            "loss_scales": {net: scale.state() for net, scale in self.loss_scales.items()},     # of fp16
            "random": [utils.random_states(self.place.device)],     # a list: by rank in older checkpoints
        }

    def restore(self, state):
        """Resume from what `state()` returned."""
        for name in ("G", "D", "G_ema"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("g_optimizer", "d_optimizer"):
            optimizer = getattr(self, name)
            # take the moments only: learning rates, betas and options are those of this command line and device
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state[name]["state"]})
        for net, scale in self.loss_scales.items():
            scale.restore(state.get("loss_scales", {}).get(net))    # older checkpoints have none
        self.step, self.samples_seen = state["step"], state["samples_seen"]
        self.fixed_inputs = replace(self.fixed_inputs, z=state["fixed_z"])
        utils.restore_random_states(state["random"][0], self.place.device)      # last: no draws after

    def recompute_bn_stats(self, images=BN_STATS_IMAGES):
        """Recompute G_ema's batch-norm statistics, before it is shown or saved. Leaves random states as they are."""
        with utils.forked_random_state(self.place.device):
            recompute_bn_stats(self.G_ema, self.bn_stats_inputs[:images], self.precision,
                               batch_for(self.config.imsize))

    def _check_replicas(self):
        """Raise DriftError if the ranks differ, after the first step of this process and every `--check_replicas`."""
        every = self.config.check_replicas
        if self.place.world_size == 1 or not every or (self._is_checked and self.step % every):
            return
        # ranks that read different checkpoints differ in the step; unequally many draws show in the random state
        tensors = {"the step": torch.tensor(self.step), "the random state": torch.get_rng_state()}
        if self.place.device.type == "cuda":
            tensors["CUDA's random state"] = torch.cuda.get_rng_state(self.place.device)
        tensors |= {f"{net}.{name}": tensor for net in ("G", "D", "G_ema")
                    for name, tensor in getattr(self, net).state_dict().items()
                    # with --sync_bn false each rank has the statistics of its own images
                    if self.sync_bn or not name.endswith(("running_mean", "running_var"))}
        check_replicas({name: tensor.to(self.place.device) for name, tensor in tensors.items()}, self.step)
        self._is_checked = True

    def is_finite(self):
        """Return whether all that a checkpoint holds is finite: weights, running statistics, G_ema, Adam's moments.

        Synchronizes with the device once.
        """
        tensors = [tensor for net in (self.G, self.D, self.G_ema) for tensor in net.state_dict().values()]
        tensors += [tensor for optimizer in (self.g_optimizer, self.d_optimizer)
                    for moments in optimizer.state.values() for tensor in moments.values()]
        on_device = [tensor.isfinite().all().to(self.place.device) for tensor in tensors]
        return bool(torch.stack(on_device).all())


def _mean(parts):
    """Return {name: mean over the `--accumulate` parts of a batch}."""
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]} if parts[1:] else parts[0]
