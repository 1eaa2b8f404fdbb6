"""The training loop: steps, and at their intervals logs, sample grids, checkpoints and metrics.

A run ends at `--total_step`, where `--stop auto` says so, after the current step on SIGINT or SIGTERM, or with an error
when a loss or a weight is no longer finite. What comes before the first step is in start.py.
"""

import json
import math
import signal
from contextlib import contextmanager
from typing import NamedTuple

import torch

import utils
from data_loader import real_batches
from device import distributed, watch
from device.distributed import say
from device.loss_scale import LONGEST_STREAK
from errors import CheckpointError, NonFiniteError, UsageError, first_line, out_of_memory_on
from families import FAMILIES
from flags.values import written
from gallery import page
from generate.draw import BN_STATS_IMAGES
from parameter import RUN_SETTINGS, as_json, to_resume
from storage import checkpoint, score_table
from storage.boards import Wandb, is_shown
from storage.folders import step_name
from storage.journal import MetricsLog, Window, names_at
from training.measurements import Measurements
from training.recorder import LAST_PICTURE, Recorder

RECORD_IMAGES = 64          # to recompute batch-norm statistics on before a record; a checkpoint uses BN_STATS_IMAGES


class Due(NamedTuple):
    """The actions that are due after a step."""

    log: bool
    show: bool
    save: bool
    measure: bool
    stop: bool = False


def due_at(config, step):
    """Return what is due after `step` by interval; the last step logs, shows, saves, measures.

    A record has its line, too, as that holds its figures.
    """
    last = step == config.total_step
    log, show, save, measure = (every > 0 and (last or step % every == 0) for every in (
        config.log_step, config.sample_step, config.model_save_step, config.metric_step))
    return Due(log or show, show, save, measure)


def find_undone(config, folders, state):
    """Return (what is due after the step of the checkpoint `state` and is not on the disk, as the run was ended before;
    the saved state of its Window, None where its line is there).

    A state of None, and one later than the last step, have nothing undone.
    """
    if state is None or state["step"] > config.total_step:
        return Due(False, False, False, False), None
    step, unlogged = state["step"], Window.read_state(state.get("unlogged"))    # older checkpoints have none
    due, names = due_at(config, step), names_at(folders.logs, step)
    if unlogged and names & unlogged["sums"].keys():
        unlogged = None
    log = due.log and unlogged is not None
    # with its line, as that has figures of the record
    show = due.show and (log or not (folders.samples / step_name(step, LAST_PICTURE)).exists())
    return Due(log, show, save=False, measure=due.measure and "protocol" not in names), unlogged


