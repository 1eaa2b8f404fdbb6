"""The training loop: steps, and at their intervals logs, sample grids, checkpoints and metrics.

A run resumes from its newest checkpoint and locks its folder against other processes. It ends at `--total_step`, after
the current step on SIGINT or SIGTERM, or with an error when a loss or a weight is no longer finite.
"""

import json
import math
import signal
import time
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch

import utils
from data_loader import real_batches, to_images
from device import distributed
from device.distributed import say
from errors import LockedError, NonFiniteError
from families import FAMILIES
from gallery import page
from gallery.grid import save_grid
from gallery.records import Record
from generate import metadata
from generate.draw import BN_STATS_IMAGES, DrawnSamples, batch_for, draw
from metrics import table
from metrics.meter import Meter, of_run
from parameter import RUN_SETTINGS, as_json
from storage import checkpoint
from storage.folders import RunFolders, lock_folder
from storage.journal import MetricsLog
from trainer import Trainer

RECORD_IMAGES = 64          # to recompute batch-norm statistics on before a record; a checkpoint uses BN_STATS_IMAGES


def train(config, dataset, place, precision):
    """Train until `--total_step`, from `--pretrained_model` or the newest checkpoint if there is one.

    Return the exit code: 0, 130 or 143. Raise LockedError, CheckpointError, NonFiniteError, DataError.
    """
    folders = RunFolders.of(config)
    if config.pretrained_model is not None:
        checkpoint.require_step(folders.models, config.pretrained_model)    # before anything is written
    folders.create()
    lock = None
    if distributed.is_first():
        lock = lock_folder(folders.models)
        if lock is None:
            raise LockedError(f"--version {config.version}: another process is training in {folders.models}; "
                              "wait for it, or use another --version")
    try:
        with Interrupt() as interrupt:
            state = checkpoint.load_step(folders.models, config.pretrained_model, warn=say)
            trainer = Trainer(config, place, precision, len(dataset), _find_bank(config, dataset, place, state))
            _restore(trainer, state, folders)
            del state                                   # frees the checkpoint's memory
            if trainer.step >= config.total_step:
                say(f"nothing to do: '{config.version}' has reached step {trainer.step} of --total_step "
                    f"{config.total_step}; raise it to train on. Open {folders.samples / page.NAME} in a browser")
                return 0
            return Run(trainer, dataset, folders, interrupt).loop()
    finally:
        if lock:
            lock.close()


class Due(NamedTuple):
    """The actions that are due after a step."""

    log: bool
    show: bool
    save: bool
    measure: bool
    stop: bool


