"""A training step: D phase, G phase, EMA, and the pictures of a moment. One step for every family.

One step is one update of G. The trainer owns every `backward()` and every optimizer step; what the losses are is the
objective's business, what D returns is its family's. A step never waits for the device: statistics stay there until
`--log_step`. What changes from step to step reaches it in tensors, so that a step can be recorded once and repeated.
Records fork the random state, so that switching them on changes no weight.
"""

import copy
import importlib.util
import json
from functools import cached_property, partial

import torch

import distributed
import drawing
import gallery
import metadata
import utils
from data_loader import normalize
from diffaug import augment
from distributed import say
from families import FAMILIES, View, networks
from fast_step import FastStep, Way, recorded
from metrics import Drawn
from parameter import as_json
from precision import Precision
from spectral import power_iterate, shared_weights

COMPILED_FROM = 100_000     # steps ahead that `--compile auto` compiles for: a minute or two, for some 0.7 ms a step


class Trainer:
    """Networks, optimizers and counters of one run, and the steps on them.

    `bank` holds the metadata that G is fed beside its noise, None without. Raises DataError where the objective needs
    weights that are missing.
    """

    def __init__(self, config, dataset, place, bank=None):
        self.config, self.dataset, self.place = config, dataset, place
        self.folders = utils.RunFolders.of(config)
        self.precision = Precision(config.precision, place.device)
        self.family = FAMILIES[config.model]
        utils.seed_everything(config.seed)
        self.G, self.D = (net.train() for net in networks(config, place.device))
        self.objective = self.family.objective(config, place.device)
        self.latents = metadata.Latents(config.z_dim, bank, config.metadata_sample, place.device)
        distributed.broadcast(self.G, self.D)
        self.G_ema = copy.deepcopy(self.G).requires_grad_(False).eval()
        self._do_not_compile()
        self.g_optimizer = self._adam(self.G, config.g_lr)
        self.d_optimizer = self._adam(self.D, config.d_lr)
        # their own generator: the fixed z of a run depend on the seed alone
        generator = torch.Generator().manual_seed(config.seed)
        self.fixed_z = self.latents.sampling(gallery.grid_side(config.imsize) ** 2, generator)
        self.settling_z = self.latents.sampling(drawing.SETTLING_IMAGES, generator).to(place.device)
        utils.seed_everything(config.seed + place.rank)     # processes start from equal weights and draw unequal z
        self.step = 0
        self.samples_seen = 0

    # ------------------------------------------------------------------------------------------ the algorithm

    def train_step(self, real_images):
        """One step on the next `d_iters` batches of `real_images`. Returns {name: 0-d tensor on the device}."""
        batches = [next(real_images) for _ in range(self.config.d_iters)]   # of (B, 3, imsize, imsize) in [-1, 1]
        self._set_learning_rates()
        with self.precision.switched():
            stats = self._fast_step(batches)
        # A young average would remember the random start: its horizon grows with the run up to ema_decay's.
        utils.ema_update(self.G_ema, self.G, decay=min(self.config.ema_decay, (1 + self.step) / (10 + self.step)))
        self.step += 1
        self.samples_seen = real_images.samples_seen
        return stats

    def _updates(self, batches):
        """D's updates, one on each of the `batches` of real images, and G's. Returns their statistics."""
        config = self.config
        # one batch of fakes for both phases; in parts its graphs would all have to be held
        reuse_fake = config.d_iters == 1 and config.accumulate == 1
        power_iterate(self.G)

        # D phase: minimize d_loss(D)
        self.D.requires_grad_(True)
        for batch in batches:
            reals = batch.chunk(config.accumulate)
            power_iterate(self.D)
            d_stats = []
            for real in reals:
                with torch.set_grad_enabled(reuse_fake):
                    fake = self.generate(real.size(0))
                with shared_weights(self._ahead(self.D)), self.precision.autocast():
                    d_loss, stats = self._d_loss(self.D, self.seen(real), [self.seen(x.detach()) for x in fake])
                self._backward(d_loss)
                d_stats.append({"d_loss": d_loss.detach(), **stats})
            self._update(self.d_optimizer)

        # G phase: minimize g_loss(G). D's gradients are not wanted: freezing it halves the backward pass.
        self.D.requires_grad_(False)
        g_stats = []
        for real in reals:
            if not reuse_fake:
                fake = self.generate(real.size(0))
            with shared_weights(self._ahead(self.D)), self.precision.autocast():
                g_loss, stats = self._g_loss(self.D, [self.seen(x) for x in fake])
            self._backward(g_loss)
            g_stats.append({"g_loss": g_loss.detach(), **stats})
        self._update(self.g_optimizer)
        return {**_mean(d_stats), **_mean(g_stats)}

    def seen(self, images):
        """Images as D sees them, augmented: real and fake alike, in both phases."""
        return augment(images, self.config.augment)

    def generate(self, count):
        """[images, ...] of fresh z, largest first."""
        with shared_weights(self._ahead(self.G)), self.precision.autocast():
            return self._G(self.latents.training(count))

    def _ahead(self, net):
        """The network whose W / sigma is wanted ahead: one that is compiled would compile that as well.

        CUDA's convolutions then got weights that lay in memory otherwise than the compiler had assumed.
        """
        return net if self._G is not self.G else None

    def _backward(self, loss):
        """Add the gradients of one of the parts that `--accumulate` makes of a batch."""
        (loss / self.config.accumulate).backward()

    @staticmethod
    def _update(optimizer):
        distributed.average_gradients(optimizer.param_groups[0]["params"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _adam(self, net, lr):
        on_gpu = self.place.device.type == "cuda"
        return torch.optim.Adam(net.parameters(), torch.tensor(lr, device=self.place.device) if on_gpu else lr,
                                (self.config.beta1, self.config.beta2), fused=True, capturable=on_gpu)

    def _set_learning_rates(self):
        factor = self.config.lr_decay ** (self.samples_seen // len(self.dataset))
        for optimizer, lr in ((self.g_optimizer, self.config.g_lr), (self.d_optimizer, self.config.d_lr)):
            (group,) = optimizer.param_groups
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr * factor)
            else:
                group["lr"] = lr * factor

    # ------------------------------------------------------------------------------------- faster ways to the same

    @cached_property
    def _fast_step(self):
        return FastStep(self._updates, (self.G, self.D), (self.g_optimizer, self.d_optimizer), self.place.device,
                        list(self._ways()))

    def _ways(self):
        config, on_gpu = self.config, self.place.device.type == "cuda"
        if self.place.world > 1:
            # one that fails or decides alone would leave the others waiting
            for flag in ("compile", "cuda_graph"):
                if getattr(config, flag) is True:
                    say(f"note: --{flag} is for one process; steps go on without it")
            return
        # on two cores of a CPU compiling took one to three minutes and saved a tenth of a step
        auto = on_gpu and not config.deterministic          # whether one is faster may turn out otherwise next time
        pays = auto and config.total_step - self.step >= COMPILED_FROM and importlib.util.find_spec("triton")
        if pays if config.compile == "auto" else config.compile:
            yield Way("compile", config.compile is True, self._compile, self._do_not_compile)
        if auto if config.cuda_graph == "auto" else config.cuda_graph:
            yield Way("cuda_graph", config.cuda_graph is True, recorded)

    def _compile(self, step, images):
        say("--compile: compiling the networks, which takes a minute or two")
        # the random numbers of a plain step, at the price of a kernel for each, and in its order: moved to where they
        # take less memory, a FastGAN's label noise and its quadrants changed places
        options = {"fallback_random": True, "reorder_for_peak_memory": False}
        compiled = partial(torch.compile, dynamic=False, options=options)
        self._G, self._g_loss = compiled(self.G), compiled(self.objective.g_loss)
        if not self.objective.double_backward:              # what is compiled has none
            self._d_loss = compiled(self.objective.d_loss)
        return step

    def _do_not_compile(self):
        # what a step calls: these, or what they were compiled to
        self._G, self._d_loss, self._g_loss = self.G, self.objective.d_loss, self.objective.g_loss

    # ---------------------------------------------------------------------------------------------- the state

    def state(self):
        """Everything needed to go on, bit for bit. With several processes every one of them must call this."""
        states = distributed.gather(utils.random_states(self.place.device))
        return {
            "step": self.step, "samples_seen": self.samples_seen,
            "config": json.loads(as_json(self.config)),
            "G": self.G.state_dict(), "D": self.D.state_dict(), "G_ema": self.G_ema.state_dict(),
            "g_optimizer": self.g_optimizer.state_dict(), "d_optimizer": self.d_optimizer.state_dict(),
            "fixed_z": self.fixed_z, "metadata": self.latents.state(), "random": states,
        }

    def settle(self, images=drawing.SETTLING_IMAGES):
        """Make G_ema fit to be looked at or saved; see `drawing.settle_batch_statistics`."""
        with utils.forked_random_state(self.place.device):
            drawing.settle_batch_statistics(self.G_ema, self.settling_z[:images], self.precision,
                                            drawing.batch_for(self.config.imsize))

    def is_finite(self):
        """Whether every weight is a number; waits for the device. A checkpoint that is not would be worthless."""
        weights = [*self.G.parameters(), *self.D.parameters()]
        return bool(torch.stack([weight.isfinite().all() for weight in weights]).all())

    def restore(self, state):
        """Go on from what `state()` returned."""
        for name in ("G", "D", "G_ema"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("g_optimizer", "d_optimizer"):
            optimizer = getattr(self, name)
            # its settings are those of this command line and this device
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state[name]["state"]})
        self.step, self.samples_seen, self.fixed_z = state["step"], state["samples_seen"], state["fixed_z"]
        if self.place.rank < len(state["random"]):
            utils.restore_random_states(state["random"][self.place.rank], self.place.device)   # last of all

    # ----------------------------------------------------------------------------------------------- measures

    def measure(self, meter, stopped):
        """[Score, ...] by `meter` of the samples that a checkpoint of this step gives; None if `stopped()` came true.

        All processes must call this. G_ema must be settled.
        """
        config = self.config
        pictures = Drawn(self.G_ema, self.latents, config.num_eval, config.seed, self.precision, config.imsize)
        with utils.forked_random_state(self.place.device):
            return meter.measure(pictures, self.latents.source(config.seed), stopped)

    # ------------------------------------------------------------------------------------------------ records

    @cached_property
    def real_pictures(self):
        """As many real pictures as a grid shows, spread over the data set: (B, 3, imsize, imsize) in [-1, 1], CPU."""
        count, shown = len(self.dataset), min(len(self.fixed_z), len(self.dataset))
        return normalize(self.dataset.gather([i * count // shown for i in range(shown)]))

    @torch.no_grad()
    def write_pictures(self):
        """The grid of G_ema at the fixed z and the family's own pictures. Returns {name: float}, figures on these."""
        config, device, folders = self.config, self.place.device, self.folders
        self.D.eval()
        with utils.forked_random_state(device):
            images = drawing.draw(self.G_ema, self.fixed_z, self.precision, drawing.batch_for(config.imsize))
            view = View(self.fixed_z.to(device), images.to(device), self.real_pictures.to(device),
                        folders.samples, folders.attention, self.step, config.attn_queries, config.attn_raw)
            gallery.save_grid(images, view.samples / view.name("fake"))
            figures = self.family.write_pictures(self.G_ema, self.D, view)
        self.D.train()
        return figures


def _mean(parts):
    """{name: mean over the parts of a batch} of their statistics."""
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]} if parts[1:] else parts[0]