class Run:
    """One training run: calls the `trainer` for steps; logs, shows, saves and measures into `folders`.

    `meter` computes the metrics of `--metric_step`, or is None; `undone` and `unlogged` are what `find_undone` found.
    """

    def __init__(self, trainer, meter, dataset, data, folders, interrupt, undone, unlogged):
        self.trainer, self.folders, self.interrupt = trainer, folders, interrupt
        self.dataset, self.data = dataset, data         # the pictures, and what a checkpoint keeps of which they are
        self.config, self.place, self.classes = trainer.config, trainer.place, trainer.latents.classes
        self.failing = set()                            # what `try_to` could not do the last time
        self.saved_step = self.first_step = trainer.step
        self.recorder = Recorder(trainer, dataset, folders)
        self.measurements = Measurements(trainer, meter, folders)
        self.stop_vote = distributed.StopVote()
        self.finite_until = trainer.step
        self.undone, self.unlogged = undone, unlogged
        self.said_done = False
        self.page = page.PageWriter(folders, self.config, self.classes and len(self.classes))
        self.ended = page.FAILED                        # what the page says in the end, without `stop` and `finish`

    def loop(self):
        """Train until the last step or a signal. Return the exit code."""
        trainer = self.trainer
        with self.interrupt.deferred(), self.opened(), self.saved_if_it_ends_early():
            # what was due after the checkpoint's step, and not done
            if any(self.undone):
                with self.window.paused():
                    self.report(self.undone, self.undone.log and self.window.means())
            while trainer.step < self.config.total_step and not self.has_ended():
                # one step; its statistics stay on the device
                self.window.add(trainer.train_step(self.batches))
                self.progress.update()
                due = self.due()
                if not any(due):
                    continue
                with self.window.paused():
                    # nothing that is not finite is saved, shown or logged
                    means = self.finite_means(due)
                    self.prepare_G_ema(due)
                    # the checkpoint first: what follows may fail
                    if due.save or due.stop:
                        self.save()
                    self.report(due, means)
                if due.stop and trainer.step < self.config.total_step or due.measure and self.stopped():
                    return self.stop()
            return self.finish()

    # ------------------------------------------------------------------------------------------ what is due, and when

    def due(self):
        """Return what is due after this step, by interval or signal."""
        return due_at(self.config, self.trainer.step)._replace(stop=self.stop_vote(self.interrupt.signal is not None))

    def stopped(self):
        """Return whether a signal arrived; always False with several processes: one would stop, the others wait."""
        return self.place.world_size == 1 and self.interrupt.signal is not None

    def finite_means(self, due):
        """Return {name: mean since the last log line} of the step's statistics. Synchronizes with the device.

        Raise NonFiniteError if one of them is not finite or, before a checkpoint, a weight is not.
        """
        trainer, means = self.trainer, self.window.means()
        wrong = [name for name, value in means.items() if not math.isfinite(value)]
        if (due.save or due.measure or due.stop) and not wrong and not trainer.is_finite():
            wrong = ["a weight, statistic or moment"]   # the step's losses were computed before its update
        # in fp16 an update that overflows is skipped
        stuck = [net for net, scale in trainer.loss_scales.items() if scale.is_stuck()]
        wrong += [f"the gradients of {' and '.join(stuck)} ({LONGEST_STREAK} times or more in a row)"] * bool(stuck)
        step = trainer.step
        if wrong:
            saved = checkpoint.steps_in(self.folders.models)
            newest = f"the checkpoint of step {saved[-1]} is good" if saved else "no checkpoint was written yet"
            raise NonFiniteError(f"{', '.join(wrong)} became NaN or infinite between steps {self.finite_until} and "
                                 f"{step}; {newest}.\nTry a lower --g_lr and --d_lr, or --sn both"
                                 + (", or --precision fp32." if trainer.is_fp16 else "."))
        self.finite_until = step
        return means

    def prepare_G_ema(self, due):
        """Recompute G_ema's batch-norm statistics, on fewer images for a record than for a checkpoint or metrics."""
        if due.save or due.measure or due.stop:
            self.trainer.recompute_bn_stats(BN_STATS_IMAGES)
        elif due.show:
            self.trainer.recompute_bn_stats(RECORD_IMAGES)

    # ------------------------------------------------------------------------------------------------- the actions

    def report(self, due, means):
        """Show, log and measure what is `due`; `means` of the step statistics are for the log."""
        if due.show:
            self.try_to("write samples and attention maps", self.show)
            self.show_on_boards()
        if due.log:
            self.log(means)
        if due.measure and not due.stop:
            self.measure()
        if due.show or due.measure:
            self.write_page()

    def show(self):
        """Write a record, on rank 0."""
        if distributed.is_first():
            self.recorder.write()

    def show_on_boards(self):
        """Give the record's pictures to TensorBoard and wandb; of a long run not those of all records."""
        config, step = self.config, self.trainer.step
        if not distributed.is_first() or not (config.use_tensorboard or config.wandb):
            return
        if step != config.total_step and not is_shown(-(-step // config.sample_step)):
            return
        pictures = page.pictures_at(self.folders, step)
        if self.metrics_log:
            self.try_to("write TensorBoard pictures", lambda: self.metrics_log.write_pictures(step, pictures))
        if self.wandb:
            self.wandb.write_pictures(step, pictures)

    def log(self, means):
        """Write a line to metrics.jsonl and update the text of the progress bar."""
        trainer, config, window = self.trainer, self.config, self.window
        gammas = FAMILIES[config.model].gammas(trainer.G, trainer.D)
        values = torch.cat(list(gammas.values())).tolist() if gammas else []        # one synchronization for all
        scalars = {
            **means, **{f"gamma/{layer}": value for layer, value in zip(gammas, values, strict=True)},
            **self.recorder.figures,
            "epoch": trainer.samples_seen / len(self.dataset),
            "sec_per_step": window.seconds / window.steps,
            "images_per_sec": config.batch_size * config.d_iters * window.steps / window.seconds,
        }
        for net, scale in trainer.loss_scales.items():
            scalars |= {f"loss_scale/{net}_{name}": value for name, value in scale.figures().items()}
        if self.place.device.type == "cuda":
            scalars["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.place.device) / 2**30
        if self.place.device.type == "mps":
            scalars["gpu_memory_gib"] = torch.mps.driver_allocated_memory() / 2**30
        self.recorder.health.watch(trainer.step, means)
        self.write_line(scalars)
        self.progress.set_postfix_str(_summary(scalars), refresh=False)
        self.recorder.figures = {}
        window.clear()

    def write_line(self, values):
        """Write a line of metrics.jsonl, and TensorBoard's events."""
        if distributed.is_first():
            self.try_to("write metrics.jsonl", lambda: self.open_log().write(self.trainer.step, values))
            if self.metrics_log:
                self.try_to("write TensorBoard events",
                            lambda: self.metrics_log.write_events(self.trainer.step, values))
            if self.wandb:
                self.wandb.write(self.trainer.step, values)

    def open_log(self):
        """Return the MetricsLog, opened at the first call that the disk allows."""
        if self.metrics_log is None:
            settings = {name: value if type(value) in (int, float) else written(value)
                        for name in RUN_SETTINGS if (value := getattr(self.config, name)) is not None}
            self.metrics_log = MetricsLog(self.folders.logs, self.config.use_tensorboard, self.first_step, settings)
        return self.metrics_log

    def state(self):
        """Return all that a checkpoint holds."""
        return {**self.trainer.state(), "data": self.data, "processes": self.place.world_size,
                "unlogged": self.window.state()}

    def save(self):
        """Write a checkpoint, on rank 0, and prune the old ones."""
        if distributed.is_first():
            with watch.not_ended():                     # the other ranks count on it from now on
                self.write_checkpoint()
        self.saved_step = self.trainer.step

    def write_checkpoint(self):
        """Write a checkpoint and prune the old ones, on this rank."""
        checkpoint.save(self.state(), self.folders.models)
        self.try_to("delete old checkpoints",
                    lambda: checkpoint.prune(self.folders.models, self.config.keep_checkpoints))

    def measure(self):
        """Compute the metrics of G_ema's samples; save best.pth if they are the best so far.

        Raise UsageError if they need more memory than there is.
        """
        try:
            scores = self.measurements.take(self.state, self.stopped)
        except (MemoryError, RuntimeError) as error:
            where = out_of_memory_on(error)
            if where is None:
                raise
            raise UsageError(f"out of memory on {where} while --metrics {written(self.config.metrics)} were computed, "
                             f"after step {self.trainer.step}.\nGive another --feature_net, fewer --metrics, or "
                             "--metric_step 0") from None
        if scores is None or not distributed.is_first():
            return
        step, config, standing = self.trainer.step, self.config, self.measurements.standing
        self.try_to("write scores.md", lambda: score_table.record(
            config.log_path, score_table.as_entries(config.version, step, scores)))
        for score in scores:
            self.write_line(score.line())               # the last thing: `find_undone` looks for it
        self.progress.write(f"step {step}: {', '.join(score_table.in_words(score.values) for score in scores)}")
        if standing.is_done(config) and config.stop == "never" and not self.said_done:
            self.progress.write(f"note: {standing.in_words()}; --stop auto ends such a run")
            self.said_done = True

    def has_ended(self):
        """Return whether `--stop auto` ends the run after this step."""
        return self.config.stop == "auto" and self.measurements.standing.is_done(self.config)

    def write_page(self, state=page.RUNNING):
        """Rewrite the run's page and the overview of all runs."""
        if distributed.is_first():
            self.try_to("write the page", lambda: self.page.write(state))

    def try_to(self, what, action):
        """Call an action that training can do without. A failure is announced once, until it succeeds again."""
        try:
            action()
        except Exception as error:                      # whatever a full disk, a font or a library may raise
            if what not in self.failing:
                reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else (
                    f"{type(error).__name__}: {first_line(error)}")
                say(f"warning: cannot {what} ({reason}); training continues, and it is tried again every time")
            self.failing.add(what)
        else:
            if what in self.failing:
                say(f"note: can {what} again")
            self.failing.discard(what)

    @contextmanager
    def saved_if_it_ends_early(self):
        """Whatever ends the run between two steps, such as a dead loader process: save first, then leave as it came.

        All ranks hold the same state: the first that meets it between two steps saves, whichever it is.
        """
        try:
            yield
        except (NonFiniteError, CheckpointError, KeyboardInterrupt):
            raise
        except BaseException:
            watch.take_over()
            trainer = self.trainer
            unsaved = trainer.is_whole and trainer.step > self.saved_step
            if unsaved and trainer.is_finite() and watch.claim(f"save step {trainer.step}"):
                trainer.recompute_bn_stats()
                self.window.stop_clock()
                self.write_checkpoint()
                say(f"step {trainer.step} is saved in {self.folders.models}", any_rank=True)
            raise

    def stop(self):
        """Save, where a measurement was broken off, and report the interruption. Return the exit code."""
        if self.saved_step < self.trainer.step:
            self.save()
        self.ended = page.INTERRUPTED
        self.progress.close()
        say(f"interrupted: step {self.trainer.step} is saved in {self.folders.models}; run "
            f"{to_resume(self.config)} again to resume")
        return 128 + (self.interrupt.signal or signal.SIGTERM)

    def finish(self):
        """Save where --stop auto ends the run, and report the end. Return the exit code."""
        if self.saved_step < self.trainer.step:
            self.save()
        self.ended = page.DONE
        self.progress.close()
        if self.has_ended():
            say(self.measurements.standing.in_words())
        say(f"done: {self.trainer.step} steps. Open {self.folders.samples / page.NAME} in a browser")
        return 0

    # ------------------------------------------------------------------------------------------- resources of the loop

    @contextmanager
    def opened(self):
        """Open the batches, the metrics log (rank 0 only, else None) and the progress bar; close them at the end."""
        config, trainer, first = self.config, self.trainer, distributed.is_first()
        self.batches = real_batches(config, self.dataset, trainer.samples_seen, self.place.device, self.place.rank,
                                    self.place.world_size, self.classes is not None)
        self.metrics_log = self.wandb = None
        self.progress = distributed.progress(config.total_step, "step", initial=trainer.step)
        try:
            if first:
                self.try_to("open metrics.jsonl", self.open_log)
                self.try_to("write config.json", lambda: utils.write_atomically(        # a checkpoint has it, too
                    self.folders.models / "config.json", lambda path: path.write_text(as_json(config))))
                self.try_to("write real.png", self.recorder.write_real)
                if config.wandb:
                    self.wandb = Wandb(self.folders.logs, config.version, json.loads(as_json(config)))
                self.write_page()                       # so that it can be opened, and follows the run, from now on
            self.window = Window(self.unlogged, self.place.device)
            yield
        finally:
            self.progress.close()
            self.batches.close()
            if self.metrics_log:
                self.metrics_log.close()
            self.write_page(self.ended)
            if self.wandb:
                self.wandb.close(failed=self.ended == page.FAILED)


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