class Run:
    """One training run: calls the `trainer` for steps; logs, shows, saves and measures into `folders`."""

    def __init__(self, trainer, dataset, folders, interrupt):
        self.trainer, self.dataset, self.folders, self.interrupt = trainer, dataset, folders, interrupt
        self.config, self.place = trainer.config, trainer.place
        # built before the first step: missing weights must fail now, not after hours
        self.meter = Meter(self.config, of_run(self.config, dataset), self.place,
                           self.stopped) if self.config.metric_step else None
        self.figures = {}                               # numbers from the last record, for the next log line
        self.finite_until = trainer.step
        self.window = Window()

    def loop(self):
        """Train until the last step or a signal. Return the exit code."""
        trainer = self.trainer
        if self.stopped():
            say(f"interrupted before step {trainer.step + 1}; run the same command again to resume")
            return 128 + self.interrupt.signal
        with self.opened():
            while trainer.step < self.config.total_step:
                # one step; its statistics stay on the device
                self.window.add(trainer.train_step(self.batches))
                self.progress.update()
                due = self.due()
                if not any(due):
                    continue
                # first make sure that all is finite: nothing else may be logged, shown, saved or measured
                with self.window.paused():
                    means = self.finite_means(due)
                    self.prepare_G_ema(due)
                    if due.show:
                        self.show()
                    if due.log:
                        self.log(means)
                    if due.save or due.stop:
                        self.save()
                    if due.measure and not due.stop:
                        self.measure()
                    if due.show or due.measure:
                        self.write_page()
                if due.stop and trainer.step < self.config.total_step:
                    return self.stop()
            return self.finish()

    # ------------------------------------------------------------------------------------------ what is due, and when

    def due(self):
        """Return what is due after this step by interval or signal; the last step logs, shows, saves, measures."""
        config, step = self.config, self.trainer.step
        last = step == config.total_step
        log, show, save = (last or step % every == 0
                           for every in (config.log_step, config.sample_step, config.model_save_step))
        measure = self.meter is not None and (last or step % config.metric_step == 0)
        # all ranks must stop at the same step: they agree on it at log steps, where they synchronize anyway
        stop = self.stopped() if self.place.world_size == 1 else log and distributed.any_process(
            self.interrupt.signal is not None, self.place.device)
        return Due(log, show, save, measure, stop)

    def stopped(self):
        """Return whether a signal arrived; always False with several processes: one would stop, the others wait."""
        return self.place.world_size == 1 and self.interrupt.signal is not None

    def finite_means(self, due):
        """Return {name: mean since the last log line} of the step's statistics. Synchronizes with the device.

        Raise NonFiniteError if one of them is not finite or, before a checkpoint, a weight is not.
        """
        means = self.window.means()
        wrong = [name for name, value in means.items() if not math.isfinite(value)]
        if (due.save or due.measure or due.stop) and not wrong and not self.trainer.is_finite():
            wrong = ["a weight"]                        # the step's losses were computed before its update
        step = self.trainer.step
        if wrong:
            saved = checkpoint.steps_in(self.folders.models)
            newest = f"the checkpoint of step {saved[-1]} is good" if saved else "no checkpoint was written yet"
            raise NonFiniteError(f"{', '.join(wrong)} became NaN or infinite between steps {self.finite_until} and "
                                 f"{step}; {newest}.\nTry a lower --g_lr and --d_lr, or --sn both.")
        self.finite_until = step
        return means

    def prepare_G_ema(self, due):
        """Recompute G_ema's batch-norm statistics, on fewer images for a record than for a checkpoint or metrics."""
        if due.save or due.measure or due.stop:
            self.trainer.recompute_bn_stats(BN_STATS_IMAGES)
        elif due.show:
            self.trainer.recompute_bn_stats(RECORD_IMAGES)

    # ------------------------------------------------------------------------------------------------- the actions

    @torch.no_grad()
    def show(self):
        """Write a record: the grid of G_ema at the fixed inputs, and what the networks attend to."""
        if not distributed.is_first():
            return
        trainer, config, device, folders = self.trainer, self.config, self.place.device, self.folders
        trainer.D.eval()
        with utils.forked_random_state(device):
            inputs = trainer.fixed_inputs
            images = draw(trainer.G_ema, inputs, trainer.precision, batch_for(config.imsize))
            record = Record(inputs.to(device), images.to(device), self.real_images.to(device), folders.samples,
                            folders.attention, trainer.step, config.attn_queries, config.attn_raw)
            save_grid(images, record.samples / record.name("fake"))
            self.figures = FAMILIES[config.model].write_record(trainer.G_ema, trainer.D, record)
        trainer.D.train()

    def log(self, means):
        """Write a line to metrics.jsonl and update the text of the progress bar."""
        trainer, config, window = self.trainer, self.config, self.window
        gammas = FAMILIES[config.model].gammas(trainer.G, trainer.D)
        values = torch.cat(list(gammas.values())).tolist() if gammas else []        # one synchronization for all
        scalars = {
            **means, **{f"gamma/{layer}": value for layer, value in zip(gammas, values, strict=True)}, **self.figures,
            "epoch": trainer.samples_seen / len(self.dataset),
            "sec_per_step": window.seconds / window.steps,
            "images_per_sec": config.batch_size * config.d_iters * window.steps / window.seconds,
        }
        if self.place.device.type == "cuda":
            scalars["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.place.device) / 2**30
        if self.metrics_log:
            self.metrics_log.write(trainer.step, scalars)
        self.progress.set_postfix_str(_summary(scalars), refresh=False)
        self.figures = {}
        window.clear()

    def save(self):
        """Write a checkpoint and prune the old ones."""
        state = self.trainer.state()
        if distributed.is_first():
            checkpoint.save(state, self.folders.models)
            checkpoint.prune(self.folders.models, self.config.keep_checkpoints)

    def measure(self):
        """Compute the metrics of G_ema's samples; save best.pth if their fid is the best so far."""
        trainer, config = self.trainer, self.config
        samples = DrawnSamples(trainer.G_ema, trainer.latents, config.num_eval, config.seed, trainer.precision,
                               config.imsize)
        with utils.forked_random_state(self.place.device):
            scores = self.meter.measure(samples, trainer.latents.source(config.seed), self.stopped)
        if scores is None:
            return
        if self.metrics_log:
            for score in scores:
                self.metrics_log.write(trainer.step, score.line())
            table.record(config.log_path, config.version, trainer.step, scores)
            values = {name: value for score in scores for name, value in score.values.items()}
            text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.progress.write(f"step {trainer.step}: {text}")
        better = distributed.gather(table.better_fid(scores, checkpoint.best_score(self.folders.models))
                                    if distributed.is_first() else None)[0]
        if better:
            state = {**trainer.state(), "best": better}
            if distributed.is_first():
                checkpoint.save_best(state, self.folders.models)

    def write_page(self):
        """Rewrite the run's page and the overview of all runs."""
        if distributed.is_first():
            page.write_pages(self.folders, self.config)

    def stop(self):
        """Report the interruption. Return the exit code."""
        self.progress.close()
        say(f"interrupted: step {self.trainer.step} is saved in {self.folders.models}; run the same command "
            "again to resume")
        return 128 + (self.interrupt.signal or signal.SIGTERM)

    def finish(self):
        """Report the end of the run. Return the exit code."""
        self.progress.close()
        say(f"done: {self.config.total_step} steps. Open {self.folders.samples / page.NAME} in a browser")
        return 0

    # ------------------------------------------------------------------------------------------- resources of the loop

    @contextmanager
    def opened(self):
        """Open the batches, the metrics log (rank 0 only, else None) and the progress bar; close them at the end."""
        config, trainer, first = self.config, self.trainer, distributed.is_first()
        self.batches = real_batches(config, self.dataset, trainer.samples_seen, self.place.device, self.place.rank,
                                    self.place.world_size)
        self.metrics_log = MetricsLog(self.folders.logs, config.use_tensorboard,
                                      resume_from=trainer.step) if first else None
        self.progress = distributed.progress(config.total_step, "step", initial=trainer.step)
        try:
            if first:
                utils.write_atomically(self.folders.models / "config.json",
                                       lambda path: path.write_text(as_json(config)))
                save_grid(self.real_images, self.folders.samples / "real.png")
            self.window = Window()
            yield
        finally:
            self.progress.close()
            self.batches.close()
            if self.metrics_log:
                self.metrics_log.close()

    @cached_property
    def real_images(self):
        """Real images for a grid, spread evenly over the data set: (N, 3, imsize, imsize) in [-1, 1], on the CPU."""
        indices = utils.spread_indices(len(self.trainer.fixed_inputs), len(self.dataset))
        return to_images(self.dataset.load_batch(indices))


class Window:
    """Sums of the step statistics since the last log line, on the device, and the seconds spent in steps."""

    def __init__(self):
        self.clear()

    def clear(self):
        """Start a new window."""
        self.sums, self.steps, self.seconds, self._began = {}, 0, 0.0, time.perf_counter()

    def add(self, stats):
        """Add the statistics of one step, {name: 0-d tensor}."""
        for name, value in stats.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1

    def means(self):
        """Return {name: mean over the window and all ranks}. Synchronizes with the device; all ranks must call it."""
        values = distributed.mean_over_processes(torch.stack([total.float() for total in self.sums.values()]))
        means = dict(zip(self.sums, (values / self.steps).tolist(), strict=True))
        self.seconds = time.perf_counter() - self._began        # after the synchronization: all steps have ended
        return means

    @contextmanager
    def paused(self):
        """Leave the time inside out of `seconds`, except that `means` waits for the steps to end."""
        yield
        self._began = time.perf_counter() - self.seconds


class Interrupt:
    """SIGINT and SIGTERM set `signal`: the run ends after the current step. A second one raises KeyboardInterrupt."""

    def __init__(self):
        self.signal = None
        self._before = {}

    def _handle(self, number, frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _find_bank(config, dataset, place, state):
    """Return the metadata bank of the checkpoint `state`, or of the data set for a new run; None if unused."""
    if not config.metadata:
        return None
    if state is None:
        return metadata.find_bank(config, dataset, place.device)
    bank = metadata.Bank.from_state(state["metadata"])
    if not metadata.same_pictures(bank, config, dataset):
        say("note: the pictures have changed since this run's metadata were computed; it keeps the old metadata")
    return bank


def _restore(trainer, state, folders):
    """Resume from the checkpoint `state`, or start a new run if it is None; report which, and changed settings."""
    config = trainer.config
    if state is None:
        say(f"starting '{config.version}'; run the same command again to resume from the newest checkpoint")
        return
    trainer.restore(state)
    if distributed.is_first():
        moved = checkpoint.supersede_after(folders.models, trainer.step)
        if moved:
            say(f"later checkpoints ({', '.join(moved)}) moved to {folders.models / 'superseded'}")
            folders.supersede_records_after(trainer.step)
    distributed.barrier()
    say(f"resuming '{config.version}' from step {trainer.step}")
    for name, value in json.loads(as_json(config)).items():
        if name in RUN_SETTINGS and name in state["config"] and state["config"][name] != value:
            say(f"  --{name} is now {value}, was {state['config'][name]}")


def _summary(scalars):
    """Return the text of the progress bar: losses, gammas, GPU memory."""
    parts = [f"D {scalars['d_loss']:.3f} G {scalars['g_loss']:+.3f}"]
    if "gp" in scalars:
        parts.append(f"gp {scalars['gp']:.3f}")
    gammas = [f"{name[6:]} {value:+.3f}" for name, value in scalars.items() if name.startswith("gamma/")]
    if gammas:
        parts.append("gamma " + " ".join(gammas))
    if "gpu_memory_gib" in scalars:
        parts.append(f"{scalars['gpu_memory_gib']:.1f} GiB")
    return " | ".join(parts)
